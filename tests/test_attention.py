"""Both attention primitives through every implementation and every carrier; references.py has the rule of error."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Callable

import numpy as np
import pytest

import pidiff._C as core
from references import attention_reference, bfloat16, identity_inputs, identity_mix_reference, require_close

Array = np.ndarray

# --- carriers: name -> (attention, identity_mix) --------------------------------------------------------------------


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


# --- attention ------------------------------------------------------------------------------------------------------


def require_attention(carrier: str, got: Array, q: Array, k: Array, v: Array, heads: int) -> None:
    """The rule, for what `carrier` got."""
    if carrier in OPERANDS:
        same = attention_reference(q, k, v, heads, np.float32, OPERANDS[carrier])
    else:
        same = attention_reference(q, k, v, heads, q.dtype.type)
    require_close(got, attention_reference(q, k, v, heads, np.float64), same, v)


@carriers
@dtypes
@pytest.mark.parametrize("queries,keys", [(1, 77), (77, 1), (129, 129), (33, 200)])
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 160])
def test_attention(rng, carrier, dtype, queries, keys, dim):
    heads = 2
    q, k, v = (rng.standard_normal((2, n, heads * dim)).astype(dtype) for n in (queries, keys, keys))
    got = CARRIERS[carrier][0](q, k, v, heads)
    assert got.dtype == dtype
    require_attention(carrier, got, q, k, v, heads)


@pytest.mark.parametrize("carrier", [name for name in FAST if name != "torch"])
@dtypes
@pytest.mark.parametrize("dim", [40, 64])
def test_attention_long(rng, carrier, dtype, dim):
    """S = 4096, checked on a sample of rows so that the reference stays cheap."""
    q, k, v = (rng.standard_normal((1, 4096, dim)).astype(dtype) for _ in range(3))
    got = CARRIERS[carrier][0](q, k, v, 1)
    rows = np.r_[0:4, 2040:2060, 4090:4096]
    require_attention(carrier, got[:, rows], q[:, rows], k, v, 1)


@pytest.mark.parametrize("carrier", [name for name in CARRIERS if name != "onnxruntime"])
@dtypes
def test_attention_strided(rng, carrier, dtype):
    """q, k, v as views into one packed projection, and a batch axis that was sliced."""
    packed = rng.standard_normal((4, 77, 3 * 80)).astype(dtype)[::2]
    q, k, v = packed[..., :80], packed[..., 80:160], packed[..., 160:]
    got = CARRIERS[carrier][0](q, k, v, 2)
    require_attention(carrier, got, q, k, v, 2)


def bits(x: Array) -> Array:
    """The nearest bfloat16 as its 16 bits."""
    return (bfloat16(x).view(np.uint32) >> 16).astype(np.uint16)


def unbits(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("implementation", core.cpu_implementations())
def test_bfloat16_storage(rng, implementation):
    """To the bit: float32's result of what the 16 bits hold, rounded once, at the end. NaN stays NaN, infinity infinity."""
    q, k, v = (bits(rng.standard_normal((2, n, 3 * 40))) for n in (70, 131, 131))
    q[0, 3], v[1, 5, :2] = 0x7FFF, (0x7F80, 0xFF80)
    with np.errstate(invalid="ignore"):
        expected = core.attention(*map(unbits, (q, k, v)), 3, implementation)
    got = unbits(core.attention(q, k, v, 3, implementation))
    assert np.isnan(got[0, 3]).all() and np.isinf(got[1, 0, 0])
    np.testing.assert_array_equal(got, bfloat16(expected))
    inputs = [bits(x) for x in identity_inputs(rng, np.float32, 37, 5, 40, 2, 4, True)]
    expected = core.identity_mix(*map(unbits, inputs), 5, True, implementation)
    for one, other in zip(core.identity_mix(*inputs, 5, True, implementation), expected):
        np.testing.assert_array_equal(unbits(one), bfloat16(other))


def test_result_into_an_array_of_the_caller(rng):
    """`out` is written in place, whatever its strides and however few threads; what cannot be written is refused."""
    q = rng.standard_normal((2, 300, 80)).astype(np.float32)
    expected, wide = core.attention(q, q, q, 2), np.zeros((2, 300, 160), np.float32)
    out = wide[..., 80:]
    for threads in (0, 1, 2, 99):
        wide[:] = 0
        assert core.attention(q, q, q, 2, out=out, threads=threads) is out
        np.testing.assert_array_equal(out, expected)
        assert not wide[..., :80].any()
    fixed = np.zeros_like(q)
    fixed.flags.writeable = False
    for other, message in ((out[:1], r"out must have shape \[B, S, C\] = \(2, 300, 80\), got \(1, 300, 80\)"),
                           (q.astype(np.float16), "out must have the dtype of q"), (fixed, "out must be writable")):
        with pytest.raises(ValueError, match=message):
            core.attention(q, q, q, 2, out=other)
    with pytest.raises(ValueError, match="threads must not be negative, got -1"):
        core.attention(q, q, q, 2, threads=-1)
    assert core.start_threads() == core.start_threads() >= 1


