"""pidiff-train: train the parts of a model into one model folder."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from ..checkpoint import CheckpointError
from ..data.people import load_people
from .adapter import AdapterOptions
from .common import TrainConfig
from .distill import DistillOptions
from .isolate import IsolateOptions
from .localise import LocaliseOptions
from .stages import NEED_EXACT_CODES, STAGES, picture_size

DESCRIPTION = """\
Train one stage of a PIDiff model. All stages share one model folder:

  pidiff-data synth --out DATA --people 2000          synthetic people with exact codes
  pidiff-data draft --out MORE --like DATA            many more, fast: then --data DATA MORE below
  pidiff-train vae     --data DATA --model MODEL      autoencoder                   -> MODEL/vae
  pidiff-train matting --data DATA --model MODEL      background removal            -> MODEL/face_matting
  pidiff-train mapper  --data DATA --model MODEL      W+ -> identity tokens, by drawing faces from them (needs vae)
  pidiff-train encoder --data DATA --model MODEL      photo -> W+ (uses mapper)     -> MODEL/w_plus_encoder
  pidiff-train encoder --data DATA --model MODEL --with-mapper    both together, as an autoencoder of faces: more alike
  pidiff-train base    --data DATA --model MODEL      UNet, text, identity (needs vae; uses encoder and mapper)
  pidiff-train adapter --data DATA --model MODEL      identity branch only: localised, background kept, the rest frozen
  pidiff-train isolate --data DATA --model NEW --teacher MODEL    NEW/unet as MODEL's, but a background does not depend on the face before it
  pidiff-train localise --data DATA --model MODEL     identity inside the face's border: nobody's key alone, in closed form; once
  pidiff-train decoder --data DATA --model MODEL      VAE's decoder, on what the sampler makes: no seams; last
  pidiff-train distill --data DATA --model FEW --teacher MODEL    FEW/unet does in 4 steps without guidance what MODEL's does in 20 with it
  pidiff-export MODEL BUNDLE                          deployable bundle
  any stage on a GPU: --device cuda --workers 15      so many processes draw the batches
  pidiff-train personalize PHOTO... --out ME          tune one person's code on 1 to 10 photos -> an identity file

Several processes, on one or many machines: torchrun --nproc-per-node 2 -m pidiff.train base ..., or
accelerate launch --num_processes 2 --cpu -m pidiff.train base ... (gloo on CPUs, nccl on GPUs).

The folder holds averaged weights in float16, as they are shipped; a stage that was stopped goes on, in float32, from
MODEL/.state/STAGE/state.pt. Without that file it begins with the folder's weights, or from nothing."""

LOCALISE_PICTURES = 400     # are enough for 25 batches

PRESETS = {
    "vae": TrainConfig(steps=8000, batch_size=48, decay=0.6, ema_decay=0.99),
    "encoder": TrainConfig(steps=20000, batch_size=32, weight_decay=0.05, decay=0.6, ema_decay=0.998),
    "matting": TrainConfig(steps=3000, batch_size=16, learning_rate=2e-3, decay=0.6, ema_decay=0.99),
    "mapper": TrainConfig(steps=8000, batch_size=256, learning_rate=2e-3, decay=0.5, ema_decay=0.99),
    "base": TrainConfig(steps=60000, batch_size=16, decay=0.3, ema_decay=0.998),
    "isolate": TrainConfig(steps=800, batch_size=16, matrix_learning_rate=0.002, learning_rate=1e-4, decay=0.8, ema_decay=0.99),
    "localise": TrainConfig(steps=25, batch_size=16),
    "decoder": TrainConfig(steps=2000, batch_size=16, matrix_learning_rate=0.002, learning_rate=2e-4, decay=0.6, ema_decay=0.99),
    "distill": TrainConfig(steps=3000, batch_size=16, matrix_learning_rate=0.005, learning_rate=2e-4, decay=0.7, ema_decay=0.99),
    "adapter": TrainConfig(steps=5000, batch_size=16, matrix_learning_rate=0.005, learning_rate=2e-4, decay=0.5, ema_decay=0.998),
}

