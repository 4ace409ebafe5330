"""Published IP-Adapter files (Ye et al. 2023, arXiv 2308.06721) for Stable Diffusion 1, and the image encoder that they read.

    plain   ip-adapter_sd15, _light     image_proj.{proj, norm}: CLIP's projected embedding [1, 1024] -> 4 tokens
    plus    ip-adapter-plus_sd15, -plus-face    image_proj.{latents, proj_in, layers, proj_out, norm_out}: features -> 16 tokens

and per layer `ip_adapter.{i}.to_k_ip`, `to_v_ip`, i odd in the UNet's own order. It is a `parallel` identity branch without a null
key whose queries are the text attention's. The resampler of Plus runs in the image encoder, so that a person stays a small file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import CheckpointError, load_strict, read_tensors, weight_files
from .config import AdapterConfig, ImageEncoderConfig
from .identity import IdentityAdapter
from .image_encoder import HEAD_DIM, ImageEncoder

# By these, with so many axes, a kind is known and its sizes are told.
_PLAIN = {"proj.weight": 2, "norm.weight": 1}
_PLUS = {"latents": 3, "proj_in.weight": 2, "norm_out.weight": 1, "layers.0.0.to_q.weight": 2}


@dataclass(frozen=True)
class IPAdapterFile:
    """image_proj: of the file, under its own names. layers: key and value matrices, "{i}.to_k_ip.weight"."""

    image_proj: dict[str, Tensor]
    layers: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> "IPAdapterFile":
        """Read .safetensors (flat names) or .bin (one dict for each part). Raises CheckpointError."""
        raw = read_tensors(path)
        if all(isinstance(part, dict) for part in raw.values()):
            raw = {f"{part}.{key}": value for part, state in raw.items() for key, value in state.items()}
        parts = {part: {k.removeprefix(f"{part}."): v for k, v in raw.items() if k.startswith(f"{part}.")} for part in ("image_proj", "ip_adapter")}
        proj, others = parts["image_proj"], [k for k in raw if not k.startswith(("image_proj.", "ip_adapter."))]
        if others or not all(parts.values()):
            raise CheckpointError(f"IP-Adapter file must hold image_proj and ip_adapter only, got {', '.join((others or list(raw))[:4]) or 'nothing'} in {path}")
        if not any(all(getattr(proj.get(k), "ndim", None) == axes for k, axes in kind.items()) for kind in (_PLAIN, _PLUS)):
            raise CheckpointError(f"IP-Adapter file must be a plain one (image_proj.proj) or Plus (image_proj.latents), not FaceID or full-face, "
                                  f"got image_proj.{', image_proj.'.join(list(proj)[:4])} in {path}")
        return cls(proj, parts["ip_adapter"])

    @property
    def plus(self) -> bool:
        return "latents" in self.image_proj

    @property
    def image_width(self) -> int:
        """Width of what it reads from the image encoder."""
        return self.image_proj["proj_in.weight" if self.plus else "proj.weight"].shape[1]

    @property
    def tokens(self) -> int:
        return self.image_proj["latents"].shape[1] if self.plus else self.image_proj["proj.weight"].shape[0] // self.token_dim

    @property
    def token_dim(self) -> int:
        return self.image_proj["norm_out.weight" if self.plus else "norm.weight"].shape[0]

    @property
    def resampler_layers(self) -> int:
        return len({k.split(".")[1] for k in self.image_proj if k.startswith("layers.")})

    def adapter_config(self, token_dim: int) -> AdapterConfig:
        """Configuration of the identity branch for a UNet with text of width `token_dim`."""
        if token_dim != self.token_dim:
            raise CheckpointError(f"IP-Adapter file must be made for a UNet with text of width {token_dim}, got one for {self.token_dim}")
        levels, width = (self.tokens, token_dim) if self.plus else (1, self.image_width)
        return AdapterConfig(groups=(levels,), w_plus_dim=width, token_dim=token_dim, tokens_per_group=self.tokens, null_key=False,
                             center=self.plus, projection="none" if self.plus else "affine")


def load_ip_adapter(file: IPAdapterFile, adapter: IdentityAdapter, nobody: Tensor | None = None) -> IdentityAdapter:
    """Fill an adapter of `file.adapter_config` that was just attached, so that its queries are the text's; strictly.

    nobody: the image encoder's, for Plus, whose codes count from it.
    """
    proj = file.image_proj
    if file.plus:
        mapper = {"norm.weight": proj["norm_out.weight"], "norm.bias": proj["norm_out.bias"], "latent_avg": -nobody}
    else:
        mapper = {k.replace("proj.", "proj_0."): v for k, v in proj.items()}
    load_strict(adapter.mapper, mapper, "image_proj")
    names = {f"{2 * n + 1}.to_{p}_ip.weight": f"{n}.to_{p}_id.weight" for n in range(len(adapter.layers)) for p in "kv"}
    queries = {f"{n}.to_q_id.weight": layer.to_q_id.weight for n, layer in enumerate(adapter.layers)}
    load_strict(adapter.layers, queries | {names.get(k, f"{k} (of the file)"): v for k, v in file.layers.items()}, "ip_adapter")
    return adapter


def load_image_encoder(folder: Path, file: IPAdapterFile) -> ImageEncoder:
    """A transformers CLIPVisionModelWithProjection folder as the encoder of faces for an IP-Adapter file, loaded strictly."""
    config = _encoder_config(folder, file)
    encoder, state = ImageEncoder(config), {}
    for path in weight_files(folder):
        state |= read_tensors(path)
    state.pop("vision_model.embeddings.position_ids", None)     # older transformers stored it
    if file.plus:
        unused = (f"vision_model.encoder.layers.{config.num_layers}.", "vision_model.post_layernorm.", "visual_projection.")
        state = {k: v for k, v in state.items() if not k.startswith(unused)}
        state |= {f"resampler.{k}": v for k, v in file.image_proj.items() if not k.startswith("norm_out.")}
        state["nobody"] = torch.zeros_like(encoder.nobody)
    load_strict(encoder, state, "image encoder").eval()
    if file.plus:
        encoder.measure_nobody()
    return encoder


def _encoder_config(folder: Path, file: IPAdapterFile) -> ImageEncoderConfig:
    vision = _vision_config(folder)
    width, side = vision["hidden_size" if file.plus else "projection_dim"], vision["image_size"]
    if width != file.image_width:
        raise CheckpointError(f"image encoder must give numbers of width {file.image_width}, which the IP-Adapter file reads, got {width} in {folder}")
    if side % 32:
        raise CheckpointError(f"image encoder must read pictures whose side 32 divides, as the network that removes their background does, got "
                              f"{side} in {folder}")
    code = {"num_styles": 1, "style_dim": width}
    if file.plus:
        code = {"num_styles": file.tokens, "style_dim": file.token_dim, "resampler_layers": file.resampler_layers,
                "resampler_width": file.image_proj["latents"].shape[2],
                "resampler_heads": file.image_proj["layers.0.0.to_q.weight"].shape[0] // HEAD_DIM}
    # Plus reads the features before the last layer.
    return ImageEncoderConfig(
        side, vision["patch_size"], vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"] - file.plus,
        vision["num_attention_heads"], vision["hidden_act"], vision["layer_norm_eps"], **code)


def _vision_config(folder: Path) -> dict:
    """config.json of a CLIPVisionModelWithProjection, completed with transformers' defaults."""
    from transformers import CLIPVisionConfig

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "vision_config" in config or config.get("model_type") != "clip_vision_model":
            raise ValueError(f"model_type {config.get('model_type')}")
        return CLIPVisionConfig.from_dict(config).to_dict()
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"image encoder must be a folder of a CLIPVisionModelWithProjection, got {folder} ({str(error)[:100]})") from error
