"""A complete PIDiff model: base diffusion model, W+ encoder and identity adapter, and its folder on disk."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from .checkpoint import CheckpointError, load_e4e, load_strict, load_wplus_adapter, local_only, read_tensors, save_weights, weight_files
from .config import AdapterConfig, from_dict, new_adapter_config, save_config
from .identity import IdentityAdapter
from .image_encoder import ImageEncoder, make_encoder
from .unet import attach
from .w_plus_encoder import WPlusEncoder

# One resolution, that of the packed latents: 8x8 positions see each other by attention, and depth is spent there.
MINI_UNET = {
    "sample_size": 8, "in_channels": 64, "out_channels": 64, "layers_per_block": 2, "norm_num_groups": 32,
    "block_out_channels": (224,), "cross_attention_dim": 192, "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
}
MINI_TEXT = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 32, "projection_dim": 192,
}
MINI_SCHEDULER = {
    "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
    "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True,
    "steps_offset": 0,
}


def mini_unet():
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(**MINI_UNET)


def mini_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                                        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **MINI_TEXT))


def scale_factor(vae: nn.Module) -> int:
    """Pixels along one side of a latent position."""
    if isinstance(vae, PatchAutoencoder):
        return vae.config.scale_factor
    return 2 ** (len(vae.config.block_out_channels) - 1)


@dataclass
class Model:
    """Everything that makes a picture, as torch modules in eval mode (float32)."""

    unet: nn.Module
    text_encoder: nn.Module
    vae: nn.Module                       # PatchAutoencoder or diffusers AutoencoderKL
    tokenizer: object
    scheduler: dict                      # a diffusers scheduler_config.json
    w_plus_encoder: WPlusEncoder | ImageEncoder
    adapter: IdentityAdapter
    directions: dict[str, Tensor]        # name -> [L, 512]; one unit = one standard deviation

    @property
    def vae_scale_factor(self) -> int:
        return scale_factor(self.vae)

    def encode_image(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> scaled latents (posterior mean)."""
        if isinstance(self.vae, PatchAutoencoder):
            return self.vae.encode(image)
        return self.vae.encode(image).latent_dist.mode() * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        if isinstance(self.vae, PatchAutoencoder):
            return self.vae.decode(latents)
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample

    def encode_text(self, input_ids: Tensor) -> Tensor:
        return self.text_encoder(input_ids).last_hidden_state


def shipped_mini() -> Path:
    """Folder of the model that comes with the package (or lies in the source tree)."""
    here = Path(__file__).resolve().parent
    for folder in (here / "models" / "mini", here.parent / "models" / "mini"):
        if folder.is_dir():
            return folder
    raise CheckpointError(f"model must be shipped with the package, got no models/mini beside {here}")


def _folder_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"model must have {folder.name}/config.json, got none in {folder.parent}")
    return json.loads(path.read_text())


def _load_part(folder: Path, module: nn.Module) -> nn.Module:
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"model must have a weights file in {folder.name}/, got none in {folder.parent}")
    state = {}
    for file in files:
        state.update(read_tensors(file))
    return load_strict(module, state, folder.name).eval()


def load_vae(folder: Path) -> nn.Module:
    config = _folder_config(folder)
    if "patch_size" in config:
        return _load_part(folder, PatchAutoencoder(from_dict(PatchAutoencoderConfig, config)))
    from diffusers import AutoencoderKL
    return AutoencoderKL.from_pretrained(folder, **local_only(folder)).eval()


def load_encoder(folder: Path) -> WPlusEncoder | ImageEncoder:
    return _load_part(folder, make_encoder(_folder_config(folder)))


def _load_text(folder: Path):
    from transformers import CLIPTextModel, CLIPTokenizer
    # transformers keeps the stored dtype; diffusers' models come in float32.
    return (CLIPTextModel.from_pretrained(folder / "text_encoder", **local_only(folder / "text_encoder")).float().eval(),
            CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))


def load_model(folder: Path, adapter_file: Path | None = None, encoder_file: Path | None = None,
               new_adapter: str | None = None) -> Model:
    """A model folder: diffusers' layout plus `w_plus_encoder/`, `adapter/` and `directions.safetensors`.

    `adapter_file` and `encoder_file` take published W+ Adapter and e4e files in place of these folders, `new_adapter` a
    kind of `new_adapter_config` for an untrained one. An exported bundle is such a folder too, so it loads the same way, but
    one in int8 does not.
    """
    from diffusers import UNet2DConditionModel

    folder = Path(folder)
    if not (folder / "unet").is_dir():
        raise CheckpointError(f"model must be a folder with unet/, vae/, text_encoder/ and tokenizer/, got {folder}")
    manifest = folder / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("precision") in ("int8", "int8-fp16"):
        raise CheckpointError(f"model must hold float weights, got the int8 bundle {folder}")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **local_only(folder / "unet")).eval()
    text_encoder, tokenizer = _load_text(folder)
    encoder = load_encoder(folder / "w_plus_encoder") if encoder_file is None else load_e4e(encoder_file)
    if new_adapter is not None:
        adapter = attach(unet, new_adapter_config(new_adapter, encoder.config.num_styles, unet.config.cross_attention_dim))
    elif adapter_file is not None:
        config = AdapterConfig(mode="residual", token_dim=unet.config.cross_attention_dim)
        adapter = load_wplus_adapter(adapter_file, attach(unet, config))
    else:
        adapter = attach(unet, from_dict(AdapterConfig, _folder_config(folder / "adapter")))
        _load_part(folder / "adapter", adapter)
    directions_file = folder / "directions.safetensors"
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return Model(unet, text_encoder, load_vae(folder / "vae"), tokenizer, scheduler, encoder, adapter.eval(),
                 read_tensors(directions_file) if directions_file.is_file() else {})


def with_w_plus(model: Model) -> Model:
    """The model, if its people are W+ codes: training draws, moves and compares these."""
    if isinstance(model.w_plus_encoder, ImageEncoder):
        raise CheckpointError("model must have a W+ encoder to be trained, got an image encoder (IP-Adapter)")
    return model


def save_diffusers_config(module, folder: Path) -> None:
    """config.json of a diffusers module, without the folder that it came from."""
    config = {k: v for k, v in json.loads(module.to_json_string()).items() if k != "_name_or_path"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_model(model: Model, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model folder that `load_model` reads; weights in `dtype` (float16 for what is shipped)."""
    folder = Path(folder)
    for name in ("unet", "text_encoder", "vae"):
        module, part = getattr(model, name), folder / name
        part.mkdir(parents=True, exist_ok=True)
        if isinstance(module, PatchAutoencoder):
            save_config(module.config, part / "config.json")
        elif hasattr(module, "save_config"):
            save_diffusers_config(module, part)
        else:
            module.config.save_pretrained(part)
        save_weights(module, part / ("model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"), dtype)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(model.scheduler, indent=2) + "\n")
    for name in ("w_plus_encoder", "adapter"):
        module = getattr(model, name)
        save_weights(module, folder / name / "model.safetensors", dtype)
        save_config(module.config, folder / name / "config.json")
    if model.directions:
        save_file(model.directions, folder / "directions.safetensors")
