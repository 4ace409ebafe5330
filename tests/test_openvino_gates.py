"""Gated linear units of OpenVINO graphs as two products: which nodes, and the same numbers as without."""

import numpy as np
import pytest

pytest.importorskip("openvino")

from test_openvino import opened
from test_openvino_weights import large  # noqa: F401 (a fixture)
from tiny_model import shared

from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engines.openvino_ops import core

core()  # imports openvino as the runtime does
import openvino
from openvino import opset13 as ops

from pidiff.runtime.engines.openvino_gates import split_gates

WIDTH, HALF = 6, 8


def gated(turned=False, axis=-1, bias=True, stored_turned=False, rank=3):
    """x [..., WIDTH] W^T + b, cut in two; `turned`: a Transpose turns the weights [2 N, K], `stored_turned`: they are [K, 2 N]."""
    rng = np.random.default_rng(0)
    x = ops.parameter([-1] * (rank - 1) + [WIDTH], np.float32)
    weights = ops.constant(rng.standard_normal((2 * HALF, WIDTH)).astype(np.float32))
    if stored_turned:
        weights = ops.constant(np.ascontiguousarray(weights.data.T))
    y = ops.matmul(x, ops.transpose(weights, np.array([1, 0])) if turned else weights, False, not turned and not stored_turned)
    if bias:
        y = ops.add(y, rng.standard_normal(2 * HALF).astype(np.float32))
    halves = ops.split(y, np.array(axis), 2).outputs()
    return openvino.Model([ops.multiply(halves[0], ops.gelu(halves[1], "erf"))], [x])


def result(model, x):
    return core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0].copy()


def splits_in(model):
    return sum(op.get_type_name() == "Split" for op in model.get_ops())


@pytest.mark.parametrize("options", [{}, {"turned": True}, {"axis": 2}, {"rank": 2}])
def test_gates_become_two_products(rng, options):
    """The same numbers; weights and biases are the memory of those before."""
    x = rng.standard_normal((2, 5, WIDTH)[3 - options.get("rank", 3):]).astype(np.float32)
    expected = result(gated(**options), x)
    model = gated(**options)
    before = {op.data.ctypes.data for op in model.get_ops() if op.get_type_name() == "Constant" and op.data.size >= 2 * HALF}
    kept = split_gates(model)
    assert not splits_in(model) and len(kept) == 2
    after = {op.data.ctypes.data for op in model.get_ops() if op.get_type_name() == "Constant" and op.data.size >= HALF}
    assert before < after and len(after) == 4
    np.testing.assert_allclose(result(model, x), expected, rtol=1e-5, atol=1e-6)


def test_every_gate_of_a_unet(large, tmp_path_factory):  # noqa: F811
    """Whatever the form of its attention."""
    for form in ("fused", "standard23"):
        bundle = Bundle.open(shared(form, tmp_path_factory))
        before = splits_in(core().read_model(bundle.file("unet.onnx")))
        engine = opened(bundle, "unet", static=True)
        assert len(engine._kept) // 2 == before - splits_in(engine._model) > 0


@pytest.mark.parametrize("options", [{"axis": 1}, {"bias": False}, {"stored_turned": True}])
def test_what_is_cut_otherwise_stays(options):
    model = gated(**options)
    assert not split_gates(model) and splits_in(model) == 1
