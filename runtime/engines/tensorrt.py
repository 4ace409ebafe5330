"""TensorRT and TensorRT-RTX, by one class: their Python modules have the same names for what is used here.

First what can be asked without a loaded engine: the installed version, and what TensorRT-RTX says about an engine's header.
"""

import importlib
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..cuda import DeviceMemory, HostMemory, Stream
from ..errors import EngineError, NotFinite, require
from . import ENGINES, rebound
from .tensorrt_context import Context

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}
_PLUGIN = ("PidiffIdentityAttention", "1", "pidiff")      # one of libpidiff_trt.so: name, version, namespace


def installed_version(backend):
    """Return (version, "") of the backend's Python module, or (None, why it cannot be used). Never raises."""
    _, _, name, install = ENGINES[backend]
    try:
        return importlib.import_module(name).__version__, ""
    except ImportError as e:        # also a library of its own that is missing
        missing = getattr(e, "name", None) == name
        return None, f"{name} is not installed ({install})" if missing else f"{name} cannot be imported: {e}"


def plugin_library():
    """Return where the library with the nodes of fused graphs is, built for TensorRT and installed beside the compiled core."""
    from pidiff import _C

    return Path(_C.__file__).parent / "lib" / "libpidiff_trt.so"


def plugin_problem(backend):
    """Return why an engine of a backend cannot be made of a fused graph or run here, "" if it can."""
    if backend != "tensorrt":
        return "the plug-in is for tensorrt only"
    return "" if plugin_library().is_file() else ("this pidiff has no libpidiff_trt.so, it was built without nvcc or the headers "
                                                  "of TensorRT 10.3 or newer")


def header_size(backend):
    """Return how many bytes of an engine `validity` reads, or None where the backend has no such question."""
    trt = importlib.import_module(ENGINES[backend][2])
    if not hasattr(trt.Runtime, "get_engine_validity"):
        return None
    return trt.Runtime(_logger(trt)).engine_header_size


def validity(backend, header):
    """Ask the backend about an engine's first bytes, without deserialising it.

    Returns ("valid" | "suboptimal" | "invalid", tuple of diagnostics in lower case, such as "old_cuda_driver").
    """
    trt = importlib.import_module(ENGINES[backend][2])
    verdict, bits = trt.Runtime(_logger(trt)).get_engine_validity(header)
    flags = getattr(trt, "EngineInvalidityDiagnostics", None)
    found = [name for name, flag in flags.__members__.items() if int(bits) & int(flag)] if flags else []
    return verdict.name.lower(), tuple(name.lower() for name in found)


