"""What tuning a person's code on a few photos brings: python -m benchmarks.personalize_gain --data DATA --embedder FILE.onnx --people 20

Of each test person's pictures the last is held out, the others are enrolled in three ways: the first alone, the mean of all codes, and
`pidiff-train personalize`; with `--rank`, also with keys and values. The same prompts and seeds are then drawn with each, and compared with the held-out picture and with
what the prompt named; intervals are over people, also of the differences.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pidiff.data.factors import caption
from pidiff.data.people import load_people
from pidiff.evaluate import metrics
from pidiff.evaluate.generators import BundleGenerator
from pidiff.evaluate.protocol import prompt_factors
from pidiff.evaluate.readers import FactorReader, FaceTools
from pidiff.evaluate.subjects import SIZE
from pidiff.model import load_model
from pidiff.runtime.identity import Identity
from pidiff.train.personalize import PersonalizeOptions, Photos, tuned

SCORES = ("similarity_held_out", "background", "style", "expression", "pose")


def draw_and_score(generator, tools, factors, person, held_out, prompts: range) -> dict[str, float]:
    """Mean scores over the prompts; held_out is a unit embedding [D]."""
    rows = []
    for prompt in prompts:
        wanted = prompt_factors(prompt, prompt)
        image = generator.generate(person, caption(wanted), seed=100 * prompt)[0]
        rows.append({"similarity_held_out": metrics.similarity(tools.embed(image), held_out), **factors.correct(image, tools.mask(image), wanted)})
    with np.errstate(all="ignore"):
        return {name: float(np.nanmean([r[name] for r in rows])) if any(np.isfinite(r[name]) for r in rows) else float("nan") for name in SCORES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--embedder", type=Path, required=True)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=PersonalizeOptions.steps)
    parser.add_argument("--learning-rate", type=float, default=PersonalizeOptions.learning_rate)
    parser.add_argument("--rank", type=int, default=PersonalizeOptions.rank)
    parser.add_argument("--rank-learning-rate", type=float, default=PersonalizeOptions.rank_learning_rate)
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="people to try on (default: test)")
    parser.add_argument("--out", type=Path, help="JSON file for the scores")
    args = parser.parse_args()
    tools, generator = FaceTools(args.embedder), BundleGenerator(args.bundle, "onnxruntime", None, None)
    known = load_people(args.data, SIZE, "validation", limit=300)
    factors = FactorReader(tools, known, list(known.images[::3]))
    people, model = load_people(args.data, SIZE, args.split), load_model(generator.pipeline.bundle.path)
    groups = [i for i in people.variants().values() if len(i) > 2][:args.people]
    scores: dict[str, list[dict]] = {"one photo": [], "mean code": [], "personalized": [], **({"with keys and values": []} if args.rank else {})}
    seconds = []
    for index in tqdm(groups, desc="people", disable=None):
        held_out = tools.embed(people.images[index[-1]])
        if held_out is None:
            continue
        photos = Photos.read(generator.pipeline, [people.images[i] for i in index[:-1]])
        started = time.perf_counter()
        options = PersonalizeOptions(args.steps, learning_rate=args.learning_rate, rank=args.rank, rank_learning_rate=args.rank_learning_rate)
        people_of_ways = [Identity(photos.codes[0]), Identity(photos.codes.mean(0)), tuned(model, photos, dataclasses.replace(options, rank=0))]
        seconds.append(time.perf_counter() - started)
        if args.rank:
            people_of_ways.append(tuned(model, photos, options, generator.pipeline.bundle.adapter_id()))
        for way, person in zip(scores, people_of_ways):
            scores[way].append(draw_and_score(generator, tools, factors, person, held_out, range(args.prompts)))
    print(report(scores, seconds, args.out))


def report(scores: dict[str, list[dict]], seconds: list[float], out: Path | None) -> str:
    rng, names = np.random.default_rng(0), np.arange(len(seconds))
    lines = ["| enrolled from | " + " | ".join(SCORES) + " |", "|---" * (len(SCORES) + 1) + "|"]
    for way, rows in scores.items():
        cells = [metrics.interval([r[name] for r in rows], names, rng) for name in SCORES]
        lines.append(f"| {way} | " + " | ".join("-" if c["mean"] is None else f"{c['mean']:.3f} ({c['low']:.3f} - {c['high']:.3f})" for c in cells) + " |")
    for way in (way for way in scores if way != "personalized"):
        gain = metrics.interval([a[SCORES[0]] - b[SCORES[0]] for a, b in zip(scores["personalized"], scores[way])], names, rng)
        lines.append(f"\npersonalized - {way}: {gain['mean']:+.3f} ({gain['low']:+.3f} - {gain['high']:+.3f})")
    lines.append(f"\n{np.median(seconds):.1f} s of tuning a person (median), {len(seconds)} people")
    if out is not None:
        out.write_text(json.dumps({"scores": scores, "seconds": seconds}, indent=1) + "\n")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
