"""OpenVINO engine: the fast choice on x86-64 processors, with bfloat16 where they multiply it themselves."""

import math
import sys
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from ..errors import EngineError, require
from ..files import private_cache, trim_folder
from ..memory import PACKED, MappedPages, available_memory, give_back
from . import check_names, rebound
from .openvino_attention import use_attention
from .openvino_convolution import MORE, faster_kernel, use_convolution
from .openvino_gates import split_gates
from .openvino_group_norm import use_group_norm
from .openvino_linear import use_linear
from .openvino_node import Kernels
from .openvino_ops import core
from .openvino_rows import ROWS, share_rows
from .openvino_weights import rewritten
from .packed_weights import PackedWeights

KEPT_SHAPES = 2  # compiled graphs kept at once, with their own packed weights each (not those of our kernels): a full batch and the last, smaller one
# From here on weights are mapped from a file in the format of the arithmetic, and our kernels take what OpenVINO is slow at; and, where memory
# counts more than time, a graph is packed once for all numbers of pictures. Compiled for one of them, Stable Diffusion's UNet is up to a third faster
# and takes 1.7 GB for each, in float32 3.4. Graphs that draw are large earlier: our kernels are for them, and what they hold beside weights is more.
LARGE_BYTES, LARGE_DRAWING_BYTES = 256 << 20, 64 << 20
# Bytes at the peak per byte of float32 weights, of a large graph in float32 and in bfloat16: packed while mapped pages are dropped (on
# Linux, from the cache), or beside the packed ones; and for each other shape of a small graph.
MAPPED, UNMAPPED, ANOTHER_SHAPE = (1.4, 0.65), (PACKED, 1.15), 2.1


