"""W+ encoder in e4e's architecture (Tov et al. 2021, arXiv 2102.02766, "Encoder4Editing").

Module names are those of the published state dict, so a published e4e encoder loads strictly.
"""

import math
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import E4E_FFHQ, WPlusEncoderConfig


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class BottleneckIRSE(nn.Module):
    """Improved residual block with squeeze and excitation (ArcFace's IR-SE)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if in_channels == channels else nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False), nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels),
            SqueezeExcitation(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class EqualLinear(nn.Module):
    """Linear layer with StyleGAN2's equalised learning rate: y = x (W / sqrt(in))^T + b."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1 / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class StyleHead(nn.Module):
    """Feature map [B, C, s, s], s a power of two -> one style vector [B, style_dim]."""

    def __init__(self, in_channels: int, channels: int, style_dim: int, spatial: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(int(math.log2(spatial))):
            layers += [nn.Conv2d(in_channels if i == 0 else channels, channels, 3, 2, 1), nn.LeakyReLU(0.01)]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(channels, style_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class WPlusEncoder(nn.Module):
    """Aligned face [B, 3, S, S] in [-1, 1] -> w_plus [B, L, 512], `latent_avg` added.

    w_0 = latent_avg + head_0;  w_i = w_0 + head_i (i >= 1): a main code and per-level offsets, as in e4e.
    """

    def __init__(self, config: WPlusEncoderConfig = E4E_FFHQ):
        super().__init__()
        self.config = config
        c1, c2, c3, c4 = config.stage_channels
        self.input_layer = nn.Sequential(nn.Conv2d(3, config.stem_channels, 3, 1, 1, bias=False),
                                         nn.BatchNorm2d(config.stem_channels), nn.PReLU(config.stem_channels))
        blocks: list[nn.Module] = []
        channels = config.stem_channels
        for width, count in zip(config.stage_channels, config.stage_blocks):
            for i in range(count):
                blocks.append(BottleneckIRSE(channels, width, 2 if i == 0 else 1))
                channels = width
        self.body = nn.Sequential(*blocks)
        self.latlayer1 = nn.Conv2d(c3, c4, 1)
        self.latlayer2 = nn.Conv2d(c2, c4, 1)
        widths = [config.head_channels] + [config.offset_channels or config.head_channels] * (config.num_styles - 1)
        self.styles = nn.ModuleList(StyleHead(c4, width, config.style_dim, config.input_size // self._stride(i))
                                    for i, width in enumerate(widths))
        for head in self.styles[1:]:                    # every level begins as the main code
            nn.init.zeros_(head.linear.weight)
        self.register_buffer("latent_avg", torch.zeros(config.num_styles, config.style_dim))

    def _stride(self, style: int) -> int:
        return 16 if style < self.config.coarse_styles else 8 if style < self.config.middle_styles else 4

    @torch.no_grad()
    def init_main_code(self, codes: Tensor) -> None:
        """Point the main head at the principal components of `codes` [N, style_dim], each with its own deviation."""
        linear = self.styles[0].linear
        std, directions = torch.linalg.svd(codes - codes.mean(0), full_matrices=False)[1:]
        count = min(linear.weight.shape[1], len(std))
        linear.weight.zero_()
        linear.weight[:, :count] = (directions[:count] * std[:count, None]).T / len(codes) ** 0.5 / linear.scale

    def forward(self, face: Tensor) -> Tensor:
        maps = self.feature_maps(face)
        codes = [head(maps[self._stride(i)]) for i, head in enumerate(self.styles)]
        main = codes[0]
        return torch.stack([main] + [main + offset for offset in codes[1:]], dim=1) + self.latent_avg

    def main_code(self, face: Tensor) -> Tensor:
        """w_0 [B, 512] alone: what e4e's first training stage learns, at a third less work."""
        return self.styles[0](self.feature_maps(face)[self._stride(0)]) + self.latent_avg[0]

    def feature_maps(self, face: Tensor) -> dict[int, Tensor]:
        """Feature pyramid of faces [B, 3, S, S]: stride -> [B, C, S / stride, S / stride], coarse ones added into fine ones."""
        taps = []
        ends = list(accumulate(self.config.stage_blocks))
        x = self.input_layer(face)
        for i, block in enumerate(self.body, 1):
            x = block(x)
            if i in ends[1:]:
                taps.append(x)
        c1, c2, c3 = taps
        p2 = _upsample_like(c3, c2) + self.latlayer1(c2)
        p1 = _upsample_like(p2, c1) + self.latlayer2(c1)
        return {16: c3, 8: p2, 4: p1}


def _upsample_like(x: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(x, size=target.shape[-2:], mode="bilinear", align_corners=True)
