"""The model folder that is exported: its parts one at a time, strictly loaded, as float32 modules."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from pidiff.autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from pidiff.checkpoint import CheckpointError, load_e4e, load_strict, load_wplus_adapter, local_only, read_tensors, weight_files
from pidiff.config import AdapterConfig, from_dict
from pidiff.identity import IdentityAdapter
from pidiff.image_encoder import make_encoder
from pidiff.ip_adapter import IPAdapterFile, load_image_encoder, load_ip_adapter
from pidiff.unet import attach

from .lora import Lora, check, fuse
from .single_file import PREFIXES, SingleFile
from .weights import ExportError, source_dtype

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_IGNORED_KEYS = ("position_ids",)      # buffers that older transformers stored


@dataclass(frozen=True)
class Source:
    """A folder in diffusers' layout plus w_plus_encoder/ and adapter/, or published files in place of these two: W+ Adapter's and
    e4e's, or an IP-Adapter file and `image_encoder`, a folder of transformers.

    single_file: a checkpoint with the weights of UNet, VAE and text encoder, which the folder then need not have. loras: are
    fused into UNet and text encoder.
    """

    folder: Path
    adapter_file: Path | None = None
    encoder_file: Path | None = None
    single_file: Path | None = None
    loras: tuple[Lora, ...] = ()
    image_encoder: Path | None = None

    def __post_init__(self):
        for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if not (self.folder / name).is_dir():
                raise ExportError(f"model must be mini or a folder with unet/, vae/, text_encoder/, tokenizer/ and "
                                  f"scheduler/, got {self.folder} without {name}/")
        if self.image_encoder is not None:
            self._check_image_encoder()
        for part, file, option in (("adapter", self.adapter_file, "--adapter FILE"), ("w_plus_encoder", self.encoder_file, "--encoder FILE or --image-encoder FOLDER")):
            if file is None and not (self.folder / part).is_dir() and not self._given(part):
                raise ExportError(f"model must have {part}/ or be given {option}, got neither in {self.folder}")
            if file is not None and not file.is_file():
                raise ExportError(f"{option.split()[0]} must be an existing file, got {file}")
        if self.single_file is not None:
            self.checkpoint.check_prediction(self.config("scheduler"))
        check(self.loras)

    def _check_image_encoder(self) -> None:
        if self.encoder_file is not None or self.adapter_file is None:
            got = "none" if self.adapter_file is None else "--encoder too"
            raise ExportError(f"--image-encoder must be given with an IP-Adapter file as --adapter and without --encoder, got {got}")
        if not weight_files(self.image_encoder):
            raise ExportError(f"--image-encoder must be a folder with config.json and model.safetensors, got {self.image_encoder}")
        self.ip_adapter.adapter_config(self.config("unet").get("cross_attention_dim"))

    @cached_property
    def ip_adapter(self) -> IPAdapterFile | None:
        return None if self.image_encoder is None else IPAdapterFile.read(self.adapter_file)

    @cached_property
    def checkpoint(self) -> SingleFile | None:
        return None if self.single_file is None else SingleFile(self.single_file)

    @property
    def name(self) -> str:
        return self.single_file.stem if self.single_file else self.folder.resolve().name

    def config(self, part: str) -> dict:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        path = self.folder / part / name
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"model must have a readable {part}/{name}, got {first_line(error)}") from error
        if not isinstance(config, dict):
            raise ExportError(f"{part}/{name} must be a JSON object, got {type(config).__name__}")
        return config

    def weight_files(self, part: str) -> list[Path]:
        """The weights of a part: safetensors (or .bin) files, all shards of them; those in half precision where there are no others."""
        if self._given(part):
            return self._given(part)
        if self._in_single_file(part):
            return [self.single_file]
        if files := weight_files(self.folder / part):
            return files
        raise ExportError(f"model must have a weights file in {part}/, got none in {self.folder}")

    def stored_dtype(self, part: str) -> torch.dtype:
        """dtype in which the checkpoint stores a part; published files in its place count as float32."""
        if self._in_single_file(part):
            return self.checkpoint.dtype(part)
        files = self.weight_files(part)
        return torch.float32 if self._given(part) else _named(part, lambda: source_dtype(files))

    def size(self, part: str) -> int:
        """Bytes of a part's weights."""
        if self._in_single_file(part):
            return self.checkpoint.size(part)
        return sum(f.stat().st_size for f in self.weight_files(part))

    def _in_single_file(self, part: str) -> bool:
        return self.single_file is not None and part in PREFIXES

    def _given(self, part: str) -> list[Path]:
        """Published files in place of a part; the resampler of IP-Adapter Plus belongs to the encoder."""
        if part == "w_plus_encoder" and self.image_encoder is not None:
            return weight_files(self.image_encoder) + [self.adapter_file] * self.ip_adapter.plus
        file = {"adapter": self.adapter_file, "w_plus_encoder": self.encoder_file}.get(part)
        return [] if file is None else [file]

    def text_encoder(self) -> nn.Module:
        from transformers import CLIPTextModel

        def load():
            folder = self.folder / "text_encoder"
            model, info = CLIPTextModel.from_pretrained(folder, **local_only(folder), output_loading_info=True,
                                                        ignore_mismatched_sizes=True)     # named by _complete
            return _complete(model, info, "text_encoder")

        if self._in_single_file("text_encoder"):
            model = _named("text_encoder", lambda: self.checkpoint.load("text_encoder", self.config("text_encoder")))
        else:
            self.weight_files("text_encoder")
            model = _named("text_encoder", load).float().eval()
        return fuse(model, self.loras, "text_encoder")

    def vae(self) -> nn.Module:
        config = self.config("vae")
        if "patch_size" in config:
            return self._own(PatchAutoencoder(from_dict(PatchAutoencoderConfig, config)), "vae")
        from diffusers import AutoencoderKL
        return self._diffusers(AutoencoderKL, "vae")

    def w_plus_encoder(self) -> nn.Module:
        """The encoder of faces: WPlusEncoder or ImageEncoder."""
        if self.image_encoder is not None:
            return load_image_encoder(self.image_encoder, self.ip_adapter)
        if self.encoder_file is not None:
            return load_e4e(self.encoder_file)
        return self._own(make_encoder(self.config("w_plus_encoder")), "w_plus_encoder")

    def unet(self) -> tuple[nn.Module, IdentityAdapter]:
        """UNet with the adapter attached."""
        from diffusers import UNet2DConditionModel

        # Before the UNet takes its memory.
        nobody = self.w_plus_encoder().nobody if self.image_encoder is not None and self.ip_adapter.plus else None
        unet = fuse(self._diffusers(UNet2DConditionModel, "unet"), self.loras, "unet")
        if self.image_encoder is not None:
            adapter = attach(unet, self.ip_adapter.adapter_config(unet.config.cross_attention_dim))
            return unet, load_ip_adapter(self.ip_adapter, adapter, nobody).eval()
        if self.adapter_file is not None:
            config = AdapterConfig(mode="residual", token_dim=unet.config.cross_attention_dim)
            return unet, load_wplus_adapter(self.adapter_file, attach(unet, config)).eval()
        adapter = attach(unet, from_dict(AdapterConfig, self.config("adapter")))
        return unet, self._own(adapter, "adapter")

    def copy_tokenizer(self, out: Path) -> None:
        """Copy the tokenizer's files; tokenizer.json is made where the folder has only CLIP's older files."""
        out.mkdir()
        for name in TOKENIZER_FILES:
            if (self.folder / "tokenizer" / name).is_file():
                shutil.copyfile(self.folder / "tokenizer" / name, out / name)
        if not (out / "tokenizer.json").is_file():
            from transformers import CLIPTokenizerFast
            _named("tokenizer", lambda: CLIPTokenizerFast.from_pretrained(self.folder / "tokenizer", local_files_only=True)
                   .save_pretrained(out))

    def _own(self, module: nn.Module, part: str) -> nn.Module:
        state = {}
        for file in self.weight_files(part):
            state.update(read_tensors(file))
        return load_strict(module, state, part).eval()

    def _diffusers(self, cls, part: str) -> nn.Module:
        def load():
            model, info = cls.from_pretrained(self.folder / part, **local_only(self.folder / part), output_loading_info=True)
            return _complete(model, info, part)

        if self._in_single_file(part):
            return _named(part, lambda: self.checkpoint.load(part, self.config(part)))
        self.weight_files(part)
        return _named(part, load).float().eval()


def _named(part: str, load):
    """Run another library's loader; whatever it raises becomes one sentence that names the part."""
    try:
        return load()
    except (ExportError, CheckpointError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise ExportError(f"model must have a readable {part}/, got {first_line(error)}") from error


def _complete(model: nn.Module, info, part: str) -> nn.Module:
    """Refuse a checkpoint whose keys or shapes are not exactly the model's (its loader would fill in random numbers)."""
    problems = [f"missing {k}" for k in sorted(info["missing_keys"])]
    problems += [f"unexpected {k}" for k in sorted(info["unexpected_keys"]) if not k.endswith(_IGNORED_KEYS)]
    problems += [f"{k[0] if isinstance(k, tuple) else k} of another shape" for k in info["mismatched_keys"]]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ExportError(f"{part} must have exactly the expected keys and shapes, got {'; '.join(problems[:5])}{more}")
    return model


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:240] + "..." if len(text) > 240 else text) or type(error).__name__