class OpenVinoEngine:
    """One compiled graph that works on the caller's memory (protocol: engines.Engine).

    A static graph is compiled for every shape that is bound, the last `KEPT_SHAPES` of them are kept, of a large one as many as the machine
    has free memory for; a large one for any batch where `lean` asks for it, memory is short, or from the number of pictures on that is one
    too many; another one is compiled once for all shapes when it is loaded. Compiled graphs, but large ones, also go into the user's cache
    (files.private_cache).
    """

    copies = 1      # see engines.Engine

    def __init__(self, path, spec, device="cpu", threads=None, fused=False, static=False, precision="full", lean=False):
        problem = self.problem()
        require(problem is None, "engine", "work on this machine", f"'openvino': {problem}", EngineError)
        import openvino

        require(device == "cpu", "device", "be cpu with openvino", repr(device), EngineError)
        self._ov, self._spec, self._static = openvino, spec, static
        self._config, self._cache = _config(threads, precision), private_cache("openvino")
        self._bound, self._given, self._request, self._requests, self._ran = {}, {}, None, OrderedDict(), set()
        self._model = self._try("load", lambda: core().read_model(path))
        check_names(Path(path), spec, _names(self._model, spec))
        self._large = large = _is_large(sum(op.get_byte_size() for op in _constants(self._model)), static)
        self._any_batch, self._most, self._packing, self._packed = False, KEPT_SHAPES, nullcontext, PackedWeights(path, self._cache)
        if large:
            with _mapped(self._model).dropped():
                kind = self._config["INFERENCE_PRECISION_HINT"]
                self._model = self._try("load", lambda: rewritten(self._model, path, self._cache, kind)) or self._model
            self._packing = _mapped(self._model).dropped
            fitting = _fitting(self._model, kind)
            self._any_batch, self._most = static and (lean or not fitting), fitting or KEPT_SHAPES
            if self._cache:
                trim_folder(self._cache)
            self._cache = None      # compiled in seconds; and OpenVINO would read `use_attention`' nodes back without what they were made with
            give_back()
        self._kept = self._try("load", lambda: split_gates(self._model)) if large else None
        self._shares = static and large and self._try("load", lambda: share_rows(self._model))
        if not static:
            self._request_for({})
            self._model = None

    @staticmethod
    def problem():
        """Return why OpenVINO cannot be used on this machine, None where it can."""
        try:
            core().get_property("CPU", "FULL_DEVICE_NAME")
        except Exception as e:  # a broken installation raises whatever it likes
            return _sentence(e)

    @staticmethod
    def computes_in(precision):
        """Return the number format that UNet and VAE decoder are computed in here: "bfloat16" or "float32"."""
        return "bfloat16" if _config(None, precision)["INFERENCE_PRECISION_HINT"] == "bf16" else "float32"

    @staticmethod
    def loading(weights, static, precision, lean=True):
        """See engines.Engine."""
        if not _is_large(weights // 2, static):
            return int((PACKED + ANOTHER_SHAPE * (KEPT_SHAPES - 1) * static) * weights)
        narrow = static and OpenVinoEngine.computes_in(precision) == "bfloat16"
        mapped = sys.platform == "linux" and private_cache("openvino")
        more = MORE[narrow] if static and not lean and faster_kernel(narrow) else 0
        return int(((MAPPED if mapped else UNMAPPED)[narrow] + more) * weights)

    def inputs(self):
        return self._spec.inputs

    def outputs(self):
        return self._spec.outputs

    def bind(self, tensors, constant=()):
        bound = rebound(self._spec, self._bound, tensors)
        for output in self._spec.outputs:
            require(bound[output.name].flags.writeable, output.name, "be writable", "a read-only array", EngineError)
        given = bound | (self._rows(bound["latents"]) if self._shares else {})
        request = self._request_for(given)
        for name in given if request is not self._request else {*tensors, *(given.keys() - bound.keys())}:
            tensor = self._ov.Tensor(_shared(given[name]), shared_memory=True)
            self._try("take its tensors", lambda: request.set_tensor(name, tensor))
        self._bound, self._given, self._request = bound, given, request  # keeps the arrays alive

    def run(self, stream=None):
        require(self._request is not None, "tensors", "be bound before a run", "none", EngineError)
        shapes = tuple(array.shape for array in self._given.values())
        with nullcontext() if shapes in self._ran else self._packing():     # what is compiled for any batch packs its weights when it runs
            self._try("run", lambda: self._request.infer(share_outputs=True))  # shared: the bound arrays, not copies of them
        self._ran.add(shapes)

    def _rows(self, latents):
        """Return what a graph of `share_rows` takes for latents that are `copies` times the same rows."""
        count = len(latents) // self.copies
        return {"latents": latents[:count], ROWS: np.tile(np.arange(count), self.copies)}

    def _request_for(self, given):
        """Return the inference request that is compiled for the shapes of these arrays."""
        shapes, alike = self._shapes(given)
        key = alike, tuple(shapes.values())
        if self._large and self._static and key not in self._requests and sum(kept == alike for kept, _ in self._requests) == self._most:
            self._any_batch = True      # numbers of pictures vary: compiling for each would take longer than it gains
            self._requests.clear()
            self._request = None        # its memory is needed
            shapes, _ = self._shapes(given)
            key = alike, alike
        if key not in self._requests:
            while len(self._requests) >= self._most:
                self._requests.popitem(last=False)
            self._requests[key] = self._try("compile", lambda: self._compile(shapes))
        self._requests.move_to_end(key)
        return self._requests[key]

    def _shapes(self, given):
        """Return what each input is compiled for, by name, -1 for any size; and the shapes that all share that differ in the number of pictures alone."""
        axes = {t.name: t.shape for t in self._spec.inputs if self._static} | ({ROWS: "B"} if self._shares else {})
        alike = {name: tuple(-1 if axis == "B" else n for axis, n in zip(named, given[name].shape)) for name, named in axes.items()}
        return alike if self._any_batch else {name: given[name].shape for name in axes}, tuple(alike.values())

    def _compile(self, shapes):
        model, kernels = self._model, None
        config = {**self._config, "CACHE_DIR": str(self._cache)} if self._cache else self._config
        with self._packing():
            if shapes:
                model = model.clone()
                model.reshape({name: list(shape) for name, shape in shapes.items()})
                if self._large:
                    kernels = self._use_kernels(model)
                    give_back()     # what packing took
            compiled = core().compile_model(model, "CPU", config)
        if kernels:
            kernels.follow(compiled)
        if self._cache and not compiled.get_property("LOADED_FROM_CACHE"):
            trim_folder(self._cache)
        request = compiled.create_infer_request()
        request.kernels = kernels       # they live as long
        return request

    def _use_kernels(self, model):
        """Give our kernels what they are faster at; returns the Kernels."""
        rounding, kernels = self._config["INFERENCE_PRECISION_HINT"] == "bf16", Kernels()
        use_attention(model, rounding, kernels)
        use_convolution(model, rounding, kernels, self._packed, self._any_batch)    # first: a normalisation would take its bias
        use_linear(model, rounding, kernels, self._packed)
        faster, one_shape = faster_kernel(rounding), not self._any_batch
        if rounding and faster or one_shape and (rounding or faster):
            use_group_norm(model, kernels)      # where channels lie together: between our convolutions, or OpenVINO's in bfloat16, compiled for one shape
        return kernels

    def _try(self, verb, work):
        try:
            return work()
        except Exception as e:  # OpenVINO raises RuntimeError for everything
            raise EngineError(f"{self._spec.file} must {verb} in OpenVINO {self._ov.__version__.split('-')[0]}, "
                              f"got: {_sentence(e)}") from e


def _config(threads, precision):
    """Compile options. bfloat16 only where it is OpenVINO's own default: where the processor has instructions for it.
    float16, its default on some others, is never taken: activations of Stable Diffusion overflow it."""
    native = core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string() == "bf16"
    low = precision == "auto" and native
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if low else "f32",
            "EXECUTION_MODE_HINT": "PERFORMANCE" if low else "ACCURACY",
            **({"INFERENCE_NUM_THREADS": threads} if threads else {})}


def _is_large(size, static):
    return size >= (LARGE_DRAWING_BYTES if static else LARGE_BYTES)


def _names(model, spec):
    """Return the names of a model's inputs and outputs, those of the spec where a tensor has several."""
    return [next(filter(spec.tensor, port.names), port.any_name) for port in (*model.inputs, *model.outputs)]


def _constants(model):
    return [op for op in model.get_ops() if op.get_type_name() == "Constant"]


def _fitting(model, kind):
    """Return how many compiled graphs the machine has free memory for, `KEPT_SHAPES` at most; packing takes as much as one."""
    packed = sum(math.prod(op.get_output_shape(0)) for op in _constants(model)) * (2 if kind == "bf16" else 4)
    room = available_memory()
    return KEPT_SHAPES if room is None else max(0, min(KEPT_SHAPES, room // max(packed, 1) - 1))


def _mapped(model):
    return MappedPages([op.data for op in _constants(model)])


def _shared(array):
    """Return the array itself, or for a read-only one (which OpenVINO refuses as an input) its memory as a writable one."""
    if array.flags.writeable:
        return array
    alias = type("Alias", (), {"__array_interface__": {**array.__array_interface__, "data": (array.ctypes.data, False)}})
    return np.asarray(alias())


def _sentence(error):
    """Return what an exception says without the lines that name OpenVINO's source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check '", "Caught exception")))
    return (text or str(error).strip() or type(error).__name__)[:300]
