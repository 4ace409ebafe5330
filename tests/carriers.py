"""What attention runs through: every implementation of the core, and all that carries them to a user."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Callable

import numpy as np
import pytest

import pidiff._C as core
from references import bfloat16

Array = np.ndarray


def onnx_session(
    op: str, inputs: list[str], outputs: list[str], dtype: np.dtype, precision: str | None = None, **attributes: int
):
    """An ONNX Runtime session with one node of domain `pidiff`."""
    import onnxruntime
    from onnx import TensorProto, helper

    element = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, domain="pidiff", **attributes)],
        "one_node",
        [helper.make_tensor_value_info(name, element, None) for name in inputs],
        [helper.make_tensor_value_info(name, element, None) for name in outputs],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("pidiff", 1)], ir_version=9
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    if precision is not None:
        options.add_session_config_entry("pidiff.precision", precision)
    options.register_custom_ops_library(str(Path(core.__file__).parent / "lib" / "libpidiff_ort.so"))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ort_attention(q: Array, k: Array, v: Array, heads: int, precision: str | None = None) -> Array:
    session = onnx_session("Attention", ["q", "k", "v"], ["out"], q.dtype, precision, num_heads=heads)
    return session.run(None, {"q": q, "k": k, "v": v})[0]


IDENTITY_INPUTS = ["q", "k", "v", "x", "a", "v_id", "mask", "scale"]


def ort_identity_attention(feeds: dict[str, Array], heads: int, null: bool, residual: bool) -> tuple[Array, Array]:
    session = onnx_session(
        "IdentityAttention", IDENTITY_INPUTS, ["out", "id_mass"], feeds["q"].dtype,
        num_heads=heads, has_null=int(null), residual=int(residual),
    )  # fmt: skip
    return tuple(session.run(None, feeds))


def ort_identity_mix(h: Array, y: Array, a: Array, v: Array, mask: Array, scale: Array, heads: int, null: bool):
    """The node's text attention made transparent: one key whose value is h would need S = 1, so S runs as batch."""
    batch, queries, channels = h.shape
    rows = batch * queries
    feeds = {
        "q": np.zeros((rows, 1, channels), h.dtype),
        "k": np.zeros((rows, 1, channels), h.dtype),
        "v": h.reshape(rows, 1, channels),
        "x": np.ascontiguousarray(y).reshape(rows, 1, channels),
        "a": np.repeat(a, queries, 0),
        "v_id": np.repeat(v, queries, 0),
        "mask": np.ascontiguousarray(mask.transpose(0, 2, 1)).reshape(rows, -1, 1),
        "scale": np.repeat(scale, queries, 0),
    }
    out, mass = ort_identity_attention(feeds, heads, null, residual=False)
    return out.reshape(h.shape), mass.reshape(batch, queries, -1).transpose(0, 2, 1)


def pybind(implementation: str) -> tuple[Callable, Callable]:
    return (
        lambda q, k, v, heads: core.attention(q, k, v, heads, implementation),
        lambda *arguments: core.identity_mix(*arguments, implementation),
    )


def through_torch(implementation: str) -> tuple[Callable, Callable]:
    """pidiff.attention: its plain functions, or its operator that calls the C++ kernel (float32 only)."""

    def call(function: str, arrays: tuple, *rest):
        import torch

        import pidiff.attention

        if implementation == "native" and arrays[0].dtype != np.float32:
            pytest.skip("the torch operator takes float32")
        tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]
        return getattr(pidiff.attention, function)(*tensors, *rest, implementation=implementation)

    def mix(*arguments):
        out, mass = call("identity_mix", arguments[:6], *arguments[6:])
        return out.numpy(), mass.numpy()

    return lambda q, k, v, heads: call("attention", (q, k, v), heads).numpy(), mix


# name -> (attention, identity_mix)
CARRIERS: dict[str, tuple[Callable, Callable]] = {name: pybind(name) for name in core.cpu_implementations()}
CARRIERS["onnxruntime"] = (ort_attention, ort_identity_mix)
if importlib.util.find_spec("torch"):
    CARRIERS["torch"] = through_torch("reference")
    CARRIERS["torch-native"] = through_torch("native")
# Carriers that round the operands of both products; the others compute in float32.
OPERANDS = {"avx512bf16": bfloat16, "amx": bfloat16}
FAST = [name for name in CARRIERS if name != "reference"]

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
carriers = pytest.mark.parametrize("carrier", list(CARRIERS))
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
