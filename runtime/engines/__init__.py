"""Engines run graphs. One class per vendor; the protocol is all that the rest of the runtime knows about them."""

import importlib
import importlib.util
import platform
import warnings
from typing import Protocol

import numpy as np

from ..errors import EngineError

# name -> (module beside this file, class, the vendor's module, how to install it)
ENGINES = {
    "onnxruntime": ("onnxruntime", "OnnxRuntimeEngine", "onnxruntime", "pip install onnxruntime"),
    "openvino": ("openvino", "OpenVinoEngine", "openvino", "pip install 'pidiff-edge[openvino]'"),
    "tensorrt-rtx": ("tensorrt", "TensorRtEngine", "tensorrt_rtx", "pip install 'pidiff-edge[rtx]'"),
    "tensorrt": ("tensorrt", "TensorRtEngine", "tensorrt", "it comes with JetPack or NVIDIA's TensorRT packages"),
}
AUTO = "auto"  # the name that `choose_engine` turns into one of the above
OPENVINO_BYTES = 512 << 20  # a smaller model has drawn its picture in ONNX Runtime before OpenVINO has compiled it
PRECISIONS = ("auto", "full")


class Engine(Protocol):
    """One loaded graph. Constructor: `Engine(path, spec, device="cpu", threads=None, fused=False, static=False,
    precision="full", lean=False)`.

    path: the .onnx file. spec: its bundle.GraphSpec. device: "cpu" or "cuda". threads: cores to use, None for all.
    fused: the graph holds nodes of the domain `pidiff`. static: the same few shapes come again and again, so that it is
    worth compiling for each of them. precision: "full" computes in no fewer bits than the graph is written in, "auto"
    may where the processor is faster then. lean: memory counts more than time. An engine that gains nothing by one of the last
    three does the same for all its values. Raises EngineError. TensorRT's takes a compiled engine in place of a path (compiled.py), ONNX
    Runtime's also `limits` (device_budget.py).

    One that runs on the processor also has `loading(weights, static, precision, lean=True)`, a static method: bytes at the peak of loading a
    graph whose weights are so many bytes in float32 (memory.Predictor), with the argument `lean` that it will have. An engine whose device has memory of its own may also have `array(name, shape)`, see `new_array`. One that
    draws on the processor may have an attribute `copies`, set before `bind`: `latents` is so many times the same rows, one after another
    (2 with guidance, 1 without), which is all that it looks at.
    """

    def inputs(self):
        """Return the tuple of TensorSpec of the inputs; axes may have names instead of sizes."""

    def outputs(self):
        """Return the tuple of TensorSpec of the outputs."""

    def bind(self, tensors, constant=()):
        """Set the C-contiguous arrays that later runs read and write, by name.

        The first call names every input and output; a later one may name a few. Arrays are used in place: write into
        them between runs. Names in `constant` promise not to change before they are bound again, so that an engine on
        another device copies them once. May compile for new shapes. Raises EngineError for a wrong name, dtype or shape.
        """

    def run(self, stream=None):
        """Run once on the bound arrays. Returns when the outputs are there, or, with a stream, when work is queued."""


class DeviceEngine(Engine, Protocol):
    """An engine whose tensors can stay on a CUDA device between runs: what device_loop.py needs.

    device: cuda.Device, None where this engine has none. stream: the cuda.Stream that its work is queued on. loop: where the
    step loop keeps its memory from picture to picture; None at first.
    """

    def bind_device(self, tensors):
        """Return a DeviceBinding to memory on the device. Other bindings, and `bind`, are not touched.

        tensors: for every input and output, by name, (address, shape); the dtype is that of its TensorSpec, an address a multiple
        of 256. May compile for new shapes. Raises EngineError.
        """

    def check_loop(self, size, shapes):
        """Raise PidiffError if `size` bytes for the step loop, and what runs on these shapes of inputs need beside them, are more
        memory than the engine may have. Called before the loop allocates."""


class DeviceBinding(Protocol):
    """An engine bound to memory on its device, for some shapes. `queue` runs it, once `settle` was called."""

    def settle(self):
        """Make ready for `queue`; returns a number that changes whenever what was captured before must not be launched again."""

    def capturable(self, stream):
        """Return whether `queue` can be captured on a stream, after it was queued once."""

    def queue(self, stream):
        """Queue one run on the engine's stream. Raises EngineError."""