@carriers
def test_attention_outlier_rows(rng, carrier):
    """Logits of several thousand: one key takes all; and rows that are all zero."""
    q, k, v = (rng.standard_normal((1, 129, 80)).astype(np.float32) for _ in range(3))
    q[:, 3] *= 1e3
    q[:, 5] = 0
    k[:, 100] *= 100
    got = CARRIERS[carrier][0](q, k, v, 2)
    assert np.isfinite(got).all()
    require_attention(carrier, got, q, k, v, 2)
    np.testing.assert_allclose(got[:, 5], OPERANDS.get(carrier, np.asarray)(v).mean(1), atol=1e-6)


@pytest.mark.parametrize("carrier", [name for name in CARRIERS if not name.startswith("torch")])
def test_attention_half_overflow(carrier):
    """Half inputs whose products overflow half: the kernels' arithmetic is float32."""
    q = np.full((1, 1, 8), 300, np.float16)
    k = np.stack([np.full((1, 8), 300), np.full((1, 8), -300)], 1).astype(np.float16)
    v = np.stack([np.full((1, 8), 2), np.full((1, 8), 5)], 1).astype(np.float16)
    np.testing.assert_array_equal(CARRIERS[carrier][0](q, k, v, 1), np.full((1, 1, 8), 2, np.float16))


@carriers
def test_attention_keeps_nan(rng, carrier):
    """A NaN query gives NaN in its own row and nowhere else."""
    q, k, v = (rng.standard_normal((1, 77, 40)).astype(np.float32) for _ in range(3))
    q[0, 7, 3] = np.nan
    got = CARRIERS[carrier][0](q, k, v, 1)
    bad = np.isnan(got).all(-1)[0]
    assert bad[7] and not np.isnan(np.delete(got, 7, 1)).any()


@pytest.mark.parametrize("carrier", FAST)
def test_attention_is_repeatable(rng, carrier):
    """The same bits whatever the batch around an image."""
    q, k, v = (rng.standard_normal((3, 130, 80)).astype(np.float32) for _ in range(3))
    together = CARRIERS[carrier][0](q, k, v, 2)
    alone = CARRIERS[carrier][0](q[1:2], k[1:2], v[1:2], 2)
    np.testing.assert_array_equal(together[1:2], alone)


def test_only_who_allows_it_gets_bfloat16(rng):
    """`low`, which a session gets with precision "auto", rounds where there are many keys and that is faster: by AMX, or by AVX-512
    on AMD's processors, not on Intel's. The default and "full" are float32 to the bit."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()
    rounding = "amx" if "amx" in CARRIERS else "avx512bf16" if amd and "avx512bf16" in CARRIERS else None
    for keys, name in ((511, None), (512, rounding)):
        q, k, v = (rng.standard_normal((1, n, 80)).astype(np.float32) for n in (60, keys, keys))
        exact, low = core.attention(q, k, v, 2), core.attention(q, k, v, 2, "low")
        assert (exact != low).any() == (name is not None)
        np.testing.assert_array_equal(low, core.attention(q, k, v, 2, name or "auto"))
        for precision, expected in (("auto", low), (None, exact), ("full", exact)):
            np.testing.assert_array_equal(ort_attention(q, k, v, 2, precision), expected)
    assert "avx512bf16" not in CARRIERS or (core.attention(q, k, v, 2, "avx512") == exact).all()


def test_threads_survive_fork(rng):
    """A forked child has none of its parent's threads: it starts its own pool instead of waiting for them."""
    import multiprocessing

    q = rng.standard_normal((1, 400, 80)).astype(np.float32)
    expected = core.attention(q, q, q, 2)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(core.attention(q, q, q, 2)))
    child.start()
    try:
        assert receive.poll(60), "the child hangs"
        np.testing.assert_array_equal(receive.recv(), expected)
    finally:
        child.kill()
        child.join()


