"""Group normalisation of OpenVINO graphs through our kernel: which nodes, and the same numbers as without."""

import numpy as np
import onnx
import pytest

pytest.importorskip("openvino")

from test_group_norm import reference
from test_openvino import drawn_inputs, needs_bfloat16, opened
from test_openvino_weights import large  # noqa: F401 (a fixture)
from tiny_model import shared

from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engines import call
from pidiff.runtime.engines.openvino_ops import core

core()  # imports openvino as the runtime does
import openvino
from openvino import opset13 as ops

from pidiff.runtime.engines.openvino_convolution import faster_kernel
from pidiff.runtime.engines.openvino_group_norm import use_group_norm
from pidiff.runtime.engines.openvino_node import Kernels

SHAPE, GROUPS = (2, 12, 5, 3), 4
UNIT = np.eye(SHAPE[1], dtype=np.float32)[:, :, None, None]
RNG = np.random.default_rng(0)
WEIGHT, BIAS = (RNG.standard_normal(SHAPE[1]).astype(np.float32) for _ in range(2))
SHIFT = RNG.standard_normal((1, SHAPE[1])).astype(np.float32)


def conv(x):
    return ops.convolution(x, UNIT, [1, 1], [0, 0], [0, 0], [1, 1])


def normed(shift=None, silu=False, shape=SHAPE, scale=1.0, outside=False, read_twice=False, flat=False):
    """x -> convolution by the unit -> as PyTorch's normalisation comes out of ONNX -> convolution by the unit.

    scale: of the InstanceNormalization in it. outside: epsilon outside the root. read_twice: the sigmoid's input goes elsewhere, too. flat:
    the picture comes back as [B,C,HW].
    """
    x = ops.parameter(list(shape), np.float32)
    source = conv(x)
    if shift is not None:
        source = ops.add(source, shift)
    rows = ops.mvn(ops.reshape(source, np.array([0, GROUPS, -1]), True), np.array([2]), True, 1e-5, "outside_sqrt" if outside else "inside_sqrt")
    rows = ops.add(ops.multiply(rows, np.full((1, GROUPS, 1), scale, np.float32)), np.zeros((1, GROUPS, 1), np.float32))
    y = ops.reshape(rows, np.array([0, SHAPE[1], -1]), True) if flat else ops.reshape(rows, ops.shape_of(source), False)
    more = (1,) if flat else (1, 1)
    y = ops.add(ops.multiply(y, WEIGHT.reshape(-1, *more)), ops.convert_like(ops.unsqueeze(ops.constant(BIAS), np.array([1, 2][:len(more)])), y))
    gated = ops.multiply(y, ops.sigmoid(y)) if silu else y
    return openvino.Model([gated if flat else conv(gated), *([conv(y)] if read_twice else [])], [x])


def nodes(model):
    """How many normalisations the kernel has, and how many OpenVINO keeps."""
    kinds = [op.get_type_name() for op in model.get_ops()]
    return kinds.count("GroupNorm"), kinds.count("MVN")


def kernels_of(model):
    """The Kernels of a model, which keeps them."""
    model.kernels = Kernels()
    return model.kernels


def results(model, x, precision="f32"):
    done = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})(x)
    return [done[i].copy() for i in range(len(model.outputs))]


def expected(x, shift=None, silu=False):
    flat = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
    return reference(flat, WEIGHT, BIAS, GROUPS, shift, silu).swapaxes(1, 2).reshape(x.shape)


@pytest.mark.parametrize("precision", ["f32", pytest.param("bf16", marks=needs_bfloat16)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifts, batch", [(0, 2), (1, 2), (2, 2), (0, -1), (1, -1)])
def test_kernel_in_a_graph(rng, precision, silu, shifts, batch):
    """An addition per channel before it and SiLU after it go along, of any number of pictures."""
    x, shift = rng.standard_normal(SHAPE).astype(np.float32), np.tile(SHIFT, (shifts, 1)) if shifts else None
    model = normed(None if shift is None else shift[..., None, None], silu, shape=(batch, *SHAPE[1:]))
    use_group_norm(model, kernels_of(model))
    assert nodes(model) == (1, 0)
    assert not {"Add", "Sigmoid"} & {op.get_type_name() for op in model.get_ops()}
    want = expected(x, shift, silu)
    np.testing.assert_allclose(results(model, x, precision)[0], want, atol=(1e-5 if precision == "f32" else 0.02) * np.abs(want).max())


def test_a_sigmoid_beside_something_else(rng):
    """SiLU stays a node of its own where what it begins with is read elsewhere."""
    x = rng.standard_normal(SHAPE).astype(np.float32)
    model = normed(silu=True, read_twice=True)
    use_group_norm(model, kernels_of(model))
    assert nodes(model) == (1, 0) and "Sigmoid" in {op.get_type_name() for op in model.get_ops()}
    for got, silu in zip(results(model, x), (True, False)):
        np.testing.assert_allclose(got, expected(x, silu=silu), atol=1e-4)


@pytest.mark.parametrize("shift", [np.ones((1, 1, 1, 1), np.float32), np.ones(SHAPE, np.float32)])
def test_another_addition_stays(rng, shift):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    model = normed(shift)
    use_group_norm(model, kernels_of(model))
    assert nodes(model) == (1, 0) and "Add" in {op.get_type_name() for op in model.get_ops()}
    np.testing.assert_allclose(results(model, x)[0], expected(x + shift), atol=1e-4)


@pytest.mark.parametrize("options", [{"shape": (2, 12, -1, 3)}, {"scale": 2.0}, {"outside": True}, {"flat": True}])
def test_what_is_of_another_kind_stays(options):
    model = normed(**options)
    use_group_norm(model, kernels_of(model))
    assert nodes(model) == (0, 1)


@needs_bfloat16
@pytest.mark.parametrize("lean", [False, True])
def test_every_normalisation_of_a_unet(large, tmp_path_factory, lean):  # noqa: F811
    """Where it is compiled for its shape; for any batch where convolutions are ours, too: with OpenVINO's, transpositions would be copies."""
    bundle = Bundle.open(shared("fused", tmp_path_factory))
    groups = sum(node.op_type == "InstanceNormalization" for node in onnx.load(bundle.file("unet.onnx"), load_external_data=False).graph.node)
    engine = opened(bundle, "unet", static=True, precision="auto", lean=lean)
    call(engine, drawn_inputs(bundle.graph("unet"), np.random.default_rng(0), B=2, P=1, h=8, w=8))
    names = [op.get_friendly_name() for op in engine._request.get_compiled_model().get_runtime_model().get_ops()]
    assert sum(name.rpartition("_")[0] == "GroupNorm" for name in names) == (0 if lean and not faster_kernel(True) else groups) and groups > 4
