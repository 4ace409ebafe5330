"""The graphs of a bundle as torch modules, with the names and axes of their tensors.

Modules only rearrange the model's own layers, so that every weight of a graph is a tensor of the checkpoint. The
conditioners run once per prompt, person or schedule: they compute in float32 in any bundle and cast what they give.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pidiff.attention import merge_heads, split_heads
from pidiff.autoencoder import PatchAutoencoder
from pidiff.identity import IdentityAdapter
from pidiff.unet import cross_attention_layers

from .attention import Form, heads_attention
from .step import time_projections


@dataclass(frozen=True)
class Tensors:
    """Names of a graph's inputs or outputs with their axes: an int is a fixed size, a name a free one."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int | str, ...], ...]


@dataclass(frozen=True)
class Graph:
    """One graph to write: a module, and its interface. `float_dtype` is that of its floating inputs and outputs,
    but for inputs named in `float32`."""

    name: str
    module: nn.Module
    inputs: Tensors
    outputs: Tensors
    float_dtype: torch.dtype = torch.float32
    float32: tuple[str, ...] = ()
    int64: tuple[str, ...] = ()

    def input_dtype(self, name: str) -> torch.dtype:
        return torch.int64 if name in self.int64 else torch.float32 if name in self.float32 else self.float_dtype


class TextEncoder(nn.Module):
    """input_ids [B, T] -> last hidden state [B, T, D] of a CLIP text model, causal, after the final LayerNorm.

    Walks the layers of transformers' module itself: its own forward builds masks in ways that differ between versions
    and do not trace everywhere.
    """

    def __init__(self, clip: nn.Module, form: Form):
        super().__init__()
        self.clip, self.form = getattr(clip, "text_model", clip), form
        length = clip.config.max_position_embeddings
        self.heads = clip.config.num_attention_heads
        dtype = next(clip.parameters()).dtype
        causal = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings = self.clip.embeddings
        x = embeddings.token_embedding(input_ids) + embeddings.position_embedding.weight
        for layer in self.clip.encoder.layers:
            x = x + self._attention(layer.self_attn, layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
        return self.clip.final_layer_norm(x)

    def _attention(self, attn: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        return attn.out_proj(merge_heads(heads_attention(q, k, v, self.form, self.causal)))


class TextConditioner(nn.Module):
    """prompt_embeds [B, T, D] -> text_kv [B, T, 2 sum(C)]: per attn2 layer K then V."""

    def __init__(self, unet: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        layers = [unet.get_submodule(name.removesuffix(".processor")) for name, _, _ in cross_attention_layers(unet)]
        self.projections = nn.ModuleList(p for attn in layers for p in (attn.to_k, attn.to_v))

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        prompt_embeds = prompt_embeds.float()
        return torch.cat([p(prompt_embeds) for p in self.projections], -1).to(self.dtype)


class IdConditioner(nn.Module):
    """w_plus [B, L, 512], level_scale [B, G] -> id_fold [B, F] (`IdentityAdapter.fold`)."""

    def __init__(self, adapter: IdentityAdapter, dtype: torch.dtype):
        super().__init__()
        self.adapter, self.dtype = adapter, dtype

    def forward(self, w_plus: Tensor, level_scale: Tensor) -> Tensor:
        return self.adapter.fold(w_plus.float(), level_scale.float()).to(self.dtype)


class TimeConditioner(nn.Module):
    """timesteps [N] -> time_table [N, sum(Ct)]: every residual block's projection of the embedded timestep."""

    def __init__(self, unet: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        blocks = time_projections(unet)
        self.projections = nn.ModuleList(projection for _, projection in blocks)
        self.nonlinearity = blocks[0][0].nonlinearity

    def forward(self, timesteps: Tensor) -> Tensor:
        embedded = self.nonlinearity(self.time_embedding(self.time_proj(timesteps)))
        return torch.cat([p(embedded) for p in self.projections], -1).to(self.dtype)


class VaeDecoder(nn.Module):
    """latents [B, c, h, w], scaled as the UNet sees them -> image [B, 3, H, W] in about [-1, 1]."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        if isinstance(self.vae, PatchAutoencoder):
            return self.vae.decode(latents)
        latents = latents / self.vae.config.scaling_factor
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        return self.vae.decoder(latents)


class VaeEncoder(nn.Module):
    """image [B, 3, H, W] in [-1, 1] -> latents [B, c, h, w]: the posterior's mean, scaled."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        if isinstance(self.vae, PatchAutoencoder):
            return self.vae.encode(image)
        moments = self.vae.encoder(image)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        return moments.chunk(2, 1)[0] * self.vae.config.scaling_factor


@contextmanager
def norms_in_float32(module: nn.Module) -> Iterator[None]:
    """GroupNorm in float32 inside a float16 module, for the length of the block: its sums overflow and lose digits.

    (LayerNormalization has this in its ONNX definition, stash_type = 1.)
    """
    norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm) and m.weight.dtype == torch.float16]
    for norm in norms:
        norm.forward = _float32_group_norm(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _float32_group_norm(norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
        return y.to(x.dtype)

    return forward
