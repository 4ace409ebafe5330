"""Attention references and the torch operator.

The functions with plain names are the reference: any float dtype up to float64, any device, differentiable. They state
the formulas of the localised identity cross-attention in its unfolded and folded forms; a test holds these equal.
`implementation="native"` calls the C++ kernel of `pidiff._C` (CPU, float32, no gradient).

Shapes: B batch, S queries, N text tokens, C channels, H heads, d = C / H, P people, T identity tokens,
T' = T + 1 with a null key, else T.
"""

import torch
from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., S, C] -> [..., H, S, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """[..., H, S, d] -> [..., S, C]."""
    return x.transpose(-3, -2).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, implementation: str = "reference") -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head; q [B, S, C], k and v [B, N, C] -> [B, S, C]."""
    if implementation == "native":
        return torch.ops.pidiff.attention(q, k, v, num_heads)
    q, k, v = (split_heads(x, num_heads) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return merge_heads(torch.softmax(logits, -1) @ v)


def identity_attention(q_id: Tensor, k_id: Tensor, v_id: Tensor, k_null: Tensor | None, num_heads: int,
                       ) -> tuple[Tensor, Tensor]:
    """Unfolded identity attention of every person (method: localised identity cross-attention).

    q_id [B, S, C]; k_id, v_id [B, P, T, C]; k_null [C] or None.
    Returns the contribution [B, P, S, C] before masks and scale, and the mass on real tokens `1 - p_null`
    [B, P, S], mean over heads (ones without a null key).
    """
    if k_null is not None:
        k_id = torch.cat([k_id, k_null.to(k_id.dtype).expand(*k_id.shape[:2], 1, -1)], 2)
    q, k, v = split_heads(q_id[:, None], num_heads), split_heads(k_id, num_heads), split_heads(v_id, num_heads)
    p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    tokens = v.shape[-2]
    return merge_heads(p[..., :tokens] @ v), p[..., :tokens].sum(-1).mean(2)


def fold_identity(w_q: Tensor, k_id: Tensor, k_null: Tensor | None, num_heads: int) -> Tensor:
    """Fold `to_q_id` into the keys: A[:, h T' + t] = W_q,h^T k_t,h / sqrt(d).

    w_q [C, C] (out, in); k_id [B, P, T, C] -> A [B, P, C, H T']. Exact; fold in float32 or wider, then cast.
    """
    if k_null is not None:
        k_id = torch.cat([k_id, k_null.expand(*k_id.shape[:2], 1, -1)], 2)
    k = split_heads(k_id, num_heads)                                        # [B, P, H, T', d]
    w = w_q.unflatten(0, (num_heads, -1))                                   # [H, d, C]
    folded = torch.einsum("bphtd,hdc->bpcht", k, w) * k.shape[-1] ** -0.5
    return folded.flatten(-2)


def identity_mix(h: Tensor, y: Tensor, a: Tensor, v_id: Tensor, mask: Tensor, scale: Tensor, num_heads: int,
                 has_null: bool, implementation: str = "reference") -> tuple[Tensor, Tensor]:
    """h + scale_b sum_p m_p softmax_t(y A_p) V_p: the folded identity term with its residual add.

    h, y [B, S, C]; a [B, P, C, H T']; v_id [B, P, T, C]; mask [B, P, S]; scale [B].
    Returns ([B, S, C], mass on real tokens [B, P, S]; zeros without a null key).
    """
    if implementation == "native":
        return torch.ops.pidiff.identity_mix(h, y, a, v_id, mask, scale, num_heads, has_null)
    logits = (y[:, None] @ a).unflatten(-1, (num_heads, -1))                # [B, P, S, H, T']
    p = torch.softmax(logits, -1)
    tokens = v_id.shape[-2]
    mix = merge_heads(p[..., :tokens].transpose(-3, -2) @ split_heads(v_id, num_heads))
    mass = p[..., :tokens].sum(-1).mean(-1) if has_null else torch.zeros_like(mask)
    return h + scale[:, None, None] * (mask[..., None] * mix).sum(1), mass


def _native(x: Tensor, name: str):
    if x.device.type != "cpu" or x.dtype != torch.float32:
        raise ValueError(f"{name} must be a float32 CPU tensor for the native kernel, got {x.dtype} on {x.device}")
    return x.detach().contiguous().numpy()


@torch.library.custom_op("pidiff::attention", mutates_args=())
def _attention_op(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    from . import _C
    return torch.from_numpy(_C.attention(_native(q, "q"), _native(k, "k"), _native(v, "v"), num_heads))


@_attention_op.register_fake
def _(q, k, v, num_heads):
    return torch.empty_like(q)


@torch.library.custom_op("pidiff::identity_mix", mutates_args=())
def _identity_mix_op(h: Tensor, y: Tensor, a: Tensor, v_id: Tensor, mask: Tensor, scale: Tensor, num_heads: int,
                     has_null: bool) -> tuple[Tensor, Tensor]:
    from . import _C
    names = ("h", "y", "a", "v_id", "mask", "scale")
    arrays = [_native(x, n) for x, n in zip((h, y, a, v_id, mask, scale), names)]
    out, mass = _C.identity_mix(*arrays, num_heads, has_null)
    return torch.from_numpy(out), torch.from_numpy(mass)


@_identity_mix_op.register_fake
def _(h, y, a, v_id, mask, scale, num_heads, has_null):
    return torch.empty_like(h), torch.empty_like(mask)
