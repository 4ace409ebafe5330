"""Adapter stage: the identity branch alone, fine-tuned so that identity stays in the face (base model frozen).

    L_rec = mean( (M + b (1 - M)) |v - v_hat(c, w)|^2 )
    L_bg  = mean( (1 - M) |v_hat(c, w) - sg v_hat(c, identity off)|^2 )      the background is the base model's, and nobody's identity
                                                                             (w = 0, M = 0 here) changes nothing: guidance amplifies it
    L_dis = mean( (1 - M) |v_hat(c, w) - sg v_hat(c, w')|^2 )                and does not depend on who it is
    L_loc = identity attention is on inside the face and off outside
    L_id  = 1 - cos(F(x0_hat) - F_mean, w - F_mean)                          of a nearly clean step's picture, F the W+ encoder
    L     = L_rec + bg L_bg + dis L_dis + loc L_loc + id L_id + preserve L_preserve

M is the person's mask at latent size, w' another person's code or an edited one, sg stops the gradient. PIDiff
(arXiv 2505.05081) names these aims; the formulas are ours. L_preserve = mean |v_hat(c, w) - sg v_hat(c, identity off)|^2 over
the whole picture is W+ Adapter's own term (arXiv 2311.17461), for comparisons; L_id is for aligned faces.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .base import BaseLoss, Task, clean_latents, localisation_loss

ID_PICTURES = 4          # of a batch that L_id decodes


@dataclass(frozen=True)
class AdapterOptions:
    """Weights of the terms; 0 switches a term off, and its UNet call with it."""

    background_weight: float = 0.1      # b
    bg: float = 4.0
    dis: float = 2.0
    loc: float = 0.05
    id: float = 0.0
    preserve: float = 0.0
    edited: float = 0.5                 # share of w' that are edits of w; the others are other people's codes
    edit_strength: float = 2.0          # of an edit, in standard deviations

    def __post_init__(self):
        for name in ("background_weight", "bg", "dis", "loc", "id", "preserve", "edit_strength"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.edited <= 1:
            raise ValueError(f"edited must be in [0, 1], got {self.edited}")


class AdapterLoss(BaseLoss):
    """See the module docstring; batches are drawn as in the base stage."""

    def __init__(self, *args, terms: AdapterOptions = AdapterOptions(), **kwargs):
        super().__init__(*args, **kwargs)
        if terms.id and self.people.faces is not None and any(self.people.captions):
            raise ValueError(f"id must be 0 for photos that are not aligned (pidiff-data photos --aligned), got {terms.id}")
        self.terms, self.directions = terms, [d.to(self.device) for d in self.model.directions.values()]
        self.held = ExitStack()             # gradient checkpointing calls the UNet again in backward, with the same identity

    def negatives(self, w_plus: Tensor, rng: np.random.Generator) -> Tensor:
        """w' [B, L, 512]: the code of the next picture's person, or the picture's own code after an edit."""
        others = w_plus.roll(1, 0).clone()
        for i in range(len(w_plus)):
            if self.directions and rng.random() < self.terms.edited:
                direction = self.directions[rng.integers(len(self.directions))]
                others[i] = w_plus[i] + float(rng.choice((-1, 1))) * self.terms.edit_strength * direction
        return others

    def identity_loss(self, task: Task, output: Tensor) -> Tensor:
        """L_id of at most ID_PICTURES pictures with more signal than noise; 0 where the batch has none."""
        alpha = self.alphas_cumprod[task.timesteps].view(-1, 1, 1, 1)
        chosen = ((alpha.flatten() > 0.5) & (task.real > 0)).nonzero().flatten()[:ID_PICTURES]
        if not len(chosen):
            return output.new_zeros(())
        alpha, noisy, output = alpha[chosen], task.noisy[chosen], output[chosen]
        clean = clean_latents(self.model.scheduler, noisy, output, alpha)
        picture, encoder = self.model.decode_latents(clean).float(), self.model.w_plus_encoder
        mask = F.interpolate(task.masks[chosen], size=picture.shape[-2:], mode="bilinear")
        size = encoder.config.input_size
        white = F.interpolate(mask * picture + 1 - mask, size=(size, size), mode="area")
        mean = encoder.latent_avg[0]
        return 1 - F.cosine_similarity(encoder.main_code(white).float() - mean, task.w_plus[chosen, 0] - mean).mean()

    def __call__(self, rng: np.random.Generator, batch: tuple | None = None) -> tuple[Tensor, dict]:
        self.held.close()
        terms, task = self.terms, self.draw(rng, batch)
        with torch.no_grad():
            if terms.bg or terms.preserve:
                without = self.predict(task, task.w_plus, torch.zeros_like(task.id_scale))[0]
            if terms.dis:
                negative = self.predict(task, self.negatives(task.w_plus, rng), task.id_scale)[0]
        output, maps = self.predict(task, task.w_plus, task.id_scale, self.held)
        outside, someone = 1 - task.masks, task.real.view(-1, 1, 1, 1)
        nobody = task.id_scale.view(-1, 1, 1, 1) - someone      # the null identity
        weight = (task.masks + terms.background_weight * outside) * self.weight(task)
        parts = {"rec": (weight * (output - task.target).square()).mean()}

        def change(other: Tensor, where: Tensor) -> Tensor:
            return (where * (output - other).square()).mean()   # plain: a tint is in the few channels that vary most

        if terms.bg:
            parts["bg"] = terms.bg * change(without, someone * outside + nobody)
        if terms.preserve:
            parts["preserve"] = terms.preserve * change(without, someone + nobody)
        if terms.id:
            parts["id"] = terms.id * self.identity_loss(task, output)
        if terms.dis:
            parts["dis"] = terms.dis * change(negative, someone * outside)
        if terms.loc and self.model.adapter.config.has_null:
            parts["loc"] = terms.loc * localisation_loss(maps, task.masks, task.real)
        return sum(parts.values()), {name: value.detach() for name, value in parts.items()}
