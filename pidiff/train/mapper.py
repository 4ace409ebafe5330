"""Mapper stage: tokens learn to describe the face before a UNet has to read them.

Each level group's tokens cover the latent grid, one token per cell, and a linear read-out shared by the group's tokens
predicts that group's share of the latent channels there (coarse channels from the coarse levels): regression of the
latents of a person on white from the person's code, the inner face weighing most. Few megaflops a sample, so that tens of thousands of people pass
many times in minutes; the base stage then keeps the mapper as it is and learns where to look and what to make of it.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..attention import split_heads
from ..checkpoint import load_strict, read_tensors
from ..config import ADAPTER_MINI, AdapterConfig
from ..data.people import People
from ..identity import IdentityAdapter, WPlusMapper
from .common import on_white
from .precision import autocast


HEAD, INNER_FACE = (slice(2, 7), slice(1, 7)), (slice(3, 6), slice(2, 6))       # rows, columns: eighths of an aligned picture


def face_window(size: int, inner: float, head: float = 1.0, device: str = "cpu") -> Tensor:
    """Weights [size, size] of the places of an aligned picture: 1 elsewhere, `head` around the face, `inner` on it."""
    window = torch.ones(8, 8, device=device)
    window[HEAD], window[INNER_FACE] = head, inner
    return F.interpolate(window[None, None], (size, size), mode="area")[0, 0]


def likeness_weight(std: Tensor, size: int) -> Tensor:
    """Weights [C, h, w], mean 1, of squared errors of standardised latents (their deviations: std [C, 1, 1]): coarse channels
    and the inner face, where recognition looks. Plain errors spend themselves on hair and texture: 768 principal components of
    `mini`'s latents keep a similarity of 0.54 to a person (ArcFace), weighted by channel and place 0.75 to 0.79."""
    weight = (face_window(size, 4.0, 2.2, std.device) * std ** 0.75).square()
    return weight / weight.mean()


@functools.cache                # on the device: a copy from the processor at every call would make a GPU wait
def cells_met(config: AdapterConfig, side: int, device: torch.device) -> Tensor:
    """Which cells of the token grid lie where a position of a side x side map lies: [side^2, tokens of a group] bool."""
    def along(cells: int) -> Tensor:
        fine = math.lcm(cells, side)
        place = torch.arange(fine)
        met = torch.zeros(side, cells, dtype=torch.bool)
        met[place * side // fine, place * cells // fine] = True
        return met
    rows, columns = along(config.token_rows), along(config.token_columns)
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1).to(device)


