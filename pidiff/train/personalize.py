"""pidiff-train personalize: tune one person's W+ code and identity attention on a few photos; the engines stay as they are.

The encoder reads each photo once and its codes are averaged; then an offset per W+ level, which moves every identity token on
its own, is learned through the frozen diffusion model, so that it draws these faces. With `rank`, so is a change of low rank to
`to_k_id` and `to_v_id` of every layer (LoRA, arXiv 2106.09685): with the person's tokens known, that is a few small matrices
which the runtime adds to the folded identity (`runtime/tuning.py`), so both fit in an identity file.

    L = likeness(x0_hat, x0) + d mean( M W |v - v_hat(c, w + offset)|^2 / var(v) ) + decay |offset|^2 / std(w)^2

M is the person's mask, W the mapper stage's weight of places and channels, `likeness` the base stage's distance in the encoder's
feature maps, of pictures with little noise. Plain errors alone fit hair and light, and the person is recognised less. Guidance moves a
picture by its scale times what moves the conditional prediction, so what was learned is divided by it.
"""

import argparse
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from pidiff.runtime.tuning import LayerChange, Tuning

from ..data.factors import COLOURS, Factors, caption, composite, paint_background
from ..identity import IdentityAdapter
from ..model import Model, load_model, with_w_plus
from ..sampling import encode_prompts
from .base import add_noise, predicted_likeness, target_weight, training_alphas
from .common import to_tensor, training_timesteps
from .mapper import likeness_weight
from .precision import autocast

MAX_PHOTOS = 10
CLEAR_ALPHA = 0.3           # least share of the picture in what the likeness is taken of


@dataclass(frozen=True)
class PersonalizeOptions:
    steps: int = 60
    batch_size: int = 4
    learning_rate: float = 0.01
    rank: int = 0                       # of the change to keys and values; 0: the offset alone, which does better on `mini`
    rank_learning_rate: float = 0.002
    diffusion: float = 0.3              # d
    decay: float = 0.01
    guidance_scale: float = 3.0         # with which pictures will be drawn
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "guidance_scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank <= 64:
            raise ValueError(f"rank must lie in [0, 64], got {self.rank}")


