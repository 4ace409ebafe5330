"""LoRA files fused into a model's weights before export: W + scale * (alpha / rank) * up @ down.

Read are kohya's names (lora_unet_..., lora_te_..., as LCM-LoRA has them) and those of diffusers and PEFT (unet...., text_encoder....),
for linear layers and convolutions. What is not understood completely is refused: a part of a LoRA is another LoRA.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pidiff.checkpoint import read_tensors

from .errors import ExportError

PARTS = {"lora_unet_": "unet", "lora_te_": "text_encoder", "unet.": "unet", "text_encoder.": "text_encoder"}
# Ends of keys; the last group says which matrix it is. diffusers' older attention processors come first: theirs hold a layer's name.
_ENDS = (r"\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight", r"\.lora_(?:linear|conv)_layer\.(down|up)\.weight",
         r"\.lora\.(down|up)\.weight", r"\.lora_(down|up)\.weight", r"\.lora_(A|B)(?:\.default)?\.weight", r"\.alpha")
_ROLES = {"A": "down", "B": "up", "down": "down", "up": "up"}


@dataclass(frozen=True)
class Lora:
    """A LoRA file and the strength it is fused with."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Read FILE or FILE:SCALE."""
        path, colon, number = text.rpartition(":")
        if not colon or Path(text).is_file():
            path, number = text, "1"
        try:
            scale = float(number)
        except ValueError:
            path, scale = text, 1.0
        if not math.isfinite(scale) or abs(scale) > 10:
            raise ExportError(f"lora must have a scale from -10 to 10, got {text}")
        if not Path(path).is_file():
            raise ExportError(f"lora must be an existing file, or FILE:SCALE, got {text}")
        return cls(Path(path), scale)


def fuse(module: nn.Module, loras: Iterable[Lora], part: str) -> nn.Module:
    """Add every LoRA's matrices for `part` (unet or text_encoder) to the weights of `module` (float32), in place."""
    for lora in loras:
        layers = _layers(lora.path)
        names = {flat: name for name, _ in module.named_modules() for flat in (name, name.replace(".", "_"))}
        for (owner, layer), matrices in layers.items():
            if owner == part:
                name = next((names[n] for n in (layer, layer.removeprefix("text_model.").removeprefix("text_model_"),
                                                f"text_model.{layer}") if n in names), None)
                target = module.get_submodule(name) if name is not None else None
                if not isinstance(getattr(target, "weight", None), Tensor) or target.weight.ndim < 2:
                    raise ExportError(f"lora must be for this model, got {lora.path} with the layer {layer}, which its {part} has not")
                with torch.no_grad():
                    target.weight.add_(_difference(target.weight, matrices, lora, f"{part} {layer}"))
    return module


def check(loras: Iterable[Lora]) -> None:
    """Raise ExportError, before any work, for a file with keys that are not understood."""
    for lora in loras:
        _layers(lora.path)


def _layers(path: Path) -> dict[tuple[str, str], dict[str, Tensor | float]]:
    """(part, layer) -> {"down", "up", and alpha where the file gives one}."""
    found: dict[tuple[str, str], dict] = {}
    for key, value in read_tensors(path).items():
        prefix = next((p for p in PARTS if key.startswith(p)), None)
        match = next((m for pattern in _ENDS if (m := re.search(pattern + "$", key))), None)
        if prefix is None or match is None or not isinstance(value, Tensor):
            raise ExportError(f"lora must have kohya's, diffusers' or PEFT's names for Stable Diffusion 1, got {key} in {path}")
        layer, groups = key[len(prefix):match.start()], match.groups()
        if len(groups) == 2:
            layer += "." + {"to_out": "to_out.0"}.get(groups[0], groups[0])
        role = _ROLES[groups[-1]] if groups else "alpha"
        found.setdefault((PARTS[prefix], layer), {})[role] = value
    if not found:
        raise ExportError(f"lora must hold matrices, got none in {path}")
    alphas = _alphas(path)
    for (part, layer), matrices in found.items():
        if not {"down", "up"} <= matrices.keys():
            raise ExportError(f"lora must have both matrices of a layer, got {', '.join(matrices)} of {part} {layer} in {path}")
        if part in alphas:
            matrices.setdefault("alpha", alphas[part])
    return found


def _alphas(path: Path) -> dict[str, float]:
    """Alphas of whole parts that newer diffusers writes into the file's metadata."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata")
        settings = json.loads(text) if text else {}
        special = [k for k, v in settings.items() if v and k.split(".")[-1] in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora")]
        if special:
            raise ExportError(f"lora must be a plain LoRA, got {special[0].split('.')[-1]} in {path}")
        return {p: float(settings[f"{p}.lora_alpha"]) for p in ("unet", "text_encoder") if f"{p}.lora_alpha" in settings}
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"lora must have readable metadata, got {path} ({str(error)[:80]})") from error


def _difference(weight: Tensor, matrices: dict[str, Tensor | float], lora: Lora, layer: str) -> Tensor:
    """What is added to a weight: of a linear layer [out, in], or of a convolution [out, in, height, width]."""
    down, up = matrices["down"].float(), matrices["up"].float()
    rank = down.shape[0] if down.ndim else 0
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and rank and up.flatten(1).shape == (weight.shape[0], rank) \
        and down.numel() == rank * weight[0].numel()
    if not fits:
        raise ExportError(f"lora must fit the weight {tuple(weight.shape)} of {layer}, got {tuple(up.shape)} and {tuple(down.shape)} in "
                          f"{lora.path}")
    scale = lora.scale * float(matrices.get("alpha", rank)) / rank
    result = scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if not torch.isfinite(result).all():
        raise ExportError(f"lora must hold finite numbers, got NaN or infinity for {layer} in {lora.path}")
    return result
