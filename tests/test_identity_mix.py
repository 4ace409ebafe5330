"""The identity branch's primitive through every implementation and every carrier; references.py has the rule of error."""

from __future__ import annotations

import numpy as np
import pytest

import pidiff._C as core
from carriers import CARRIERS, FAST, carriers, dtypes, ort_identity_attention
from references import identity_inputs, identity_mix_reference, require_close


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
