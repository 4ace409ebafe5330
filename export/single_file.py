"""Stable Diffusion 1 checkpoints in one .safetensors file, with the names of its first release (`model.diffusion_model...`).

Such a file has no configuration and no tokenizer: these come from a folder in diffusers' layout, which needs no weights.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pidiff.checkpoint import load_strict

from .errors import ExportError
from .weights import TYPES, read_header

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}
_BUFFERS = ("position_ids",)           # stored by older transformers


class SingleFile:
    """The parts of a checkpoint file. Raises ExportError for a file that holds none of a part."""

    def __init__(self, path: Path):
        self.path, self._header = path, read_header(path)
        for part, prefix in PREFIXES.items():
            if not self._keys(part):
                raise ExportError(f"model must hold tensors {prefix}*, as Stable Diffusion 1 in one file does, got {path} without "
                                  f"its {part}")

    def _keys(self, part: str) -> list[str]:
        return [k for k in self._header if k.startswith(PREFIXES[part])]

    def size(self, part: str) -> int:
        """Bytes of a part's weights."""
        ends = [self._header[k]["data_offsets"] for k in self._keys(part)]
        return sum(end - start for start, end in ends)

    def dtype(self, part: str) -> torch.dtype:
        """float16 when every floating tensor of the part is, else float32."""
        found = {TYPES.get(self._header[k]["dtype"], torch.float32) for k in self._keys(part)}
        return torch.float16 if {t for t in found if t.is_floating_point} == {torch.float16} else torch.float32

    def check_prediction(self, scheduler: dict) -> None:
        """A file that says how it was trained must agree with the folder's schedule."""
        type_, zero_snr = scheduler.get("prediction_type", "epsilon"), bool(scheduler.get("rescale_betas_zero_snr"))
        if "v_pred" in self._header and type_ != "v_prediction":
            raise ExportError(f"scheduler prediction_type must be v_prediction for {self.path}, which says so, got {type_}")
        if "ztsnr" in self._header and not zero_snr:
            raise ExportError(f"scheduler rescale_betas_zero_snr must be true for {self.path}, which says so (ztsnr), got {zero_snr}")

    def load(self, part: str, config: dict) -> nn.Module:
        """A part as a float32 module, strictly: every tensor of it in the file, and no other."""
        return getattr(self, f"_{part}")(config).float().eval()

    def _unet(self, config: dict) -> nn.Module:
        from diffusers import UNet2DConditionModel
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        unet, state = UNet2DConditionModel.from_config(config), self._state("unet")
        return load_strict(unet, self._converted("unet", state, lambda: convert_ldm_unet_checkpoint(state, dict(unet.config))), "unet")

    def _vae(self, config: dict) -> nn.Module:
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        vae, state = AutoencoderKL.from_config(config), self._state("vae")
        return load_strict(vae, self._converted("vae", state, lambda: convert_ldm_vae_checkpoint(state, dict(vae.config))), "vae")

    def _text_encoder(self, config: dict) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        clip = CLIPTextModel(CLIPTextConfig.from_dict(config))
        state = {k.removeprefix(PREFIXES["text_encoder"]): v for k, v in self._state("text_encoder").items()
                 if not k.endswith(_BUFFERS)}
        if not next(iter(clip.state_dict())).startswith("text_model."):
            state = {k.removeprefix("text_model."): v for k, v in state.items()}
        return load_strict(clip, state, "text_encoder")

    def _state(self, part: str) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in self._keys(part)}

    def _converted(self, part: str, state: dict[str, Tensor], convert) -> dict[str, Tensor]:
        """diffusers' names; it fails in its own ways where blocks of the configuration are not in the file."""
        try:
            return convert()
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ExportError(f"{part} must be the one that {part}/config.json describes, got {self.path} with others "
                              f"({len(state)} tensors; {json.dumps(str(error))[:80]})") from error
