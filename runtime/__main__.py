"""Command line: `pidiff-generate` and `pidiff-enroll` (also `python -m pidiff.runtime generate|enroll ...`).

Exit codes: 0 done, 1 something was wrong (one sentence on stderr), 2 wrong usage, 130 stopped with Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from .errors import PidiffError
from .files import check_writable, reason


def generate(argv=None):
    """Entry point of `pidiff-generate`; returns the exit code."""
    return _guard("pidiff-generate", _generate_parser, _generate, argv)


def enroll(argv=None):
    """Entry point of `pidiff-enroll`; returns the exit code."""
    return _guard("pidiff-enroll", _enroll_parser, _enroll, argv)


def _generate_parser():
    from .engines import PRECISIONS
    from .presets import PRESETS
    from .schedule import SOLVERS

    parser = argparse.ArgumentParser(prog="pidiff-generate", description="Make a picture of the person in a photo.")
    parser.add_argument("--face", action="append", required=True, metavar="PHOTO",
                        help="photo (PNG, JPEG, WebP) or file written by pidiff-enroll; repeat for several people")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    parser.add_argument("--out", required=True, metavar="OUT.png", help="picture to write; several become OUT-1.png, ...")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to avoid")
    _common(parser)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="full computes in no fewer bits than the bundle was exported in; auto (default) lets openvino "
                             "run UNet and VAE decoder, and onnxruntime the UNet's long self-attention, in bfloat16 where "
                             "the processor has it")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same picture (default: random)")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures, with seeds SEED, SEED+1, ...")
    parser.add_argument("--preset", choices=PRESETS, default="exact",
                        help="exact (default), balanced or fast; what you set yourself comes before the preset")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the bundle's, usually 20)")
    parser.add_argument("--scheduler", choices=SOLVERS, help="solver (default: the bundle's, usually dpmpp_2m)")
    parser.add_argument("--eta", type=float, metavar="X", help="with tcd: how random its steps are, 0 to 1 (default: the bundle's, usually 0.3)")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="how strictly to follow the prompt; 1 or 0 = off")
    parser.add_argument("--guidance-interval", type=_numbers(2), metavar="START,END",
                        help="part of the steps with guidance, 0 to 1; the others cost half (default: 0,1)")
    parser.add_argument("--cache-interval", type=int, metavar="N",
                        help="run the whole UNet every N-th step and its outermost layers in the others (default: 1, off)")
    parser.add_argument("--id-scale", type=float, default=1.0, metavar="X", help="strength of the identity; 0 = base model")
    parser.add_argument("--id-start", type=float, metavar="X",
                        help="part of the steps, from the start, without the identity, 0 to 1 (default: 0)")
    parser.add_argument("--level-scale", type=_numbers(4), default=(1.0,) * 4, metavar="C,M,F,F",
                        help="strength of the W+ levels: coarse, middle, fine, finest")
    parser.add_argument("--edit", type=_edit, action="append", default=[], metavar="NAME=X",
                        help="move the person along a direction of the bundle, e.g. smile=1.5 (standard deviations)")
    parser.add_argument("--region", type=_numbers(4), action="append", metavar="X0,Y0,X1,Y1",
                        help="where the person may appear, in fractions of the picture; one per --face, in order")
    for name in ("height", "width"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="pixels (default: the model's own; others where the bundle takes any size)")
    parser.add_argument("--tiled-decode", action="store_true", default=None,
                        help="decode in tiles that overlap, for less memory (by itself where --max-memory asks for it)")
    parser.add_argument("--map", metavar="FILE.png", help="also write where the identity was read, as a heat map")
    return parser


def _enroll_parser():
    parser = argparse.ArgumentParser(prog="pidiff-enroll", description="Write a small file of the person in a photo.")
    parser.add_argument("photo", metavar="PHOTO", help="PNG, JPEG or WebP")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="file to write")
    parser.add_argument("--save-face", metavar="FILE.png", help="also write the aligned face without its background")
    _common(parser)
    return parser


def _common(parser):
    from .engines import AUTO, ENGINES

    parser.add_argument("--bundle", metavar="DIR", help="bundle made by pidiff-export (default: the shipped mini)")
    parser.add_argument("--require-signature", metavar="KEY.pub", help="use the bundle only if it is signed by this key")
    parser.add_argument("--engine", default=AUTO, metavar="NAME",
                        help=f"one of {', '.join(ENGINES)}, or auto (default): engines in the bundle that run on the GPU here; "
                             "openvino where it is installed, on x86-64 processors, for bundles of 512 MiB and more; else "
                             "onnxruntime")
    parser.add_argument("--max-memory", type=_size, metavar="SIZE",
                        help="memory that this process shall not exceed, such as 800M, or where a GPU draws its part of the GPU's memory; "
                             "work that does not fit is refused")
    parser.add_argument("--threads", type=int, metavar="N", help="cores to use (default: all)")
    parser.add_argument("--largest-face", action="store_true", help="take the largest face of a photo with several")
    parser.add_argument("--json", action="store_true", help="print seconds per stage, engine and seed as JSON")


def _generate(args):
    begun = time.perf_counter()
    if Path(args.out).suffix.lower() != ".png":
        raise PidiffError(f"--out must end in .png, got {args.out}")
    _check_outputs(args.out, args.map)
    if args.region is not None and len(args.region) != len(args.face):
        raise PidiffError(f"--region must be given once per --face, {len(args.face)} times, got {len(args.region)}")
    pipeline, seconds = _open(args, args.device, args.precision)
    people = [_person(pipeline, face, _select(args)) for face in args.face]
    seconds.update(pipeline.seconds)
    result = pipeline.generate(
        people, args.prompt, args.negative_prompt, preset=args.preset, num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale, guidance_interval=args.guidance_interval, cache_interval=args.cache_interval,
        id_scale=args.id_scale, id_start=args.id_start, level_scale=args.level_scale, id_mask=args.region, seed=args.seed,
        num_images=args.num_images, scheduler=args.scheduler, eta=args.eta, edits=dict(args.edit), height=args.height, width=args.width,
        tiled_decode=args.tiled_decode,
        progress=sys.stderr.isatty() and not args.json)
    _add(seconds, result.seconds)
    if args.map and result.identity_map is None:
        raise PidiffError("--map must be used with an identity and a bundle that gives identity maps, got none")
    paths = result.save(args.out, args.map)
    seconds["total"] = time.perf_counter() - begun
    _report(args, seconds, out=[str(p) for p in paths], bundle=pipeline.bundle.manifest.name, engine=result.engine,
            device=result.device, precision=pipeline.precision, seed=result.seeds[0], seeds=result.seeds,
            scheduler=result.scheduler, num_inference_steps=result.num_inference_steps, guidance_scale=result.guidance_scale)


def _enroll(args):
    from .files import write_all
    from .images import encode_png

    begun = time.perf_counter()
    _check_outputs(args.out, args.save_face)
    pipeline, seconds = _open(args)
    identity = pipeline.enroll(args.photo, _select(args))
    files = {args.out: identity.to_bytes()}
    if args.save_face:
        files[args.save_face] = encode_png(identity.face)
    write_all(files)
    seconds.update(pipeline.seconds, total=time.perf_counter() - begun)
    _report(args, seconds, out=list(files), bundle=pipeline.bundle.manifest.name, engine=pipeline.engine)


def _check_outputs(*paths):
    """Refuse before the work what could not be written after it."""
    paths = [Path(p) for p in paths if p]
    for path in paths:
        check_writable(path)
    if len({p.absolute() for p in paths}) != len(paths):
        raise PidiffError(f"output files must be different, got {paths[0]} twice")


def _open(args, device="cpu", precision="auto"):
    from .pipeline import Pipeline

    begun = time.perf_counter()
    pipeline = Pipeline.from_bundle(args.bundle, args.engine, device, args.threads, precision=precision,
                                    keep=False, max_memory=args.max_memory, require_signature=args.require_signature)
    return pipeline, {"open": time.perf_counter() - begun}


def _select(args):
    return "largest" if args.largest_face else "only"


def _person(pipeline, path, select):
    from .identity import Identity

    if Path(path).suffix.lower() == ".safetensors":
        return Identity.load(path)
    return pipeline.enroll(path, select)


def _add(seconds, more):
    for stage, spent in more.items():
        seconds[stage] = seconds.get(stage, 0.0) + spent


def _report(args, seconds, out, **facts):
    if args.json:
        facts["seconds"] = {k: round(v, 4) for k, v in seconds.items()}
        print(json.dumps({"out": out, **facts}))
    else:
        seed = f" (seed {facts['seed']})" if "seed" in facts else ""
        print(f"{', '.join(out)}{seed} in {seconds['total']:.1f} s")


def _numbers(count):
    def parse(text):
        values = tuple(float(part) for part in text.split(","))
        if len(values) != count:
            raise ValueError
        return values

    parse.__name__ = f"{count} numbers"  # argparse puts it in its sentence
    return parse


def _size(text):
    from .memory import parse_size

    return parse_size(text)


_size.__name__ = "size"  # argparse puts it in its sentence


def _edit(text):
    name, _, strength = text.partition("=")
    return name.strip(), float(strength)


_edit.__name__ = "NAME=X"


def _guard(program, make_parser, work, argv):
    """Run `work` and turn whatever goes wrong into one sentence and an exit code.

    Heavy modules are imported inside, so that a Ctrl-C during the imports is caught as well.
    """
    try:
        with contextlib.suppress(ValueError):  # raised outside the main thread, where the caller owns the signals
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary files are removed on the way out
        warnings.showwarning = lambda message, *_, **__: print(f"{program}: warning: {message}", file=sys.stderr)
        work(make_parser().parse_args(argv))
        return 0
    except KeyboardInterrupt:
        return _fail(program, "stopped", 130)
    except PidiffError as e:
        return _fail(program, str(e))
    except MemoryError:
        return _fail(program, "memory must be enough for this model and number of pictures, got none left")
    except OSError as e:
        return _fail(program, f"{e.filename or 'a file'} must be usable, got: {reason(e)}")
    except Exception as e:
        if os.environ.get("PIDIFF_TRACEBACK"):
            raise
        return _fail(program, f"unexpected {type(e).__name__}: {e} (PIDIFF_TRACEBACK=1 shows where)")


def _fail(program, sentence, code=1):
    print(f"{program}: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def main():
    commands = {"generate": generate, "enroll": enroll}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(f"usage: python -m pidiff.runtime {{{','.join(commands)}}} ...", file=sys.stderr)
        return 2
    return commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
