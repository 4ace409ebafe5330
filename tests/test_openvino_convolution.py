"""3 x 3 convolution of OpenVINO graphs through our kernel: which nodes, and the same numbers as without."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("openvino")

from test_convolution import ROUNDING, close, expected, inputs
from test_openvino import needs_bfloat16
from test_openvino_group_norm import kernels_of, results

from pidiff import _C
from pidiff.runtime.engines.openvino_ops import core

core()  # imports openvino as the runtime does
import openvino
from openvino import opset13 as ops

from pidiff.runtime.engines import openvino_convolution
from pidiff.runtime.engines.openvino_convolution import use_convolution
from pidiff.runtime.engines.openvino_group_norm import use_group_norm
from pidiff.runtime.engines.packed_weights import PackedWeights

SHAPE, OUTPUTS = (2, 32, 16, 18), 64


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """The kernel counts as the faster one, wherever this runs; returns the list of what weights were packed for, and how."""
    real, made = _C.pack_convolution, []

    def pack(weight, implementation, method):
        made.append((implementation, method))
        return real(weight, implementation, method)

    monkeypatch.setattr(_C, "pack_convolution", pack)
    monkeypatch.setattr(openvino_convolution, "faster_kernel", lambda rounding: _C.implementation_of("low" if rounding else "auto"))
    return made


@pytest.fixture
def numbers(rng):
    """(x, weight, bias, residual) in OpenVINO's order of axes."""
    x, weight, bias, residual = inputs(rng, 2, 16, 18, 32, OUTPUTS)
    return x.transpose(0, 3, 1, 2), weight, bias, residual.transpose(0, 3, 1, 2)


def convolved(source, weight, bias, stride=1, pad=1):
    y = ops.convolution(source, weight, [stride] * 2, [pad] * 2, [pad] * 2, [1, 1])
    return y if bias is None else ops.add(y, bias.reshape(1, -1, 1, 1))


def converted(model, rounding=True, lean=False):
    """What kinds of nodes a model has then."""
    use_convolution(model, rounding, kernels_of(model), PackedWeights("none.onnx"), lean)
    return [op.get_type_name() for op in model.get_ops()]


def wanted(x, weight, bias, residual=None, upsample=False, stride=1):
    last = lambda a: None if a is None else a.transpose(0, 2, 3, 1)  # noqa: E731
    return expected(last(x), weight, bias, last(residual), upsample, stride).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("precision", ["f32", pytest.param("bf16", marks=needs_bfloat16)])
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("upsample", [False, True])
def test_kernel_in_a_graph(numbers, made, precision, upsample, added, divided):
    """A doubling before it, an addition after it and a division by one go along."""
    x, weight, bias, residual = numbers
    small, residual = (x[:, :, ::2, ::2], residual if added else None) if upsample else (x, residual if added else None)
    source = ops.parameter(small.shape, np.float32)
    y = ops.interpolate(source, np.array([1, 1, 2, 2], np.float32), "nearest", "scales", coordinate_transformation_mode="asymmetric",
                        nearest_mode="floor") if upsample else source
    y = convolved(y, weight, bias)
    if added:
        y = ops.add(y, residual)
        if divided:
            y = ops.divide(y, np.ones((1, 1, 1, 1), np.float32))
    model = openvino.Model([y], [source])
    kinds = converted(model, rounding=precision == "bf16")
    assert kinds.count("OwnConvolution") == 1 and not {"Convolution", "Interpolate", "Add", "Divide"} & set(kinds)
    rounding = ROUNDING.get(made[0][0], 2e-6) + (2**-7 if precision == "bf16" else 0)
    close(results(model, np.ascontiguousarray(small), precision)[0], wanted(small, weight, bias, residual, upsample), rounding)


def test_what_else_reads_the_sum_of_bias_reads_it_still(numbers, made):
    x, weight, bias, residual = numbers
    source = ops.parameter(SHAPE, np.float32)
    biased = convolved(source, weight, bias)
    model = openvino.Model([ops.add(biased, residual), ops.relu(biased)], [source])
    kinds = converted(model)
    assert kinds.count("OwnConvolution") == 1 and "Add" in kinds
    plain = wanted(x, weight, bias)
    for got, want in zip(results(model, np.ascontiguousarray(x)), (plain + residual, np.maximum(plain, 0))):
        close(got, want, ROUNDING.get(made[0][0], 2e-6))


