"""Autoencoder stage: linear patch transform from principal components, then everything trained together."""

import numpy as np
import torch
from torch import Tensor, nn

from ..autoencoder import PatchAutoencoder
from ..data.people import People, compose
from .common import to_tensor


class VaeLoss:
    """L1 + gradient L1 + L2 on random crops of composed pictures, plus KL (Kingma and Welling 2014)."""

    def __init__(self, model: PatchAutoencoder, people: People, batch_size: int, crop: int = 64,
                 kl_weight: float = 1e-3, device: str = "cpu"):
        self.model, self.people, self.batch_size, self.crop = model, people, batch_size, crop
        self.kl_weight, self.device = kl_weight, device

    def batch(self, rng: np.random.Generator) -> Tensor:
        crops = []
        for index in rng.integers(len(self.people), size=self.batch_size // 4):
            picture = compose(self.people, int(index), rng)[0]
            for top, left in rng.integers(0, len(picture) - self.crop + 1, (4, 2)):
                crops.append(picture[top:top + self.crop, left:left + self.crop])
        return to_tensor(np.stack(crops)).to(self.device)

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, dict]:
        image = self.batch(rng)
        mean = self.model.posterior_mean(image).float()
        error = self.model.reconstruct(self.model.sample(mean)).float() - image
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = self.model.kl(mean)
        loss = error.abs().mean() + 0.5 * gradient + error.square().mean() + self.kl_weight * kl
        return loss, {"l1": error.abs().mean().detach(), "kl": kl.detach()}


def set_rotation(model: PatchAutoencoder, loss: VaeLoss, batches: int = 100) -> None:
    """Rotate packed latents onto their principal components over the stage's own crops."""
    rng = np.random.default_rng(0)
    model.init_rotation(torch.cat([loss.batch(rng) for _ in range(batches)]))


@torch.no_grad()
def reconstruction_psnr(model: nn.Module, images: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of decode(encode(x)), range [-1, 1]."""
    x = to_tensor(images)
    return float(10 * torch.log10(4 / (model.decode(model.encode(x)) - x).square().mean()))
