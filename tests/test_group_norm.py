"""Group normalisation through every implementation, against float64."""

import numpy as np
import pytest
from references import bfloat16
from test_attention import bits, unbits

import pidiff._C as core

IMPLEMENTATIONS = core.cpu_implementations()


def reference(x, weight, bias, groups, shift=None, silu=False, epsilon=1e-5):
    """In float64: the formula of csrc/kernels/group_norm.h."""
    x = x.astype(np.float64)
    if shift is not None:
        x = x + shift.astype(np.float64)[:, None]
    split = x.reshape(*x.shape[:2], groups, -1)
    mean, variance = (f(split, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    y = ((split - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * weight + bias
    return y / (1 + np.exp(-y)) if silu else y


def inputs(rng, batch, rows, channels, shifts, mean=0.0):
    x = (rng.standard_normal((batch, rows, channels)) + mean).astype(np.float32)
    weight, bias = (rng.standard_normal(channels).astype(np.float32) for _ in range(2))
    return x, weight, bias, rng.standard_normal((shifts, channels)).astype(np.float32) if shifts else None


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("batch, rows, channels, groups, shifts", [(1, 1, 4, 2, 0), (2, 7, 32, 32, 1), (2, 33, 70, 5, 2), (3, 300, 320, 32, 1), (1, 64, 2560, 32, 0)])
def test_group_norm(rng, implementation, silu, batch, rows, channels, groups, shifts):
    """float32 to a few roundings; 16 bits to one step of the result's."""
    x, weight, bias, shift = inputs(rng, batch, rows, channels, shifts)
    expected = reference(x, weight, bias, groups, shift, silu)
    got = core.group_norm(x, weight, bias, groups, shift, silu, implementation=implementation)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())
    for narrow, wide, step in ((lambda a: a.astype(np.float16), lambda a: a.astype(np.float32), 2**-10), (lambda a: bits(bfloat16(a)), unbits, 2**-7)):
        low = [None if a is None else narrow(a) for a in (x, shift)]
        expected = reference(wide(low[0]), weight, bias, groups, None if shift is None else wide(low[1]), silu)
        got = core.group_norm(low[0], weight, bias, groups, low[1], silu, implementation=implementation)
        assert got.dtype == low[0].dtype
        np.testing.assert_allclose(wide(got), expected, rtol=step, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_small_variance_beside_a_large_mean(rng, implementation):
    """Channels of a group far apart and far from zero: what float32 holds of them is normalised to float32's precision."""
    x, weight, bias, _ = inputs(rng, 2, 1000, 64, 0, mean=1e4)
    x += np.arange(64, dtype=np.float32)
    expected = reference(x, weight, bias, 8)
    np.testing.assert_allclose(core.group_norm(x, weight, bias, 8, implementation=implementation), expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_constant_channels_nan_and_infinity(implementation):
    """No variance divides by epsilon's root; NaN stays, in its own picture; SiLU of a large negative number is zero."""
    one = np.ones(16, np.float32)
    x = np.full((2, 5, 16), 3, np.float32)
    np.testing.assert_allclose(core.group_norm(x, one, one, 4, implementation=implementation), 1, atol=1e-4)
    np.testing.assert_allclose(core.group_norm(x, one, -200 * one, 4, silu=True, implementation=implementation), 0, atol=1e-30)
    x[1, 2, 3] = np.nan
    got = core.group_norm(x, one, one, 4, silu=True, implementation=implementation)
    assert np.isnan(got[1, :, :4]).all() and np.isfinite(got[0]).all() and np.isfinite(got[1, :, 4:]).all()


def test_result_in_place_and_with_fewer_threads(rng):
    x, weight, bias, shift = inputs(rng, 2, 500, 64, 1)
    expected = core.group_norm(x, weight, bias, 8, shift, True)
    assert np.array_equal(core.group_norm(x, weight, bias, 8, shift, True, threads=1), expected)
    assert core.group_norm(x, weight, bias, 8, shift, True, out=x) is x and np.array_equal(x, expected)


def test_equals_pytorchs(rng):
    torch = pytest.importorskip("torch")
    x, weight, bias, _ = inputs(rng, 2, 100, 64, 0)
    expected = torch.nn.functional.group_norm(torch.from_numpy(x).movedim(2, 1), 8, *map(torch.from_numpy, (weight, bias)), 1e-6).movedim(1, 2)
    np.testing.assert_allclose(core.group_norm(x, weight, bias, 8, epsilon=1e-6), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_errors():
    x, one = np.zeros((2, 3, 8), np.float32), np.ones(8, np.float32)
    frozen = np.zeros_like(x)
    frozen.setflags(write=False)
    for more, match in (
        ({"x": x[0]}, r"x must have shape \[B, S, C\] = \(\*, \*, \*\), got \(3, 8\)"),
        ({"x": x.astype(np.float64)}, "x must be float32, float16 or bfloat16, got float64"),
        ({"x": x[:, ::2]}, "x must be C-contiguous"),
        ({"weight": one[:4]}, r"weight must have shape \[C\] = \(8\), got \(4\)"),
        ({"bias": one.astype(np.float16)}, "bias must be float32, got float16"),
        ({"num_groups": 3}, "num_groups must divide the channels 8, got 3"),
        ({"num_groups": 0}, "num_groups must divide the channels 8, got 0"),
        ({"shift": np.zeros((3, 8), np.float32)}, r"shift must have shape \[1 or B, C\] = \(2, 8\), got \(3, 8\)"),
        ({"shift": np.zeros((1, 8), np.float16)}, "shift must have the dtype of x, float32, got float16"),
        ({"epsilon": 0.0}, "epsilon must be positive, got 0"),
        ({"threads": -1}, "threads must not be negative, got -1"),
        ({"out": frozen}, "out must be writable, got a read-only array"),
        ({"out": x[:1].copy()}, r"out must have shape \[B, S, C\] = \(2, 3, 8\), got \(1, 3, 8\)"),
        ({"implementation": "fast"}, "implementation must be one of .*, got fast"),
    ):
        with pytest.raises(ValueError, match=match):
            core.group_norm(**{"x": x, "weight": one, "bias": one, "num_groups": 4} | more)
    assert core.group_norm(x[:0], one, one, 4).shape == (0, 3, 8)
