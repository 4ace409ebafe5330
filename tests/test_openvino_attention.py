"""Long self-attention of OpenVINO graphs through our kernels: which nodes, and the same numbers as without."""

import platform
import sys

import numpy as np
import pytest
from references import attention_reference, bfloat16, require_close
from test_openvino import make_pairs, needs_bfloat16
from test_openvino_group_norm import kernels_of

from pidiff.runtime.engines import openvino as engine_module
from pidiff.runtime.engines.openvino_ops import core

core()  # imports openvino as the runtime does
import openvino
from openvino import opset13 as ops

from pidiff.runtime.engines import openvino_attention
from pidiff.runtime.engines.openvino_attention import use_attention
from pidiff.runtime.memory import resident

if platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("the kernels are used on x86-64 only", allow_module_level=True)

HEADS, DIM = 3, 40
pairs = pytest.fixture(make_pairs, scope="module")


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Every graph counts as a large one, any attention as long."""
    monkeypatch.setattr(engine_module, "_is_large", lambda *_: True)
    monkeypatch.setattr(openvino_attention, "KEYS", 1)
    monkeypatch.setenv("PIDIFF_CACHE", str(tmp_path / "cache"))


def attention_model(kind=np.float32, queries=70, keys=131, swap=True, show_heads=False):
    """q [B,S,C], k and v [B,T,C] through a product with the unit matrix, attention, and another such product."""
    unit = np.eye(HEADS * DIM, dtype=np.float32)
    inputs = [ops.parameter([-1, n, HEADS * DIM], np.float32) for n in (queries, keys, keys)]
    narrow = [ops.convert(ops.matmul(x, unit, False, False), kind) for x in inputs]
    order = np.array([0, 2, 1, 3] if swap else [0, 1, 2, 3])
    split = [ops.transpose(ops.reshape(x, np.array([0, 0, HEADS, -1]), True), order) for x in narrow]
    heads = ops.scaled_dot_product_attention(*split)
    joined = ops.reshape(ops.transpose(heads, order), np.array([0, 0, -1]), True)
    results = [ops.matmul(ops.convert(joined, "f32"), unit, False, False), *([ops.convert(heads, "f32")] if show_heads else [])]
    return openvino.Model(results, inputs)


def ran(model, precision, *arrays):
    request = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision}).create_infer_request()
    return request.infer(arrays)[0].copy()


def kernels_with(count, model):
    kernels = kernels_of(model)
    kernels.count = count
    return kernels


def kernels_in(model):
    return sum("LongAttention" in (op.get_type_name(), op.get_friendly_name().partition("_")[0]) for op in model.get_ops())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind, rounding", [("f32", False), ("bf16", True), ("f32", True)])
def test_attention_of_any_batch(rng, monkeypatch, kind, rounding, threads):
    """By the rule of references.py, also where OpenVINO's own products in bfloat16 come before and after it on the same threads."""
    keys = 600      # from 512 on operands are rounded where that is faster
    model = attention_model(kind, keys=keys)
    monkeypatch.setattr(openvino_attention, "KEYS", keys)
    use_attention(model, rounding, kernels_with(threads, model))
    assert kernels_in(model) == 1
    assert not {"ScaledDotProductAttention", "Transpose", "Reshape"} & {op.get_type_name() for op in model.get_ops()}
    for batch, queries in ((2, 70), (1, 70), (3, 33)):
        if queries != 70:       # another size of picture
            model.reshape({i: [-1, n, HEADS * DIM] for i, n in enumerate((queries, keys + 7, keys + 7))})
        q, k, v = (rng.standard_normal((batch, n, HEADS * DIM)).astype(np.float32) for n in (queries, *[keys if queries == 70 else keys + 7] * 2))
        if rounding:
            q, k, v = map(bfloat16, (q, k, v))
        got = ran(model, "bf16" if rounding else "f32", q, k, v)
        exact = attention_reference(q, k, v, HEADS, np.float64)
        same = attention_reference(q, k, v, HEADS, np.float32, bfloat16 if rounding else lambda x: x)
        if rounding:    # the result is rounded, too, on its way to the next product
            same = bfloat16(same) + np.sign(same - exact) * np.abs(same) * 2**-9
        require_close(got, exact, same, v)


def test_only_what_is_long_and_known(monkeypatch, rng):
    """Fewer keys, a number of them that is not known, heads split in another way or used elsewhere: OpenVINO's own, as before."""
    monkeypatch.setattr(openvino_attention, "KEYS", 131)
    q, k, v = (rng.standard_normal((2, n, HEADS * DIM)).astype(np.float32) for n in (70, 131, 131))
    for options, taken in (({}, True), ({"keys": 130}, False), ({"keys": -1}, False), ({"swap": False, "queries": 131}, False), ({"show_heads": True}, False)):
        model = attention_model(**options)
        use_attention(model, False, kernels_with(1, model))
        assert kernels_in(model) == taken, options
        if options.get("keys") != 130 and options.get("swap", True):
            np.testing.assert_allclose(ran(model, "f32", q, k, v), attention_reference(q, k, v, HEADS, np.float64), atol=1e-5)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    model = attention_model()
    use_attention(model, False, kernels_with(1, model))
    assert not kernels_in(model)


@pytest.mark.parametrize("precision", ["full", pytest.param("auto", marks=needs_bfloat16)])
def test_unet(pairs, kernels, precision):
    """The UNet against PyTorch."""
    torch = pytest.importorskip("torch")
    parity, pair = pairs("fused", precision, "kernels")
    got, exact = parity.unet_call(pair)
    assert kernels_in(pair.pipe._engines["unet"]._request.get_compiled_model().get_runtime_model()) >= 4
    _, rounded = parity.unet_call(pair, torch.bfloat16)
    for key, value in exact.items():
        error, scale = np.abs(got[key] - value).max(), np.abs(value).max()
        assert error <= (1e-4 * scale if precision == "full" else 2 * np.abs(rounded[key] - value).max() + 2**-8 * scale), key


def test_whole_pictures(pairs, kernels, monkeypatch):
    parity, pair = pairs("fused", "full", "kernels")
    parity.compare(pair, monkeypatch, pair.people[:1], solver="dpmpp_2m", guidance_scale=2.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_call_leaves_memory_behind(monkeypatch):
    """glibc's aligned_alloc before 2.38 did, 79 MiB here, between what OpenVINO allocates for shapes of any batch."""
    monkeypatch.setattr(openvino_attention, "KEYS", 1)
    model = attention_model("bf16", 1024, 1024)
    use_attention(model, True, kernels_with(1, model))
    assert kernels_in(model) == 1
    request = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"}).create_infer_request()
    array, sizes = np.zeros((1, 1024, HEADS * DIM), np.float32), []
    for _ in range(100):
        request.infer([array] * 3)
        sizes.append(resident())
    assert sizes[-1] - sizes[9] < 8 << 20
