"""Isolate stage: the base model learns that a background does not depend on whose face is before it.

The identity branch can leave the background alone, and the picture still changes there: the UNet sees another face in its noisy
latents, and normalisation and self-attention carry that everywhere, most where noise hides the background's own colour. Here two people stand
before one background, in the same noise, and the UNet shall say the same of what is behind them (ours; no source):

    L = mean( (M + b (1 - M)) |v_hat - v_teacher|^2 / var )                             the person stays as it was
        + isolation mean( (1 - M) |P (x0_hat - x0_hat')|^2 ) / max(sigma, 0.3)^2

x0_hat is the prediction without noise, P the autoencoder's linear part, which takes it to pixels, M both people's mask, sigma^2 = 1 -
alpha. The teacher is the model as it was. The second person's identity is off half of the time, as in a picture without identity.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.factors import caption
from ..data.people import People, compose
from ..model import Model
from .base import BaseLoss, EncoderCodes, Task, add_noise, clean_latents, tokenize
from .common import to_tensor, training_timesteps

SAME = 3                # levels of 255: mean difference of backgrounds that are one (some pictures keep their own)
LEAST_SIGMA = 0.3


@dataclass(frozen=True)
class IsolateOptions:
    isolation: float = 15.0
    behind_weight: float = 0.1          # b: the teacher's background depends on the face, so it cannot be kept
    log_sigma: float = 0.8              # mean of the noise's log sigma = log(noise / signal), deviation 1.5
    second_off: float = 0.5             # share of second people whose identity is off
    unguided: float = 0.25              # share of pairs as the unconditional half of guidance is: no text, nobody's identity

    def __post_init__(self):
        for name in ("isolation", "behind_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not -5 <= self.log_sigma <= 5:
            raise ValueError(f"log_sigma must be in [-5, 5], got {self.log_sigma}")
        for name in ("second_off", "unguided"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


class IsolateLoss(BaseLoss):
    """See the module docstring. model and teacher differ in their UNets' weights, and have a PatchAutoencoder; rows [first people..., second people...]."""

    def __init__(self, model: Model, teacher: Model, people: People, batch_size: int, codes: EncoderCodes | None = None,
                 options: IsolateOptions = IsolateOptions()):
        super().__init__(model, people, batch_size, codes)
        self.teacher, self.isolate = teacher, options

    def prepare(self, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """What needs no model: pictures uint8 [2B, S, S, 3], where neither person is bool [B, S, S], token ids [B, T], w_plus
        [2B, L, 512], id_scale [2B]. Pairs whose backgrounds differ count nowhere: False everywhere."""
        first, second = (rng.integers(len(self.people), size=self.batch_size) for _ in range(2))
        pairs, captions, unguided = [], [], rng.random(self.batch_size) < self.isolate.unguided
        for i, j, plain in zip(first, second, unguided):
            seed = int(rng.integers(2 ** 31))           # the same background and style
            pairs.append([compose(self.people, int(k), np.random.default_rng(seed)) for k in (i, j)])
            captions.append("" if plain or rng.random() < self.options.text_drop else caption(pairs[-1][0][2], rng))
        images = np.stack([pair[k][0] for k in (0, 1) for pair in pairs])
        behind = np.stack([behind_both(*pair) for pair in pairs])
        codes, scales = map(torch.cat, zip(*(self.codes(indices, captions, rng) for indices in (first, second))))
        plain = torch.from_numpy(unguided).repeat(2)
        codes[plain], scales[plain] = 0, 1
        scales[self.batch_size:] *= torch.from_numpy(rng.random(self.batch_size) >= self.isolate.second_off)
        return torch.from_numpy(images), torch.from_numpy(behind), tokenize(self.model, captions), codes, scales

    def draw(self, rng: np.random.Generator, batch: tuple | None = None) -> tuple[Task, Tensor]:
        """A batch of both rows with one noise for each pair, and where neither person is [B, 1, S, S]."""
        images, behind, ids, w_plus, id_scale = (x.to(self.device) for x in (self.prepare(rng) if batch is None else batch))
        with torch.no_grad():
            latents = self.model.encode_image(to_tensor(images)).float()
        count = len(latents) // 2
        timesteps = training_timesteps(count, self.alphas_cumprod, self.isolate.log_sigma, 1.5).repeat(2)
        noise = torch.randn_like(latents[:count]).repeat(2, 1, 1, 1)
        noisy, target = add_noise(self.model.scheduler, latents, noise, self.alphas_cumprod[timesteps].view(-1, 1, 1, 1))
        behind, prompt_embeds = behind[:, None].float(), self.model.encode_text(ids).repeat(2, 1, 1)
        masks = 1 - F.interpolate(behind, size=noisy.shape[-2:], mode="area").repeat(2, 1, 1, 1)
        return Task(noisy, timesteps, target, masks, prompt_embeds, w_plus, id_scale), behind

    def dependence(self, task: Task, output: Tensor, behind: Tensor) -> Tensor:
        """What a background depends on who is before it, by the UNet's output [2B, C, h, w]: the second term without its weight."""
        alpha, vae = self.alphas_cumprod[task.timesteps].view(-1, 1, 1, 1), self.model.vae
        first, second = clean_latents(self.model.scheduler, task.noisy, output, alpha).chunk(2)
        change = F.pixel_shuffle(F.conv2d(vae.unpack(first - second), vae.patch_out.weight), vae.config.patch_size)
        sigma = (1 - alpha[:len(change)]).sqrt().clamp(min=LEAST_SIGMA)
        return (behind * (change / sigma).square()).mean(1).sum() / behind.sum().clamp(min=1)

    def __call__(self, rng: np.random.Generator, batch: tuple | None = None) -> tuple[Tensor, dict]:
        task, behind = self.draw(rng, batch)
        output, _ = self.predict(task, task.w_plus, task.id_scale)
        first = slice(len(behind))
        with torch.no_grad(), self.teacher.adapter.condition(self.teacher.adapter.mapper(task.w_plus[first]), task.id_scale[first]):
            target = self.teacher.unet(task.noisy[first], task.timesteps[first], task.prompt_embeds[first]).sample.float()
        where = task.masks[first] + self.isolate.behind_weight * (1 - task.masks[first])
        kept = (where * (output[first] - target).square() * self.weight(task)[first] * self.window).mean()
        dependence = self.dependence(task, output, behind)
        return kept + self.isolate.isolation * dependence, {"kept": kept.detach(), "dependence": dependence.detach()}


def behind_both(first: tuple, second: tuple) -> np.ndarray:
    """Where neither person of two composed pictures (image, mask, ...) is, bool [S, S]; nowhere if their backgrounds differ."""
    mask = F.max_pool2d(torch.from_numpy(np.maximum(first[1], second[1]))[None, None], 5, 1, 2)[0, 0].numpy()
    behind = mask < 0.1
    same = behind.any() and np.abs(first[0].astype(float) - second[0])[behind].mean() < SAME
    return behind & same
