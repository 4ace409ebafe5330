"""`pidiff-export --engine`, `--into` and `--check`: the part of the command line that is about compiled engines.

None of it imports torch. With MODEL and OUT the export runs in a process of its own, which is gone when engines are built.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engine_specs import BACKENDS
from pidiff.runtime.engine_store import EngineStore
from pidiff.runtime.engines import ENGINES
from pidiff.runtime.preflight import ENGINE_GRAPHS, FALLBACK, VERDICTS, preflight
from pidiff.runtime.signature import SIGNATURE, load_secret_key, new_key

from .engines import (DEFAULT_TARGETS, DEFAULT_WORKSPACE, PYTHON, EngineOptions, add_engines, check_attention, check_strip,
                      parse_targets, require_backend)
from .errors import ExportError
from .profiles import MAX_BATCH, MAX_PEOPLE, Range, Shapes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options about engines to a parser."""
    group = parser.add_argument_group("engines: graphs compiled for certain GPUs, added to the bundle")
    group.add_argument("--engine", choices=tuple(ENGINES), help=f"{' or '.join(BACKENDS)}: build engines for {', '.join(ENGINE_GRAPHS)}; "
                       f"the other graphs stay on {FALLBACK}. tensorrt-rtx needs no GPU for it, tensorrt builds on the GPU that will run "
                       "it. An engine that is there already is not built again. The others run the graphs as they are: nothing is built")
    group.add_argument("--into", metavar="BUNDLE", type=Path, help="in place of MODEL and OUT: add engines to this bundle")
    group.add_argument("--target", metavar="SM,...", help="GPUs to build for, or host, the one that is here, or orin (default "
                       f"{','.join(DEFAULT_TARGETS)}: GeForce RTX 30, 40, 50; host with tensorrt)")
    group.add_argument("--batch", default="1", metavar="N", help="pictures made at once; N, or MIN:OPT:MAX (default 1)")
    group.add_argument("--people", default="1", metavar="N", help="people in one picture; N, or MIN:OPT:MAX (default 1)")
    group.add_argument("--size", metavar="N", help="of pictures in pixels; N, or MIN:OPT:MAX (default: the model's own)")
    group.add_argument("--workspace", type=int, default=DEFAULT_WORKSPACE, metavar="MIB",
                       help="GPU scratch memory that a layer may use (default %(default)s MiB)")
    group.add_argument("--strip", action="store_true", help="leave the weights out of the engines, which take them from the bundle's own "
                       "files when they are loaded: they are on the disk once, and loading takes longer. Needs a GPU, and standard attention")
    group.add_argument("--force", action="store_true", help="build even if memory is predicted not to suffice")
    group.add_argument("--sign", metavar="KEY.key", type=Path, help="sign the bundle: OUT, or the one that --into names, with or "
                       "without more engines. A change without --sign drops a signature, and says so")
    group.add_argument("--new-key", metavar="NAME", help="in place of MODEL and OUT: make NAME.key to sign with and NAME.pub to give away")
    group.add_argument("--require-signature", metavar="KEY.pub", type=Path,
                       help="use a bundle (MODEL, or that of --into or --check) only if it is signed by this key")
    statuses = ", ".join(f"{status} {name}" for name, status in VERDICTS.items())
    group.add_argument("--check", metavar="BUNDLE", type=Path, help="say what the engines of a bundle will do on this machine, "
                       f"before any is loaded; exit status, of the worst graph: {statuses}")
    group.add_argument("--rebuild", action="store_true", help="with --check: run the commands that it names, if any, and check again. What "
                       "it takes the place of is dropped; --sign KEY.key signs the bundle anew")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a usage message unless the arguments name exactly one thing to do."""
    commands = [option for option in ("--into", "--check", "--new-key") if getattr(args, option[2:].replace("-", "_"))]
    if commands:
        if args.model is not None or len(commands) > 1:
            parser.error(f"{commands[0]} takes the place of MODEL, OUT and other commands")
        work = args.engine or args.sign and not args.rebuild
        if args.into and not work or not args.into and work:
            parser.error("--into needs --engine or --sign, --check and --new-key take none (but --check --rebuild takes --sign)")
        if args.into and args.engine not in (None, *BACKENDS):
            parser.error(f"--into builds engines, and {args.engine} runs the graphs of any bundle as they are")
    if args.rebuild and not args.check:
        parser.error("--rebuild needs --check BUNDLE")
    if args.rebuild and args.require_signature and not args.sign:
        parser.error("--rebuild with --require-signature needs --sign, since it changes the bundle")
    if not commands and args.out is None:
        parser.error("the following arguments are required: MODEL, OUT (or --into BUNDLE, or --check BUNDLE)")


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Run the command; returns its exit status. Raises ExportError or BundleError."""
    if args.new_key:
        print(f"keep {' secret, give away '.join(map(str, new_key(args.new_key)))}")
        return 0
    if args.check:
        return _check_and_rebuild(args)
    secret = load_secret_key(args.sign) if args.sign else None
    if not args.engine:
        with EngineStore(args.into, args.require_signature) as store:
            store.sign(secret)
        return 0
    check_attention(args.engine, args.attention or "standard")
    if args.strip:
        check_strip(args.engine, args.attention or "standard")
    size = None if args.size is None else Range.parse("size", args.size, 8192)
    shapes = Shapes(Range.parse("batch", args.batch, MAX_BATCH), Range.parse("people", args.people, MAX_PEOPLE), size)
    options = EngineOptions(args.engine, parse_targets(args.target, args.engine), shapes, args.workspace, args.force,
                            args.strip, secret, args.require_signature if args.into else None)
    if args.into is None:
        if (args.out / "manifest.json").is_file():
            raise ExportError(f"out must be a new or empty directory, got the bundle {args.out}: --into adds engines to it")
        require_backend(args.engine)             # not after minutes of export
        if status := _export(argv, args.attention or "standard"):
            return status
    return _build(args.into or args.out, options, args.quiet)


