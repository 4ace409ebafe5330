"""Small random IP-Adapter files with the published names, and the image encoder folder that they read."""

import torch
from safetensors.torch import save_file

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
          "projection_dim": 10, "hidden_act": "gelu"}


def layer_tensors(channels, token_dim):
    """Key and value matrices of attn2 layers with so many channels, in the UNet's processor order: 1, 3, 5, ..."""
    return {f"{2 * n + 1}.to_{p}_ip.weight": torch.randn(c, token_dim) / token_dim**0.5 for n, c in enumerate(channels) for p in "kv"}


def plain(channels, token_dim=16, image_dim=10, tokens=4):
    proj = {"proj.weight": torch.randn(tokens * token_dim, image_dim), "proj.bias": torch.randn(tokens * token_dim),
            "norm.weight": torch.randn(token_dim), "norm.bias": torch.randn(token_dim)}
    return {"image_proj": proj, "ip_adapter": layer_tensors(channels, token_dim)}


def plus(channels, token_dim=16, image_dim=16, tokens=5, width=24, heads=2, depth=4):
    norm = lambda name, size: {f"{name}.weight": 1 + torch.randn(size) / 4, f"{name}.bias": torch.randn(size) / 4}
    matrix = lambda rows, columns: torch.randn(rows, columns) / columns**0.5
    proj = {"latents": torch.randn(1, tokens, width), "proj_in.weight": matrix(width, image_dim), "proj_in.bias": torch.randn(width),
            "proj_out.weight": matrix(token_dim, width), "proj_out.bias": torch.randn(token_dim), **norm("norm_out", token_dim)}
    for i in range(depth):
        proj |= {**norm(f"layers.{i}.0.norm1", width), **norm(f"layers.{i}.0.norm2", width), **norm(f"layers.{i}.1.0", width),
                 f"layers.{i}.0.to_q.weight": matrix(64 * heads, width), f"layers.{i}.0.to_kv.weight": matrix(128 * heads, width),
                 f"layers.{i}.0.to_out.weight": matrix(width, 64 * heads), f"layers.{i}.1.1.weight": matrix(4 * width, width),
                 f"layers.{i}.1.3.weight": matrix(width, 4 * width)}
    return {"image_proj": proj, "ip_adapter": layer_tensors(channels, token_dim)}


def write(path, state):
    """A .safetensors file with flat names, or a .bin file with one dict for each part."""
    if path.suffix == ".safetensors":
        save_file({f"{part}.{k}": v.contiguous() for part, tensors in state.items() for k, v in tensors.items()}, path)
    else:
        torch.save(state, path)
    return path


def write_image_encoder(folder, **changes):
    """Returns transformers' model; `folder` holds it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**VISION, **changes})).eval()
    with torch.no_grad():
        for value in clip.parameters():
            value.add_(torch.randn_like(value) / 10)         # no zero bias, no norm of ones
    clip.save_pretrained(folder)
    return clip
