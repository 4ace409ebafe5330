"""Write a model folder in diffusers' layout as one file with the names of Stable Diffusion's first release, for rivals that read
such files. `pidiff-export` reads what this writes (pidiff.export.single_file)."""

import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
          ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")]


def _replaced(text: str, pairs) -> str:
    return reduce(lambda t, pair: re.sub(*pair, t), pairs, text)


def unet_name(key: str, layers: int = 2) -> str:
    """diffusers' name of a UNet's tensor -> the first release's, without its prefix."""
    if "resnets" in key:
        key = _replaced(key, RESNET)
    part = lambda m: int(m[2] == "attentions")
    rules = ((r"time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"), (r"conv_in", "input_blocks.0.0"),
             (r"conv_norm_out", "out.0"), (r"conv_out", "out.2"),
             (r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda m: f"input_blocks.{1 + (layers + 1) * int(m[1]) + int(m[3])}.{part(m)}"),
             (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(layers + 1) * (int(m[1]) + 1)}.0.op"),
             (r"mid_block\.(resnets|attentions)\.(\d)", lambda m: f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}"),
             (r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda m: f"output_blocks.{(layers + 1) * int(m[1]) + int(m[3])}.{part(m)}"),
             (r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{(layers + 1) * int(m[1]) + layers}.{1 if m[1] == '0' else 2}.conv"))
    for pattern, name in rules:
        key, count = re.subn("^" + pattern, name, key)
        if count:
            return key
    raise KeyError(key)


def vae_name(key: str, blocks: int = 4) -> str:
    """The same for a tensor of the autoencoder."""
    up = lambda kind: lambda m: f"up.{blocks - 1 - int(m[1])}.{kind}"
    return _replaced(key, [("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
                           (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"), (r"up_blocks\.(\d)\.resnets", up("block")),
                           (r"up_blocks\.(\d)\.upsamplers\.0", up("upsample")), (r"mid_block\.attentions\.0", "mid.attn_1"),
                           (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"), ("group_norm", "norm"),
                           (r"\.to_([qkv])\.", r".\1."), (r"to_out\.0", "proj_out")])


def first_release(folder: Path, layers: int = 2, blocks: int = 4) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything that the file holds. layers: of the UNet's blocks; blocks: of the autoencoder's halves."""
    tensors = lambda part: load_file(next((folder / part).glob("*.safetensors"))).items()
    for key, value in tensors("unet"):
        yield f"model.diffusion_model.{unet_name(key, layers)}", value
    for key, value in tensors("vae"):
        flat = "attentions" in key and value.ndim == 2                  # was a convolution with a kernel of one pixel
        yield f"first_stage_model.{vae_name(key, blocks)}", value[..., None, None] if flat else value
    for key, value in tensors("text_encoder"):
        yield f"cond_stage_model.transformer.{key if key.startswith('text_model.') else f'text_model.{key}'}", value


def write_single_file(folder: Path, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in first_release(folder)}, file)
