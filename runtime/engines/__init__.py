"""Engines run graphs. One class per vendor; the protocol is all that the rest of the runtime knows about them."""

import importlib
import importlib.util
from typing import Protocol

import numpy as np

from ..errors import EngineError

# name -> (module beside this file, class, the vendor's module, how to install it)
ENGINES = {
    "onnxruntime": ("onnxruntime", "OnnxRuntimeEngine", "onnxruntime", "pip install onnxruntime"),
}


class Engine(Protocol):
    """One loaded graph. Constructor: `Engine(path, spec, device="cpu", threads=None, fused=False)`.

    path: the .onnx file. spec: its bundle.GraphSpec. device: "cpu" or "cuda". threads: cores to use, None for all.
    fused: the graph holds nodes of the domain `pidiff`. Raises EngineError.
    """

    def inputs(self):
        """Return the tuple of TensorSpec of the inputs; axes may have names instead of sizes."""

    def outputs(self):
        """Return the tuple of TensorSpec of the outputs."""

    def bind(self, tensors, constant=()):
        """Set the C-contiguous arrays that later runs read and write, by name.

        The first call names every input and output; a later one may name a few. Arrays are used in place: write into
        them between runs. Names in `constant` promise not to change before they are bound again, so that an engine on
        another device copies them once. Raises EngineError for a wrong name, dtype or shape.
        """

    def run(self, stream=None):
        """Run once on the bound arrays. Returns when the outputs are there, or, with a stream, when work is queued."""


def load_engine(name):
    """Return the Engine class called `name`; EngineError lists what is installed when there is none."""
    if name not in ENGINES:
        raise EngineError(f"engine must be one of {', '.join(ENGINES)} (installed: {_installed()}), got {name!r}")
    module, cls, vendor, install = ENGINES[name]
    if importlib.util.find_spec(vendor) is None:
        raise EngineError(f"engine must be installed (installed: {_installed()}), got {name!r}: {install}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)


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


def call(engine, inputs, **axes):
    """Run once on fresh buffers: casts the inputs, returns name -> output array.

    Output axes with a name get their size from the inputs' axes of the same name, or from `axes`.
    """
    arrays = {}
    for spec in engine.inputs():
        array = np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype)
        arrays[spec.name] = array
        axes.update({a: n for a, n in zip(spec.shape, array.shape) if isinstance(a, str)})
    outputs = {spec.name: np.zeros([axes.get(a, a) for a in spec.shape], spec.dtype) for spec in engine.outputs()}
    engine.bind({**arrays, **outputs})
    engine.run()
    return outputs
