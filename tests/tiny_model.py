"""Whole models of a few thousand random weights, in the two shapes that PIDiff has.

`parallel`: PatchAutoencoder, null key, fixed picture size, stored in float16 as `mini` is. `residual`: AutoencoderKL, W+
Adapter's query mode, free picture size, stored in float32 as SD1.5 often is. Nothing was trained, and no weight is zero.
"""

import contextlib
import fcntl
import io
import os
from pathlib import Path

import torch

from pidiff.autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from pidiff.config import AdapterConfig, WPlusEncoderConfig
from pidiff.model import Model, save_model
from pidiff.tokenizer import build_tokenizer
from pidiff.unet import attach
from pidiff.w_plus_encoder import WPlusEncoder

ENCODER = WPlusEncoderConfig(input_size=64, num_styles=6, stem_channels=4, stage_channels=(4, 8, 8, 8), stage_blocks=(1, 1, 1, 1),
                             head_channels=8, coarse_styles=2, middle_styles=4)
SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
             "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False,
             "set_alpha_to_one": True, "steps_offset": 0}
TEXT_LENGTH, WIDTH = 12, 16


def make_unet():
    """Attention at two sizes: three layers at latent size, one at half of it."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(16, 32),
        cross_attention_dim=WIDTH, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def make_adapter(unet, mode: str):
    """Attached to `unet`; its null keys are no zeros. `single` is `parallel` without them."""
    config = AdapterConfig(mode="residual" if mode == "residual" else "parallel", null_key=mode != "single", groups=(2, 2, 1, 1), token_dim=WIDTH, tokens_per_group=2 if mode == "parallel" else 1,
                           center=mode == "parallel")
    return _noisy(attach(unet, config))


def make_vae(mode: str):
    if mode == "parallel":
        return _noisy(PatchAutoencoder(PatchAutoencoderConfig(4, 64, 8, (8, 8), (8, 8, 8))))
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                         up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16).eval()


def make_model(folder: Path, mode: str = "parallel") -> Model:
    """A model in memory; `folder` receives its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = build_tokenizer(Path(folder) / "tokenizer", text_length=TEXT_LENGTH)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TEXT_LENGTH, projection_dim=WIDTH)).eval()
    unet = make_unet()
    return Model(unet, text, make_vae(mode), tokenizer, SCHEDULER, _noisy(WPlusEncoder(ENCODER)), make_adapter(unet, mode),
                 {"smile": torch.randn(6, 512)})


def write_model(folder: Path, mode: str = "parallel") -> Path:
    """Write the model folder of a mode and return it."""
    model = make_model(folder, mode)
    save_model(model, folder, torch.float16 if mode == "parallel" else None)
    (folder / "LICENSE").write_text("Made of random numbers.\n")
    return folder


def write_overflowing(folder: Path) -> Path:
    """Write the folder of a model whose attention in the middle of the UNet overflows float16, and return it."""
    model = make_model(folder)
    with torch.no_grad():
        model.unet.up_blocks[1].attentions[1].proj_out.weight.mul_(6e4)
        model.unet.conv_norm_out.weight.mul_(0.5)
    save_model(model, folder, torch.float16)
    return folder


_made: dict[str, Path] = {}


def shared(name: str, factory) -> Path:
    """Models and bundles that several test files use, made at the first use by one of pytest's processes for all (`factory` is pytest's
    tmp_path_factory).

    Models: parallel, residual. Bundles: fused (of parallel), standard23 (of residual, opset 23), fp16 (by the command
    line, from the bundle `fused`).
    """
    if name not in _made:
        base = factory.getbasetemp()
        root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
        root.mkdir(exist_ok=True)
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{name}.txt").is_file():
                text = _make(name, root / name, factory)
                (root / f"{name}.txt").write_text(text)
        _made[name] = root / name
    return _made[name]


def printed(name: str) -> str:
    """What the command line said when it made a bundle."""
    return _made[name].with_name(f"{name}.txt").read_text()


def _make(name: str, out: Path, factory) -> str:
    from pidiff.export.__main__ import main
    from pidiff.export.attention import Form
    from pidiff.export.bundle import ExportOptions, export_bundle
    from pidiff.export.source import Source

    text = io.StringIO()
    if name in ("parallel", "residual"):
        write_model(out, name)
    elif name == "fp16":
        with contextlib.redirect_stdout(text):
            assert main([str(shared("fused", factory)), str(out), "--fp16", "--steps", "7", "--name", "again", "--report", "none"]) == 0
    else:
        mode = "parallel" if name == "fused" else "residual"
        form = Form() if name == "fused" else Form("standard", 23)
        export_bundle(Source(shared(mode, factory)), out, ExportOptions(form, report="short"))
    return text.getvalue()


def _noisy(module):
    """Give zero-initialised parameters and buffers values, so that every weight reaches an output."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not value.any():
                value.normal_(std=0.1)
    return module.eval()
