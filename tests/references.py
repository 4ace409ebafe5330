"""What the attention kernels are held against: the same maths in numpy, in any dtype.

The rule: the error against float64 may be at most twice the error of the same maths done in the kernel's own dtype
(numpy; for a kernel that rounds the operands of its products to bfloat16, float32 with operands so rounded), plus a
floor: a few float32 roundings of the values that are averaged, and the rounding of the result.
"""

from __future__ import annotations

from typing import Callable

import numpy as np

Array = np.ndarray


def bfloat16(x: Array) -> Array:
    """The nearest bfloat16, ties to even, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x).astype(np.float32)


def attention_reference(
    q: Array, k: Array, v: Array, heads: int, dtype: type, operand: Callable[[Array], Array] = lambda x: x
) -> Array:
    """softmax(q k^T / sqrt(d)) v, every intermediate in `dtype`; [B, S, C]. The products take `operand` of what they get."""
    batch, queries, channels = q.shape
    dim = channels // heads

    def split(x: Array) -> Array:
        return x.astype(dtype).reshape(batch, -1, heads, dim).transpose(0, 2, 1, 3)

    logits = operand(split(q)) @ operand(split(k)).transpose(0, 1, 3, 2) * dtype(1 / np.sqrt(dim))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True, dtype=dtype)
    return (operand(weights) @ operand(split(v))).transpose(0, 2, 1, 3).reshape(batch, queries, channels)


def identity_mix_reference(
    h: Array, y: Array, a: Array, v: Array, mask: Array, scale: Array, heads: int, null: bool, dtype: type
) -> tuple[Array, Array]:
    """The folded identity term with its residual add, every intermediate in `dtype`; ([B, S, C], [B, P, S])."""
    h, y, a, v, mask, scale = (x.astype(dtype) for x in (h, y, a, v, mask, scale))
    batch, queries, channels = h.shape
    people, tokens = v.shape[1:3]
    dim, columns = channels // heads, tokens + int(null)
    logits = (y[:, None] @ a).reshape(batch, people, queries, heads, columns)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True, dtype=dtype))[..., :tokens]
    values = v.reshape(batch, people, tokens, heads, dim)
    mixed = np.einsum("bpsht,bpthd->bpshd", weights, values).reshape(batch, people, queries, channels)
    out = h + scale[:, None, None] * (mask[..., None] * mixed).sum(1, dtype=dtype)
    mass = weights.sum(-1, dtype=dtype).mean(-1, dtype=dtype) if null else np.zeros((batch, people, queries), dtype)
    return out, mass


def require_close(got: Array, exact: Array, same_dtype: Array, *summed: Array) -> None:
    """Apply the rule of this module; `summed` are the arrays whose values the result is a sum of."""
    assert got.shape == exact.shape
    if not exact.size:
        return
    largest = max((float(np.abs(x).max()) for x in summed if x.size), default=1.0)
    floor = 4 * float(np.finfo(np.float32).eps) * largest
    floor += 0.5 * float(np.finfo(got.dtype).eps) * float(np.abs(exact).max())
    error = float(np.abs(got.astype(np.float64) - exact).max())
    allowed = 2 * float(np.abs(same_dtype.astype(np.float64) - exact).max()) + floor
    assert error <= allowed, f"error {error:.3g} over {allowed:.3g}"


def require_close_16bit(got: Array, exact: Array, *summed: Array, terms: int = 1) -> None:
    """The rule for CUDA: probabilities, too, pass through the storage dtype on their way to the tensor cores. The error
    of a float32 sum of many `terms`, one after the other, grows with their number."""
    assert got.shape == exact.shape and np.isfinite(got.astype(np.float32)).all()
    unit = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}[str(got.dtype)]
    unit = max(unit, terms * 2.0**-28)
    largest = max((float(np.abs(x.astype(np.float32)).max()) for x in summed if x.size), default=1.0)
    if exact.size:
        error = float(np.abs(got.astype(np.float64) - exact).max())
        assert error <= 2 * unit * largest, f"error {error:.3g} over {2 * unit * largest:.3g}"


def identity_inputs(
    rng: np.random.Generator, dtype: type, queries: int, heads: int, dim: int, people: int, tokens: int, null: bool,
    batch: int = 2,
) -> tuple[Array, ...]:  # fmt: skip
    """h, y, a, v, mask, scale for identity_mix, with logits of order one."""
    channels = heads * dim
    h, y = (rng.standard_normal((batch, queries, channels)).astype(dtype) for _ in range(2))
    a = (rng.standard_normal((batch, people, channels, heads * (tokens + null))) / np.sqrt(channels)).astype(dtype)
    v = rng.standard_normal((batch, people, tokens, channels)).astype(dtype)
    return h, y, a, v, rng.random((batch, people, queries)).astype(dtype), rng.random(batch).astype(dtype)


def stable_diffusion_alphas() -> np.ndarray:
    """alphas_cumprod of Stable Diffusion 1: float64 [1000]."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
