"""Compiled engines for a bundle: what has to be built, whether there is memory for it, and one builder process per graph
(`build_engine.py`), each engine going into the bundle as soon as it is done.

Imports no torch: on a small machine that memory belongs to the builder.
"""

import hashlib
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pidiff.runtime.bundle import Bundle, Manifest
from pidiff.runtime.cuda import find_gpu
from pidiff.runtime.engine_specs import TARGETS, EngineFile, EngineSet, engine_path
from pidiff.runtime.engine_store import EngineStore
from pidiff.runtime.engines import ENGINES
from pidiff.runtime.engines.tensorrt import installed_version, plugin_library, plugin_problem
from pidiff.runtime.files import is_private
from pidiff.runtime.preflight import ENGINE_GRAPHS
from pidiff.runtime.signature import SecretKey

from .engine_report import update_report
from .errors import ExportError
from .memory import check_disk, check_memory
from .plugin_nodes import read_for_plugins
from .profiles import Shapes, profiles_of

DEFAULT_TARGETS = ("sm86", "sm89", "sm120")      # GeForce RTX 30, 40 and 50
DEFAULT_WORKSPACE = 1024
_NAMES = {"orin": "sm87", "thor": "sm110"}       # Jetsons
# The current folder may hold files of any name: none of them is a module here.
PYTHON = [sys.executable, "-c", "import sys; sys.path = [p for p in sys.path if p]; from {} import main; sys.exit(main({}))"]
_BUILDER = [*PYTHON[:2], PYTHON[2].format("pidiff.export.build_engine", "")]

Report = Callable[[str, float], None]            # graph, part of its build that is done (1 = built)


@dataclass(frozen=True)
class EngineOptions:
    """backend: `tensorrt-rtx` or `tensorrt`. targets: GPUs to build for. shapes: what the engines take. workspace: MiB of scratch memory
    that a layer may use on the GPU. force: build even where memory is predicted not to suffice. strip: leave the weights out of the
    engines. secret: key to sign the bundle
    with when it is done. require_signature: public key that it must be signed by before."""

    backend: str = "tensorrt-rtx"
    targets: tuple[str, ...] = DEFAULT_TARGETS
    shapes: Shapes = Shapes()
    workspace: int = DEFAULT_WORKSPACE
    force: bool = False
    strip: bool = False
    secret: SecretKey | None = None
    require_signature: Path | None = None

    def __post_init__(self):
        if not 1 <= self.workspace <= 1 << 20:
            raise ExportError(f"workspace must be 1 to {1 << 20} MiB, got {self.workspace}")


@dataclass(frozen=True)
class Job:
    """One graph to build: its .onnx file, the entry that its engine will have in the manifest, bytes of weights, and whether
    it may hold nodes of the domain `pidiff`."""

    graph: str
    onnx: Path
    engine: EngineFile
    weight_bytes: int
    fused: bool = False


def parse_targets(text: str | None, backend: str) -> tuple[str, ...]:
    """Read `sm89,sm120`, `orin` or `host`, the GPU of this machine; returns the targets in order, each once. None: DEFAULT_TARGETS,
    or for TensorRT, which builds for the GPU that it builds on, that one."""
    known, only_host = TARGETS[backend], backend == "tensorrt"
    named = (text or ("host" if only_host else ",".join(DEFAULT_TARGETS))).split(",")
    targets = {_NAMES.get(name, name) for name in named}
    gpu, reason = find_gpu() if only_host or "host" in targets else (None, "")
    if "host" in targets:
        if gpu is None:
            instead = "be a machine with a GPU for tensorrt" if only_host else (
                f"name GPUs, such as {','.join(DEFAULT_TARGETS)}, on this machine")
            raise ExportError(f"target must {instead}, got host: {reason}")
        targets = targets - {"host"} | {gpu.target}
    if only_host and (gpu is None or targets != {gpu.target}):
        raise ExportError(f"target must be host for tensorrt, which builds for the GPU that is here, got {text}")
    for target in sorted(targets - set(known)):
        raise ExportError(f"target must be host or among {', '.join(known)} for {backend}, got {target or 'nothing'}")
    return tuple(t for t in known if t in targets)


