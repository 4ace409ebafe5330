"""What each preset costs: time and change of the picture, and, with data, identity and prompt.

    python -m benchmarks.presets [--bundle DIR] [--data DATA --embedder FILE.onnx]

Presets take turns on the same person, prompt and seed, so that a busy moment meets all of them; medians over the pictures.
Processor seconds count what this process used, on all threads: with `--threads 1` other work on the machine touches them least.
Every picture is checked (size, not flat), `exact` against the defaults bit for bit. Change: PSNR against `exact`. DATA and
FILE.onnx are pidiff-evaluate's; without them one shipped photo is drawn. `--try NAME=VALUE ...` adds a row with options of
`Pipeline.generate`.
"""

import argparse
import ast
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from pidiff.data.factors import caption
from pidiff.evaluate.protocol import prompt_factors
from pidiff.runtime import Pipeline
from pidiff.runtime.images import read_image
from pidiff.runtime.presets import PRESETS

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "person-1.jpg"


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two uint8 pictures, in dB."""
    error = np.square(a.astype(np.float64) - b).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


class Scores:
    """Identity similarity to the reference and background accuracy, by pidiff-evaluate's readers; shapes: `factors` reads expression and pose, too."""

    def __init__(self, data: Path, embedder: Path, people: int, shapes: bool = False):
        from pidiff.evaluate.readers import FaceTools, FactorReader
        from pidiff.evaluate.subjects import load_subjects

        self.subjects, known = load_subjects(data, people)
        self.tools = FaceTools(embedder)
        self.factors = FactorReader(self.tools, known if shapes else None, list(known.images[::3]) if known is not None else [s.other for s in self.subjects])

    def __call__(self, image: np.ndarray, reference: np.ndarray, wanted) -> tuple[float, float]:
        from pidiff.evaluate.metrics import similarity

        found = similarity(self.tools.embed(image), self.tools.embed(reference))
        return found, self.factors.correct(image, self.tools.mask(image), wanted)["background"]


def measure(pipeline: Pipeline, photos: list[np.ndarray], rows: dict[str, dict], rounds: int, scores: Scores | None) -> dict[str, dict]:
    """Row name -> lists of seconds, cpu, psnr, similarity, background; `rounds` pictures of every photo and row."""
    found = {name: {k: [] for k in ("seconds", "cpu", "psnr", "similarity", "background")} for name in rows}
    side = pipeline.bundle.manifest.model.image_size
    for i, photo in enumerate(photos):
        person, wanted = pipeline.enroll(photo, "largest"), prompt_factors(0, i)
        for seed in range(rounds):
            pictures = {}
            for name, options in rows.items():
                begun, used = time.perf_counter(), time.process_time()
                pictures[name] = pipeline.generate(person, caption(wanted), seed=seed, **options).images[0]
                if i or seed:               # the first round loads and compiles
                    found[name]["seconds"].append(time.perf_counter() - begun)
                    found[name]["cpu"].append(time.process_time() - used)
                if pictures[name].shape != (side, side, 3) or pictures[name].std() < 1:
                    raise SystemExit(f"presets: {name} must draw a picture of {side} pixels, got {pictures[name].shape}")
            if not i and not seed and not np.array_equal(pictures["exact"], pipeline.generate(person, caption(wanted), seed=seed).images[0]):
                raise SystemExit("presets: exact must be the defaults bit for bit, got another picture")
            for name, picture in pictures.items():
                found[name]["psnr"].append(psnr(picture, pictures["exact"]))
                if scores:
                    likeness, background = scores(picture, photo, wanted)
                    found[name]["similarity"].append(likeness)
                    found[name]["background"].append(background)
    return found


def table(found: dict[str, dict]) -> str:
    exact = {k: statistics.median(found["exact"][k]) for k in ("seconds", "cpu")}
    lines = ["| preset | s a picture | times faster | processor s | times less | PSNR to exact, median (lowest) | similarity | background |",
             "|---|---|---|---|---|---|---|---|"]
    for name, row in found.items():
        change, times = row["psnr"], []
        for key in exact:
            middle = statistics.median(row[key])
            times += [f"{middle:.3f}", f"{exact[key] / middle:.2f}"]
        means = [f"{np.nanmean(row[k]):.3f}" if row[k] else "" for k in ("similarity", "background")]
        same = "same" if min(change) == float("inf") else f"{statistics.median(change):.1f} ({min(change):.1f})"
        lines.append(f"| {' | '.join([name, *times, same, *means])} |")
    return "\n".join(lines)


def parse_try(text: str) -> tuple[str, dict]:
    pairs = [part.partition("=") for part in text.split()]
    return text, {k: v if v in PRESETS or v.isidentifier() else ast.literal_eval(v) for k, _, v in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the shipped mini")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="pictures of every person and row")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--embedder", type=Path)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--try", dest="tries", type=parse_try, action="append", default=[], metavar="'NAME=VALUE ...'")
    args = parser.parse_args()
    if (args.data is None) != (args.embedder is None):
        parser.error("--data and --embedder must be given together")
    pipeline = Pipeline.from_bundle(args.bundle, engine=args.engine, threads=args.threads)
    scores = Scores(args.data, args.embedder, args.people) if args.data else None
    photos = [s.reference for s in scores.subjects] if scores else [read_image(PHOTO)]
    rows = {name: {"preset": name} for name in PRESETS} | dict(args.tries)
    print("python -m benchmarks.presets", *sys.argv[1:])
    print(f"{pipeline.bundle.manifest.name} on {pipeline.engine}, {len(photos)} people, {args.rounds} pictures each")
    print(table(measure(pipeline, photos, rows, args.rounds, scores)))


if __name__ == "__main__":
    main()
