"""Write a model folder in the full SD1.5 configuration with random weights, to try export and runtime at that size.

    python benchmarks/make_sd15_random.py OUT [--dtype float16|float32] [--seed N]
    pidiff-export OUT BUNDLE --fp16

860 M UNet, CLIP-L text encoder, KL autoencoder, e4e encoder (FFHQ-1024), W+ Adapter's identity branch (`residual`, 16
layers): 2.7 GB in float16. The pictures it makes are noise. The tokenizer is PIDiff's small one; the text encoder keeps
CLIP's vocabulary of 49408.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from pidiff.config import E4E_FFHQ, AdapterConfig, save_config
from pidiff.export.weights import write_safetensors
from pidiff.identity import IdentityAdapter
from pidiff.tokenizer import build_tokenizer
from pidiff.unet import cross_attention_layers
from pidiff.w_plus_encoder import WPlusEncoder

UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VAE = {
    "sample_size": 512, "latent_channels": 4, "layers_per_block": 2, "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "scaling_factor": 0.18215,
}
TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    "clip_sample": False,
}


def random_state(module: nn.Module, generator: torch.Generator, gain: float = 0.7) -> dict[str, torch.Tensor]:
    """Values for a module on the meta device: normal weights scaled by fan-in, unit norms, small biases.

    Large tensors repeat one pool of random numbers: no test needs 1.3 billion independent ones.
    """
    pool = torch.randn(1 << 20, generator=generator)
    state = {}
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            state[key] = torch.zeros(value.shape, dtype=value.dtype)
        elif value.ndim >= 2:
            start = int(torch.randint(1 << 16, (1,), generator=generator))
            flat = pool[start:].repeat(1 + value.numel() // (len(pool) - start))[:value.numel()]
            scale = 0.02 if "embedding.weight" in key else gain / value[0].numel() ** 0.5
            state[key] = (flat * scale).half().reshape(value.shape)
        else:
            unit = key.endswith("running_var") or (key.endswith("weight") and value.ndim == 1)
            state[key] = (torch.ones if unit else torch.zeros)(value.shape)
    return state


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    generator, dtype = torch.Generator().manual_seed(args.seed), getattr(torch, args.dtype)

    def write(part: str, module: nn.Module, file: str, gain: float = 0.7, prefix: str = "") -> None:
        state = {k if k.startswith(prefix) else prefix + k: v for k, v in random_state(module, generator, gain).items()}
        write_safetensors(args.out / part / file, state, dtype, part)
        print(part, f"{sum(p.numel() for p in module.parameters()):,} parameters", flush=True)

    tokenizer = build_tokenizer(args.out / "tokenizer", text_length=TEXT["max_position_embeddings"])
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
        text = CLIPTextModel(CLIPTextConfig(**TEXT, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
        encoder = WPlusEncoder(E4E_FFHQ)
        adapter = IdentityAdapter(AdapterConfig(mode="residual"), cross_attention_layers(unet))
    write("unet", unet, "diffusion_pytorch_model.safetensors")
    unet.save_config(args.out / "unet")
    write("vae", vae, "diffusion_pytorch_model.safetensors")
    vae.save_config(args.out / "vae")
    write("text_encoder", text, "model.safetensors", prefix="text_model.")     # as published; transformers 5 has dropped it
    text.config.save_pretrained(args.out / "text_encoder")
    # Without trained batch norms, 24 residual blocks must not add up.
    write("w_plus_encoder", encoder, "model.safetensors", gain=0.5)
    save_config(encoder.config, args.out / "w_plus_encoder" / "config.json")
    write("adapter", adapter, "model.safetensors")
    save_config(adapter.config, args.out / "adapter" / "config.json")
    (args.out / "scheduler").mkdir(exist_ok=True)
    (args.out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")


if __name__ == "__main__":
    main()
