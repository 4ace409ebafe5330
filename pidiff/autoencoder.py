"""The small autoencoder of `mini`: a KL autoencoder whose work is done at low resolution.

A linear patch transform (8x8 pixels -> C channels, initialised with the principal components of the training
patches) carries most of the picture; convolutional residuals at 1/4 and 1/2 of the resolution refine it. On two CPU
cores it decodes a 128 px picture in a few milliseconds, where the usual full-resolution decoder needs a hundred.
Latents come out scaled to unit mean variance, so `scaling_factor` is part of the weights. With a `pack_size` of 2, squares of
2x2 latent pixels become one with four times the channels, rotated onto their principal components: the UNet then works
on a quarter of the positions, and channels run from coarse structure to fine texture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PatchAutoencoderConfig:
    latent_channels: int = 16
    image_size: int = 128
    patch_size: int = 8
    encoder_channels: tuple[int, int] = (64, 128)          # at 1/4, at 1/8
    decoder_channels: tuple[int, int, int] = (160, 96, 48)  # at 1/8, 1/4, 1/2
    pack_size: int = 1                                      # latent pixels per side that are packed into one

    @property
    def scale_factor(self) -> int:
        """Pixels per side of a latent pixel."""
        return self.patch_size * self.pack_size


MINI_VAE = PatchAutoencoderConfig(pack_size=2)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), without normalisation; starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class PatchAutoencoder(nn.Module):
    """Image [B, 3, H, W] in [-1, 1] <-> latents [B, C p^2, H/8p, W/8p] for a pack_size p; H and W multiples of 8p."""

    def __init__(self, config: PatchAutoencoderConfig = PatchAutoencoderConfig()):
        super().__init__()
        self.config = config
        c, p = config.latent_channels, config.patch_size
        e4, e8 = config.encoder_channels
        d8, d4, d2 = config.decoder_channels
        self.patch_in = nn.Conv2d(3 * p * p, c, 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(3 * 16, e4, 3, padding=1), ResidualBlock(e4),
            nn.Conv2d(e4, e8, 3, stride=2, padding=1), ResidualBlock(e8), ResidualBlock(e8),
            nn.SiLU(), _zero(nn.Conv2d(e8, c, 3, padding=1)))
        self.log_std = nn.Parameter(torch.full((c,), -3.0))
        self.patch_out = nn.Conv2d(c, 3 * p * p, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(c, d8, 3, padding=1), ResidualBlock(d8), ResidualBlock(d8), ResidualBlock(d8),
            nn.Conv2d(d8, 4 * d4, 3, padding=1), nn.PixelShuffle(2), ResidualBlock(d4), ResidualBlock(d4),
            nn.Conv2d(d4, 4 * d2, 3, padding=1), nn.PixelShuffle(2), ResidualBlock(d2), ResidualBlock(d2),
            nn.SiLU(), _zero(nn.Conv2d(d2, 12, 3, padding=1)), nn.PixelShuffle(2))
        self.register_buffer("rotation", torch.eye(c * config.pack_size ** 2) if config.pack_size > 1 else None)

    def encode(self, image: Tensor) -> Tensor:
        """Latents of the posterior mean."""
        return self.pack(self.posterior_mean(image))

    def decode(self, latents: Tensor) -> Tensor:
        return self.reconstruct(self.unpack(latents))

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, H/8, W/8] -> [B, C p^2, H/8p, W/8p]; no loss: the rotation is orthogonal."""
        if self.rotation is None:
            return latents
        return F.conv2d(F.pixel_unshuffle(latents, self.config.pack_size), self.rotation[:, :, None, None])

    def unpack(self, latents: Tensor) -> Tensor:
        if self.rotation is None:
            return latents
        return F.pixel_shuffle(F.conv2d(latents, self.rotation.T[:, :, None, None]), self.config.pack_size)

    def posterior_mean(self, image: Tensor) -> Tensor:
        """[B, C, H/8, W/8], not packed: what the autoencoder stage trains."""
        return self.patch_in(F.pixel_unshuffle(image, self.config.patch_size)) + self.encoder(F.pixel_unshuffle(image, 4))

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Picture of latents that are not packed."""
        return F.pixel_shuffle(self.patch_out(latents), self.config.patch_size) + self.decoder(latents)

    def sample(self, mean: Tensor) -> Tensor:
        """Posterior sample: the standard deviation is one learned number per channel."""
        return mean + self.log_std.exp().view(1, -1, 1, 1) * torch.randn_like(mean)

    def kl(self, mean: Tensor) -> Tensor:
        """KL(N(mean, std^2) || N(0, 1)), mean over all elements, in nats."""
        log_std = self.log_std.view(1, -1, 1, 1)
        return 0.5 * (mean.float().square() + (2 * log_std).exp() - 1 - 2 * log_std).mean()

    @torch.no_grad()
    def init_from_patches(self, images: Tensor) -> None:
        """Set the linear path to the principal components of 8x8 patches of `images` [N, 3, H, W].

        Channel i has variance proportional to the square root of its eigenvalue (half whitening), so that coarse
        structure keeps a higher signal-to-noise ratio than texture during diffusion. Mean variance is one.
        """
        p, c = self.config.patch_size, self.config.latent_channels
        patches = F.pixel_unshuffle(images, p).permute(0, 2, 3, 1).reshape(-1, 3 * p * p).double()
        mean = patches.mean(0)
        eigenvalues, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        eigenvalues, vectors = eigenvalues.flip(0)[:c], vectors.flip(1)[:, :c]
        std = eigenvalues.pow(0.25)
        std = std / std.square().mean().sqrt()
        gain = std / eigenvalues.sqrt()
        forward, backward = (vectors * gain).T, vectors / gain
        self.patch_in.weight.copy_(forward[:, :, None, None])
        self.patch_in.bias.copy_(-forward @ mean)
        self.patch_out.weight.copy_(backward[:, :, None, None])
        self.patch_out.bias.copy_(mean)

    @torch.no_grad()
    def init_rotation(self, images: Tensor) -> None:
        """Rotate packed latents onto their principal components over `images` [N, 3, H, W], the largest first."""
        if self.rotation is None:
            return
        packed = F.pixel_unshuffle(self.posterior_mean(images).float(), self.config.pack_size).movedim(1, -1).flatten(0, 2).double()
        centred = packed - packed.mean(0)
        self.rotation.copy_(torch.linalg.eigh(centred.T @ centred)[1].flip(1).T)