class LowRank:
    """Changes up down^T of `to_k_id` and `to_v_id` in every layer of an adapter; nothing at first. down [d, r], up [C, r]."""

    def __init__(self, adapter: IdentityAdapter, rank: int, generator: torch.Generator):
        width, names = adapter.config.token_dim, ("to_k_id", "to_v_id")
        self.adapter = adapter
        self.down = {name: [nn.Parameter(torch.randn(width, rank, generator=generator) * width ** -0.5) for _ in adapter.layers] for name in names}
        self.up = {name: [nn.Parameter(torch.zeros(layer.to_q_id.out_features, rank)) for layer in adapter.layers] for name in names}

    def parameters(self) -> list[nn.Parameter]:
        return [p for part in (self.down, self.up) for parameters in part.values() for p in parameters]

    @contextmanager
    def active(self):
        """The adapter computes with the changes inside the block."""
        def hook(name: str, i: int):
            return lambda _, args, out: out + args[0] @ self.down[name][i] @ self.up[name][i].T

        hooks = [getattr(layer, name).register_forward_hook(hook(name, i)) for name in self.down for i, layer in enumerate(self.adapter.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def tuning(self, w_plus: Tensor, model: str) -> Tuning:
        """What the changes are for a person w_plus [L, 512], in the fold."""
        tokens, layers = self.adapter.mapper(w_plus[None])[0], []
        for i, layer in enumerate(self.adapter.layers):
            w_q, up = (m.unflatten(0, (layer.num_heads, -1)) for m in (layer.to_q_id.weight, self.up["to_k_id"][i]))      # [H, C / H, C or r]
            query = torch.einsum("hdc,hdr->hcr", w_q, up) * w_q.shape[1] ** -0.5
            parts = query, tokens @ self.down["to_k_id"][i], tokens @ self.down["to_v_id"][i], self.up["to_v_id"][i].T
            layers.append(LayerChange(*(p.contiguous().numpy().astype(np.float16) for p in parts)))
        return Tuning(tuple(layers), model)


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


def tuned(model: Model, photos: Photos, options: PersonalizeOptions = PersonalizeOptions(), name: str = "", progress: bool = False) -> Identity:
    """The person after tuning; deterministic for a seed. name: `Bundle.adapter_id` of the model's bundle."""
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    start = torch.from_numpy(photos.codes.mean(0))
    spread = (start - model.w_plus_encoder.latent_avg).std() + 1e-6
    offset, change = nn.Parameter(torch.zeros_like(start)), LowRank(model.adapter, options.rank, generator)
    for part in (model.unet, model.text_encoder, model.vae, model.adapter):
        part.requires_grad_(False)
    optimizer = torch.optim.Adam([{"params": [offset], "lr": options.learning_rate},
                                  {"params": change.parameters(), "lr": options.rank_learning_rate}])
    rates = [group["lr"] for group in optimizer.param_groups]
    loss_of = _DrawingLoss(model, photos, options, rng, generator)
    with change.active():
        for step in tqdm(range(options.steps), desc="personalize", disable=not progress):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * (1 - step / options.steps)
            loss = loss_of(start + offset)
            optimizer.zero_grad()
            (loss + options.decay * (offset / spread).square().mean()).backward()
            optimizer.step()
    with torch.no_grad():
        w_plus = (start + offset / options.guidance_scale).float()
        for up in (u for kind in change.up.values() for u in kind):
            up /= options.guidance_scale
    return Identity(w_plus.numpy(), photos.enrolled.face, photos.enrolled.encoder, change.tuning(w_plus, name) if options.rank else None)


class _DrawingLoss:
    """The first two terms of the module docstring, on a new batch at each call."""

    def __init__(self, model: Model, photos: Photos, options: PersonalizeOptions, rng: np.random.Generator, generator: torch.Generator):
        self.model, self.photos, self.options, self.rng, self.generator = model, photos, options, rng, generator
        latents = _batch(model, photos, np.random.default_rng(options.seed), 16)[0]
        std = latents.std((0, 2, 3), keepdim=True)
        self.variance, self.weight = std.square(), likeness_weight(std[0], latents.shape[-1])

    def __call__(self, w_plus: Tensor) -> Tensor:
        model, alphas, count = self.model, training_alphas(self.model.scheduler), self.options.batch_size
        latents, masks, prompts = _batch(model, self.photos, self.rng, count)
        torch.manual_seed(int(torch.randint(2 ** 31, (1,), generator=self.generator)))
        timesteps = training_timesteps(count, alphas)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy, target = add_noise(model.scheduler, latents, torch.randn_like(latents), alpha)
        with autocast("cpu"), model.adapter.condition(model.adapter.mapper(w_plus.expand(count, -1, -1)), 1.0):
            output = model.unet(noisy, timesteps, prompts).sample.float()
        errors = masks * self.weight * target_weight(model.scheduler, alpha, self.variance) * (output - target).square()
        loss, clear = self.options.diffusion * errors.mean(), (alpha.flatten() > CLEAR_ALPHA).nonzero().flatten()
        if len(clear):
            loss = loss + predicted_likeness(model, *(x[clear] for x in (noisy, output, target, alpha, masks)))
        return loss


@torch.no_grad()
def _batch(model: Model, photos: Photos, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, masks at their size and prompt embeddings: the photos on new backgrounds, as in training."""
    images, masks, captions = [], [], []
    for index in rng.integers(len(photos.faces), size=count):
        face, mask = photos.faces[index], photos.masks[index]
        colour = str(rng.choice(list(COLOURS)))
        images.append(composite(face, mask, paint_background(colour, len(face), rng)))
        masks.append(mask)
        captions.append(caption(Factors("photo", colour)))
    latents = model.encode_image(to_tensor(np.stack(images))).float()
    masks = F.interpolate(torch.from_numpy(np.stack(masks))[:, None], size=latents.shape[-2:], mode="area")
    return latents, masks, encode_prompts(model, captions)


def personalize(bundle: Path | None, paths: list, options: PersonalizeOptions = PersonalizeOptions(), progress: bool = False,
                require_signature: Path | None = None) -> Identity:
    """An Identity for 1 to 10 photos of one person, tuned on the bundle (None: the shipped mini), which must be signed by the
    public key `require_signature` if there is one."""
    pipeline = Pipeline.from_bundle(bundle, require_signature=require_signature)
    photos = Photos.read(pipeline, paths)
    options = replace(options, guidance_scale=max(1.0, pipeline.bundle.manifest.scheduler.get("guidance_scale", options.guidance_scale)))
    return tuned(with_w_plus(load_model(pipeline.bundle.path)), photos, options, pipeline.bundle.adapter_id(), progress)


def main(argv: list[str]) -> int:
    from pidiff.runtime.errors import PidiffError

    from ..checkpoint import CheckpointError
    parser = argparse.ArgumentParser("pidiff-train personalize", description=__doc__.split("\n")[0])
    parser.add_argument("photos", nargs="+", type=Path, help=f"1 to {MAX_PHOTOS} photos of one person")
    parser.add_argument("--model", type=Path, help="bundle (default: the shipped mini)")
    parser.add_argument("--require-signature", metavar="KEY.pub", type=Path, help="use the bundle only if it is signed by this key")
    parser.add_argument("--out", type=Path, required=True, help="identity file to write; pidiff-generate --face takes it")
    for name in ("steps", "batch_size", "rank", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(PersonalizeOptions, name))
    args = parser.parse_args(argv)
    try:
        options = PersonalizeOptions(args.steps, args.batch_size, rank=args.rank, seed=args.seed)
        personalize(args.model, args.photos, options, sys.stderr.isatty(), args.require_signature).save(args.out)
    except (ValueError, OSError, PidiffError, CheckpointError) as error:
        print(f"pidiff-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pidiff-train: stopped; nothing was written", file=sys.stderr)
        return 130
    print(args.out)
    return 0
