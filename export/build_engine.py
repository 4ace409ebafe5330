"""The builder process: one ONNX graph in, one engine file out. Run by `engines.py`, one process per graph.

Imports neither torch nor numpy: what they would hold is memory that a build needs. A crash of TensorRT, or the kernel's
killer, ends this process and no other. Job: a JSON object on stdin. Answer: lines `done total` on stdout as the build
goes on, then a JSON object; where the exit status is 1, the reason on stderr.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys

from pidiff.runtime.errors import PidiffError
from pidiff.runtime.files import write_atomic
from pidiff.runtime.memory import resident

_SET_PARENT_DEATH_SIGNAL = 1        # prctl option, Linux


def main() -> None:
    """Read a job, build, write, and exit with 0, or with 1 after the reason on stderr."""
    _die_with_parent()
    try:
        print(json.dumps(build(json.load(sys.stdin))), flush=True)
    except (RuntimeError, OSError, ImportError) as error:
        sys.exit(" ".join(str(error).split()) or type(error).__name__)


def build(job: dict) -> dict:
    """Build an engine.

    job: module (`tensorrt_rtx` or `tensorrt`), version it must have, onnx and out (paths), targets (["sm86", ...]), workspace in bytes,
    profiles ([{input: [min, opt, max]}]), fused (None, or paths: `library` of plug-ins, and `graph`, what plugin_nodes.py made of
    onnx), strip (leave the weights out), timings (None, or the file with the times of kernels that builds share). Returns
    {"peak_rss": bytes}. Raises RuntimeError with TensorRT's own words.
    """
    trt = importlib.import_module(job["module"])
    if trt.__version__ != job["version"]:
        raise RuntimeError(f"{job['module']} must be version {job['version']}, got {trt.__version__}")
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not _parse(trt, parser, job, log):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise RuntimeError("; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors) or log.first)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace"])
    config.progress_monitor = monitor = _monitor(trt)       # noqa: F841, held here while TensorRT calls it
    if hasattr(trt, "ComputeCapability"):
        _set_targets(trt, config, job["targets"])
    if job["strip"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    timings = _timings(config, job["timings"], log)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise RuntimeError(f"the profile {shapes} was refused: {log.first}")
    # The parser owns the weights: it must live until the engine is written, as `parser` does here.
    _write(trt, builder, network, config, job["out"], log)
    if timings is not None:
        _keep(job["timings"], timings.serialize())
    return {"peak_rss": resident(peak=True)}


def _parse(trt, parser, job: dict, log) -> bool:
    """Parse the graph. By path, not by bytes: the weights lie in the safetensors files beside it."""
    if job["fused"] is None:
        return parser.parse_from_file(job["onnx"])
    if trt.get_plugin_registry().load_library(job["fused"]["library"]) is None:
        raise RuntimeError(f"{job['module']} must load {job['fused']['library']}, got {log.first or 'no reason given'}")
    with open(job["fused"]["graph"], "rb") as file:
        return parser.parse(file.read(), job["onnx"])


def _set_targets(trt, config, targets: list[str]) -> None:
    """Compute capabilities that the engine will run on; TensorRT-RTX builds for others than this machine's.

    All its memory is to come from the caller: without that it cannot be captured in a CUDA graph. No timing cache is made: TensorRT-RTX ignores its content, and asking for one makes it look for a GPU.
    """
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index):
            raise RuntimeError(f"the target {target} was refused")


def _timings(config, path: str | None, log):
    """The cache of a path, used by the build: which kernel is fastest is measured once for a layer, not in every graph and build."""
    if path is None:
        return None
    known = b""
    if os.path.exists(path):
        with open(path, "rb") as file:
            known = file.read()
    for content in (known, b""):                    # what another GPU, version or accident left is refused, and made anew
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        log.first = ""
    return None


def _keep(path: str, data) -> None:
    """Replace the file of timings at once: another builder may be reading it. It is a help, so that what goes wrong is no error."""
    with contextlib.suppress(PidiffError, OSError):
        write_atomic(path, data)
        os.chmod(path, 0o600)


def _write(trt, builder, network, config, out: str, log) -> None:
    """Build straight into the file where that can be done: a serialized engine in memory is a second copy of the weights."""
    nothing = "the build ended without an engine and without a reason"
    with open(out, "wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = _writer(trt, file)
            if not builder.build_serialized_network_to_stream(network, config, writer):
                raise writer.error or RuntimeError(log.first or nothing)
        else:                                       # TensorRT 10.3
            engine = builder.build_serialized_network(network, config)
            if engine is None:
                raise RuntimeError(log.first or nothing)
            file.write(engine)
        file.flush()
        os.fsync(file.fileno())


def _writer(trt, file):
    class Writer(trt.IStreamWriter):
        error = None

        def __init__(self):
            trt.IStreamWriter.__init__(self)

        def write(self, data):
            try:
                return file.write(data)
            except OSError as error:          # must not pass through TensorRT's C++ frames
                self.error = error
                return 0

    return Writer()


def _monitor(trt):
    class Monitor(trt.IProgressMonitor):
        """Prints the steps of the outermost phase; phases inside it come and go."""

        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.root, self.total = None, 0

        def phase_start(self, phase_name, parent_phase, num_steps):
            if parent_phase is None:
                self.root, self.total = phase_name, num_steps

        def step_complete(self, phase_name, step):
            if phase_name == self.root:
                print(step + 1, self.total, flush=True)
            return True

        def phase_finish(self, phase_name):
            pass

    return Monitor()


def _logger(trt):
    class Logger(trt.ILogger):
        """Keeps the first error: those after it are its consequences, down to one about a missing CUDA driver."""

        def __init__(self):
            trt.ILogger.__init__(self)
            self.first = ""

        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.ERROR and not self.first:
                self.first = message

    return Logger()


def _die_with_parent() -> None:
    """No builder stays behind when the exporter is killed (Linux)."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
