"""Localise stage: more weight for nobody's key, in closed form. The identity stays inside the face's border; nothing else changes.

Attention at the border of a face is torn between the person and nobody, and gives about half of an identity; what lies behind is
tinted by it. A constant b added to the logit of the null key, q . k_null / sqrt(d), switches the border off long before the inside,
where the person leads by far more. The key alone can do it, so that no graph, engine or bundle needs to know:

    delta = b sqrt(d) E[q q^T]^-1 E[q]        per head, d its width

is the least squares solution of q . delta / sqrt(d) = b over the queries of training pictures (ours; no source).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..identity import IdentityAdapter
from .base import AttentionProbe, BaseLoss

RIDGE = 1e-3            # of the mean eigenvalue


@dataclass(frozen=True)
class LocaliseOptions:
    log_odds: float = 2.0               # b; each run adds to what is there

    def __post_init__(self):
        if not -20 <= self.log_odds <= 20:
            raise ValueError(f"log_odds must be in [-20, 20], got {self.log_odds}")


def constant_shift(total: Tensor, square: Tensor, count: int) -> Tensor:
    """delta [H, d] with q . delta / sqrt(d) nearest to 1, of the sums over queries of q [H, d] and q q^T [H, d, d]; float64."""
    mean, second = total / count, square / count
    width = mean.shape[-1]
    ridge = RIDGE * second.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.linalg.solve(second + ridge[:, None, None] * torch.eye(width, dtype=second.dtype, device=second.device), mean) * width ** 0.5


@torch.no_grad()
def localise(loss: BaseLoss, options: LocaliseOptions, steps: int, rng: np.random.Generator) -> list[float]:
    """Shift every `k_null` of the loss's adapter, which must have it, by the queries of so many batches. Returns by layer what the mean square error
    of the constant is, as a part of b^2."""
    adapter: IdentityAdapter = loss.model.adapter
    probe, sums = AttentionProbe(adapter), [[0.0, 0.0, 0] for _ in adapter.layers]
    for _ in tqdm(range(steps), desc="localise", disable=None):
        task = loss.draw(rng)
        loss.predict(task, task.w_plus, task.id_scale)
        for layer, queries, kept in zip(adapter.layers, probe.queries, sums):
            q = queries[task.real > 0].flatten(0, 1).unflatten(-1, (layer.num_heads, -1)).double()
            kept[0], kept[1], kept[2] = kept[0] + q.sum(0), kept[1] + torch.einsum("nhd,nhe->hde", q, q), kept[2] + len(q)
    if not all(count for _, _, count in sums):
        raise ValueError(f"steps must give at least one picture with an identity, got none in {steps}")
    errors = []
    for layer, (total, square, count) in zip(adapter.layers, sums):
        delta = constant_shift(total, square, count)
        layer.k_null += (options.log_odds * delta).flatten().to(layer.k_null)
        errors.append(float((1 - (total / count * delta).sum(-1) / delta.shape[-1] ** 0.5).mean()))     # of least squares
    return errors
