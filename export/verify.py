"""Parity: every graph in ONNX Runtime, and in other engines that are here, against the PyTorch model, on the same inputs.

The reference is the model as it was trained: float32, unfolded identity branch, timestep and text inside the UNet. So
these numbers include folding, the tables outside the step loop, the custom nodes and the number format.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pidiff.runtime.bundle import GraphSpec
from pidiff.runtime.engine_specs import BACKENDS
from pidiff.runtime.engines import ENGINES, load_engine
from pidiff.runtime.pipeline import HOT_GRAPHS

from .weights import ExportError

# Largest allowed error, relative to the largest value of the reference.
BOUNDS = {"fp32": 2e-4, "fp16": 3e-2, "int8": 0.2}
_THREADS = 2


@dataclass(frozen=True)
class Case:
    """Inputs of a graph (in its dtypes) and what PyTorch makes of them (float32)."""

    inputs: dict[str, Tensor]
    expected: tuple[Tensor, ...]


@dataclass(frozen=True)
class Parity:
    """Largest and mean absolute error over all outputs, and the largest relative to the reference's largest value."""

    max_abs: float
    mean_abs: float
    max_rel: float

    def to_dict(self) -> dict[str, float]:
        return {"max_abs": self.max_abs, "mean_abs": self.mean_abs, "max_rel": self.max_rel}


def custom_op_library() -> Path:
    """The compiled library with the ONNX nodes of domain `pidiff`."""
    from pidiff import _C

    path = Path(_C.__file__).parent / "lib" / "libpidiff_ort.so"
    if not path.is_file():
        raise ExportError(f"attention must be standard without the custom-op library, got fused and no {path}")
    return path


def open_session(path: Path, fused: bool):
    """ONNX Runtime session on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = _THREADS, 3
    # Packed copies of the weights double the memory and change nothing in the result.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if fused:
        options.register_custom_ops_library(str(custom_op_library()))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_graph(path: Path, spec: GraphSpec, inputs: dict[str, Tensor], fused: bool) -> list[np.ndarray]:
    """Outputs of an .onnx file, in its own order; ExportError in one sentence where it cannot run."""
    try:
        session = open_session(path, fused)
        return session.run([t.name for t in spec.outputs], {k: v.numpy() for k, v in inputs.items()})
    except ExportError:
        raise
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types
        text = " ".join(str(error).split())[:300]
        raise ExportError(f"graph {path.stem} must run in ONNX Runtime, got {text}") from error


def verify_graph(path: Path, spec: GraphSpec, case: Case, precision: str, fused: bool) -> Parity:
    """Run, compare, and raise ExportError where an output is not finite or off by more than `BOUNDS[precision]`."""
    parity = _compare(path.stem, spec, run_graph(path, spec, case.inputs, fused), case, precision)
    if parity.max_rel > BOUNDS[precision]:
        raise ExportError(f"graph {path.stem} must agree with PyTorch to {BOUNDS[precision]:g} of the largest value, "
                          f"got {parity.max_rel:.3g}")
    return parity


def other_engines() -> list[str]:
    """The runtime's engines beside ONNX Runtime that run a graph as it is and work on this machine."""
    return [n for n, (_, _, vendor, _) in ENGINES.items()
            if n not in ("onnxruntime", *BACKENDS) and importlib.util.find_spec(vendor) and load_engine(n).problem() is None]


def measure_engine(engine: str, path: Path, spec: GraphSpec, case: Case, fused: bool) -> tuple[Parity, str]:
    """Parity of a graph in one of the runtime's engines, loaded as `Pipeline` loads it, and the number format it computed in.

    Raises PidiffError or ExportError where it cannot run there; nothing is wrong with the bundle then.
    """
    precision = "auto" if path.stem in HOT_GRAPHS else "full"
    cls = load_engine(engine)
    loaded = cls(path, spec, threads=_THREADS, fused=fused, static=path.stem in HOT_GRAPHS, precision=precision)
    inputs = {t.name: np.ascontiguousarray(case.inputs[t.name].numpy()) for t in spec.inputs}
    outputs = {t.name: np.zeros(tuple(e.shape), t.dtype) for t, e in zip(spec.outputs, case.expected, strict=True)}
    loaded.bind({**inputs, **outputs})
    loaded.run()
    return _compare(path.stem, spec, list(outputs.values()), case, ""), cls.computes_in(precision)


def _compare(graph: str, spec: GraphSpec, outputs: list[np.ndarray], case: Case, precision: str) -> Parity:
    worst = mean = relative = 0.0
    for tensor, output, expected in zip(spec.outputs, outputs, case.expected, strict=True):
        reference = expected.numpy()
        if not np.isfinite(output).all():
            overflow = ", an overflow in float16: export without --fp16" if precision == "fp16" else ""
            raise ExportError(f"graph {graph} must give finite numbers, got NaN or infinity in {tensor.name}{overflow}")
        if output.shape != reference.shape:
            raise ExportError(f"graph {graph} {tensor.name} must have shape {reference.shape}, got {output.shape}")
        error = np.abs(output.astype(np.float64) - reference)
        worst, mean = max(worst, float(error.max())), max(mean, float(error.mean()))
        relative = max(relative, float(error.max() / max(np.abs(reference).max(), 1e-6)))
    return Parity(worst, mean, relative)


def table(parity: dict[str, Parity]) -> str:
    """The parity figures as text."""
    lines = [f"{'graph':<18}{'max abs':>11}{'mean abs':>11}{'max rel':>11}"]
    lines += [f"{n:<18}{p.max_abs:>11.2e}{p.mean_abs:>11.2e}{p.max_rel:>11.2e}" for n, p in parity.items()]
    return "\n".join(lines)
