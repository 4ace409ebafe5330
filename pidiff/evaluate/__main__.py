"""pidiff-evaluate: identity, prompt and background of a bundle or checkpoint, on people it was not trained on."""

import argparse
import sys
from pathlib import Path

import numpy as np

from pidiff.runtime.presets import PRESETS

DESCRIPTION = """\
Evaluate a model on people it was not trained on.

  pidiff-evaluate --data DATA --embedder FILE.onnx --people 50 --prompts 4 --seeds 1 --out REPORT
  pidiff-evaluate --bundle DIR --engine onnxruntime ...      a bundle on an engine (default: the shipped mini)
  pidiff-evaluate --checkpoint DIR ...                       a model folder in PyTorch

DATA is a folder that `pidiff-data` wrote (its test people are taken), or one with a sub-folder of two or more photos per
person. FILE.onnx is any face-recognition network that takes [1, 3, 112, 112] in [-1, 1] aligned to ArcFace's template; it
must not have been used in training. REPORT gets summary.json, scores.csv, report.md and plots."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("pidiff-evaluate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bundle", type=Path, help="bundle folder (default: the shipped mini)")
    source.add_argument("--checkpoint", type=Path, help="model folder, run in PyTorch")
    parser.add_argument("--require-signature", metavar="KEY.pub", type=Path, help="use the bundle only if it is signed by this key")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--embedder", type=Path, required=True)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--curve-people", type=int, default=0, help="people for the operating curves of id_scale x id_start")
    parser.add_argument("--curve-starts", type=float, nargs="+", default=(0.0, 0.2, 0.4), metavar="START", help="values of id_start in the curves (default: 0 0.2 0.4)")
    parser.add_argument("--pairs", type=int, default=0, help="pictures with two people, for the leakage between them")
    parser.add_argument("--edits", type=int, default=0, help="people who are edited along pose, smile and age (needs exact codes in DATA)")
    parser.add_argument("--steps", type=int, help="default: the bundle's own (a checkpoint's too, if it is one), or 20")
    parser.add_argument("--guidance-scale", type=float, help="default: likewise, or 3")
    parser.add_argument("--preset", choices=PRESETS, default="exact", help="of pidiff-generate, for bundles")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    for name, least in (("people", 2), ("prompts", 1), ("seeds", 1), ("curve_people", 0), ("pairs", 0), ("edits", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not all(0 <= start <= 1 for start in args.curve_starts):
        raise ValueError(f"--curve-starts must be in [0, 1], got {args.curve_starts}")
    if args.checkpoint and args.require_signature:
        raise ValueError(f"--require-signature must be given for a bundle, which has a signature, got --checkpoint {args.checkpoint}")
    if args.checkpoint and args.preset != "exact":
        raise ValueError(f"--preset must be exact for a checkpoint, got {args.preset}")
    if not args.embedder.is_file():
        raise ValueError(f"embedder must be an ONNX file, got {args.embedder}")
    return args


def make_generator(args, tools):
    from pidiff.runtime.faces import FaceReader

    from .generators import BundleGenerator, CheckpointGenerator
    if args.checkpoint is None:
        return BundleGenerator(args.bundle, args.engine, args.steps, args.guidance_scale, args.require_signature, args.preset)
    return CheckpointGenerator(args.checkpoint, args.steps, args.guidance_scale, lambda size: FaceReader(tools.pipeline._graph, size))


def reader_ceilings(factors, directions, subjects, data: Path) -> dict:
    """Accuracy of the factor readers on real pictures of the evaluated people: what generated pictures can reach at most."""
    from ..data.factors import STYLES, apply_style
    from ..data.people import load_people
    from .readers import face_shape, style_features
    styles = [factors.style(style_features(apply_style(s.reference, style))) == style for s in subjects for style in STYLES]
    ceilings = {"style_reader_on_photos": round(float(np.mean(styles)), 4)}
    if factors.shapes:
        real = load_people(data, subjects[0].reference.shape[0], "test", limit=3 * len(subjects))
        for name, reader in factors.shapes.items():
            points = [(factors.tools.landmarks(real.images[i]), getattr(real.factors(i), name)) for i in range(len(real))]
            right = [p is not None and reader(face_shape(p)) == label for p, label in points if label is not None]
            ceilings[f"{name}_reader_on_photos"] = round(float(np.mean(right)), 4)
        if directions is not None:
            ceilings |= directions.correlations(real)
    return ceilings


def inversion_ceiling(evaluation, tools, rng) -> dict:
    """Likeness of StyleGAN's own picture of the encoder's code, where `random-face` and what it needs are installed; else nothing."""
    from . import metrics
    from .report import FALSE_MATCH_RATES
    try:
        from ..data.synth import Generator
        generator = Generator()
    except (ImportError, ValueError):
        return {}
    vectors = [tools.embed(generator.image(np.asarray(getattr(person, "w_plus", person))[0])) for _, person, *_ in evaluation.people]
    names = [p[0].name for p in evaluation.people]
    likeness = np.array([metrics.similarity(v, p[2]) for v, p in zip(vectors, evaluation.people)])
    limit = metrics.threshold(evaluation.impostor, FALSE_MATCH_RATES[0])
    return {"inversion_similarity": metrics.interval(likeness, names, rng),
            "inversion_verification_rate": metrics.interval((likeness > limit).astype(float), names, rng),
            "inversion_rank1": metrics.interval([metrics.rank1(v, evaluation.gallery, i) for i, v in enumerate(vectors)], names, rng)}


def evaluate(args) -> None:
    from . import report
    from .edits import DirectionReader
    from .groups import apparent_groups
    from .protocol import Evaluation
    from .readers import FactorReader, FaceTools
    from .subjects import load_subjects
    subjects, known = load_subjects(args.data, args.people)
    if args.edits and known is None:
        raise ValueError(f"--edits must be 0 for data without exact codes, got {args.edits}")
    tools = FaceTools(args.embedder)
    pictures = list(known.images[::3]) if known is not None else [s.other for s in subjects]
    generator = make_generator(args, tools)
    factors = FactorReader(tools, known, pictures)
    evaluation = Evaluation(generator, subjects, tools, factors)
    reader = DirectionReader(tools, known) if args.edits else None
    evaluation.run(args.prompts, args.seeds, args.curve_people, args.pairs, args.edits, reader, args.curve_starts)
    ceilings = reader_ceilings(factors, reader, subjects, args.data) | inversion_ceiling(evaluation, tools, np.random.default_rng(0))
    settings = {"model": generator.name, "prompts": args.prompts, "seeds": args.seeds, **generator.settings}
    summary = report.summarise(evaluation, ceilings, settings, apparent_groups(evaluation, known))
    report.write(args.out, evaluation, summary)
    print(report.markdown(summary))


def main(argv: list[str] | None = None) -> int:
    from pidiff.runtime.errors import PidiffError

    try:
        evaluate(parse(argv))
    except (ValueError, OSError, PidiffError) as error:
        print(f"pidiff-evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pidiff-evaluate: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
