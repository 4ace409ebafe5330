"""The compiled engines of a bundle that run on this machine: judged by the preflight, then loaded when they are needed."""

import warnings

from .cuda import Device, Scratch
from .engine_specs import BACKENDS
from .engines import fall_back, load_engine
from .engines.tensorrt import choose_profile
from .errors import EngineError
from .preflight import preflight, rebuild_command


class CompiledEngines:
    """Engines of one backend. `graph in engines`: whether a graph has one; the others run on ONNX Runtime.

    found: Preflight of the bundle. limit: bytes of the GPU's memory that they may take together, None for all. Raises EngineError
    where the bundle holds none, or one that cannot run here: the sentence says why, and how to build it again.
    """

    def __init__(self, bundle, backend, found=None, limit=None):
        self.backend, self._bundle = backend, bundle
        self._sets = _usable(bundle, backend, found or preflight(bundle))
        self._scratch = Scratch(Device(limit))

    def __contains__(self, graph):
        return graph in self._sets

    def load(self, graph):
        """Return the Engine of a graph. Its file is hashed here, and what was hashed is what TensorRT gets. PidiffError, before it is
        read, if it is more than the limit."""
        engines, spec = self._sets[graph], self._bundle.graph(graph)
        engine = engines.graphs[graph]
        self._scratch.device.check(self._bundle.manifest.files[engine.file].size + engine.left_out, f"the engine of {graph}")
        return load_engine(self.backend)(
            self.backend, self._bundle.engine(engines.id, graph), spec, engine.profiles, self._scratch,
            lambda shapes: self._command(engines, graph, shapes), self._bundle.manifest.attention == "fused",
            (self._bundle.file(spec.file), engine.left_out) if engine.left_out else None)

    def most_images(self, guided):
        """Return the largest number of pictures that UNet and VAE decoder take at once, None for any."""
        limits = [max(profile["latents"][2][0] for profile in self._sets[graph].graphs[graph].profiles) // rows
                  for graph, rows in (("unet", 2 if guided else 1), ("vae_decoder", 1)) if graph in self._sets]
        return max(1, min(limits)) if limits else None

    def check_images(self, latents):
        """Raise EngineError unless the VAE decoder takes latents of this shape: known before the steps are made."""
        graph = "vae_decoder"
        if graph in self._sets:
            engines = self._sets[graph]
            choose_profile(graph, engines.graphs[graph].profiles, {"latents": latents}, lambda s: self._command(engines, graph, s))

    def _command(self, engines, graph, shapes):
        """The command that builds the engines of a set for these input shapes too."""
        sizes = {}
        for tensor in self._bundle.graph(graph).inputs:
            for axis, size in zip(tensor.shape, shapes[tensor.name]):
                sizes.setdefault(axis, set()).add(size)
        scale, rows = self._bundle.manifest.model.vae_scale_factor, max(sizes.get("B", {1}))
        # An even number of the UNet's rows is what guided steps of half as many pictures have.
        images = rows // 2 if graph == "unet" and rows % 2 == 0 else rows
        pixels = {n * scale for axis in "hw" for n in sizes.get(axis, ())}
        return rebuild_command(self._bundle, engines, engines.targets, batch={images}, people=sizes.get("P", ()), size=pixels)


def find_compiled(bundle, limit=None):
    """Return the CompiledEngines that `auto` takes, None where no engine of the bundle's UNet runs here.

    Warns where a GPU is here and an engine was built, but cannot be used.
    """
    for backend in BACKENDS:
        if any(e.backend == backend for e in bundle.manifest.engines.values()):
            found = preflight(bundle)
            if found.gpu is None:
                return None
            try:
                return CompiledEngines(bundle, backend, found, limit)
            except EngineError as e:
                fall_back(backend, e)
    return None


def _usable(bundle, backend, found):
    """Return graph -> EngineSet."""
    if not any(e.backend == backend for e in bundle.manifest.engines.values()):
        raise EngineError(f"bundle must hold engines of {backend}, got {bundle.path} without any: build them with: "
                          f"pidiff-export --into {bundle.path} --engine {backend}")
    sets = {}
    for graph in bundle.manifest.graphs:
        best = found.best(graph, backend)
        if best is None or not best.engines:
            continue
        if best.verdict not in ("ok", "slower"):
            problem = best.why if best.verdict == "fallback" else best     # nothing is fallen back to by itself here
            raise EngineError(f"engine {backend} must run {graph} on this machine, got: {problem}")
        sets[graph] = bundle.manifest.engines[best.engines]
        slower = best if best.verdict == "slower" else None
        if slower and len(sets) == 1:
            warnings.warn(f"engine {backend} is {slower}", stacklevel=4)
    return sets