def alignment_loss(adapter: IdentityAdapter, queries: list[Tensor], keys: list[Tensor], mask: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of identity attention against the tokens' own layout: inside the person each head should read one
    level group's tokens of its position, outside the null token.

    queries: per layer [B, S, C]; keys: [B, 1, T, C]; mask [B, 1, h, w] in [0, 1]; weight [B], 0 for pictures without an
    identity. Without it heads settle on a few arbitrary tokens, and it takes them many thousand pictures to part.
    """
    config, total = adapter.config, mask.new_zeros(())
    for layer, q, k in zip(adapter.layers, queries, keys):
        heads, side = layer.num_heads, int(q.shape[1] ** 0.5)
        k = torch.cat([k[:, 0], layer.k_null.to(k.dtype).expand(len(k), 1, -1)], 1)
        logits = split_heads(q, heads) @ split_heads(k, heads).transpose(-1, -2) * (q.shape[-1] // heads) ** -0.5
        log_p = logits.float().log_softmax(-1)                                              # [B, H, S, T + 1]
        group = torch.arange(heads, device=q.device) * 4 // heads
        groups = log_p[..., :-1].unflatten(-1, (4, -1))                                     # [B, H, S, 4, tokens of a group]
        own = groups.take_along_dim(group.view(1, -1, 1, 1, 1), 3)[..., 0, :]
        on = own.masked_fill(~cells_met(config, side, q.device), -torch.inf).logsumexp(-1)
        inside = F.interpolate(mask, size=(side, side), mode="area").flatten(2)
        loss = -(inside * on + (1 - inside) * log_p[..., -1]).mean((1, 2))
        total = total + (loss * weight).sum() / weight.sum().clamp(min=1)
    return total / len(queries)


class RenderingMapper(nn.Module):
    """A mapper and its read-outs: w_plus [B, L, 512] -> standardised latents [B, C, h, w]."""

    def __init__(self, config: AdapterConfig, channels: int, size: int):
        super().__init__()
        self.rows, self.columns = config.token_rows, config.token_columns
        self.size = size
        if channels % 4 or size % self.rows or size % self.columns:
            raise ValueError(f"latents must have 4 n channels and a side that {self.rows} and {self.columns} divide, "
                             f"got {channels} and {size}")
        self.mapper, self.content = WPlusMapper(config), config.token_dim - config.position_dim
        region = channels // 4 * size * size // config.tokens_per_group
        self.read = nn.ModuleList(nn.Linear(self.content, region) for _ in config.groups)
        self.register_buffer("mean", torch.zeros(channels, size, size))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Take mean and deviation from latents [N, C, h, w]."""
        some = latents[::max(1, len(latents) // 5000)].float()
        self.mean.copy_(some.mean(0))
        self.std.copy_(some.std((0, 2, 3)).view(-1, 1, 1))

    def standardise(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] as `forward` gives them, on its device."""
        return (latents.to(self.mean.device).float() - self.mean) / self.std

    def language(self) -> list[nn.Parameter]:
        """What says where a token is and how it is read: held where a UNet has learned to read the tokens."""
        return [*self.read.parameters(), *self.mapper.norm.parameters(), self.mapper.position]

    @torch.no_grad()
    def learn_to_read(self, w_plus: Tensor, latents: Tensor) -> None:
        """Least-squares read-outs for the mapper's tokens as they are, from codes [N, L, 512] and standardised latents
        [N, C, h, w]: for a mapper that comes from an adapter, where no read-outs are kept."""
        high, wide = self.size // self.rows, self.size // self.columns
        cells = latents.unflatten(3, (self.columns, wide)).unflatten(2, (self.rows, high)).permute(0, 2, 4, 1, 3, 5)
        for read, tokens, wanted in zip(self.read, self.mapper(w_plus)[..., :self.content].chunk(4, 1), cells.chunk(4, 3)):
            x, y = F.pad(tokens.flatten(0, 1), (0, 1), value=1.0).double(), wanted.flatten(3).flatten(0, 2).double()
            solution = torch.linalg.lstsq(x, y).solution.float()
            read.weight.copy_(solution[:-1].T)
            read.bias.copy_(solution[-1])

    def forward(self, w_plus: Tensor) -> Tensor:
        tokens = self.mapper(w_plus)[..., :self.content].chunk(4, 1)
        high, wide = self.size // self.rows, self.size // self.columns
        bands = [read(t).unflatten(1, (self.rows, self.columns)).unflatten(-1, (-1, high, wide)) for read, t in zip(self.read, tokens)]
        return torch.cat([b.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3) for b in bands], 1)


def load_renderer(file: Path) -> RenderingMapper:
    """What the mapper stage wrote, for pictures only: no gradient reaches its weights."""
    state = read_tensors(file)
    model = RenderingMapper(ADAPTER_MINI, *state["mean"].shape[:2])
    return load_strict(model, state, file.parent.name).eval().requires_grad_(False)


@torch.no_grad()
def white_latents(vae: nn.Module, people: People, batch: int = 50) -> Tensor:
    """Latents [N, C, h, w] float16 of every person on white."""
    vae, device, parts = vae.to(memory_format=torch.channels_last), next(vae.parameters()).device, []
    for start in tqdm(range(0, len(people), batch), desc="latents", disable=None):
        with autocast(str(device)):
            parts.append(vae.encode(on_white(people, slice(start, start + batch), device)).half().cpu())
    return torch.cat(parts)


class MapperLoss:
    """Squared error of standardised latents by `likeness_weight`. Codes: the encoder's, or exact ones with noise of up to
    `code_noise` (a code's own standard deviation is about 0.34)."""

    def __init__(self, model: RenderingMapper, people: People, latents: Tensor, codes: np.ndarray | None, batch_size: int,
                 device: str = "cpu", code_noise: float = 0.03, encoded: float = 0.5):
        self.model, self.latents, self.codes, self.batch_size, self.device = model, latents, codes, batch_size, device
        self.w, self.code_noise, self.encoded = people.w, code_noise, encoded if codes is not None else 0.0
        self.weight = likeness_weight(model.std, model.size)

    def exact(self, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Exact codes [B, L, 512] of pictures with a little noise."""
        noise = rng.normal(size=(len(indices), 1, 512)) * self.code_noise * rng.random((len(indices), 1, 1))
        return (self.w[indices][:, None] + noise).astype(np.float32).repeat(sum(self.model.mapper.config.groups), 1)

    def errors(self, w_plus: Tensor, indices: np.ndarray) -> Tensor:
        """Weighted squared errors [B, C, h, w] of what codes [B, L, 512] draw."""
        target = self.model.standardise(self.latents[torch.from_numpy(indices)])
        return (self.model(w_plus).float() - target).square() * self.weight

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, dict]:
        indices = rng.integers(len(self.latents), size=self.batch_size)
        w_plus = self.exact(indices, rng)
        if self.codes is not None:
            encoded = rng.random(self.batch_size) < self.encoded
            w_plus[encoded] = self.codes[indices[encoded]]
        return self.errors(torch.from_numpy(w_plus).to(self.device), indices).mean(), {}


@torch.no_grad()
def unexplained(model: RenderingMapper, w_plus: Tensor, latents: Tensor) -> float:
    """Share of the latents' variance over people that the mapper's rendering leaves unexplained."""
    latents = latents.float()
    picture = model(w_plus) * model.std + model.mean
    return float((picture - latents).square().mean() / (latents - latents.mean(0)).square().mean())
