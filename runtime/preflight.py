"""Can the engines of a bundle run here, and if not, what to do: known before any engine is deserialised.

A compiled engine belongs to GPU targets and to one version of TensorRT-RTX. Loading it elsewhere fails deep inside the
vendor's library, so this module compares what the manifest says with what is here, and asks TensorRT-RTX about the
engine's header where it can.
"""

import shlex
from dataclasses import dataclass

from .cuda import find_gpu
from .engine_specs import TARGETS
from .engines import tensorrt
from .manifest import REQUIRED_GRAPHS

ENGINE_GRAPHS = REQUIRED_GRAPHS     # the graphs of a generation; face detection and matting stay on FALLBACK
FALLBACK = "onnxruntime"
# Verdicts from best to worst, with the exit status of `pidiff-export --check`. 1 and 2 are errors.
VERDICTS = {"ok": 0, "slower": 3, "rebuild": 4, "fallback": 5}
_WORDS = {"ok": "ok", "slower": "slower than it could be", "rebuild": "rebuild", "fallback": f"falls back to {FALLBACK}"}
# Diagnostics of TensorRT-RTX that no rebuild cures.
_MACHINE = {"old_cuda_driver": "the NVIDIA driver is too old for it", "old_cuda_runtime": "the CUDA runtime is too old for it",
            "insufficient_gpu_memory": "the GPU has too little memory", "cuda_error": "CUDA does not work here"}


@dataclass(frozen=True)
class Finding:
    """What is to be expected of one engine: set of engines ("" where none was built), graph, verdict (a key of VERDICTS),
    why, the command that would make it better ("" where none would), and the backend."""

    engines: str
    graph: str
    verdict: str
    why: str = ""
    command: str = ""
    backend: str = ""

    def __str__(self):
        words = _WORDS[self.verdict] + (f": {self.why}" if self.why else "")
        return f"{words}; rebuild with: {self.command}" if self.command else words


@dataclass(frozen=True)
class Preflight:
    """here: the GPU and driver in words. findings: one Finding per engine, and per graph that has none. gpu: cuda.Gpu or None."""

    here: str
    findings: tuple
    gpu: object = None

    def best(self, graph, backend=None):
        """Return the best Finding for a graph, the engine that a loader should take, or None; `backend`: of this one only."""
        found = [f for f in self.findings if f.graph == graph and backend in (None, f.backend)]
        return min(found, key=lambda f: VERDICTS[f.verdict], default=None)

    @property
    def status(self):
        """Exit status: of the worst graph, each at its best engine; 0 for a bundle without engines."""
        return max((VERDICTS[self.best(f.graph).verdict] for f in self.findings), default=0)


def preflight(bundle):
    """Return the Preflight of an open Bundle on this machine.

    Every engine file is hashed before its header is looked at. Raises BundleError if one is not what the manifest lists.
    """
    gpu, reason = find_gpu()
    here = f"{gpu.name} ({gpu.target}), driver for CUDA {gpu.driver}" if gpu else reason
    findings, sets = [], bundle.manifest.engines.values()
    for engines in sets:
        findings += [_judge(bundle, engines, graph, gpu, reason) for graph in engines.graphs]
    if sets:
        newest = list(sets)[-1]
        built = {f.graph for f in findings}
        findings += [_missing(bundle, newest, graph, gpu, reason) for graph in ENGINE_GRAPHS if graph not in built]
    return Preflight(here, tuple(findings), gpu)


def _judge(bundle, engines, graph, gpu, reason):
    """The verdict on one engine."""
    finding = lambda verdict, why="", command="": Finding(engines.id, graph, verdict, why, command, engines.backend)
    version, why = _usable(bundle, engines.backend, gpu, reason)
    if version is None:
        return finding("fallback", why)
    fits = gpu.target in engines.targets
    command = rebuild_command(bundle, engines, engines.targets if fits else (gpu.target,))
    driver = engines.graphs[graph].driver
    beside = f" with a driver for CUDA {driver}" if driver else ""
    if version != engines.version:
        return finding("rebuild", f"it was built by {engines.backend} {engines.version}{beside}, here is {version}", command)
    other = f"it was built for {', '.join(engines.targets)}{beside}, here is {gpu.target}"
    size = tensorrt.header_size(engines.backend)
    if size is None:
        return finding("ok") if fits else finding("rebuild", other, command)
    verdict, diagnostics = tensorrt.validity(engines.backend, bytes(bundle.engine(engines.id, graph, size)))
    if verdict == "invalid":
        machine = [_MACHINE[d] for d in diagnostics if d in _MACHINE]
        if machine:
            return finding("fallback", " and ".join(machine))
        said = ", ".join(d.replace("_", " ") for d in diagnostics) or "no reason given"
        return finding("rebuild", f"{engines.backend} refuses it ({said})" if fits else other, command)
    if verdict == "suboptimal" or not fits:
        return finding("slower", f"{engines.backend} calls it {verdict}" if fits else other, command)
    return finding("ok")


def _missing(bundle, engines, graph, gpu, reason):
    """The verdict on a graph that no set holds: its build was stopped."""
    version, why = _usable(bundle, engines.backend, gpu, reason)
    if version is None:
        return Finding("", graph, "fallback", why, backend=engines.backend)
    targets = engines.targets if gpu.target in engines.targets else (gpu.target,)
    return Finding("", graph, "rebuild", "it was never built", rebuild_command(bundle, engines, targets), engines.backend)


def _usable(bundle, backend, gpu, reason):
    """Return (installed version, "") or (None, why no engine of this backend for this bundle can run here)."""
    if gpu is None:
        return None, reason
    if gpu.target not in TARGETS[backend]:
        return None, f"{gpu.target} is no target of {backend}"
    problem = tensorrt.plugin_problem(backend) if bundle.manifest.attention == "fused" else ""
    if problem:
        return None, problem
    return tensorrt.installed_version(backend)


def rebuild_command(bundle, engines, targets, **wider):
    """Return the command that builds a set of engines again, for `targets`, with the same shapes.

    wider: sizes that must fit in as well, name of an option (`batch`, `people`, `size`) -> numbers.
    """
    words = ["pidiff-export", "--into", str(bundle.path), "--engine", engines.backend, "--target", ",".join(targets)]
    scale = bundle.manifest.model.vae_scale_factor
    for option, graph, tensor, axis, unit in (("--batch", "vae_decoder", "latents", 0, 1), ("--people", "unet", "id_mask", 1, 1),
                                              ("--size", "vae_decoder", "latents", 2, scale)):
        if graph in engines.graphs:
            low, best, high = (shape[axis] * unit for shape in engines.graphs[graph].profiles[0][tensor])
            more = wider.get(option[2:], ())
            sizes = (min(low, *more), best, max(high, *more)) if more else (low, best, high)
            default = bundle.manifest.model.image_size if option == "--size" else 1
            if set(sizes) != {default}:
                words += [option, ":".join(map(str, sizes))]
    if any(engine.left_out for engine in engines.graphs.values()):
        words.append("--strip")
    return shlex.join(words)
