"""Linear layers of OpenVINO graphs through our kernel: which nodes, and the same numbers as without."""

import numpy as np
import pytest

pytest.importorskip("openvino")

from test_convolution import ROUNDING, close
from test_openvino import drawn_inputs, needs_bfloat16, opened
from test_openvino_group_norm import kernels_of, results
from test_openvino_weights import large  # noqa: F401 (a fixture)

from pidiff import _C
from pidiff.runtime.bundle import Bundle, shipped_bundle
from pidiff.runtime.engines import call
from pidiff.runtime.engines.openvino_ops import core

core()  # imports openvino as the runtime does
import openvino
from openvino import opset13 as ops

from pidiff.runtime.engines import openvino_linear
from pidiff.runtime.engines.openvino_convolution import faster_kernel
from pidiff.runtime.engines.openvino_linear import use_linear
from pidiff.runtime.engines.packed_weights import PackedWeights

BATCH, TOKENS, CHANNELS, OUTPUTS = 2, 7, 96, 128
LOW = _C.implementation_of("low")
LIMIT = ROUNDING.get(LOW, 4e-6)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """The kernel counts as the faster one, wherever this runs."""
    monkeypatch.setattr(openvino_linear, "faster_kernel", lambda rounding: LOW if rounding else _C.implementation_of("auto"))


@pytest.fixture
def numbers(rng):
    """(x, weight, bias, residual)"""
    x, residual = (rng.standard_normal((BATCH, TOKENS, n)).astype(np.float32) for n in (CHANNELS, OUTPUTS))
    return x, (rng.standard_normal((OUTPUTS, CHANNELS)) / 10).astype(np.float32), rng.standard_normal(OUTPUTS).astype(np.float32), residual


def wanted(x, weight, bias=0.0, residual=0.0):
    return x.astype(np.float64) @ weight.T + bias + residual


def converted(model, rounding=True):
    """What kinds of nodes a model has then."""
    use_linear(model, rounding, kernels_of(model), PackedWeights("none.onnx"))
    return [op.get_type_name() for op in model.get_ops()]


def product(source, weight, how):
    """By weights [O,C], [C,O], or [O,C] that a node turns."""
    if how == "turned":
        return ops.matmul(source, weight, False, True)
    plain = ops.transpose(ops.constant(weight), np.array([1, 0])) if how == "by a node" else np.ascontiguousarray(weight.T)
    return ops.matmul(source, plain, False, False)


@pytest.mark.parametrize("precision", ["f32", pytest.param("bf16", marks=needs_bfloat16)])
@pytest.mark.parametrize("batch", [BATCH, -1])
@pytest.mark.parametrize("how", ["turned", "as it is", "by a node"])
def test_kernel_in_a_graph(numbers, how, batch, precision):
    """With bias and an addition after it, for pictures of any number."""
    x, weight, bias, residual = numbers
    source, more = ops.parameter([batch, TOKENS, CHANNELS], np.float32), ops.parameter([batch, TOKENS, OUTPUTS], np.float32)
    model = openvino.Model([ops.add(more, ops.add(product(source, weight, how), bias))], [source, more])
    kinds = converted(model)
    assert kinds.count("Linear") == 1 and not {"MatMul", "Add"} & set(kinds)
    close(results(model, [x, residual], precision)[0], wanted(x, weight, bias, residual), LIMIT + (2**-7 if precision == "bf16" else 0))


@pytest.mark.parametrize("other", ["none", "relu", "a row of numbers for each token"])
def test_without_bias(numbers, other):
    x, weight, *_ = numbers
    shift = np.arange(TOKENS, dtype=np.float32).reshape(1, TOKENS, 1)
    source = ops.parameter(x.shape, np.float32)
    y = product(source, weight, "turned")
    y = {"none": y, "relu": ops.relu(y)}.get(other) or ops.add(y, shift)
    model = openvino.Model([y], [source])
    assert converted(model).count("Linear") == 1
    want = wanted(x, weight)
    close(results(model, x)[0], {"none": want, "relu": np.maximum(want, 0)}.get(other, want + shift), LIMIT)


