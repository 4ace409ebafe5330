"""Attention as it is written into the UNet's graph: three forms of the same maths, and the processors that use them.

`fused` writes nodes of the ONNX domain `pidiff` (version 1), which only a runtime with our custom operators computes:

    Attention(q [B,S,C], k [B,T,C], v [B,T,C]; num_heads) -> out [B,S,C]
    IdentityAttention(q, k, v, x [B,S,C], a [B,P,C,H*T'], v_id [B,P,T,C], mask [B,P,S], scale [B];
                      num_heads, has_null, residual) -> out [B,S,C], id_mass [B,P,S]

`standard` writes MatMul and Softmax (opset 18) or the ONNX node Attention (opset 23). Softmax is taken in float32
whatever the graph computes in. The formulas are those of `pidiff.attention`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from pidiff.attention import merge_heads, split_heads

DOMAIN = "pidiff"
DOMAIN_VERSION = 1
FORMS = ("fused", "standard")
OPSETS = (18, 23)


@dataclass(frozen=True)
class Form:
    """How attention is written: `attention` is fused or standard, `opset` 18 or 23."""

    attention: str = "fused"
    opset: int = 18

    def __post_init__(self):
        if self.attention not in FORMS:
            raise ValueError(f"attention must be one of {', '.join(FORMS)}, got {self.attention!r}")
        if self.opset not in OPSETS:
            raise ValueError(f"opset must be one of {', '.join(map(str, OPSETS))}, got {self.opset!r}")

    @property
    def fused(self) -> bool:
        return self.attention == "fused"


def self_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, form: Form) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head; q [B, S, C], k and v [B, T, C] -> [B, S, C]."""
    if form.fused:
        return torch.onnx.ops.symbolic(f"{DOMAIN}::Attention", (q, k, v), {"num_heads": num_heads}, dtype=q.dtype,
                                       shape=q.shape, version=DOMAIN_VERSION)
    return merge_heads(heads_attention(*(split_heads(x, num_heads) for x in (q, k, v)), form))


def heads_attention(q: Tensor, k: Tensor, v: Tensor, form: Form, mask: Tensor | None = None) -> Tensor:
    """The standard forms, on [B, H, S, d]; mask is added to the logits."""
    if form.opset >= 23:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return _softmax(logits if mask is None else logits + mask) @ v


def identity_attention(q: Tensor, k: Tensor, v: Tensor, x: Tensor, a: Tensor, v_id: Tensor, mask: Tensor, scale: Tensor,
                       num_heads: int, has_null: bool, residual: bool, form: Form) -> tuple[Tensor, Tensor]:
    """Text attention h plus the folded identity term; shapes in the module docstring -> (out [B,S,C], id_mass [B,P,S])."""
    if form.fused:
        attributes = {"num_heads": num_heads, "has_null": int(has_null), "residual": int(residual)}
        out, mass = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::IdentityAttention", (q, k, v, x, a, v_id, mask, scale), attributes, dtypes=(q.dtype, q.dtype),
            shapes=(q.shape, mask.shape), version=DOMAIN_VERSION)
        return out, mass
    h = self_attention(q, k, v, num_heads, form)
    logits = ((h if residual else x)[:, None] @ a).unflatten(-1, (num_heads, -1))    # [B, P, S, H, T']
    p = _softmax(logits)[..., :v_id.shape[2]].transpose(-3, -2)                      # [B, P, H, S, T]
    mix = merge_heads(p @ split_heads(v_id, num_heads))
    mass = p.sum(-1).mean(2) if has_null else torch.zeros_like(mask)
    return h + scale[:, None, None] * (mask[..., None] * mix).sum(1), mass


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=torch.float32).to(logits.dtype)


@dataclass
class StepInputs:
    """What one UNet call hands to its layers; written by `StepUNet.forward`, read by the processors below."""

    time_row: Tensor | None = None
    id_fold: Tensor | None = None
    id_scale: Tensor | None = None
    masks: dict[int, Tensor] = field(default_factory=dict)          # level (0 = latent size) -> [B, P, h / 2^level, ...]
    maps: dict[int, list[Tensor]] = field(default_factory=dict)     # level -> identity maps [B, P, S]


class SelfAttention:
    """Processor of an attn1 layer."""

    def __init__(self, form: Form):
        self.form = form

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return attn.to_out[0](self_attention(q, k, v, attn.heads, self.form))


class FoldedIdentityAttention:
    """Processor of an attn2 layer: `encoder_hidden_states` is text_kv, the identity comes folded in `inputs`.

    kv_start, fold_start: where this layer's slices begin; tokens: identity tokens T; level: 0 = latent size, 1 = half.
    """

    def __init__(self, inputs: StepInputs, form: Form, kv_start: int, fold_start: int, tokens: int, has_null: bool,
                 residual: bool, level: int):
        self.inputs, self.form, self.kv_start, self.fold_start = inputs, form, kv_start, fold_start
        self.tokens, self.has_null, self.residual, self.level = tokens, has_null, residual, level

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
        channels, q = attn.to_q.out_features, attn.to_q(hidden_states)
        k, v = encoder_hidden_states[..., self.kv_start:self.kv_start + 2 * channels].split(channels, -1)
        columns = attn.heads * (self.tokens + self.has_null)
        middle = self.fold_start + channels * columns
        dtype, mask = hidden_states.dtype, self.inputs.masks[self.level].flatten(2)
        fold = self.inputs.id_fold
        a = fold[..., self.fold_start:middle].unflatten(-1, (channels, columns))
        v_id = fold[..., middle:middle + self.tokens * channels].unflatten(-1, (self.tokens, channels))
        # In a float32 island of a float16 graph these come from outside of it.
        a, v_id, scale = a.to(dtype), v_id.to(dtype), self.inputs.id_scale.to(dtype)
        out, mass = identity_attention(q, k, v, hidden_states, a, v_id, mask.to(dtype), scale, attn.heads,
                                       self.has_null, self.residual, self.form)
        self.inputs.maps.setdefault(self.level, []).append(mass.to(mask.dtype))
        return attn.to_out[0](out)
