"""CLIP's vision transformer (Radford et al. 2021, arXiv 2103.00020) as encoder of faces, for IP-Adapter (arXiv 2308.06721).

It stands where the W+ encoder stands, and its code of a face where w_plus does. Module names are those of the published state
dicts: transformers' CLIPVisionModelWithProjection, and under `resampler` IP-Adapter Plus' `image_proj`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import attention
from .config import ImageEncoderConfig, WPlusEncoderConfig, from_dict
from .w_plus_encoder import WPlusEncoder

# Of pictures in [0, 1] per channel, what every CLIP was trained with.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 64                    # of the resampler


def make_encoder(config: dict) -> nn.Module:
    """The encoder of faces that a config.json describes."""
    if "patch_size" in config:
        return ImageEncoder(from_dict(ImageEncoderConfig, config))
    return WPlusEncoder(from_dict(WPlusEncoderConfig, config))


class PatchEmbeddings(nn.Module):
    """Pixels [B, 3, S, S] -> [B, 1 + patches, width], the class token first."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        width, patch = config.width, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding((config.input_size // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1) + self.position_embedding.weight


class TransformerLayer(nn.Module):
    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        width, self.heads, self.quick = config.width, config.num_heads, config.activation == "quick_gelu"
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, config.norm_eps) for _ in range(2))
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, config.inner_width), "fc2": nn.Linear(config.inner_width, width)})

    def forward(self, x: Tensor) -> Tensor:
        h, attn, mlp = self.layer_norm1(x), self.self_attn, self.mlp
        x = x + attn["out_proj"](attention(*(attn[f"{name}_proj"](h) for name in "qkv"), self.heads))
        wide = mlp["fc1"](self.layer_norm2(x))
        return x + mlp["fc2"](wide * torch.sigmoid(1.702 * wide) if self.quick else F.gelu(wide))


class LatentAttention(nn.Module):
    """Queries from the latents; keys and values from the picture and the latents."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, inner = heads, heads * HEAD_DIM
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, inner, bias=False), nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], 1)).chunk(2, -1)
        return self.to_out(attention(self.to_q(latents), k, v, self.heads))


class Resampler(nn.Module):
    """Features [B, N, width] -> tokens [B, T, d], up to the LayerNorm that the published module ends with: that is the mapper's."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        width = config.resampler_width
        self.latents = nn.Parameter(torch.randn(1, config.num_styles, width) / width**0.5)
        self.proj_in, self.proj_out = nn.Linear(config.width, width), nn.Linear(width, config.style_dim)
        self.layers = nn.ModuleList(nn.ModuleList([LatentAttention(width, config.resampler_heads), nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))])
            for _ in range(config.resampler_layers))

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for attn, feed_forward in self.layers:
            latents = latents + attn(x, latents)
            latents = latents + feed_forward(latents)
        return self.proj_out(latents)


class ImageEncoder(nn.Module):
    """Face [B, 3, S, S] in [-1, 1] -> code [B, L, D], zeros for nobody.

    IP-Adapter's unconditional half sees zeros in place of an embedding, and in Plus the tokens of a picture of zeros, after CLIP's
    normalisation. A code of tokens counts from these (`nobody`), so that zeros mean the same everywhere.
    """

    def __init__(self, config: ImageEncoderConfig = ImageEncoderConfig()):
        super().__init__()
        self.config = config
        self.vision_model = nn.ModuleDict({
            "embeddings": PatchEmbeddings(config), "pre_layrnorm": nn.LayerNorm(config.width, config.norm_eps),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))})})
        plus = config.resampler_layers > 0
        self.resampler = Resampler(config) if plus else None
        if not plus:
            self.vision_model["post_layernorm"] = nn.LayerNorm(config.width, config.norm_eps)
        self.visual_projection = None if plus else nn.Linear(config.width, config.style_dim, bias=False)
        code = torch.zeros(config.num_styles, config.style_dim)
        self.register_buffer("nobody", code if plus else None)
        # Codes lie around it, as those of the W+ encoder around its own.
        self.register_buffer("latent_avg", code.clone(), persistent=False)
        self.register_buffer("mean", 2 * torch.tensor(MEAN)[:, None, None] - 1, persistent=False)
        self.register_buffer("std", 2 * torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, face: Tensor) -> Tensor:
        code = self.encode((face - self.mean) / self.std)
        return code if self.nobody is None else code - self.nobody

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures as CLIP normalises them [B, 3, S, S] -> projected embedding [B, 1, D], or tokens [B, L, D]."""
        vision = self.vision_model
        x = vision["pre_layrnorm"](vision["embeddings"](pixels))
        for layer in vision["encoder"]["layers"]:
            x = layer(x)
        if self.resampler is not None:
            return self.resampler(x)
        return self.visual_projection(vision["post_layernorm"](x[:, :1]))

    @torch.no_grad()
    def measure_nobody(self) -> None:
        size = self.config.input_size
        self.nobody.copy_(self.encode(torch.zeros(1, 3, size, size))[0])