def _given(args, stage: str, options: type):
    """The options of one stage, where they were given; they are refused for others."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(options) if getattr(args, f.name) is not None}
    if given and args.stage != stage:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} must be given to the {stage} stage, got it for {args.stage}")
    return options(**given)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("pidiff-train", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders written by pidiff-data: synthetic people, or photos")
    parser.add_argument("--model", type=Path, required=True, help="model folder to read from and write to")
    parser.add_argument("--keep-mapper", action=argparse.BooleanOptionalAction,
                        help="base and adapter stages: go on with the mapper of MODEL/adapter as it is (default: in the adapter stage, but for a new adapter)")
    parser.add_argument("--with-mapper", action="store_true",
                        help="encoder stage: train encoder and mapper together, as an autoencoder of faces (then base)")
    parser.add_argument("--likeness", type=float, default=0.0,
                        help="base stage: weight of the person's difference in the encoder's features (default: 0)")
    parser.add_argument("--new-adapter", choices=("parallel", "residual", "single"),
                        help="adapter stage: begin with an untrained adapter: ours, W+ Adapter's form, IP-Adapter's form")
    parser.add_argument("--encoder", type=Path, help="adapter stage: published e4e file, kept as MODEL/w_plus_encoder")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="adapter stage: less memory, a third slower")
    parser.add_argument("--teacher", type=Path, help="distill and isolate stages: the model that MODEL shall imitate, and begins as")
    parser.add_argument("--people-limit", type=int, help="use only so many pictures (for trials)")
    for f in dataclasses.fields(TrainConfig):
        kind = float if f.name == "minutes" else type(f.default)
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=kind, help=f"default: {f.default} or the stage's preset")
    for options, what in ((AdapterOptions, "terms of the adapter stage's loss (0 switches one off)"),
                          (IsolateOptions, "how the isolate stage parts face and background"),
                          (LocaliseOptions, "how far the localise stage moves nobody's key"), (DistillOptions, "what the distill stage imitates")):
        group = parser.add_argument_group(what)
        for f in dataclasses.fields(options):
            group.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), help=f"default: {f.default}")
    args = parser.parse_args(argv)
    for stage, name, options in (("adapter", "terms", AdapterOptions), ("isolate", "isolate", IsolateOptions),
                                 ("localise", "localise", LocaliseOptions), ("distill", "distill", DistillOptions)):
        setattr(args, name, _given(args, stage, options))
    if args.stage == "localise" and args.people_limit is None:
        args.people_limit = LOCALISE_PICTURES
    if args.keep_mapper is False and args.stage != "adapter":
        raise ValueError(f"no-keep-mapper must be given to the adapter stage, got it for {args.stage}")
    if args.keep_mapper and args.stage not in ("base", "adapter"):
        raise ValueError(f"keep-mapper must be given to the base or adapter stage, got it for {args.stage}")
    if args.keep_mapper and args.new_adapter:
        raise ValueError(f"keep-mapper must be left out for a new adapter, got it with {args.new_adapter}")
    if args.keep_mapper is None:        # few pictures of the adapter stage undo what the mapper stage's many taught
        args.keep_mapper = args.stage == "adapter" and args.new_adapter is None
    if args.with_mapper and args.stage != "encoder":
        raise ValueError(f"with-mapper must be given to the encoder stage, got it for {args.stage}")
    if args.teacher is not None and args.stage not in ("distill", "isolate"):
        raise ValueError(f"teacher must be given to the distill or isolate stage, got it for {args.stage}")
    if args.likeness and args.stage != "base" or not 0 <= args.likeness < float("inf"):
        raise ValueError(f"likeness must be at least 0, and given to the base stage only, got {args.likeness} for {args.stage}")
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if getattr(args, f.name) is not None}
    args.config = dataclasses.replace(PRESETS[args.stage], **given)
    if args.config.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.config = dataclasses.replace(args.config, device=f"cuda:{os.environ['LOCAL_RANK']}")
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["personalize"]:
        from . import personalize
        return personalize.main(argv[1:])
    try:
        args = parse(argv)
        if (args.model / "manifest.json").is_file():
            raise ValueError(f"model must be a model folder, got the bundle {args.model}, whose manifest holds hashes of the weights; "
                             "train a copy of it without manifest.json")
        people = load_people(args.data, picture_size(args), "train", args.people_limit)
        if len(people) == 0:
            raise ValueError(f"data must hold at least one picture of the training split, got none in {', '.join(map(str, args.data))}")
        if people.w is None and args.stage in NEED_EXACT_CODES:
            raise ValueError(f"data must have exact codes for the {args.stage} stage (pidiff-data synth), got photos")
        args.model.mkdir(parents=True, exist_ok=True)
        STAGES[args.stage](args, people)
    except (ValueError, CheckpointError, RuntimeError, OSError) as error:
        print(f"pidiff-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pidiff-train: stopped; run the same command to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
