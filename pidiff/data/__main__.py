"""pidiff-data: make training data."""

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Make training data for `pidiff-train`.

  pidiff-data synth --out DATA --people 2000      synthetic people (needs: pip install --no-deps random-face, and openvino)
  pidiff-data draft --out MORE --like DATA --people 47000      many more people, one picture each, six times faster
  pidiff-data photos PHOTOS --out DATA --size 512 real photos: a folder (sub-folder = person) and WebDataset shards in it
  pidiff-data preview --data DATA --out SHEET.png composed training pictures with their captions

Of synthetic people DATA then holds faces-*.tar (pictures and masks), manifest.csv and latents.npz; a picture takes about half
a second on two CPU cores. A stopped run goes on when repeated. People whose number ends in 9 are for tests, in 8 for
validation.

PHOTOS may hold NAME.txt (a caption) and NAME.mask.png (white = person) beside NAME.jpg; *.tar are WebDataset shards of such files.
The largest face of each photo is found and cut out for the W+ encoder; photos without a face, or too small, are left out and
counted. Pictures are squares around the face, or with --aligned the face as FFHQ cuts it (what `mini` draws; those without a
caption get new backgrounds and styles, and captions that name them)."""


def synth(args) -> None:
    from ..checkpoint import load_strict, read_tensors
    from ..matting import FaceMatting
    from ..model import shipped_mini
    from .synth import synthesise
    model = args.model or shipped_mini()
    if args.require_signature:
        from .prepare import check_signed
        check_signed(model, args.require_signature)
    matting = load_strict(FaceMatting(), read_tensors(model / "face_matting" / "model.safetensors"), "face_matting").eval()
    directions = {k: v.mean(0).numpy() for k, v in read_tensors(model / "directions.safetensors").items()}
    synthesise(args.out, args.people, args.variants, args.size, args.seed, matting, directions)


def draft(args) -> None:
    from .draft import draft as draw_people
    draw_people(args.out, args.like, args.people, args.seed, args.device)


def photos(args) -> None:
    from .prepare import prepare
    total, left_out = prepare(args.out, args.photos, args.size, args.aligned, args.bundle, args.require_signature)
    print(f"{total} pictures in {args.out}, {left_out.total()} left out")
    for reason in list(left_out)[:10]:
        print(f"  {reason}")


def preview(args) -> None:
    import cv2
    import numpy as np
    from .factors import caption
    from .people import compose, load_people
    rng = np.random.default_rng(args.seed)
    people = load_people(args.data, args.size, limit=200)
    pictures = [compose(people, int(i), rng) for i in rng.integers(len(people), size=32)]
    rows = [np.concatenate([p[0] for p in pictures[i:i + 8]], 1) for i in range(0, 32, 8)]
    cv2.imwrite(str(args.out), np.concatenate(rows)[..., ::-1])
    print("\n".join(caption(p[2], rng) for p in pictures))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("pidiff-data", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("synth", help="generate synthetic people")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--people", type=int, default=2000)
    one.add_argument("--variants", type=int, default=3, help="pictures per person")
    one.add_argument("--size", type=int, default=256, help="pixels")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--model", type=Path, help="bundle or model folder with face_matting/ and directions.safetensors (default: mini)")
    fast = commands.add_parser("draft", help="generate many synthetic people fast, at 128 pixels")
    fast.add_argument("--out", type=Path, required=True)
    fast.add_argument("--like", type=Path, required=True, help="folder written by `pidiff-data synth`")
    fast.add_argument("--people", type=int, default=47000)
    fast.add_argument("--seed", type=int, default=0)
    fast.add_argument("--device", default="cpu", help="where to draw, for example cuda (default: cpu)")
    real = commands.add_parser("photos", help="prepare photos of real people")
    real.add_argument("photos", type=Path, help="folder of photos and tar shards")
    real.add_argument("--out", type=Path, required=True)
    real.add_argument("--size", type=int, default=512, help="pixels")
    real.add_argument("--aligned", action="store_true", help="pictures are the faces, cut as FFHQ cuts them")
    real.add_argument("--bundle", type=Path, help="whose face detector and matting to use (default: mini)")
    for command in (one, real):
        command.add_argument("--require-signature", metavar="KEY.pub", type=Path,
                             help="use that bundle only if it is signed by this key")
    two = commands.add_parser("preview", help="contact sheet of training pictures")
    two.add_argument("--data", type=Path, required=True)
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--size", type=int, default=128)
    two.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        for name in ("people", "variants", "size"):
            if getattr(args, name, 1) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
        {"synth": synth, "draft": draft, "photos": photos, "preview": preview}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"pidiff-data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pidiff-data: stopped; run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