class TensorRtEngine:
    """One deserialised engine (protocol: engines.DeviceEngine, but for the constructor).

    With `bind` every tensor has memory of its own, allocated once for a size: on the GPU, and page-locked on the host for what goes up
    or down in every run; where both share their memory the GPU works on the host's, and nothing is copied. Constant inputs
    lie in GPU memory, which the GPU caches. The first run after a change of shape or address is queued call by call; the
    second is captured, copies included, and from then on a run is one launch (`captured`), until something moves. What
    `bind_device` returns is an execution context of its own.

    backend: its name in ENGINES. data: the engine, as Bundle.engine returned it after checking its hash. spec: GraphSpec.
    profiles: those of its EngineFile. scratch: cuda.Scratch, shared by engines that never run at the same time.
    rebuild(shapes): returns the command that builds an engine for these input shapes. fused: the engine may hold nodes of the
    domain `pidiff`. left_out: None, or the .onnx file whose weights the engine lacks, and their bytes. Raises EngineError.
    """

    _graph = _context = _spare = _engine = _stream = _give_back = loop = None

    def __init__(self, backend, data, spec, profiles, scratch, rebuild, fused=False, left_out=None):
        self._trt, self._backend = importlib.import_module(ENGINES[backend][2]), backend
        self._spec, self._profiles, self._scratch, self._rebuild = spec, profiles, scratch, rebuild
        self._name, self._device, self._log = Path(spec.file).stem, scratch.device, _logger(self._trt)
        self._done = partial(_done, f"graph {self._name}", f"{backend} {self._trt.__version__}", self._log)
        self._slots, self._bound, self._staged = {}, {}, []
        self._capturable, self._captured_at = True, None
        self._stream = Stream(self._device)
        if fused:
            self._load_plugins()
        # Its file is about what it takes on the GPU for its weights, but for those that it lacks.
        onnx, missing = left_out or (None, 0)
        self._device.take(len(data) + missing, f"the engine of {self._name}")
        self._give_back = weakref.finalize(self, self._device.give, len(data) + missing)
        self._runtime = self._trt.Runtime(self._log)
        self._engine = self._done(self._runtime.deserialize_cuda_engine(data), "deserialise")
        if onnx:
            self._fill_in(onnx)
        self._check()
        self._spare = self._make_context()      # for whoever needs one first, so that an engine that has none is found now

    def inputs(self):
        return self._spec.inputs

    def outputs(self):
        return self._spec.outputs

    @property
    def device(self):
        return self._device

    @property
    def stream(self):
        return self._stream

    @property
    def captured(self):
        """Whether a run is one launch of a CUDA graph by now."""
        return self._graph is not None or bool(self.loop and any(graph for _, graph in self.loop.graphs.values()))

    def array(self, name, shape):
        """Return the array that a tensor has in host memory, to be bound next: it needs no copy. It stays the same one
        until another size is asked for or bound."""
        spec = self._spec.tensor(name)
        size = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
        return self._slot(name, size, False).host.array(shape, spec.dtype)

    def bind(self, tensors, constant=()):
        bound = rebound(self._spec, self._bound, tensors)
        shapes = {t.name: tuple(bound[t.name].shape) for t in self._spec.inputs}
        for output in self._spec.outputs:
            require(bound[output.name].flags.writeable, output.name, "be writable", "a read-only array", EngineError)
        profile = choose_profile(self._name, self._profiles, shapes, self._rebuild)
        self._device.use()
        self._bound = {}                # until everything below has worked
        self._context = self._context or self._take_context()
        self._context.set_shapes(profile, shapes, self._stream)
        for name in [n for n, slot in self._slots.items() if n in tensors and slot.memory.size != tensors[n].nbytes]:
            self._graph = None
            del self._slots[name]       # freed first: both at once may be too much
        self._check_memory(sum(a.nbytes for name, a in tensors.items() if name not in self._slots), self._context)
        for name, array in tensors.items():
            fixed = name in constant and name in shapes
            slot = self._slot(name, array.nbytes, fixed)
            if fixed:
                self._stream.upload(slot.memory, array)
        self._stream.synchronize()
        self._bound, self._staged = bound, []
        for name, slot in self._slots.items():
            if slot.host is not None and slot.host.host != bound[name].ctypes.data:
                self._staged.append((name in shapes, bound[name], slot.host.array(bound[name].shape, bound[name].dtype)))

    def bind_device(self, tensors):
        shapes = {t.name: tuple(tensors[t.name][1]) for t in self._spec.inputs}
        profile = choose_profile(self._name, self._profiles, shapes, self._rebuild)
        self._device.use()
        context = self._take_context()
        for name, (address, _) in tensors.items():
            context.set_address(name, address)
        context.set_shapes(profile, shapes, self._stream)
        return context

    def check_loop(self, size, shapes):
        shapes = {t.name: tuple(shapes[t.name]) for t in self._spec.inputs}
        self._device.use()
        context = self._take_context()
        context.set_shapes(choose_profile(self._name, self._profiles, shapes, self._rebuild), shapes, self._stream)
        self._spare = context           # for these shapes, which come next
        self._check_memory(size, context)

    def run(self, stream=None):
        require(self._bound, "tensors", "be bound before a run", "none", EngineError)
        self._device.use()
        for is_input, array, host in self._staged:
            if is_input:
                host[...] = array
        version = self._context.settle()
        if self._captured_at != version:
            self._graph, self._captured_at = None, version
        if self._graph is None and self._context.warm and self._capturable:
            self._capture()
        if self._graph is None:
            self._queue()
        else:
            self._graph.launch()
        self._stream.synchronize()
        self._context.warm = True
        for is_input, array, host in self._staged:
            if not is_input:
                array[...] = host
        for output in self._spec.outputs:
            if not np.isfinite(self._bound[output.name]).all():
                raise NotFinite(f"graph {self._name} must give finite numbers, got NaN or infinity in {output.name}", self._name,
                                {t.name: self._bound[t.name] for t in self._spec.inputs})

    def close(self):
        """Give everything back, users before what they use. The engine cannot be used any more."""
        if self.loop:
            self.loop.graphs.clear()
            self.loop.bindings.clear()
        self._bound, self._staged, self._graph, self._context, self._spare = {}, [], None, None, None
        self._engine = self._runtime = None
        self._slots, self.loop, self._stream, self._scratch = {}, None, None, None
        if self._give_back:
            self._give_back()           # once

    def __del__(self):
        self.close()

    def _load_plugins(self):
        """Make the nodes of fused graphs known to TensorRT; once in a process, since it refuses what it knows."""
        registry = self._trt.get_plugin_registry()
        if registry.get_creator(*_PLUGIN) is None:
            problem = plugin_problem(self._backend)
            require(not problem, f"graph {self._name}", f"have its plug-in for {self._backend}", problem, EngineError)
            self._done(registry.load_library(str(plugin_library())), "load its plug-in")

    def _fill_in(self, onnx):
        """Give the engine the weights that were left out of it, from the graph that it was made of."""
        refitter = self._trt.Refitter(self._engine, self._log)
        self._done(self._trt.OnnxParserRefitter(refitter, self._log).refit_from_file(str(onnx)), "read the weights that it lacks")
        self._done(refitter.refit_cuda_engine(), "take the weights that it lacks")

    def _check(self):
        """Compare the engine with what the manifest says about it."""
        trt, engine, specs = self._trt, self._engine, {t.name: t for t in (*self._spec.inputs, *self._spec.outputs)}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        require(set(names) == set(specs), f"engine of {self._name}", "have the tensors of its manifest",
                f"{sorted(set(names) ^ set(specs))} in one of them only", EngineError)
        for name, spec in specs.items():
            mode = trt.TensorIOMode.INPUT if spec in self._spec.inputs else trt.TensorIOMode.OUTPUT
            kind = engine.get_tensor_dtype(name).name
            fits = engine.get_tensor_mode(name) == mode and engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
            require(fits and _DTYPES.get(kind) == spec.dtype, f"engine of {self._name}", f"take or give {name} in {spec.dtype}",
                    kind, EngineError)
        built = [{t.name: tuple(map(tuple, engine.get_tensor_profile_shape(t.name, i))) for t in self._spec.inputs}
                 for i in range(engine.num_optimization_profiles)]
        require(built == list(self._profiles), f"engine of {self._name}", "have the profiles of its manifest", built, EngineError)

    def _check_memory(self, size, context):
        """Raise PidiffError if `size` bytes of tensors and a context's scratch memory are more than may be used; none is there yet."""
        self._device.check(size + self._scratch.growth(context.scratch_size), f"scratch memory and tensors of {self._name}")

    def _take_context(self):
        """Return a Context that nobody else uses."""
        context, self._spare = self._spare or self._make_context(), None
        return context

    def _make_context(self):
        """A Context whose scratch memory is ours to give. In TensorRT-RTX also: kernels for a new shape are compiled at once,
        not in the background, for a captured graph would keep the slower ones for ever."""
        trt, engine = self._trt, self._engine
        ours = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            made = engine.create_execution_context(ours)
            return Context(self._done(made, "get an execution context"), self._scratch, self._done)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(ours)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        made = engine.create_execution_context(config)
        return Context(self._done(made, "get an execution context"), self._scratch, self._done)

    def _slot(self, name, size, constant):
        """Return the memory of a tensor, made anew if the size is another."""
        self._context = self._context or self._take_context()
        slot = self._slots.get(name)
        if slot is None or slot.memory.size != size or (slot.host is None) != constant:
            self._graph, self._bound = None, {}
            host = None if constant else HostMemory(self._device, size)
            memory = host if host and self._device.integrated else DeviceMemory(self._device, size)
            self._context.set_address(name, memory.address)
            slot = self._slots[name] = _Slot(memory, host)
        return slot

    def _queue(self):
        """Queue the copies up, the engine and the copies down."""
        moved = [(t.name, s) for t in (*self._spec.inputs, *self._spec.outputs)
                 if (s := self._slots[t.name]).host is not None and s.host is not s.memory]
        for name, slot in moved:
            if name in self._context.shapes:
                self._stream.upload(slot.memory, np.asarray(slot.host))
        self._context.queue(self._stream)
        for name, slot in moved:
            if name not in self._context.shapes:
                self._stream.download(np.asarray(slot.host), slot.memory)

    def _capture(self):
        """Capture a run. An engine that cannot be captured is queued call by call for ever."""
        self._capturable = self._context.capturable(self._stream)
        if self._capturable:
            try:
                self._graph = self._stream.capture(self._queue)
            except EngineError:
                self._capturable = False