@needs_torch
def test_references_agree_with_torch(rng):
    """The reference is torch's scaled_dot_product_attention."""
    import torch

    q, k, v = (rng.standard_normal((2, n, 80)) for n in (9, 7, 7))
    split = lambda x: torch.from_numpy(x).reshape(2, -1, 2, 40).transpose(1, 2)  # noqa: E731
    expected = torch.nn.functional.scaled_dot_product_attention(split(q), split(k), split(v))
    np.testing.assert_allclose(
        attention_reference(q, k, v, 2, np.float64), expected.transpose(1, 2).reshape(2, 9, 80).numpy(), atol=1e-12
    )


# --- identity_mix ---------------------------------------------------------------------------------------------------


@carriers
@dtypes
@pytest.mark.parametrize("people,null", [(0, True), (1, True), (1, False), (2, False), (3, True)])
@pytest.mark.parametrize("queries,heads,dim,tokens", [(1, 8, 8, 4), (77, 8, 40, 4), (129, 2, 80, 1), (50, 5, 64, 7)])
def test_identity_mix(rng, carrier, dtype, null, people, queries, heads, dim, tokens):
    inputs = identity_inputs(rng, dtype, queries, heads, dim, people, tokens, null)
    out, mass = CARRIERS[carrier][1](*inputs, heads, null)
    exact, same = (identity_mix_reference(*inputs, heads, null, t) for t in (np.float64, dtype))
    assert out.dtype == mass.dtype == dtype
    require_close(out, exact[0], same[0], inputs[0], inputs[3])
    require_close(mass, exact[1], same[1])


@pytest.mark.parametrize("carrier", FAST)
@dtypes
def test_identity_mix_wide(rng, carrier, dtype):
    """SD1.5's widest layer."""
    inputs = identity_inputs(rng, dtype, 64, 8, 160, 1, 4, True, batch=1)
    got = CARRIERS[carrier][1](*inputs, 8, True)
    exact, same = (identity_mix_reference(*inputs, 8, True, t) for t in (np.float64, dtype))
    require_close(got[0], exact[0], same[0], inputs[0], inputs[3])
    require_close(got[1], exact[1], same[1])


@pytest.mark.parametrize("carrier", [name for name in CARRIERS if name != "onnxruntime"])
def test_identity_mix_strided(rng, carrier):
    h, y, *rest = identity_inputs(rng, np.float32, 60, 8, 40, 2, 4, True)
    wide = np.concatenate([h, y], -1)[:, ::3]
    h, y = wide[..., :320], wide[..., 320:]
    rest[2] = np.ascontiguousarray(rest[2][..., ::3])
    got = CARRIERS[carrier][1](h, y, *rest, 8, True)
    exact, same = (identity_mix_reference(h, y, *rest, 8, True, t) for t in (np.float64, np.float32))
    require_close(got[0], exact[0], same[0], h, rest[1])
    require_close(got[1], exact[1], same[1])


@carriers
def test_identity_mix_outlier_rows(rng, carrier):
    """Logits of a thousand: one token takes all, without overflow."""
    h, y, *rest = identity_inputs(rng, np.float32, 33, 4, 40, 1, 4, True)
    y[:, ::5] *= 1e3
    out, mass = CARRIERS[carrier][1](h, y, *rest, 4, True)
    assert np.isfinite(out).all() and (mass >= 0).all() and (mass <= 1 + 1e-6).all()
    exact, same = (identity_mix_reference(h, y, *rest, 4, True, t) for t in (np.float64, np.float32))
    require_close(out, exact[0], same[0], h, rest[1])


@carriers
def test_identity_mix_off_is_exact(rng, carrier):
    """id_scale = 0, an all-zero mask, or nobody: h itself, bit for bit."""
    h, y, a, v, mask, scale = identity_inputs(rng, np.float32, 40, 8, 40, 2, 4, True)
    for inputs in [(a, v, mask, scale * 0), (a, v, mask * 0, scale), (a[:, :0], v[:, :0], mask[:, :0], scale)]:
        out, _ = CARRIERS[carrier][1](h, y, *inputs, 8, True)
        np.testing.assert_array_equal(out, h)


def test_identity_mix_null_key_takes_the_mass(rng):
    """A null column far above the others: nothing is added and the identity map is empty; far below: it is full."""
    h, y, a, v, mask, scale = identity_inputs(rng, np.float32, 20, 2, 8, 1, 3, True)
    y = np.abs(y) + 1
    for value, expected in [(50, 0), (-50, 1)]:
        a.reshape(2, 1, 16, 2, 4)[..., 3] = value
        out, mass = core.identity_mix(h, y, a, v, mask, scale, 2, True)
        np.testing.assert_allclose(mass, expected, atol=1e-6)
        if expected == 0:
            np.testing.assert_allclose(out, h, atol=1e-6)


