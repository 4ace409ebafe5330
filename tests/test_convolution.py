"""Convolution through every implementation and both ways, against PyTorch's."""

import functools

import numpy as np
import pytest
import torch
from references import bfloat16
from test_attention import bits, unbits

import pidiff._C as core

IMPLEMENTATIONS = core.cpu_implementations()
# What rounds what is multiplied to bfloat16, both transforms by Winograd's way: of the result's size; two roundings more than its own.
ROUNDING = {"avx512bf16": 6e-3, "amx": 6e-3}


def expected(x, weight, bias, residual=None, upsample=False, stride=1):
    """In float64, from PyTorch."""
    x, weight, bias = (torch.from_numpy(a.astype(np.float64)) for a in (x, weight, bias))
    x = x.movedim(-1, 1)
    if upsample:
        x = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2).movedim(1, -1).numpy()
    return y if residual is None else y + residual


def inputs(rng, batch, height, width, channels, out_channels):
    x, residual = (rng.standard_normal((batch, height, width, n)).astype(np.float32) for n in (channels, out_channels))
    weight = (rng.standard_normal((out_channels, channels, 3, 3)) / np.sqrt(9 * channels)).astype(np.float32)
    return x, weight, rng.standard_normal(out_channels).astype(np.float32), residual


def convolution(weight, bias, implementation="auto", method="winograd"):
    """The function of (x, residual, ...) with these weights packed."""
    packed = core.pack_convolution(weight, implementation, method)
    return lambda x, residual=None, **how: core.convolution(x, packed, bias, residual, implementation=implementation, **how)


def close(got, want, limit):
    """Every number, to some of the size of all."""
    assert got.shape == want.shape and np.abs(got - want).max() <= limit * np.abs(want).max()


@pytest.mark.parametrize("implementation", ["auto", "low", *IMPLEMENTATIONS])
@pytest.mark.parametrize("batch, height, width, channels, out_channels", [(1, 2, 2, 32, 64), (2, 6, 10, 64, 64), (1, 20, 22, 32, 192), (3, 4, 2, 96, 128)])
def test_convolution(rng, implementation, batch, height, width, channels, out_channels):
    """float32 to a few roundings; with bfloat16 pictures to a rounding of theirs more."""
    x, weight, bias, residual = inputs(rng, batch, height, width, channels, out_channels)
    convolve = convolution(weight, bias, implementation)
    rounding = ROUNDING.get(core.implementation_of(implementation), 2e-6)
    close(convolve(x), expected(x, weight, bias), rounding)
    close(convolve(x, residual), expected(x, weight, bias, residual), rounding)
    low, more = bits(bfloat16(x)), bits(bfloat16(residual))
    got = convolve(low, more)
    assert got.dtype == low.dtype
    close(unbits(got), expected(unbits(low), weight, bias, unbits(more)), rounding + 2**-8)


@pytest.mark.parametrize("implementation", ["auto", "low", *IMPLEMENTATIONS])
@pytest.mark.parametrize("side, stride, size, channels, out_channels", [
    (1, 1, (1, 1, 300), 32, 64), (1, 1, (3, 7, 5), 96, 192), (3, 1, (2, 7, 9), 64, 64), (3, 1, (1, 1, 1), 32, 128), (3, 2, (2, 6, 10), 32, 64),
    (1, 2, (1, 8, 2), 64, 64), (1, 1, (1, 2, 65), 1312, 64), (3, 1, (1, 3, 3), 160, 64)])  # fmt: skip
def test_directly(rng, implementation, side, stride, size, channels, out_channels):
    """As `test_convolution`; also of sums that pass in parts, and of odd numbers of pixels."""
    x, weight, bias, residual = inputs(rng, *size, channels, out_channels)
    weight, residual = np.ascontiguousarray(weight[..., :side, :side]), np.ascontiguousarray(residual[:, ::stride, ::stride])
    convolve = functools.partial(convolution(weight, bias, implementation, "direct"), stride=stride)
    rounding = ROUNDING.get(core.implementation_of(implementation), 4e-6)
    close(convolve(x), expected(x, weight, bias, stride=stride), rounding)
    close(convolve(x, residual), expected(x, weight, bias, residual, stride=stride), rounding)
    low, more = bits(bfloat16(x)), bits(bfloat16(residual))
    close(unbits(convolve(low, more)), expected(unbits(low), weight, bias, unbits(more), stride=stride), rounding + 2**-8)


