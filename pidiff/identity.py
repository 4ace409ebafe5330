"""Identity branch: mapper from W+ to tokens, and the per-layer projections of the identity cross-attention.

`IdentityAdapter` owns everything that is trained for identity. It attaches to any diffusers UNet2DConditionModel as
attention processors, without touching the UNet's weights or code (see `unet.py`).
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import fold_identity, identity_attention, merge_heads, split_heads
from .config import AdapterConfig


class SynthesisBlock(nn.Module):
    """x [B, S, d], style [B, d] -> [B, S, d]: positions are mixed by matrices of their own (one per head), channels by a two-layer
    network; the style scales and shifts what goes in (FiLM, arXiv 1709.07871). Starts as the identity."""

    def __init__(self, positions: int, width: int, heads: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.style = nn.Linear(width, 2 * width)
        self.mix = nn.Parameter(torch.eye(positions).repeat(heads, 1, 1) + torch.randn(heads, positions, positions) / positions)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        gain, bias = self.style(style)[:, None].chunk(2, -1)
        h = split_heads(self.norm(x) * (1 + gain) + bias, len(self.mix))
        return x + self.narrow(F.silu(self.wide(merge_heads(self.mix @ h))))


class SynthesisGroup(nn.Module):
    """One level group's part of the synthesis network: blocks styled by its codes, and its tokens read off what they leave."""

    def __init__(self, inputs: int, blocks: int, config: AdapterConfig):
        super().__init__()
        width = config.mapper_width
        self.style = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(SynthesisBlock(config.tokens_per_group, width) for _ in range(blocks))
        self.tokens = nn.Linear(width, config.token_dim - config.position_dim)

    def forward(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, d], codes [B, size * w_plus_dim] -> x, tokens [B, S, content]."""
        style = F.silu(self.style(codes))
        for block in self.blocks:
            x = block(x, style)
        return x, self.tokens(x)


def token_positions(config: AdapterConfig) -> Tensor:
    """One-hot row, column and level group of every token: [T, position_dim]. By them attention finds a token whoever
    the person is."""
    rows, columns, groups = config.token_rows, config.token_columns, len(config.groups)
    group, row, column = (t.flatten() for t in torch.meshgrid(*map(torch.arange, (groups, rows, columns)), indexing="ij"))
    one_hot = ((row, rows), (column, columns), (group, groups))
    return 2 * torch.cat([F.one_hot(index, count) for index, count in one_hot], 1).float()


class WPlusMapper(nn.Module):
    """w_plus [B, L, 512] -> id_embeds [B, T, d]: one map per level group, one shared LayerNorm.

    With one token per group and no `mapper_blocks` this is W+ Adapter's mapper (arXiv 2311.17461: bias-free matrices), so its
    published weights load; with one group and other projections it is IP-Adapter's (`ip_adapter.py`). With blocks it is a
    synthesis network on the token grid, as StyleGAN's is on pictures: it begins with a learned constant, and each level group
    goes on from what the coarser ones left.
    """

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        content = config.tokens_per_group * (config.token_dim - config.position_dim)
        for i, size in enumerate(config.groups):
            inputs = size * config.w_plus_dim
            self.add_module(f"proj_{i}", SynthesisGroup(inputs, config.mapper_blocks[i], config) if config.mapper_blocks
                            else nn.Identity() if config.projection == "none"
                            else nn.Linear(inputs, content, bias=config.projection == "affine"))
        self.norm = nn.LayerNorm(config.token_dim)
        self.start = nn.Parameter(torch.randn(config.tokens_per_group, config.mapper_width)) if config.mapper_blocks else None
        self.position = nn.Parameter(token_positions(config)) if config.token_rows else None
        average = torch.zeros(sum(config.groups), config.w_plus_dim) if config.center else None
        self.register_buffer("latent_avg", average)

    def forward(self, w_plus: Tensor) -> Tensor:
        levels = sum(self.config.groups)
        if w_plus.shape[1:] != (levels, self.config.w_plus_dim):
            raise ValueError(f"w_plus must have shape [B, {levels}, {self.config.w_plus_dim}], got {tuple(w_plus.shape)}")
        if self.latent_avg is not None:
            w_plus = w_plus - self.latent_avg
        tokens = self.content([part.flatten(1) for part in w_plus.split(self.config.groups, 1)])
        if self.position is not None:
            tokens = torch.cat([tokens, self.position.expand(len(tokens), -1, -1)], -1)
        return self.norm(tokens)

    def content(self, codes: list[Tensor]) -> Tensor:
        """Codes of each level group [B, size * 512] -> what the tokens say, without their positions [B, T, d]."""
        groups = [getattr(self, f"proj_{i}") for i in range(len(codes))]
        if self.start is None:
            return torch.cat([g(part).unflatten(1, (self.config.tokens_per_group, -1)) for g, part in zip(groups, codes)], 1)
        x, tokens = self.start.expand(len(codes[0]), -1, -1), []
        for group, part in zip(groups, codes):
            x, own = group(x, part)
            tokens.append(own)
        return torch.cat(tokens, 1)


class IdentityProjection(nn.Module):
    """to_q_id, to_k_id, to_v_id and the null key of one cross-attention layer with C channels."""

    def __init__(self, channels: int, num_heads: int, config: AdapterConfig):
        super().__init__()
        self.num_heads = num_heads
        self.to_q_id = nn.Linear(channels, channels, bias=False)
        self.to_k_id = nn.Linear(config.token_dim, channels, bias=False)
        self.to_v_id = nn.Linear(config.token_dim, channels, bias=False)
        self.k_null = nn.Parameter(torch.zeros(channels)) if config.has_null else None

    def values(self, id_embeds: Tensor, token_scale: Tensor) -> Tensor:
        """v_id scaled per token: id_embeds [..., T, d], token_scale [..., T] -> [..., T, C]."""
        return self.to_v_id(id_embeds) * token_scale[..., None]

    def forward(self, y: Tensor, id_embeds: Tensor, token_scale: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, S, C], id_embeds [B, P, T, d] -> contribution [B, P, S, C], identity map [B, P, S]."""
        return identity_attention(self.to_q_id(y), self.to_k_id(id_embeds), self.values(id_embeds, token_scale),
                                  self.k_null, self.num_heads)

    def fold(self, id_embeds: Tensor, token_scale: Tensor) -> tuple[Tensor, Tensor]:
        """id_embeds [B, P, T, d] -> A [B, P, C, H T'], V [B, P, T, C]; see `attention.fold_identity`."""
        a = fold_identity(self.to_q_id.weight, self.to_k_id(id_embeds), self.k_null, self.num_heads)
        return a, self.values(id_embeds, token_scale)