def _done(graph, backend, log, answer, verb):
    """Return TensorRT's answer; EngineError with the first error that it logged if it is None or False."""
    if answer is None or answer is False:
        raise EngineError(f"{graph} must {verb} in {backend}, got: " + (log.first or "no reason given"))
    return answer


def choose_profile(graph, profiles, shapes, rebuild):
    """Return the number of the profile that takes these input shapes and was tuned for the nearest; rows tell them apart.

    EngineError where there is none, with the command that builds one, `rebuild(shapes)`.
    """
    fits = lambda p, name: all(a <= n <= b for a, n, b in zip(p[name][0], shapes[name], p[name][2]))
    far = lambda p: sum(abs(n - best) for name in p for n, best in zip(shapes[name], p[name][1]))
    wrong = [[name for name in p if not fits(p, name)] for p in profiles]
    good = [i for i, names in enumerate(wrong) if not names]
    if not good:
        got = ", ".join(f"{name} {list(shapes[name])}" for name in min(wrong, key=len))
        raise EngineError(f"engine of {graph} must be built for the shapes that it is given, got {got}; build it with: "
                          + rebuild(shapes))
    return min(good, key=lambda i: far(profiles[i]))


@dataclass(frozen=True)
class _Slot:
    """Memory of one tensor. memory: what the engine uses. host: what the processor uses, None for a constant; the same as
    `memory` where both share it."""

    memory: DeviceMemory | HostMemory
    host: HostMemory | None


def _logger(trt):
    """A logger that is silent and keeps the first error; those after it are its consequences."""
    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.first = ""

        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.ERROR and not self.first:
                self.first = " ".join(message.split())[:300]

    return Logger()
