"""Sheets of sample pictures while a base or adapter trains."""

import numpy as np
import torch

from ..data.people import People
from ..model import Model
from ..sampling import generate
from .common import to_images

PROMPTS = ("a photo of a person, blue background", "a photo of a smiling person, in front of a beach", "a pencil sketch of a person")


@torch.no_grad()
def sample_sheet(model: Model, people: People, codes: np.ndarray, count: int = 6, steps: int = 20) -> np.ndarray:
    """RGB uint8 sheet: references across (the first `count` people, `codes` [N, L, 512] of their pictures), prompts down."""
    first = [int(index[0]) for index in list(people.variants().values())[:count]]
    w_plus = torch.from_numpy(np.stack([codes[i] for i in first]).astype(np.float32)).to(model.unet.device)
    rows = [np.concatenate([people.images[i] for i in first], 1)]
    size = model.unet.config.sample_size
    noise = torch.randn(1, model.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    for prompt in PROMPTS:
        pictures = generate(model, w_plus, prompt, num_inference_steps=steps, guidance_scale=2.5,
                            latents=noise.expand(len(first), -1, -1, -1).to(model.unet.device))
        rows.append(np.concatenate(list(to_images(pictures)), 1))
    return np.concatenate(rows)