@dataclass
class IdentityCondition:
    """What the identity branch sees during one UNet call. Shapes as in `IdentityAdapter.condition`."""

    id_embeds: Tensor
    id_scale: Tensor
    token_scale: Tensor
    mask: Tensor | None
    maps: list[Tensor] | None

    def mask_at(self, num_queries: int, aspect: float) -> Tensor | None:
        """Region masks [B, P, h, w] resampled to a layer's S query positions: [B, P, S]."""
        return None if self.mask is None else resample_mask(self.mask, num_queries, aspect)


def resample_mask(mask: Tensor, num_queries: int, aspect: float) -> Tensor:
    """[B, P, h, w] -> [B, P, S] by area averaging; aspect = h / w of the layer's map."""
    height = round((num_queries * aspect) ** 0.5)
    return F.interpolate(mask, size=(height, num_queries // height), mode="area").flatten(2)


class IdentityAdapter(nn.Module):
    """Mapper and projections for every cross-attention layer of a UNet.

    `layers` gives (name, channels, num_heads) in the UNet's processor order. Without a condition the adapter does
    nothing: the UNet computes exactly what it computes without it.
    """

    def __init__(self, config: AdapterConfig, layers: list[tuple[str, int, int]]):
        super().__init__()
        self.config = config
        self.layer_names = [name for name, _, _ in layers]
        self.mapper = WPlusMapper(config)
        self.layers = nn.ModuleList(IdentityProjection(channels, heads, config) for _, channels, heads in layers)
        self.active: IdentityCondition | None = None

    def token_scale(self, level_scale: Tensor) -> Tensor:
        """Scale per level group [..., G] -> per-token scale [..., T]."""
        return level_scale.repeat_interleave(self.config.tokens_per_group, -1)

    def fold(self, w_plus: Tensor, level_scale: Tensor) -> Tensor:
        """w_plus [B, L, 512], level_scale [B, G] -> id_fold [B, F]: per layer A then V, flattened."""
        embeds, scale = self.mapper(w_plus)[:, None], self.token_scale(level_scale)[:, None]
        parts = [part.flatten(1) for layer in self.layers for part in layer.fold(embeds, scale)]
        return torch.cat(parts, 1)

    @contextmanager
    def condition(self, id_embeds: Tensor, id_scale: Tensor | float = 1.0, level_scale: Tensor | None = None,
                  id_mask: Tensor | None = None, keep_maps: bool = False):
        """Make UNet calls inside the block see these people.

        id_embeds [B, P, T, d] (or [B, T, d] for one person), id_scale number or [B], level_scale [B, P, G],
        id_mask [B, P, h, w] in [0, 1] at latent size. Yields the condition; its `maps` hold one [B, P, S] per layer.
        """
        if id_embeds.ndim == 3:
            id_embeds = id_embeds[:, None]
        batch, people = id_embeds.shape[:2]
        id_scale = torch.as_tensor(id_scale, dtype=id_embeds.dtype, device=id_embeds.device).expand(batch)
        if level_scale is None:
            level_scale = id_embeds.new_ones(batch, people, len(self.config.groups))
        self.active = condition = IdentityCondition(id_embeds, id_scale, self.token_scale(level_scale), id_mask,
                                                    [] if keep_maps else None)
        try:
            yield condition
        finally:
            if self.active is condition:
                self.active = None

    def contribution(self, layer: int, x: Tensor, h: Tensor, aspect: float) -> Tensor:
        """What the identity adds to the text attention h [B, S, C] of a layer with input x [B, S, C]."""
        condition = self.active
        y = x if self.config.mode == "parallel" else h
        mix, mass = self.layers[layer](y, condition.id_embeds, condition.token_scale)
        if condition.maps is not None:
            condition.maps.append(mass)
        if (mask := condition.mask_at(x.shape[1], aspect)) is not None:
            mix = mix * mask[..., None]
        return condition.id_scale[:, None, None] * mix.sum(1)
