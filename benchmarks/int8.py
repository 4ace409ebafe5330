"""An int8 bundle beside the float one that it was made of: size, time of a UNet call, and, with data, identity and prompt.

    python -m benchmarks.int8 INT8 [--float DIR] [--data DATA --embedder FILE.onnx --people 100 --prompts 4]

Bundles and engines take turns on the same inputs, so that a busy moment meets all of them; medians over the calls. Processor
time counts what this process used; with `--threads 1` other work on the machine touches it least. Both draw every person with
the same prompts and seed, so the differences are paired: mean, and 95 % bootstrap interval over people. DATA and FILE.onnx are
pidiff-evaluate's, and so are the prompts, its first ones, and who reads whether background, style, expression and pose are what a
prompt names; `prompt` is how much of all that is right.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.presets import Scores, psnr
from pidiff.data.factors import caption
from pidiff.evaluate.metrics import interval, rank1, similarity
from pidiff.evaluate.protocol import prompt_factors
from pidiff.runtime import Pipeline
from pidiff.runtime.bundle import Bundle, shipped_bundle
from pidiff.runtime.engines import bind_new, load_engine

ENGINES = {"onnxruntime": ("onnxruntime", "full"), "openvino, full": ("openvino", "full"), "openvino, auto": ("openvino", "auto")}
NAMED = ("background", "style", "expression", "pose")
LIMITS = {"similarity": 0.01, "prompt": 0.01}


def unet_inputs(bundle: Bundle, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One guided call of one person; values do not matter for time, so they are small ones."""
    sizes = {"B": 2, "P": 1, "h": bundle.manifest.model.latent_shape[1], "w": bundle.manifest.model.latent_shape[2]}
    return {t.name: 0.1 * rng.standard_normal([sizes.get(n, n) for n in t.shape]).astype(t.dtype) for t in bundle.graph("unet").inputs}


def times(bundles: dict[str, Bundle], threads: int, rounds: int) -> None:
    inputs = unet_inputs(bundles["float"], np.random.default_rng(0))
    for label, (name, precision) in ENGINES.items():
        if importlib.util.find_spec(name) is None:
            continue
        loaded, found = {}, {form: [] for form in bundles}
        for form, bundle in bundles.items():
            spec = bundle.graph("unet")
            loaded[form] = load_engine(name)(bundle.file(spec.file), spec, threads=threads, static=True, precision=precision,
                                             fused=bundle.manifest.attention == "fused")
            bind_new(loaded[form], inputs)
            loaded[form].run()
        for _ in range(rounds):
            for form, engine in loaded.items():
                begun = time.process_time()
                engine.run()
                found[form].append(time.process_time() - begun)
        a, b = (statistics.median(found[form]) for form in ("float", "int8"))
        print(f"{label:<16} processor ms of a UNet call: float {1e3 * a:.1f}, int8 {1e3 * b:.1f}, ratio {a / b:.2f}", flush=True)


def quality(bundles: dict[str, Bundle], data: Path, embedder: Path, people: int, prompts: int, threads: int) -> None:
    from tqdm import tqdm

    scores = Scores(data, embedder, people, shapes=True)
    pipelines = {form: Pipeline(bundle, "onnxruntime", threads=threads) for form, bundle in bundles.items()}
    references = [scores.tools.embed(s.reference) for s in scores.subjects]
    gallery = np.stack([v for v in references if v is not None])
    keys = ("similarity", "rank1", "prompt", *NAMED)
    found, change, names, row = {form: {k: [] for k in keys} for form in bundles}, [], [], -1
    for i, subject in enumerate(tqdm(scores.subjects, disable=None)):
        if references[i] is None:
            continue
        person, row = pipelines["float"].enroll(subject.reference), row + 1
        for prompt in range(prompts):
            wanted, pictures = prompt_factors(prompt, i), {}
            for form, pipeline in pipelines.items():
                image = pictures[form] = pipeline.generate(person, caption(wanted), seed=0).images[0]
                vector = scores.tools.embed(image)
                found[form]["similarity"].append(similarity(vector, references[i]))
                found[form]["rank1"].append(rank1(vector, gallery, row))
                read = scores.factors.correct(image, scores.tools.mask(image), wanted)
                for name in NAMED:
                    found[form][name].append(read[name])
                found[form]["prompt"].append(float(np.nanmean([read[name] for name in NAMED])))
            change.append(psnr(pictures["float"], pictures["int8"]))
            names.append(subject.name)
    print(f"{row + 1} people, {prompts} prompts each, PSNR of int8 against float {statistics.median(change):.1f} dB (median)")
    for key in keys:
        a, b = (np.array(found[form][key], float) for form in ("float", "int8"))
        if np.isfinite(a).any():
            verdict = "" if key not in LIMITS else ", accepted" if abs(np.nanmean(b - a)) <= LIMITS[key] else ", NOT accepted"
            print(f"{key}: float {np.nanmean(a):.4f}, int8 {np.nanmean(b):.4f}, difference {interval(b - a, names, np.random.default_rng(0))}{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("int8", type=Path)
    parser.add_argument("--float", type=Path, default=shipped_bundle(), help="default: the shipped mini")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--embedder", type=Path)
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    bundles = {"float": Bundle.open(args.float), "int8": Bundle.open(args.int8)}
    for form, bundle in bundles.items():
        files = bundle.manifest.files
        print(f"{form}: {sum(f.size for f in files.values()) / 2**20:.1f} MiB, of which UNet weights "
              f"{sum(f.size for k, f in files.items() if k.startswith('unet/')) / 2**20:.1f}")
    if args.rounds:
        times(bundles, args.threads, args.rounds)
    if args.data:
        quality(bundles, args.data, args.embedder, args.people, args.prompts, args.threads)


if __name__ == "__main__":
    main()