def require_backend(backend: str) -> str:
    """Return the installed version of a backend; ExportError says how to install it if there is none."""
    version, why = installed_version(backend)
    if version is None:
        raise ExportError(f"engine must be installed, got {backend}: {why}")
    return version


def check_attention(backend: str, attention: str, advice: str = "") -> None:
    """Raise ExportError if engines of a backend cannot be built here from graphs with this attention."""
    problem = plugin_problem(backend) if attention == "fused" else ""
    if problem:
        raise ExportError(f"attention must be standard with --engine {backend}, got fused: {problem}{advice}")


def add_engines(path: Path, options: EngineOptions, report: Report = lambda *_: None) -> tuple[EngineSet, dict[str, int]]:
    """Build the engines that the bundle at `path` lacks; returns the set and the builders' peak memory, graph -> bytes.

    An engine is built again only if its graph, weights, shapes, the targets or the version have changed. Engines of the
    same targets and another version are removed at the end. Raises ExportError or BundleError in one sentence; what was
    built before it stays in the bundle.
    """
    version = require_backend(options.backend)
    with EngineStore(path, options.require_signature) as store:
        engines = EngineSet(options.backend, version, options.targets, {})
        jobs = [j for j in plan(Bundle(path, store.manifest), engines, options.shapes, options.strip)
                if not _is_built(store.manifest, engines, j)]
        check_disk(path, {j.graph: j.weight_bytes - j.engine.left_out for j in jobs})
        if not options.force:
            check_memory({j.graph: j.weight_bytes for j in jobs})
        peaks, whole, timings = {}, False, _timings(path, engines)
        try:
            for graph in ENGINE_GRAPHS:
                for job in (j for j in jobs if j.graph == graph):
                    peaks[graph] = _build(job, engines, options.workspace, store.part(engines, graph), timings, report)
                    store.add(engines, graph, job.engine)
                report(graph, 1.0)
            store.drop_older(engines)
            whole = True
        finally:
            update_report(store, measure=whole)
        if options.secret is not None:
            store.sign(options.secret)
        return store.manifest.engines[engines.id], peaks


def check_strip(backend: str, attention: str) -> None:
    """Raise ExportError if engines without weights cannot be built here from graphs with this attention."""
    if attention == "fused":
        raise ExportError("attention must be standard with --strip, for TensorRT's own reader of graphs fills the weights in, got fused")
    gpu, reason = find_gpu()
    if gpu is None:
        raise ExportError(f"strip must be used on a machine with a GPU, without which {backend} leaves no weights out, got none: {reason}")


def plan(bundle: Bundle, engines: EngineSet, shapes: Shapes, strip: bool = False) -> list[Job]:
    """What a whole set of engines consists of, in the order of ENGINE_GRAPHS."""
    check_attention(engines.backend, bundle.manifest.attention, f"; export the bundle again with --engine {engines.backend}")
    if strip:
        check_strip(engines.backend, bundle.manifest.attention)
    gpu, _ = find_gpu()
    return [_job(bundle, engines, graph, shapes, strip, gpu.driver if gpu else "") for graph in ENGINE_GRAPHS]


def _job(bundle: Bundle, engines: EngineSet, graph: str, shapes: Shapes, strip: bool, driver: str) -> Job:
    file, known = bundle.graph(graph).file, bundle.manifest.files
    axes, locations, size = read_graph(bundle.file(file))
    for location in locations - set(known):
        raise ExportError(f"graph {graph} must keep its weights in files of the bundle, got {location}")
    digest = hashlib.sha256("".join(f"{l} {known[l].sha256}\n" for l in sorted(locations)).encode()).hexdigest()
    profiles = tuple({name: tuple(map(tuple, sizes)) for name, sizes in p.items()}
                     for p in profiles_of(bundle, graph, axes, shapes))
    engine = EngineFile(engine_path(engines.id, graph), known[file].sha256, digest, profiles, size if strip else 0, driver)
    return Job(graph, bundle.path / file, engine, size, bundle.manifest.attention == "fused")


