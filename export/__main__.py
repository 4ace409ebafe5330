"""Command line of the exporter: `pidiff-export --help`."""

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from pidiff.runtime.bundle import SPACINGS, Bundle, shipped_bundle
from pidiff.runtime.engine_specs import BACKENDS
from pidiff.runtime.engines import load_engine
from pidiff.runtime.memory import resident
from pidiff.runtime.schedule import SOLVERS
from pidiff.runtime.signature import load_secret_key

from . import engine_commands

EPILOG = """\
MODEL is a folder in diffusers' layout (unet/, vae/, text_encoder/, tokenizer/, scheduler/) with two folders of PIDiff,
w_plus_encoder/ and adapter/, or the published files --encoder and --adapter in place of these (an IP-Adapter comes with
--image-encoder); or one .safetensors file and --layout. A bundle is such a folder too, so a bundle can be exported again in another form.

OUT becomes a bundle: manifest.json (sizes, hashes, parity figures), *.onnx graphs, and the weights as safetensors, which
the graphs point into. Every graph is run in ONNX Runtime and compared with PyTorch before OUT appears.

  pidiff-export mini out/mini-fp16 --fp16                       the shipped model in half precision
  pidiff-export mini out/mini-int8 --int8                       its UNet in int8, as far as that changes little
  pidiff-export mini out/mini-rtx8 --int8 --fp16 --engine tensorrt-rtx          the same for RTX cards, in float16 beside int8
  pidiff-export mini out/mini-plain --attention standard        without custom nodes, for any ONNX engine
  pidiff-export sd15/ out/sd15 --adapter wplus_adapter.bin --encoder e4e_ffhq_encode.pt --fp16
  pidiff-export sd15/ out/ip --adapter ip-adapter_sd15.safetensors --image-encoder image_encoder/ --fp16
  pidiff-export sd15/ out/lcm --adapter wplus_adapter.bin --encoder e4e_ffhq_encode.pt --lora lcm-lora.safetensors \\
      --solver lcm --steps 4 --guidance-scale 1                 a model of few steps; docs/export.md: options for TCD and Hyper-SD
  pidiff-export mini out/mini-rtx --fp16 --engine tensorrt-rtx  with engines for RTX cards; no GPU is needed to build them
  pidiff-export --into out/mini-rtx --engine tensorrt-rtx --target host       more engines, or the rest of a stopped build
  pidiff-export --new-key me; pidiff-export --into out/mini-rtx --sign me.key     a bundle signed for those who have me.pub
  pidiff-export --check out/mini-rtx                            will the engines run here? status: see --check
  pidiff-export --check out/mini-rtx --rebuild                  build again what does not, or what would be slow, and check again
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pidiff-export", description="Write a bundle that the PIDiff runtime loads, from a PyTorch model.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="'mini' (the shipped model) or a model folder")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="folder to make; must not exist, or be empty")
    parser.add_argument("--fp16", action="store_true", help="store and compute in float16 (default: compute in float32)")
    parser.add_argument("--int8", action="store_true",
                        help="compute the UNet in int8, but for layers in which that changes too much; ranges and layers are measured on "
                             "pictures that the exporter draws. With --fp16 the rest is in float16, for GPUs. What it gains: docs/export.md")
    parser.add_argument("--attention", choices=("fused", "standard"),
                        help="fused: nodes of the ONNX domain pidiff, run by our custom operators (default); standard: plain "
                             "ONNX (implied by --engine tensorrt-rtx and tensorrt; tensorrt takes fused too where this pidiff has its plug-in)")
    parser.add_argument("--opset", type=int, choices=(18, 23), default=18, help="ONNX opset; 23 has its own Attention node (default 18)")
    parser.add_argument("--adapter", metavar="FILE", type=Path, help="published W+ Adapter weights (wplus_adapter.bin), or with --image-encoder an "
                        "IP-Adapter for Stable Diffusion 1 (ip-adapter_sd15, its light, plus and plus-face forms)")
    parser.add_argument("--encoder", metavar="FILE", type=Path, help="published e4e encoder (e4e_ffhq_encode.pt)")
    parser.add_argument("--image-encoder", metavar="FOLDER", type=Path, help="the image encoder of an IP-Adapter: transformers' folder of "
                        "a CLIPVisionModelWithProjection (config.json, model.safetensors); in place of --encoder")
    parser.add_argument("--cached-layers", type=int, default=1, metavar="N",
                        help="up layers of the UNet that a step with cached features runs (default 1); 0: no graph for such steps")
    parser.add_argument("--layout", metavar="FOLDER", type=Path,
                        help="with MODEL.safetensors, a Stable Diffusion 1 checkpoint in one file: a folder like MODEL for all that is "
                             "not in it, configurations and tokenizer; weights of UNet, VAE and text encoder need not be there")
    parser.add_argument("--lora", metavar="FILE[:SCALE]", action="append", default=[],
                        help="fuse a LoRA (kohya's, diffusers' or PEFT's names; LCM, TCD and Hyper-SD too) into UNet and text encoder; may be repeated")
    parser.add_argument("--report", metavar="full|short|none|auto", default="auto",
                        help="what report.html in the bundle tells: full: every graph in every engine that is here, and a picture drawn "
                             "by PyTorch and by each; short: what the export measures anyway; auto (default): full, but short for "
                             "models of Stable Diffusion's size, whose picture would take minutes")
    parser.add_argument("--name", help="name of the bundle (default: the source's)")
    defaults = parser.add_argument_group("defaults stored for the runtime (default: the source bundle's, else the runtime's)")
    defaults.add_argument("--solver", choices=SOLVERS)
    defaults.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    defaults.add_argument("--guidance-scale", type=float, metavar="X", help="1 or 0: off; of Stable Diffusion 7.5 where nobody says")
    defaults.add_argument("--timestep-spacing", choices=SPACINGS,
                          help="where the timesteps of a schedule lie (default: what the model's scheduler says); trailing for Hyper-SD")
    defaults.add_argument("--eta", type=float, metavar="X", help="with tcd: how random its steps are, 0 to 1 (default 0.3)")
    engine_commands.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 an error that was told in one sentence, 130 interrupted.

    With --check: what `pidiff.runtime.preflight` found, see VERDICTS there.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    engine_commands.check_arguments(parser, args)
    handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if args.model and args.require_signature:
            # Before anything of it is read as a model.
            Bundle.open(_folder(args.model, args.layout), require_signature=args.require_signature)
        if args.check or args.engine in BACKENDS or args.into or args.new_key:
            return engine_commands.run(args, argv)
        if args.engine:
            load_engine(args.engine)                # not after minutes of export
        return _run(args)
    except KeyboardInterrupt as stopped:
        return _fail(f"interrupted; {str(stopped) or 'nothing was written'}", 130)
    except Exception as error:
        if args.debug:
            raise
        text = " ".join(str(error).split())
        known = isinstance(error, (ValueError, OSError)) and text
        return _fail(text if known else f"{type(error).__name__} {text[:300]} (--debug shows where)", 1)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _run(args: argparse.Namespace) -> int:
    begun = time.perf_counter()
    _silence()
    try:
        from tqdm import tqdm

        from .attention import Form
        from .bundle import INT8_STEPS, STEPS, ExportOptions, export_bundle
        from .lora import Lora
        from .source import Source
        from .verify import Parity, table
    except ImportError as error:
        raise ValueError(f"pidiff-export needs the extra 'export' (pip install 'pidiff-edge[export]'), got no {error.name}") from error
    single = Path(args.model) if Path(args.model).suffix == ".safetensors" else None
    source = Source(_folder(args.model, args.layout), args.adapter, args.encoder, single, tuple(map(Lora.parse, args.lora)), args.image_encoder)
    if args.eta is not None and args.solver != "tcd":
        raise ValueError(f"--eta must be given with --solver tcd, got {f'--solver {args.solver}' if args.solver else 'no --solver'}")
    sampling = {"solver": args.solver, "num_inference_steps": args.steps, "guidance_scale": args.guidance_scale,
                "timestep_spacing": args.timestep_spacing, "eta": args.eta}
    options = ExportOptions(Form(args.attention or "fused", args.opset), args.fp16, args.int8, args.name,
                            {k: v for k, v in sampling.items() if v is not None}, args.cached_layers, args.report,
                            load_secret_key(args.sign) if args.sign else None)
    with tqdm(total=STEPS + INT8_STEPS * args.int8, unit="graph", desc="export", leave=False, disable=args.quiet) as bar:
        def report(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        manifest = export_bundle(source, args.out, options, report)
    if not args.quiet:
        print(table({n: Parity(**p) for n, p in manifest.parity.items()}))
        for graph, layers in manifest.float32_layers.items():
            print(f"{graph} keeps in float32: {', '.join(layer or 'everything' for layer in layers)}")
        size = sum(f.size for f in manifest.files.values())
        print(f"{args.out}: {manifest.name}, {manifest.precision}, {manifest.attention} attention, opset {manifest.opset}, "
              f"{size / 2**20:.1f} MiB in {time.perf_counter() - begun:.0f} s, {resident(peak=True) / 2**30:.1f} GiB of memory at the peak"
              + (f"; see {args.out / 'report.html'}" if args.report != "none" else ""))
    return 0


def _folder(model: str, layout: Path | None = None) -> Path:
    """The folder with a model's configurations; of a checkpoint in one file, `layout`."""
    single = Path(model).suffix == ".safetensors"
    if single and Path(model).is_file() and layout is None:
        raise ValueError(f"MODEL must be given --layout FOLDER (configurations and tokenizer) if it is one file, got only {model}")
    if layout is not None and not single:
        raise ValueError(f"--layout must be given with a MODEL.safetensors, got {model}")
    folder = shipped_bundle() if model == "mini" else layout if single and Path(model).is_file() else Path(model)
    if not folder.is_dir():
        raise ValueError(f"MODEL must be mini, an existing folder or a .safetensors file, got {model if layout is None else folder}")
    return folder


def _silence() -> None:
    """Other libraries' progress bars and advice are not ours to show."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    except ImportError:
        pass


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> int:
    print(f"pidiff-export: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
