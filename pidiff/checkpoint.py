"""Read and write weights: strict, named errors, safetensors for everything written, never a pickle that can run code."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import E4E_FFHQ, WPlusEncoderConfig
from .identity import IdentityAdapter
from .w_plus_encoder import WPlusEncoder


class CheckpointError(ValueError):
    """A weights file that is not what it should be; the message is one sentence."""


def read_tensors(path: Path) -> dict:
    """Nested dict of tensors from .safetensors, or from .pt/.bin/.pth with `weights_only=True`."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint must be an existing file, got {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint must be a readable weights file, got {path} ({reason})") from error
    except Exception as error:  # UnpicklingError: the file holds more than tensors
        raise CheckpointError(f"checkpoint must hold tensors only, got {path} ({type(error).__name__})") from error


def weight_files(folder: Path) -> list[Path]:
    """The weights in a folder as diffusers and transformers name them: safetensors, else .bin, else the same in half precision
    (`model.fp16.safetensors`), all shards; empty where there are none."""
    for half in ("", ".fp16"):
        stems = [stem + half for stem in ("model", "diffusion_pytorch_model", "pytorch_model")]
        for suffix in (".safetensors", ".bin"):
            files = [f for f in sorted(folder.glob(f"*{suffix}")) if f.name.split("-")[0].removesuffix(suffix) in stems]
            if files:
                return files
    return []


def local_only(folder: Path) -> dict:
    """Arguments of `from_pretrained` (diffusers, transformers) by which it reads the `weight_files` of a folder, and nothing from elsewhere."""
    files = weight_files(folder)
    return {"local_files_only": True, "variant": "fp16" if files and ".fp16" in files[0].name else None}


def load_strict(module: nn.Module, state: dict[str, Tensor], name: str) -> nn.Module:
    """`load_state_dict` that names every missing, extra or wrongly shaped key, and refuses non-finite values."""
    want = module.state_dict()
    problems = [f"missing {k}" for k in want if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in want]
    problems += [f"{k} of shape {tuple(state[k].shape)} instead of {tuple(v.shape)}" for k, v in want.items()
                 if k in state and state[k].shape != v.shape]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{name} must have exactly the expected keys and shapes, got {'; '.join(problems[:5])}{more}")
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{name} must hold finite weights, got NaN or infinity in {key}")
    with torch.no_grad():
        for key, value in want.items():
            value.copy_(state[key])
    return module


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """State dict as safetensors, floating tensors cast to `dtype` where given."""
    state = {k: v.detach().cpu().to(dtype) if dtype is not None and v.is_floating_point() else v.detach().cpu()
             for k, v in module.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in state.items()}, path)


def load_e4e(path: Path, config: WPlusEncoderConfig = E4E_FFHQ) -> WPlusEncoder:
    """Published e4e checkpoint: {"state_dict": {"encoder.*", "decoder.*"}, "latent_avg": [L, 512]}, loaded strictly."""
    raw = read_tensors(path)
    if not isinstance(raw.get("state_dict"), dict) or not isinstance(raw.get("latent_avg"), Tensor):
        raise CheckpointError(f"e4e checkpoint must have state_dict and latent_avg, got {', '.join(map(str, list(raw)[:8]))}")
    state = {k.removeprefix("encoder."): v for k, v in raw["state_dict"].items() if k.startswith("encoder.")}
    state["latent_avg"] = raw["latent_avg"]
    return load_strict(WPlusEncoder(config), state, "e4e encoder").eval()


def load_wplus_adapter(path: Path, adapter: IdentityAdapter) -> IdentityAdapter:
    """Published W+ Adapter weights {"w_proj": ..., "wplus_adapter": ...} into a `residual` adapter, strictly.

    Their keys count attention processors in the UNet's own order, attn1 and attn2 alternating, so layer n of ours is
    their 2 n + 1.
    """
    raw = read_tensors(path)
    if adapter.config.mode != "residual":
        raise CheckpointError(f"adapter mode must be residual for W+ Adapter weights, got {adapter.config.mode}")
    if not all(isinstance(raw.get(part), dict) for part in ("w_proj", "wplus_adapter")):
        raise CheckpointError("W+ Adapter checkpoint must have w_proj and wplus_adapter (an IP-Adapter file is given with an image encoder), "
                              f"got {', '.join(map(str, list(raw)[:8]))}")
    load_strict(adapter.mapper, raw["w_proj"], "w_proj")
    names = {f"{2 * n + 1}.to_{p}_wplus.weight": f"{n}.to_{p}_id.weight" for n in range(len(adapter.layers)) for p in "qkv"}
    state = {names.get(k, f"{k} (of the file)"): v for k, v in raw["wplus_adapter"].items()}
    load_strict(adapter.layers, state, "wplus_adapter")
    return adapter