def _export(argv: list[str], attention: str) -> int:
    """Run the export without engines, with the same arguments less ours, in a process of its own."""
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(ours)
    _, rest = ours.parse_known_args(argv)
    command = PYTHON[2].format("pidiff.export.__main__", "sys.argv[1:]")
    # Not in our process group: Ctrl-C reaches us alone, and we pass it on.
    process = subprocess.Popen([*PYTHON[:2], command, *rest, "--attention", attention], start_new_session=True)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()
    if status < 0:
        raise ExportError(f"export must end by itself, got killed by signal {-status}")
    return status


def _build(path: Path, options: EngineOptions, quiet: bool) -> int:
    from tqdm import tqdm

    signed = (path / SIGNATURE).exists()
    with tqdm(total=len(ENGINE_GRAPHS), unit="engine", desc="build", leave=False, disable=quiet) as bar:
        def report(graph: str, done: float) -> None:
            bar.set_postfix_str(f"{graph} {done:.0%}")
            bar.update(done == 1)

        try:
            engines, peaks = add_engines(path, options, report)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{path} is whole, with the engines that are done; --into goes on from there") from None
        finally:
            if signed and not (path / SIGNATURE).exists():
                bar.write(f"pidiff-export: warning: {path} has changed and is no longer signed; --into {path} --sign KEY signs it",
                          file=sys.stderr)
    if not quiet:
        files = Bundle.open(path, verify=False).manifest.files
        print(f"{'engine':<18}{'MiB':>10}{'memory to build, MiB':>24}")
        for graph, engine in engines.graphs.items():
            peak = f"{peaks[graph] / 2**20:.0f}" if graph in peaks else "was there"
            print(f"{graph:<18}{files[engine.file].size / 2**20:>10.1f}{peak:>24}")
        print(f"{path}: {engines.id}")
    return 0


def _check_and_rebuild(args: argparse.Namespace) -> int:
    status, commands = _check(args.check, args.quiet, args.require_signature)
    if not args.rebuild or not commands:
        return status
    from .__main__ import build_parser

    for command in commands:
        if not args.quiet:
            print(f"\n{command}", flush=True)
        words = [*shlex.split(command)[1:], *(["--sign", str(args.sign)] if args.sign else []), *["--quiet"] * args.quiet]
        if status := run(build_parser().parse_args(words), words):
            return status
    return _check(args.check, args.quiet, args.require_signature)[0]


def _check(path: Path, quiet: bool, require_signature: Path | None) -> tuple[int, list[str]]:
    """Print what is to be expected; returns the exit status, and the commands by which it would be better."""
    bundle = Bundle.open(path, require_signature=require_signature)
    found = preflight(bundle)
    if not quiet:
        print(f"{path}: {bundle.manifest.name}, {bundle.manifest.precision}; here: {found.here}")
        if not found.findings:
            print(f"no engines: every graph runs on {FALLBACK}")
        for name in dict.fromkeys(f.engines for f in found.findings):
            print(name or "not built")
            for finding in found.findings:
                if finding.engines == name:
                    print(f"  {finding.graph:<18}{finding}")
        others = sorted(set(bundle.manifest.graphs) - set(ENGINE_GRAPHS))
        print(f"on {FALLBACK} by design: {', '.join(others)}")
    best = [found.best(graph) for graph in ENGINE_GRAPHS if found.findings]
    return found.status, list(dict.fromkeys(finding.command for finding in best if finding.command))
