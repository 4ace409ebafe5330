"""Decoder stage: the autoencoder's decoder learns to finish what the sampler really makes.

A decoder that has only seen latents of real pictures draws every error of the diffusion model: seams where latent cells do
not quite agree, blotches on skin. Here pictures are noised, denoised by the sampler itself (a few DDIM steps with guidance
and the person's code), and the decoder learns to give the picture back. Encoder, latents and UNet stay as they are.

    L = |x - x_hat| + 0.5 |grad x - grad x_hat| + code |E(x) - E(x_hat)|^2        E: the W+ encoder, on the person alone
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..data.factors import caption
from ..data.people import People, compose
from ..model import Model
from ..sampling import encode_prompts
from .base import clean_latents, training_alphas
from .common import to_images, to_tensor
from .precision import autocast


@dataclass(frozen=True)
class DecoderOptions:
    pictures: int = 8000                        # that are noised and denoised, once
    sigmas: tuple[float, float] = (0.2, 3.0)    # noise over signal, log-uniform
    steps: int = 4
    guidance_scale: float = 3.0
    clean: float = 0.2                          # share of latents that come straight from the encoder
    code: float = 0.1


@dataclass(frozen=True, eq=False)
class Sampled:
    """images uint8 [N, S, S, 3], person masks float16 [N, S, S], latents float16 [N, C, h, w] as the sampler made them."""

    images: np.ndarray
    masks: np.ndarray
    latents: Tensor


def denoise(model: Model, latents: Tensor, timestep: int, prompts: list[str], w_plus: Tensor, options: DecoderOptions) -> Tensor:
    """DDIM (arXiv 2010.02502, eta 0) with guidance, from noisy `latents` [B, C, h, w] at `timestep` down to none."""
    alphas = torch.cat([torch.ones(1), training_alphas(model.scheduler)]).to(latents.device)        # index t + 1; 0: no noise
    embeds = encode_prompts(model, [""] * len(prompts) + prompts)
    identity = model.adapter.mapper(torch.cat([torch.zeros_like(w_plus), w_plus]))
    places = np.linspace(timestep + 1, 0, options.steps + 1).round().astype(int)
    for here, there in zip(places, places[1:]):
        with model.adapter.condition(identity):
            without, with_ = model.unet(torch.cat([latents] * 2), int(here) - 1, embeds).sample.float().chunk(2)
        output = without + options.guidance_scale * (with_ - without)
        clean = clean_latents(model.scheduler, latents, output, alphas[here])
        rest = (latents - alphas[here].sqrt() * clean) / (1 - alphas[here]).sqrt()
        latents = alphas[there].sqrt() * clean + (1 - alphas[there]).sqrt() * rest
    return latents


@torch.no_grad()
def sample_pairs(model: Model, people: People, codes: np.ndarray, options: DecoderOptions, seed: int = 0, batch: int = 40) -> Sampled:
    """Training pictures and their latents after noise and the sampler; `codes` [N, L, 512] are the people's."""
    rng, generator, device = np.random.default_rng(seed), torch.Generator().manual_seed(seed), model.unet.device
    alphas = training_alphas(model.scheduler)
    sigmas, images, masks, latents = ((1 - alphas) / alphas).sqrt(), [], [], []
    for _ in tqdm(range(0, options.pictures, batch), desc="pictures", disable=None):
        indices = rng.integers(len(people), size=batch)
        pictures = [compose(people, int(i), rng) for i in indices]
        images.append(np.stack([p[0] for p in pictures]))
        masks.append(np.stack([p[1] for p in pictures]).astype(np.float16))
        timestep = int(torch.searchsorted(sigmas, float(np.exp(rng.uniform(*np.log(options.sigmas))))).clamp(0, len(sigmas) - 1))
        w_plus = torch.from_numpy(codes[indices].astype(np.float32)).to(device)
        with autocast(str(device)):
            clean = model.encode_image(to_tensor(images[-1]).to(device)).float()
            noise = torch.randn(clean.shape, generator=generator).to(device)
            noisy = alphas[timestep].sqrt() * clean + (1 - alphas[timestep]).sqrt() * noise
            latents.append(denoise(model, noisy, timestep, [caption(p[2], rng) for p in pictures], w_plus, options).half().cpu())
    return Sampled(np.concatenate(images), np.concatenate(masks), torch.cat(latents))


class DecoderLoss:
    """Draws pairs and computes the loss of the module docstring; see `sample_pairs`."""

    def __init__(self, vae: nn.Module, encoder: nn.Module, sampled: Sampled, batch_size: int, device: str = "cpu",
                 options: DecoderOptions = DecoderOptions()):
        self.vae, self.encoder, self.sampled, self.batch_size, self.device, self.options = vae, encoder, sampled, batch_size, device, options

    def code(self, image: Tensor, mask: Tensor) -> Tensor:
        """The encoder's main code [B, 512] of the person [B, 3, H, W] on white."""
        white, size = mask * image + 1 - mask, self.encoder.config.input_size
        return self.encoder.main_code(F.interpolate(white, size=(size, size), mode="area")).float()

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, dict]:
        indices = rng.integers(len(self.sampled.images), size=self.batch_size)
        image = to_tensor(self.sampled.images[indices]).to(self.device)
        mask = torch.from_numpy(self.sampled.masks[indices])[:, None].float().to(self.device)
        latents = self.sampled.latents[torch.from_numpy(indices)].float().to(self.device)
        with torch.no_grad():
            straight = torch.from_numpy(rng.random(self.batch_size) < self.options.clean).to(self.device)
            latents = torch.where(straight.view(-1, 1, 1, 1), self.vae.encode(image).float(), latents)
            wanted = self.code(image, mask)
        picture = self.vae.decode(latents).float()
        error = picture - image
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        person = (self.code(picture, mask) - wanted).square().mean() / wanted.var(0).mean()
        l1 = error.abs().mean()
        return l1 + 0.5 * gradient + self.options.code * person, {"l1": l1.detach(), "code": person.detach()}


@torch.no_grad()
def finishing_error(vae: nn.Module, sampled: Sampled) -> float:
    """Mean absolute error (0-255) of decoded latents of the sampler."""
    device = next(vae.parameters()).device
    parts = [np.abs(to_images(vae.decode(sampled.latents[i:i + 40].float().to(device))).astype(np.float32) - sampled.images[i:i + 40]).mean()
             for i in range(0, len(sampled.images), 40)]
    return float(np.mean(parts))
