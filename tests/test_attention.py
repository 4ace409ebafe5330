"""Attention through every implementation and every carrier; references.py has the rule of error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pidiff._C as core
from carriers import CARRIERS, FAST, OPERANDS, Array, carriers, dtypes, needs_torch, ort_attention
from references import attention_reference, bfloat16, identity_inputs, require_close


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


@carriers
@pytest.mark.parametrize("last", [3.0, 30.0, 150.0])
def test_attention_of_growing_logits(rng, carrier, last):
    """The maximum rises from block to block: by too little to matter, or so far that sums have to be scaled; in half of the
    rows it falls. A row of NaN among them disturbs no other."""
    queries, keys, dim = 150, 400, 40
    q, k, v = (rng.standard_normal((1, n, dim)).astype(np.float32) for n in (queries, keys, keys))
    q[..., 0] = np.linspace(-1, 1, queries) * np.sqrt(dim)
    k[..., 0] = np.linspace(0, last, keys)  # in the logits, times -1 to 1
    q[:, 70] = np.nan
    got = CARRIERS[carrier][0](q, k, v, 1)
    others = np.arange(queries) != 70
    assert np.isnan(got[:, 70]).all() and np.isfinite(got[:, others]).all()
    require_attention(carrier, got[:, others], q[:, others], k, v, 1)


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


@pytest.mark.skipif(core.has_cuda(), reason="there is a GPU")
def test_cuda_absence_is_one_sentence(rng):
    q = rng.standard_normal((1, 5, 16)).astype(np.float32)
    with pytest.raises(RuntimeError, match="implementation must be one that runs on this machine, got cuda"):
        core.attention(q, q, q, 2, "cuda")
