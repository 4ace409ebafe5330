"""Configurations: frozen dataclasses that go to and from JSON; unknown keys are errors."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def from_dict(cls: type[T], values: dict) -> T:
    """Dataclass from a JSON object; lists become tuples; unknown keys raise ValueError."""
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__} keys must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return cls(**{k: _tuples(v) for k, v in values.items()})


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def load_config(cls: type[T], path: Path) -> T:
    return from_dict(cls, json.loads(Path(path).read_text()))


def save_config(config, path: Path) -> None:
    Path(path).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


@dataclass(frozen=True)
class WPlusEncoderConfig:
    """e4e's architecture (Tov et al. 2021, arXiv 2102.02766); the defaults are its FFHQ-1024 model."""

    input_size: int = 256
    num_styles: int = 18
    style_dim: int = 512
    stem_channels: int = 64
    stage_channels: tuple[int, ...] = (64, 128, 256, 512)
    stage_blocks: tuple[int, ...] = (3, 4, 14, 3)
    head_channels: int = 512                   # width of the convolutions of each style head
    offset_channels: int | None = None         # the same for levels >= 1, whose heads give offsets; None: head_channels
    coarse_styles: int = 3                     # heads 0 .. coarse_styles-1 read the 1/16 map
    middle_styles: int = 7                     # heads .. middle_styles-1 read the 1/8 map, the rest 1/4


E4E_FFHQ = WPlusEncoderConfig()
W_PLUS_MINI = WPlusEncoderConfig(input_size=64, num_styles=12, stem_channels=32, stage_channels=(32, 64, 128, 192),
                                 stage_blocks=(1, 2, 3, 2), head_channels=192, offset_channels=16)


@dataclass(frozen=True)
class ImageEncoderConfig:
    """CLIP's vision transformer as IP-Adapter reads it; the defaults are ViT-H/14 and its projected embedding.

    `num_layers` are those that run. The code of a face is `num_styles` vectors of `style_dim`, as with the W+ encoder: the
    projected embedding, or with `resampler_layers` the tokens of IP-Adapter Plus' resampler.
    """

    input_size: int = 224
    patch_size: int = 14
    width: int = 1280
    inner_width: int = 5120
    num_layers: int = 32
    num_heads: int = 16
    activation: str = "gelu"                   # gelu | quick_gelu
    norm_eps: float = 1e-5
    num_styles: int = 1
    style_dim: int = 1024
    resampler_layers: int = 0
    resampler_width: int = 0
    resampler_heads: int = 0

    def __post_init__(self):
        if self.activation not in ("gelu", "quick_gelu"):
            raise ValueError(f"activation must be gelu or quick_gelu, got {self.activation!r}")
        if self.width % self.num_heads or self.input_size % self.patch_size:
            raise ValueError(f"width and input_size must be multiples of num_heads and patch_size, got {self.width} and {self.input_size}")


@dataclass(frozen=True)
class AdapterConfig:
    """Identity branch of one UNet.

    `groups` are the sizes of the W+ level groups (coarse, middle, fine, finest); a code without levels is one group. `tokens_per_group`
    = 1 with `mode="residual"` is W+ Adapter (Li et al. 2024, arXiv 2311.17461); `parallel` adds the null key. With
    `mapper_blocks` the mapper is a synthesis network of `mapper_width` channels with so many blocks per level group, not one matrix
    each. With `token_rows` a group's tokens stand for the cells of a grid over the picture, row by row, and the last
    `position_dim` numbers of a token say which cell and group it is: the same for everybody.
    """

    mode: str = "parallel"                     # parallel | residual
    groups: tuple[int, ...] = (4, 4, 4, 6)
    w_plus_dim: int = 512
    token_dim: int = 768
    tokens_per_group: int = 1
    center: bool = False                       # subtract latent_avg from w_plus before the mapper
    mapper_width: int = 0
    mapper_blocks: tuple[int, ...] = ()        # per level group
    token_rows: int = 0
    null_key: bool = True                      # of `parallel`; without it there is no identity map
    projection: str = "linear"                 # linear | affine (with a bias: IP-Adapter) | none (the code is tokens: its Plus)

    def __post_init__(self):
        if self.mode not in ("parallel", "residual"):
            raise ValueError(f"mode must be parallel or residual, got {self.mode!r}")
        if len(self.groups) not in (1, 4) or min(self.groups) < 1:
            raise ValueError(f"groups must be 4 positive sizes, or 1 for codes without levels, got {self.groups}")
        if self.projection not in ("linear", "affine", "none"):
            raise ValueError(f"projection must be linear, affine or none, got {self.projection!r}")
        if self.token_rows and self.tokens_per_group % self.token_rows:
            raise ValueError(f"tokens_per_group must be a multiple of token_rows {self.token_rows}, got {self.tokens_per_group}")
        if self.mapper_blocks and (len(self.mapper_blocks) != len(self.groups) or min(self.mapper_blocks) < 0 or self.mapper_width % 8 or not self.mapper_width):
            raise ValueError(f"mapper_blocks must be a size for each group with a mapper_width that 8 divides, got {self.mapper_blocks} and {self.mapper_width}")
        if self.token_dim <= self.position_dim:
            raise ValueError(f"token_dim must be more than the {self.position_dim} numbers of a position, got {self.token_dim}")

    @property
    def token_columns(self) -> int:
        return self.tokens_per_group // self.token_rows if self.token_rows else 0

    @property
    def position_dim(self) -> int:
        return self.token_rows + self.token_columns + len(self.groups) if self.token_rows else 0

    @property
    def num_tokens(self) -> int:
        return len(self.groups) * self.tokens_per_group

    @property
    def has_null(self) -> bool:
        return self.mode == "parallel" and self.null_key


def new_adapter_config(kind: str, num_styles: int, token_dim: int) -> AdapterConfig:
    """Configuration of an adapter for a base model with text width `token_dim` and an encoder of `num_styles` levels.

    parallel: ours, one token per level group and a null key. residual: W+ Adapter's form. single: IP-Adapter's form
    (arXiv 2308.06721), four tokens without a null key.
    """
    first = (4, 4, 4) if num_styles > 12 else (num_styles // 3, num_styles // 3, num_styles // 6)
    kinds = {"parallel": {}, "residual": {"mode": "residual"}, "single": {"null_key": False}}
    if kind not in kinds:
        raise ValueError(f"adapter must be one of {', '.join(kinds)}, got {kind!r}")
    return AdapterConfig(groups=(*first, num_styles - sum(first)), token_dim=token_dim, **kinds[kind])


# One token per level group and latent pixel.
ADAPTER_MINI = AdapterConfig(groups=(4, 4, 2, 2), token_dim=40, tokens_per_group=64, center=True, mapper_width=192,
                             mapper_blocks=(3, 2, 2, 1), token_rows=8)
