"""Distill stage: a student UNet whose one step does what several guided steps of the teacher do.

Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512) in one round, guidance included (Meng et al. 2022, arXiv
2210.03142) at one scale: from noisy pictures at the student's few timesteps the teacher takes `substeps` steps of DDIM with guidance
to the student's next timestep, and the student learns the output by which one step of DDIM without guidance lands there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.people import People
from ..model import Model
from ..sampling import encode_prompts, make_scheduler
from .base import BaseLoss, BaseOptions, EncoderCodes, Task, clean_latents


@dataclass(frozen=True)
class DistillOptions:
    few_steps: int = 4                  # of the student
    substeps: int = 5                   # of the teacher in each of them
    guidance_scale: float = 3.0

    def __post_init__(self):
        for name in ("few_steps", "substeps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale must be in [0, 100], got {self.guidance_scale}")


def output_for(scheduler: dict, noisy: Tensor, clean: Tensor, alpha: Tensor) -> Tensor:
    """What a model answers whose `clean_latents` are `clean`: v or the noise, at signal power `alpha` (broadcastable)."""
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    return (signal * noisy - clean) / sigma if scheduler.get("prediction_type") == "v_prediction" else (noisy - signal * clean) / sigma


def ddim_step(noisy: Tensor, clean: Tensor, alpha: Tensor, to: Tensor) -> Tensor:
    """The latents at signal power `to` after one step of DDIM (Song et al. 2020, arXiv 2010.02502, eta = 0) with prediction `clean`."""
    noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    return to.sqrt() * clean + (1 - to).sqrt() * noise


def clean_for_step(noisy: Tensor, landed: Tensor, alpha: Tensor, to: Tensor) -> Tensor:
    """The prediction with which `ddim_step` goes from `noisy` to `landed`."""
    ratio = ((1 - to) / (1 - alpha)).sqrt()
    return (landed - ratio * noisy) / (to.sqrt() - ratio * alpha.sqrt())


class DistillLoss(BaseLoss):
    """See the module docstring; batches are drawn as in the base stage, at the student's timesteps and without null identities.

    student and teacher: whole models that differ in their UNets' weights.
    """

    def __init__(self, student: Model, teacher: Model, people: People, batch_size: int, codes: EncoderCodes | None = None,
                 options: DistillOptions = DistillOptions()):
        super().__init__(student, people, batch_size, codes, BaseOptions(id_null=0.0))
        self.teacher, self.distill = teacher, options
        scheduler = make_scheduler(student.scheduler, "ddim", options.few_steps * options.substeps)
        self.path = scheduler.timesteps.to(self.device)             # the teacher's timesteps; the student's are every `substeps`-th
        self.alphas = torch.cat([self.alphas_cumprod[self.path], scheduler.final_alpha_cumprod.view(1).to(self.device)])

    def timesteps(self, count: int, rng: np.random.Generator) -> Tensor:
        return self.path[::self.distill.substeps][torch.from_numpy(rng.integers(self.distill.few_steps, size=count)).to(self.device)]

    @torch.no_grad()
    def guide(self, task: Task) -> tuple[Tensor, Tensor]:
        """Where the teacher's guided steps lead to [B, C, h, w], and the signal power there [B, 1, 1, 1]."""
        adapter, noisy, scale = self.teacher.adapter, task.noisy, self.distill.guidance_scale
        begin = (task.timesteps[:, None] == self.path).int().argmax(1)
        tokens = adapter.mapper(torch.cat([torch.zeros_like(task.w_plus), task.w_plus]))
        prompts = torch.cat([encode_prompts(self.model, [""]).expand(len(noisy), -1, -1), task.prompt_embeds])
        for step in range(self.distill.substeps):
            alpha, to = (self.alphas[begin + step + i].view(-1, 1, 1, 1) for i in (0, 1))
            with adapter.condition(tokens, task.id_scale.repeat(2)):
                output = self.teacher.unet(noisy.repeat(2, 1, 1, 1), self.path[begin + step].repeat(2), prompts).sample.float()
            without, with_ = output.chunk(2)
            clean = clean_latents(self.model.scheduler, noisy, without + scale * (with_ - without), alpha)
            noisy = ddim_step(noisy, clean, alpha, to)
        return noisy, to

    def __call__(self, rng: np.random.Generator, batch: tuple | None = None) -> tuple[Tensor, dict]:
        task = self.draw(rng, batch)
        landed, to = self.guide(task)
        alpha = self.alphas_cumprod[task.timesteps].view(-1, 1, 1, 1)
        target = output_for(self.model.scheduler, task.noisy, clean_for_step(task.noisy, landed, alpha, to), alpha)
        output, _ = self.predict(task, task.w_plus, task.id_scale)
        loss = ((output - target).square() * self.weight(task) * self.window).mean()
        return loss, {"distilled": loss.detach()}