def test_layers_that_read_the_same_stay_two(numbers):
    """OpenVINO takes nodes of one kind with the same inputs for one where nothing tells them from each other."""
    x, weight, bias, _ = numbers
    source = ops.parameter(x.shape, np.float32)
    both = [ops.add(product(source, sign * weight, "turned"), bias) for sign in (1, -1)]
    model = openvino.Model(both, [source])
    assert converted(model).count("Linear") == 2
    for sign, got in zip((1, -1), results(model, x)):
        close(got, wanted(x, sign * weight, bias), LIMIT)


def test_a_square_and_the_same_turned(rng, tmp_path):
    """Packed in two ways, of the same numbers, in one cache."""
    (tmp_path / "none.onnx").write_bytes(b"a graph")
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, TOKENS, 64), (64, 64)))
    for turned in (True, False):
        source = ops.parameter(x.shape, np.float32)
        model = openvino.Model([ops.matmul(source, weight, False, turned)], [source])
        use_linear(model, True, kernels_of(model), PackedWeights(tmp_path / "none.onnx", tmp_path))
        close(results(model, x)[0], wanted(x, weight if turned else weight.T), LIMIT)


def test_what_else_reads_the_sum_of_bias_reads_it_still(numbers):
    x, weight, bias, residual = numbers
    source = ops.parameter(x.shape, np.float32)
    biased = ops.add(product(source, weight, "turned"), bias)
    model = openvino.Model([ops.add(biased, residual), ops.relu(biased)], [source])
    kinds = converted(model)
    assert kinds.count("Linear") == 1 and "Add" in kinds
    plain = wanted(x, weight, bias)
    for got, want in zip(results(model, x), (plain + residual, np.maximum(plain, 0))):
        close(got, want, LIMIT)


@pytest.mark.parametrize("shape, outputs, turned", [
    ((2, 96), 128, False), ((2, -1, 96), 128, False), ((2, 7, 80), 128, False), ((2, 7, 96), 100, False), ((1, 2, 7, 96), 128, False),
    ((2, 96, 7), 128, True)])  # fmt: skip
def test_what_is_of_another_kind_stays(shape, outputs, turned):
    source = ops.parameter(list(shape), np.float32)
    weight = np.ones((outputs, shape[1] if turned else shape[-1]), np.float32)
    kinds = converted(openvino.Model([ops.matmul(source, weight, turned, True)], [source]))
    assert "MatMul" in kinds and "Linear" not in kinds


def test_in_float32_they_stay(numbers):
    x, weight, *_ = numbers
    source = ops.parameter(x.shape, np.float32)
    assert "MatMul" in converted(openvino.Model([product(source, weight, "turned")], [source]), rounding=False)


def test_products_of_two_tensors_stay(numbers):
    x, *_ = numbers
    source = ops.parameter(x.shape, np.float32)
    assert "MatMul" in converted(openvino.Model([ops.matmul(source, source, False, True)], [source]))


@needs_bfloat16
@pytest.mark.skipif(not faster_kernel(True), reason="our kernel is not the faster one here")
@pytest.mark.parametrize("lean", [False, True])
def test_every_layer_of_a_unet(large, lean):  # noqa: F811
    """No linear layer and no convolution of numbers of channels that the kernel can do is left with OpenVINO, which would pack its weights."""
    bundle = Bundle.open(shipped_bundle())
    inputs = drawn_inputs(bundle.graph("unet"), np.random.default_rng(0), B=2, P=1, h=32, w=32)
    engine, other = (opened(bundle, "unet", static=True, precision=precision, lean=lean) for precision in ("auto", "full"))
    got, want = (call(one, inputs)[bundle.graph("unet").outputs[0].name] for one in (engine, other))
    layers = [(op.get_rt_info()["layerType"].astype(str), op) for op in engine._request.get_compiled_model().get_runtime_model().get_ops()]
    left = [list(op.get_output_partial_shape(0))[{"FullyConnected": -1, "Convolution": 1}[kind]] for kind, op in layers if kind in ("FullyConnected", "Convolution")]
    ours = [op.get_friendly_name().partition("_")[0] for kind, op in layers if kind == "Reference"]
    assert left and all(outputs.get_length() % 64 for outputs in left) and ours.count("Linear") > 10
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
