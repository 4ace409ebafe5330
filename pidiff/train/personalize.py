"""pidiff-train personalize: tune one person's W+ code on a few photos; the engines stay as they are.

The encoder reads each photo once and its codes are averaged; then an offset per W+ level is learned through the frozen
diffusion model, so that it draws these faces. The offset moves every identity token on its own, and the result is an
ordinary identity file.

    L = mean( (M + b (1 - M)) |v - v_hat(c, w + offset)|^2 ) + decay |offset|^2 / std(w)^2        M = person's mask
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pidiff.runtime import Pipeline
from pidiff.runtime.faces import FaceReader, matte
from pidiff.runtime.identity import Identity
from pidiff.runtime.images import read_image

from ..data.factors import COLOURS, Factors, caption, composite, paint_background
from ..model import Model, load_model
from ..sampling import encode_prompts
from .augment import misalign
from .base import training_alphas
from .common import to_tensor, training_timesteps

MAX_PHOTOS = 10


@dataclass(frozen=True)
class PersonalizeOptions:
    steps: int = 80
    batch_size: int = 4
    learning_rate: float = 0.01
    background_weight: float = 0.1      # b
    decay: float = 0.01
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Photos:
    """Aligned faces uint8 [N, S, S, 3], person masks float32 [N, S, S], the encoder's codes [N, L, 512]."""

    faces: np.ndarray
    masks: np.ndarray
    codes: np.ndarray
    enrolled: Identity

    @classmethod
    def read(cls, pipeline: Pipeline, paths: list) -> "Photos":
        """Read 1 to 10 photos of one person (paths or uint8 arrays [H, W, 3]). Raises FaceError."""
        if not 1 <= len(paths) <= MAX_PHOTOS:
            raise ValueError(f"photos must be 1 to {MAX_PHOTOS}, got {len(paths)}")
        size = pipeline.bundle.manifest.model.image_size
        reader = FaceReader(pipeline._graph, size, matting=False)
        images = [read_image(p) for p in paths]
        people = [pipeline.enroll(i, select="largest") for i in images]
        faces = np.stack([reader.read(i, "largest") for i in images])
        small = pipeline.bundle.manifest.model.face_size
        masks = np.stack([matte(pipeline._graph("face_matting"), f, small) for f in faces])
        return cls(faces, masks, np.stack([p.w_plus for p in people]), people[0])


def tuned_code(model: Model, photos: Photos, options: PersonalizeOptions = PersonalizeOptions(), progress: bool = False) -> np.ndarray:
    """The person's W+ code [L, 512] float32 after tuning; deterministic for a seed."""
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    start = torch.from_numpy(photos.codes.mean(0))
    spread = (start - model.w_plus_encoder.latent_avg).std() + 1e-6
    offset = nn.Parameter(torch.zeros_like(start))
    alphas, count = training_alphas(model.scheduler), options.batch_size
    for part in (model.unet, model.text_encoder, model.vae, model.adapter):
        part.requires_grad_(False)
    optimizer = torch.optim.Adam([offset], options.learning_rate)
    for step in tqdm(range(options.steps), desc="personalize", disable=not progress):
        optimizer.param_groups[0]["lr"] = options.learning_rate * (1 - step / options.steps)
        latents, masks, prompts = _batch(model, photos, rng, count)
        torch.manual_seed(int(torch.randint(2 ** 31, (1,), generator=generator)))
        timesteps = training_timesteps(count, alphas)
        alpha, noise = alphas[timesteps].view(-1, 1, 1, 1), torch.randn_like(latents)
        target = noise if model.scheduler.get("prediction_type") != "v_prediction" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        with torch.autocast("cpu", torch.bfloat16), model.adapter.condition(
                model.adapter.mapper((start + offset).expand(count, -1, -1)), 1.0):
            output = model.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, timesteps, prompts).sample.float()
        weight = masks + options.background_weight * (1 - masks)
        loss = (weight * (output - target).square()).mean() + options.decay * (offset / spread).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (start + offset).detach().float().numpy()


@torch.no_grad()
def _batch(model: Model, photos: Photos, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, masks at their size and prompt embeddings: the photos on new backgrounds, as in training."""
    images, masks, captions = [], [], []
    for index in rng.integers(len(photos.faces), size=count):
        face, mask = misalign([photos.faces[index], photos.masks[index]], rng, 0.5)
        colour = str(rng.choice(list(COLOURS)))
        images.append(composite(face, mask, paint_background(colour, len(face), rng)))
        masks.append(mask)
        captions.append(caption(Factors("photo", colour)))
    latents = model.encode_image(to_tensor(np.stack(images))).float()
    masks = F.interpolate(torch.from_numpy(np.stack(masks))[:, None], size=latents.shape[-2:], mode="area")
    return latents, masks, encode_prompts(model, captions)


def personalize(bundle: Path | None, paths: list, options: PersonalizeOptions = PersonalizeOptions(), progress: bool = False) -> Identity:
    """An Identity for 1 to 10 photos of one person, tuned on the bundle (None: the shipped mini)."""
    pipeline = Pipeline.from_bundle(bundle)
    photos = Photos.read(pipeline, paths)
    w_plus = tuned_code(load_model(pipeline.bundle.path), photos, options, progress)
    return Identity(w_plus, photos.enrolled.face, photos.enrolled.encoder)


def main(argv: list[str]) -> int:
    from pidiff.runtime.errors import PidiffError

    from ..checkpoint import CheckpointError
    parser = argparse.ArgumentParser("pidiff-train personalize", description=__doc__.split("\n")[0])
    parser.add_argument("photos", nargs="+", type=Path, help=f"1 to {MAX_PHOTOS} photos of one person")
    parser.add_argument("--model", type=Path, help="bundle (default: the shipped mini)")
    parser.add_argument("--out", type=Path, required=True, help="identity file to write; pidiff-generate --face takes it")
    for name in ("steps", "batch_size", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(PersonalizeOptions, name))
    args = parser.parse_args(argv)
    try:
        options = PersonalizeOptions(args.steps, args.batch_size, seed=args.seed)
        personalize(args.model, args.photos, options, progress=sys.stderr.isatty()).save(args.out)
    except (ValueError, OSError, PidiffError, CheckpointError) as error:
        print(f"pidiff-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pidiff-train: stopped; nothing was written", file=sys.stderr)
        return 130
    print(args.out)
    return 0
