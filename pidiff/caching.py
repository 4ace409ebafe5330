"""Feature caching across steps (DeepCache, Ma et al., CVPR 2024, arXiv 2312.00858): a UNet call that runs only the layers
nearest to the latents and takes the rest, which changes slowly, from an earlier call.

The cut lies in the last up block, at latent size: `outer` of its layers run (1: the last alone; all of them: the cut is at
the block's start), and of the down path the first `outer - 1` layers, whose outputs these take as skip connections.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def check_outer(layers: int, outer: int) -> None:
    """Raise ValueError for a cut that is not among the `layers` of the last up block."""
    if not 1 <= outer <= layers:
        raise ValueError(f"outer must be 1 to {layers}, the layers of the UNet's last up block, got {outer}")


def deep_channels(unet: "UNet2DConditionModel", outer: int) -> int:
    """Channels of the deep features: what the first outer up layer reads beside its skip connection."""
    return unet.up_blocks[-1].resnets[-outer].in_channels - unet.conv_in.out_channels


@contextmanager
def keep_deep_features(unet: "UNet2DConditionModel", outer: int) -> Iterator[list[Tensor]]:
    """Collects the deep features [B, C, h, w] of every whole call of `unet` inside the block."""
    check_outer(len(unet.up_blocks[-1].resnets), outer)
    kept: list[Tensor] = []
    block = unet.up_blocks[-1]
    before = len(block.resnets) - outer - 1              # the layer whose output they are
    if before < 0:
        source = unet.up_blocks[-2] if len(unet.up_blocks) > 1 else unet.mid_block
    else:
        source = (getattr(block, "attentions", None) or block.resnets)[before]
    hook = source.register_forward_hook(lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output))
    try:
        yield kept
    finally:
        hook.remove()


def outer_forward(unet: "UNet2DConditionModel", latents: Tensor, timestep: Tensor | int, text: Tensor, deep: Tensor,
                  outer: int) -> Tensor:
    """Model output [B, c, h, w] with deep features [B, C, h, w] of another call; equals a whole call with its own."""
    check_outer(len(unet.up_blocks[-1].resnets), outer)
    time = unet.time_embedding(unet.get_time_embed(latents, timestep))
    x = unet.conv_in(latents)
    skips = [x]
    for resnet, attention in _layers(unet.down_blocks[0], slice(0, outer - 1)):
        x = _layer(resnet, attention, x, time, text)
        skips.append(x)
    x = deep
    for resnet, attention in _layers(unet.up_blocks[-1], slice(-outer, None)):
        x = _layer(resnet, attention, torch.cat([x, skips.pop()], 1), time, text)
    if unet.conv_norm_out is not None:
        x = unet.conv_act(unet.conv_norm_out(x))
    return unet.conv_out(x)


def _layers(block: nn.Module, part: slice) -> list[tuple[nn.Module, nn.Module | None]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return list(zip(block.resnets, attentions))[part]


def _layer(resnet: nn.Module, attention: nn.Module | None, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
    x = resnet(x, time)
    return x if attention is None else attention(x, encoder_hidden_states=text, return_dict=False)[0]