@pytest.mark.parametrize("other", [np.ones((1, OUTPUTS, 1, 1), np.float32), "itself", "halved"])
def test_another_addition_stays(numbers, made, other):
    x, weight, bias, residual = numbers
    source = ops.parameter(SHAPE, np.float32)
    y = biased = convolved(source, weight, bias)
    what = biased if isinstance(other, str) and other == "itself" else residual if isinstance(other, str) else other
    y = ops.add(biased, what)
    if isinstance(other, str) and other == "halved":
        y = ops.divide(y, np.full((1, 1, 1, 1), 2, np.float32))
    model = openvino.Model([y], [source])
    kinds = converted(model)
    assert kinds.count("OwnConvolution") == 1 and {"Add", "Divide"} & set(kinds)
    plain = wanted(x, weight, bias)
    want = 2 * plain if what is biased else (plain + residual) / 2 if isinstance(other, str) else plain + other
    close(results(model, np.ascontiguousarray(x))[0], want, ROUNDING.get(made[0][0], 2e-6))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("batch", [2, -1])
@pytest.mark.parametrize("side, stride", [(1, 1), (3, 1), (3, 2)])
def test_what_is_done_directly(numbers, made, batch, side, stride, lean):
    """1 x 1, every second pixel and, where weights are to be small, all others; of any number of pictures."""
    x, weight, bias, residual = numbers
    weight = np.ascontiguousarray(weight[:, :, :side, :side])
    residual = np.ascontiguousarray(residual[:, :, ::stride, ::stride])
    source = ops.parameter([batch, *SHAPE[1:]], np.float32)
    y = ops.add(convolved(source, weight, bias, stride, side // 2), residual)
    model = openvino.Model([y], [source])
    kinds = converted(model, lean=lean)
    assert kinds.count("OwnConvolution") == 1 and "Convolution" not in kinds and ("Add" in kinds) == (batch < 0), "the batch of a residual is known"
    assert made == [(_C.implementation_of("low"), "winograd" if (side, stride, lean) == (3, 1, False) else "direct")]
    got = results(model, np.ascontiguousarray(x))[0]
    close(got, wanted(x, weight, bias, residual, stride=stride), ROUNDING.get(made[0][0], 2e-6))


@pytest.mark.parametrize("shape, stride", [((2, 32, 16, 17), 1), ((2, 32, 14, 18), 1), ((2, 32, 7, 5), 1), ((2, 32, 32, 36), 2)])
def test_directly_in_bfloat16_only(rng, made, shape, stride):
    """Odd sides and few pixels among them; where arithmetic is in float32 they stay with OpenVINO."""
    x, weight, bias, _ = inputs(rng, shape[0], *shape[2:], shape[1], OUTPUTS)
    for rounding in (False, True):
        source = ops.parameter(list(shape), np.float32)
        model = openvino.Model([convolved(source, weight, bias, stride)], [source])
        assert ("OwnConvolution" in converted(model, rounding)) == rounding
    assert [method for _, method in made] == ["direct"]
    x = x.transpose(0, 3, 1, 2)
    close(results(model, np.ascontiguousarray(x))[0], wanted(x, weight, bias, stride=stride), ROUNDING.get(made[0][0], 2e-6))


@pytest.mark.parametrize("shape, outputs, options", [
    ((2, 32, -1, 18), 64, {}), ((2, 32, 15, 18), 64, {"stride": 2}), ((2, 16, 16, 18), 64, {}), ((2, 32, 16, 18), 48, {}),
    ((2, 32, 32, 36), 64, {"stride": 3}), ((2, 32, 16, 18), 64, {"pad": 0}), ((2, 32, 16, 18), 64, {"bias": None}),
])  # fmt: skip
def test_what_is_of_another_kind_stays(made, shape, outputs, options):
    source = ops.parameter(list(shape), np.float32)
    bias = np.zeros(outputs, np.float32)
    y = convolved(source, np.ones((outputs, shape[1], 3, 3), np.float32), **{"bias": bias, **options})
    kinds = converted(openvino.Model([y], [source]))
    assert "Convolution" in kinds and "OwnConvolution" not in kinds and not made


def test_pictures_one_behind_the_other(numbers, made):
    """Channels lie together through a concatenation, too, for all who read it."""
    x, weight, bias, _ = numbers
    source = ops.parameter(SHAPE, np.float32)
    first, second = (convolved(source, sign * weight, bias) for sign in (1, -1))
    both = ops.concat([first, second], 1)
    wide = np.concatenate([weight, weight, weight, weight], 1)
    model = openvino.Model([convolved(both, sign * wide, bias) for sign in (1, -1)], [source])
    assert converted(model).count("OwnConvolution") == 4
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run = [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ordered_ops()]
    assert run.count("Transpose") <= 3      # of what comes in and of what goes out
    joined = np.concatenate([wanted(x, weight, bias), wanted(x, -weight, bias)], 1)
    for got, sign in zip(results(model, np.ascontiguousarray(x)), (1, -1)):
        close(got, wanted(joined, sign * wide, bias), 4 * ROUNDING.get(made[0][0], 2e-6))


def test_a_sum_along_another_axis_is_no_bias(numbers, made):
    """... of as many numbers as there are outputs."""
    _, weight, bias, _ = numbers
    source = ops.parameter((2, 32, 16, OUTPUTS), np.float32)
    kinds = converted(openvino.Model([ops.add(convolved(source, weight, None), bias.reshape(1, 1, 1, -1))], [source]))
    assert {"Convolution", "Add"} <= set(kinds) and not made


def test_other_doublings_stay(numbers):
    x, weight, bias, _ = numbers
    for how in ({"mode": "linear"}, {"coordinate_transformation_mode": "half_pixel"}, {"nearest_mode": "ceil"}):
        source = ops.parameter((2, 32, 8, 9), np.float32)
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", **how}
        doubled = ops.interpolate(source, np.array([1, 1, 2, 2], np.float32), shape_calculation_mode="scales", **options)
        kinds = converted(openvino.Model([convolved(doubled, weight, bias)], [source]))
        assert {"Interpolate", "OwnConvolution"} <= set(kinds)


@pytest.mark.parametrize("implementation, in_float32, rounding", [
    ("avx512bf16", False, True), ("amx", False, False), ("avx512", True, False), ("avx2", True, False), ("portable", False, False)])  # fmt: skip
def test_only_where_it_is_the_faster(numbers, made, monkeypatch, implementation, in_float32, rounding):
    _, weight, bias, _ = numbers
    monkeypatch.undo()
    monkeypatch.setattr(_C, "implementation_of", lambda _: implementation)
    monkeypatch.setattr(_C, "pack_convolution", lambda *_: np.zeros(1, np.float32))
    monkeypatch.setattr(openvino_convolution, "faster_kernel", openvino_convolution.faster_kernel.__wrapped__)
    for low, faster in ((False, in_float32), (True, rounding)):
        source = ops.parameter(SHAPE, np.float32)
        kinds = converted(openvino.Model([convolved(source, weight, bias)], [source]), low)
        assert kinds.count("OwnConvolution") == faster and ("Convolution" in kinds) != faster


def test_between_kernels_nothing_is_transposed(numbers, made):
    """Convolution, normalisation, convolution: channels lie together all the way, and weights are packed once for two graphs."""
    x, weight, bias, _ = numbers
    packed = PackedWeights("none.onnx")
    for _ in range(2):
        source = ops.parameter(SHAPE, np.float32)
        y = first = convolved(source, weight, bias)
        rows = ops.mvn(ops.reshape(y, np.array([0, 8, -1]), True), np.array([2]), True, 1e-5, "inside_sqrt")
        rows = ops.add(ops.multiply(rows, np.ones((1, 8, 1), np.float32)), np.zeros((1, 8, 1), np.float32))
        y = ops.reshape(rows, ops.shape_of(y), False)
        y = ops.add(ops.multiply(y, np.ones((1, OUTPUTS, 1, 1), np.float32)), np.zeros((1, OUTPUTS, 1, 1), np.float32))
        last = convolved(y, np.concatenate([weight, weight], 1), bias)
        for node, name in ((first, "first"), (last, "last")):
            node.input_value(0).get_node().set_friendly_name(name)
        model = openvino.Model([last], [source])
        kernels = kernels_of(model)
        use_convolution(model, True, kernels, packed)
        use_group_norm(model, kernels)
        kinds = [op.get_type_name() for op in model.get_ops()]
        assert (kinds.count("OwnConvolution"), kinds.count("GroupNorm")) == (2, 1)
        compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        run = [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ordered_ops()]
        assert run.count("Transpose") <= 2 and run.index("Transpose") < run.index("Reference")
    assert len(made) == 2