def read_graph(path: Path) -> tuple[dict[str, tuple[int | str, ...]], set[str], int]:
    """Of an .onnx file: inputs with their axes, files of external data, and bytes of weights in the type that computes."""
    try:
        import onnx
    except ImportError as error:
        raise ExportError("pidiff-export needs the extra 'export' (pip install 'pidiff-edge[export]'), got no onnx") from error
    graph = onnx.load(path, load_external_data=False).graph
    axes = {i.name: tuple(d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.input}
    widened = {n.input[0] for n in graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.FLOAT}
    locations, size = set(), 0
    for tensor in graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        locations |= {entries["location"]} if entries else set()
        stored = int(entries["length"]) if entries else len(tensor.raw_data)
        size += max(stored, 4 * math.prod(tensor.dims)) if tensor.name in widened else stored
    return axes, locations, size


def _is_built(manifest: Manifest, engines: EngineSet, job: Job) -> bool:
    """Whether the bundle holds this very engine; its file was verified when the store opened."""
    known = manifest.engines.get(engines.id)
    return known is not None and known.graphs.get(job.graph) == job.engine


def _build(job: Job, engines: EngineSet, workspace: int, part: Path, timings: str | None, report: Report) -> int:
    """Run the builder process for one graph; returns its peak memory in bytes."""
    request = {"module": ENGINES[engines.backend][2], "version": engines.version, "onnx": str(job.onnx.absolute()),
               "out": str(part.absolute()), "targets": engines.targets, "workspace": workspace << 20,
               "profiles": job.engine.profiles, "fused": None, "strip": job.engine.left_out > 0, "timings": timings}
    answer = {}
    with tempfile.TemporaryFile("w+") as messages, tempfile.NamedTemporaryFile(suffix=".onnx") as graph:
        if job.fused:
            graph.write(read_for_plugins(job.onnx))
            graph.flush()
            request["fused"] = {"library": str(plugin_library()), "graph": graph.name}
        # Not in our process group: Ctrl-C reaches us alone, and we end the builder.
        process = subprocess.Popen(_BUILDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True,
                                   start_new_session=True)
        try:
            with suppress(BrokenPipeError), process.stdin:
                json.dump(request, process.stdin)
            for done, line in _lines(process.stdout):
                report(job.graph, done)
                answer = line or answer
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        messages.seek(0)
        said = messages.read().split("\n")
    if status or not answer:
        raise ExportError(f"graph {job.graph} must be built by {engines.backend} {engines.version}, "
                          f"got {_what_happened(status, said, workspace)}; engines that are done are kept")
    return answer["peak_rss"]


def _timings(bundle: Path, engines: EngineSet) -> str | None:
    """Where builds of this set keep what they measured of kernels: beside the bundle, which they outlive, as they do a container that the
    bundle is mounted into. TensorRT trusts what it reads there, so it must be a file that none but this user can write. TensorRT-RTX,
    which measures nothing while it builds, has none.
    """
    if engines.backend != "tensorrt":
        return None
    bundle = bundle.resolve()
    file = bundle.with_name(f"{bundle.name}.{engines.id}.timings")
    if os.path.lexists(file):
        found = os.lstat(file)
        if not stat.S_ISREG(found.st_mode) or not is_private(found):
            warnings.warn(f"{file} must be a file of the user's own with mode 600: it is not used, kernels are timed anew", stacklevel=2)
            return None
    return str(file)


def _lines(stdout) -> Iterator[tuple[float, dict | None]]:
    """(part done, the answer or None) for every line that the builder prints."""
    for line in stdout:
        if line.startswith("{"):
            yield 0.99, json.loads(line)
        else:
            done, total = map(int, line.split())
            yield min(done / max(total, 1), 0.99), None


def _what_happened(status: int, said: list[str], workspace: int) -> str:
    if status == -signal.SIGKILL:
        return "its builder killed, most likely because memory ran out"
    if status < 0:
        return f"its builder crashed ({signal.Signals(-status).name})"
    reason = next((line.strip() for line in reversed(said) if line.strip()), f"exit status {status} of its builder")
    scratch = re.search(r"OutOfMemory \(Requested size was (\d+) bytes", reason)
    if scratch:
        # What the layer's last way of working asked for; its others, and other layers, may ask for more.
        enough = max(2 * workspace, math.ceil(int(scratch[1]) / 2**20))
        return f"a layer that needs more scratch memory than {workspace} MiB: try --workspace {enough}"
    return reason[:300]