@dtypes
@pytest.mark.parametrize("residual", [False, True])
def test_onnx_node_is_attention_then_mix(rng, dtype, residual):
    """IdentityAttention against the two primitives; `residual` attends with the text result."""
    heads, channels, tokens = 4, 160, 3
    feeds = dict(zip(["h", "x", "a", "v_id", "mask", "scale"],
                     identity_inputs(rng, dtype, 50, heads, 40, 2, tokens, not residual)))  # fmt: skip
    del feeds["h"]
    for name, length in (("q", 50), ("k", 77), ("v", 77)):
        feeds[name] = rng.standard_normal((2, length, channels)).astype(dtype)
    out, mass = ort_identity_attention(feeds, heads, not residual, residual)
    h = core.attention(feeds["q"], feeds["k"], feeds["v"], heads)
    y = h if residual else feeds["x"]
    expected = core.identity_mix(h, y, feeds["a"], feeds["v_id"], feeds["mask"], feeds["scale"], heads, not residual)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(mass, expected[1])


def test_onnx_node_refuses_wrong_shapes(rng):
    feeds = dict(zip(["h", "x", "a", "v_id", "mask", "scale"], identity_inputs(rng, np.float32, 5, 2, 8, 1, 3, True)))
    del feeds["h"]
    for name in "qkv":
        feeds[name] = rng.standard_normal((2, 5, 16)).astype(np.float32)
    with pytest.raises(Exception, match=r"scale must have shape \(2\), got \(3\)"):
        ort_identity_attention(feeds | {"scale": np.ones(3, np.float32)}, 2, True, False)
    with pytest.raises(Exception, match=r"num_heads must divide the channels 16, got 3"):
        ort_identity_attention(feeds, 3, True, False)


# --- bad arguments --------------------------------------------------------------------------------------------------


def test_attention_errors(rng):
    q, k = rng.standard_normal((2, 5, 16)).astype(np.float32), rng.standard_normal((2, 7, 16)).astype(np.float32)
    cases = [
        ((q[0], k, k, 2), r"q must have shape \[B, S, C\] = \(\*, \*, \*\), got \(5, 16\)"),
        ((q, k[:1], k, 2), r"k must have shape \[B, T, C\] = \(2, \*, 16\), got \(1, 7, 16\)"),
        ((q, k, k[:, :3], 2), r"v must have shape \[B, T, C\] = \(2, 7, 16\), got \(2, 3, 16\)"),
        ((q, k[:, :0], k[:, :0], 2), r"k must have at least one key"),
        ((q, k, k, 3), r"num_heads must divide the channels 16, got 3"),
        ((q, k, k, 0), r"num_heads must be positive, got 0"),
        ((q.astype(np.float64), k, k, 2), r"q must be float32, float16 or bfloat16, got float64"),
        ((q, k.astype(np.float16), k, 2), r"k must have the dtype of q, float32, got float16"),
        ((q[..., ::2], k[..., :8], k[..., :8], 2), r"q must be contiguous along its last axis"),
        ((q, k, k, 2, "magic"), r"implementation must be one of auto, low, reference, .*, got magic"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            core.attention(*arguments)


def test_identity_mix_errors(rng):
    h, y, a, v, mask, scale = identity_inputs(rng, np.float32, 5, 2, 8, 1, 3, True)
    cases = [
        ((h, y[:, :4], a, v, mask, scale, 2, True), r"y must have shape"),
        ((h, y, a, v, mask, scale, 2, False), r"a must have shape \[B, P, C, num_heads \* T\] = \(2, 1, 16, 6\)"),
        ((h, y, a, v[..., :8], mask, scale, 2, True), r"v_id must have shape"),
        ((h, y, a, v, mask[:, :, :4], scale, 2, True), r"mask must have shape"),
        ((h, y, a, v, mask, scale[:1], 2, True), r"scale must have shape \[B\] = \(2\), got \(1\)"),
        ((h, y, a.transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2), v, mask, scale, 2, True), "a must be C-contiguous"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            core.identity_mix(*arguments)


@pytest.mark.skipif(core.has_cuda(), reason="there is a GPU")
def test_cuda_absence_is_one_sentence(rng):
    q = rng.standard_normal((1, 5, 16)).astype(np.float32)
    with pytest.raises(RuntimeError, match="implementation must be one that runs on this machine, got cuda"):
        core.attention(q, q, q, 2, "cuda")