@pytest.mark.parametrize("method", ["winograd", "direct"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_upsampled(rng, implementation, method):
    """As if every pixel were four; also where the small picture's sides are odd."""
    for height, width in ((3, 5), (8, 2)):
        x, weight, bias, _ = inputs(rng, 2, height, width, 32, 64)
        convolve = convolution(weight, bias, implementation, method)
        got = convolve(x, upsample=True)
        close(got, expected(x, weight, bias, upsample=True), ROUNDING.get(implementation, 2e-6))
        assert np.array_equal(got, convolve(x.repeat(2, 1).repeat(2, 2)))


@pytest.mark.parametrize("method", ["winograd", "direct"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_threads_pictures_and_memory(rng, implementation, method):
    """A picture is the same beside others, by any number of threads, into memory that is given and over what is added to it."""
    x, weight, bias, residual = inputs(rng, 3, 16, 14, 32, 64)
    convolve = convolution(weight, bias, implementation, method)
    want = convolve(x, residual)
    for threads in (1, 2, 7):
        assert np.array_equal(convolve(x, residual, threads=threads), want)
    assert np.array_equal(np.concatenate([convolve(x[i:i + 1], residual[i:i + 1]) for i in range(3)]), want)
    assert convolve(x, residual, out=residual) is residual and np.array_equal(residual, want)


@pytest.mark.parametrize("method", ["winograd", "direct"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_that_are_not_finite_stay_so(rng, implementation, method):
    """In the pixels around them; others keep their numbers, whatever memory held before."""
    x, weight, bias, _ = inputs(rng, 1, 24, 24, 32, 64)
    convolve = convolution(weight, bias, implementation, method)
    want = convolve(x)
    x[0, 12, 12] = np.nan
    got = convolve(x)
    assert np.isnan(got[0, 11:14, 11:14]).all()
    far = np.ones((24, 24), bool)
    far[10:16, 10:16] = False     # tiles that read it
    assert np.array_equal(got[0][far], want[0][far])


def test_what_it_is_given(rng):
    x, weight, bias, residual = inputs(rng, 1, 4, 4, 32, 64)
    packed, direct = core.pack_convolution(weight), core.pack_convolution(weight, method="direct")
    call = lambda *args, **how: core.convolution(*args, **how)  # noqa: E731
    assert call(x[:0], packed, bias).shape == (0, 4, 4, 64)
    for sentence, make in {
        r"weight must be of a multiple of 64 outputs and of 32 channels, got \(32, 32, 3, 3\)": lambda: core.pack_convolution(weight[:32]),
        r"weight must be of a multiple of 64 outputs and of 32 channels, got \(64, 16, 3, 3\)": lambda: core.pack_convolution(weight[:, :16].copy()),
        r"weight must have shape \[O, C, 3, 3\] .*, got \(64, 32, 1, 1\)": lambda: core.pack_convolution(weight[..., :1, :1].copy()),
        r"weight must be 1 x 1 or 3 x 3, got \(64, 32, 2, 2\)": lambda: core.pack_convolution(weight[..., :2, :2].copy(), method="direct"),
        r"weight must be 1 x 1 or 3 x 3, got \(64, 32, 1, 3\)": lambda: core.pack_convolution(weight[..., :1, :].copy(), method="direct"),
        r"method must be winograd or direct, got fft": lambda: core.pack_convolution(weight, method="fft"),
        r"stride must be 1 by Winograd's way, got 2": lambda: call(x, packed, bias, stride=2),
        r"stride must be 1 or 2, got 3": lambda: call(x, direct, bias, stride=3),
        r"x must have an even height and width, got \(1, 4, 3, 32\)": lambda: call(x[:, :, :3].copy(), direct, bias, stride=2),
        r"weight must be C-contiguous": lambda: core.pack_convolution(weight[:, ::-1]),
        r"weight must be float32, got float16": lambda: core.pack_convolution(weight.astype(np.float16)),
        r"implementation must be one of .*, got fast": lambda: core.pack_convolution(weight, "fast"),
        r"bias must have shape \[O\] = \(\*\), got \(8, 8\)": lambda: call(x, packed, bias.reshape(8, 8)),
        r"out_channels must be a positive multiple of 64": lambda: call(x, packed, bias[:32]),
        r"channels must be a positive multiple of 32": lambda: call(x[..., :16].copy(), packed, bias),
        r"packed must be of weights \[O, C, 3, 3\] or \[O, C, 1, 1\], packed for the implementation, got \(64, 32, 3, 3\)": lambda: call(x, weight, bias),
        r"packed must be of weights .*, got": lambda: call(np.repeat(x, 2, 3), packed, bias),
        r"packed must have shape .*, got \(64\)": lambda: call(x, bias, bias),
        r"packed must be C-contiguous": lambda: call(x, packed[..., ::-1], bias),
        r"packed must be float32, got float16": lambda: call(x, packed.astype(np.float16), bias),
        r"x must have shape \[B, H, W, C\] = .*, got \(4, 4, 32\)": lambda: call(x[0], packed, bias),
        r"x must have an even height and width, got \(1, 3, 4, 32\)": lambda: call(x[:, :3].copy(), packed, bias),
        r"x must be float32 or bfloat16, got float16": lambda: call(x.astype(np.float16), packed, bias),
        r"x must be C-contiguous": lambda: call(x[:, ::-1], packed, bias),
        r"residual must have shape \[B, H, W, O\] = \(1, 8, 8, 64\), got \(1, 4, 4, 64\)": lambda: call(x, packed, bias, residual, upsample=True),
        r"residual must have the dtype of x, float32, got uint16": lambda: call(x, packed, bias, residual.astype(np.uint16)),
        r"out must have shape": lambda: call(x, packed, bias, out=x),
        r"threads must not be negative, got -1": lambda: call(x, packed, bias, threads=-1),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            make()
    residual.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writable, got a read-only array"):
        call(x, packed, bias, out=residual)


def test_what_names_stand_for():
    assert core.implementation_of("auto") in IMPLEMENTATIONS and core.implementation_of("auto") not in ROUNDING
    assert core.implementation_of("low") in (*ROUNDING, core.implementation_of("auto"))
    assert core.implementation_of("reference") == "reference"
