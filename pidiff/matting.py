"""Foreground matting of an aligned face: a small U-Net, so that background stays out of the identity."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _block(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
                         nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


class FaceMatting(nn.Module):
    """face [B, 3, S, S] in [-1, 1] -> alpha [B, 1, S, S] in [0, 1], 1 = person.

    Works at S / 2 inside (S a multiple of 32); any S gives the same mask up to resampling, since training varies it.
    """

    def __init__(self, channels: tuple[int, ...] = (16, 32, 48, 64, 96)):
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 5, 2, 2)
        self.down = nn.ModuleList(_block(a, b, 2) for a, b in zip(channels, channels[1:]))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in zip(channels[-2::-1], channels[:0:-1]))
        self.head = nn.Conv2d(channels[0], 1, 3, 1, 1)

    def forward(self, face: Tensor) -> Tensor:
        x = F.relu(self.stem(face))
        skips = [x]
        for block in self.down:
            x = block(x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1]):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False), skip], 1))
        return torch.sigmoid(F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False))
