"""Attach an identity adapter to a diffusers UNet2DConditionModel, without forking it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import merge_heads, split_heads
from .config import AdapterConfig
from .identity import IdentityAdapter

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def cross_attention_layers(unet: "UNet2DConditionModel") -> list[tuple[str, int, int]]:
    """(processor name, channels, heads) of every attn2 in processor order (down, up, mid)."""
    return [(name, unet.get_submodule(name.removesuffix(".processor")).to_q.out_features,
             unet.get_submodule(name.removesuffix(".processor")).heads)
            for name in unet.attn_processors if name.endswith("attn2.processor")]


class IdentityAttnProcessor:
    """diffusers attention processor: text attention as in AttnProcessor2_0, plus the adapter's contribution."""

    def __init__(self, adapter: IdentityAdapter, layer: int, sizes: "LatentSize"):
        self.adapter, self.layer, self.sizes = adapter, layer, sizes

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            raise ValueError(f"attention_mask must be None in identity cross-attention, got {tuple(attention_mask.shape)}")
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        h = merge_heads(F.scaled_dot_product_attention(*(split_heads(x, attn.heads) for x in (q, k, v))))
        if self.adapter.active is not None:
            h = h + self.adapter.contribution(self.layer, hidden_states, h, self.sizes.aspect).to(h.dtype)
        out = attn.to_out[1](attn.to_out[0](h))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class LatentSize:
    """Height / width of the UNet's current input, so that layers can place region masks."""

    aspect = 1.0

    def __init__(self, unet: "UNet2DConditionModel"):
        self.hook = unet.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        sample = kwargs.get("sample", args[0] if args else None)
        self.aspect = sample.shape[-2] / sample.shape[-1]


def attach(unet: "UNet2DConditionModel", config: AdapterConfig) -> IdentityAdapter:
    """New adapter for `unet`, set as the processors of its attn2 layers.

    `to_q_id` starts as the layer's `to_q`, keys and values as the text's `to_k`, `to_v` where the widths agree.
    """
    adapter = IdentityAdapter(config, cross_attention_layers(unet))
    with torch.no_grad():
        for name, layer in zip(adapter.layer_names, adapter.layers):
            attn = unet.get_submodule(name.removesuffix(".processor"))
            layer.to_q_id.weight.copy_(attn.to_q.weight)
            if attn.to_k.weight.shape == layer.to_k_id.weight.shape:
                layer.to_k_id.weight.copy_(attn.to_k.weight)
                layer.to_v_id.weight.copy_(attn.to_v.weight)
    set_processors(unet, adapter)
    return adapter


def set_processors(unet: "UNet2DConditionModel", adapter: IdentityAdapter) -> None:
    """Route the attn2 layers of `unet` through `adapter`, in place of any other; attn1 is left as it is."""
    detach(unet)
    sizes = LatentSize(unet)
    processors = dict(unet.attn_processors)
    for index, name in enumerate(adapter.layer_names):
        processors[name] = IdentityAttnProcessor(adapter, index, sizes)
    unet.set_attn_processor(processors)


def detach(unet: "UNet2DConditionModel") -> None:
    """Give the attn2 layers of `unet` diffusers' processor back."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    processors = dict(unet.attn_processors)
    for name, processor in processors.items():
        if isinstance(processor, IdentityAttnProcessor):
            processor.sizes.hook.remove()
            processors[name] = AttnProcessor2_0()
    unet.set_attn_processor(processors)