def choose_engine(device, size):
    """Return the name of the engine that "auto" stands for, on a device, for a bundle of `size` bytes.

    OpenVINO where it is installed and faster: on x86-64 processors, for bundles of `OPENVINO_BYTES` and more. Else ONNX
    Runtime.
    """
    fast = device == "cpu" and platform.machine() in ("x86_64", "AMD64") and size >= OPENVINO_BYTES
    if fast and importlib.util.find_spec("openvino"):
        problem = load_engine("openvino").problem()
        if problem is None:
            return "openvino"
        fall_back("openvino", problem)
    return "onnxruntime"


def fall_back(name, problem):
    """Say that `auto` does without the engine `name` because of a problem, and return the engine that it takes instead."""
    warnings.warn(f"engine {name} cannot be used: {problem}; onnxruntime is used instead", stacklevel=3)
    return "onnxruntime"


def load_engine(name):
    """Return the Engine class called `name`; EngineError lists what is installed when there is none."""
    if name not in ENGINES:
        raise EngineError(f"engine must be one of {', '.join((AUTO, *ENGINES))} (installed: {_installed()}), got {name!r}")
    module, cls, vendor, install = ENGINES[name]
    if importlib.util.find_spec(vendor) is None:
        raise EngineError(f"engine must be installed (installed: {_installed()}), got {name!r}: {install}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)


def rebound(spec, bound, tensors):
    """Return the arrays bound after `tensors` come over those `bound` before, checked against a GraphSpec: none is missing."""
    bound, specs = {**bound, **tensors}, (*spec.inputs, *spec.outputs)
    check_tensors(specs, bound)
    missing = [t.name for t in specs if t.name not in bound]
    if missing:
        raise EngineError(f"tensors must include {', '.join(missing)}, got {sorted(bound)}")
    return bound


def check_names(path, spec, have):
    """Check that a graph has the inputs and outputs of its GraphSpec; `have`: the names that the engine found."""
    want = {t.name for t in (*spec.inputs, *spec.outputs)}
    if set(have) != want:
        raise EngineError(f"{path.name} must have the tensors of its manifest, "
                          f"got {sorted(set(have) ^ want)} in one of them only")


def check_tensors(specs, tensors):
    """Check arrays against TensorSpecs: names, dtypes, sizes, contiguity, and one size per axis name."""
    axes, by_name = {}, {s.name: s for s in specs}
    for name, array in tensors.items():
        spec = by_name.get(name)
        if spec is None:
            raise EngineError(f"tensors must be among {', '.join(by_name)}, got {name!r}")
        fits = len(array.shape) == len(spec.shape) and all(
            have == (want if isinstance(want, int) else axes.setdefault(want, have))
            for have, want in zip(array.shape, spec.shape))
        if not fits or array.dtype.name != spec.dtype or not array.flags.c_contiguous:
            raise EngineError(f"{name} must be a contiguous {list(spec.shape)} {spec.dtype} array, "
                              f"got {list(array.shape)} {array.dtype.name}")


def _installed():
    names = [n for n, (_, _, vendor, _) in ENGINES.items() if importlib.util.find_spec(vendor)]
    return ", ".join(names) or "none"


def new_array(engine, spec, shape):
    """Return zeros [shape] to be bound as the tensor of a TensorSpec, in memory that the engine's device copies from and to
    directly where the engine has such memory (`array`). That memory belongs to the engine: copy what you keep."""
    make = getattr(engine, "array", None)
    array = make(spec.name, shape) if make else np.empty(shape, spec.dtype)
    array[...] = 0
    return array


def call(engine, inputs, **axes):
    """Run once on fresh buffers (`bind_new`); returns name -> output array."""
    outputs = bind_new(engine, inputs, **axes)
    engine.run()
    return outputs


def bind_new(engine, inputs, **axes):
    """Bind the inputs, cast to the graph's dtypes, and fresh outputs, name -> array, which are returned.

    Output axes with a name get their size from the inputs' axes of the same name, or from `axes`.
    """
    arrays = {}
    for spec in engine.inputs():
        array = np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype)
        arrays[spec.name] = array
        axes.update({a: n for a, n in zip(spec.shape, array.shape) if isinstance(a, str)})
    outputs = {spec.name: np.zeros([axes.get(a, a) for a in spec.shape], spec.dtype) for spec in engine.outputs()}
    engine.bind({**arrays, **outputs})
    return outputs
