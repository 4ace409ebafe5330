"""Face stages: the W+ encoder (regression of exact codes; then with the mapper, as an autoencoder of faces) and the matting
network (published masks)."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.factors import COLOURS, SCENES, composite, paint_background
from ..data.people import People
from .augment import misalign, photograph
from .common import on_white, to_tensor
from .mapper import MapperLoss, RenderingMapper


def _people_batch(people: People, indices: np.ndarray, rng: np.random.Generator, background, amount: float = 1.0):
    """Augmented pictures [B, S, S, 3] and masks [B, S, S] with a background from `background(image, rng)`."""
    images, masks = [], []
    for i in indices:
        image, mask = people.images[i], people.masks[i].astype(np.float32) / 255
        image, mask = misalign([photograph(image, rng), mask], rng, amount)
        images.append(background(image, mask, rng))
        masks.append(mask)
    return np.stack(images), np.stack(masks)


def white_background(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture as `enroll` shows it to the encoder: background painted white, with an imperfect mask."""
    if rng.random() < 0.5:
        mask = np.clip(mask + rng.normal(0, 0.1), 0, 1) * (mask > 0.02)
    return composite(image, mask, np.full_like(image, 255))


def any_background(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        return image
    return composite(image, mask, paint_background(str(rng.choice([*COLOURS, *SCENES])), len(image), rng))


class EncoderLoss:
    """Mean squared error of the main code, and of the picture that the mapper stage's renderer draws from it: a code's
    error matters as far as it is seen. Both as shares of what the mean code would leave, so about 1 at first.

    Levels share one exact code in this data, so the offsets of levels >= 1 stay at zero, where they begin (e4e's
    first stage; there, too, losses on the drawn picture join the code's).
    """

    def __init__(self, model: nn.Module, people: People, batch_size: int, device: str = "cpu", renderer: RenderingMapper | None = None):
        self.model, self.people, self.batch_size, self.device = model, people, batch_size, device
        self.std = float((people.w - people.mean).std())
        self.renderer = renderer
        if renderer is not None:
            with torch.no_grad():
                self.spread = self.render(torch.from_numpy(people.w[::max(1, len(people) // 1000)]).to(device)).var(0).mean()

    def render(self, codes: Tensor) -> Tensor:
        """Standardised latents [B, C, h, w] of codes [B, 512]."""
        return self.renderer(codes[:, None].expand(-1, self.model.config.num_styles, -1)).float()

    def prepare(self, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """Indices and augmented pictures uint8 [B, S, S, 3]."""
        indices = rng.integers(len(self.people), size=self.batch_size)
        return indices, torch.from_numpy(_people_batch(self.people, indices, rng, white_background)[0])

    def __call__(self, rng: np.random.Generator, batch: tuple | None = None) -> tuple[Tensor, dict]:
        indices, images = self.prepare(rng) if batch is None else batch
        target = torch.from_numpy(self.people.w[indices]).to(self.device)
        code = self.model.main_code(to_tensor(images.to(self.device))).float()
        loss = ((code - target) / self.std).square().mean()
        if self.renderer is None:
            return loss, {}
        seen = (self.render(code) - self.render(target)).square().mean() / self.spread
        return loss + seen, {"code": loss.detach(), "seen": seen.detach()}


class FaceAutoencoder(nn.Module):
    """Encoder and mapper in one module, so that one optimiser and one average cover them."""

    def __init__(self, encoder: nn.Module, renderer: RenderingMapper):
        super().__init__()
        self.encoder, self.renderer = encoder, renderer


class AutoencoderLoss:
    """Encoder and mapper together: what the mapper draws from the encoder's main code against the person's latents (`MapperLoss`).

    An exact code says who StyleGAN drew, but a small mapper cannot draw all that it says; here the code may move to what this
    mapper can use. Half as much weighs what exact codes draw, and `code` holds the main code near the exact one, so that
    directions in W stay what they are."""

    def __init__(self, model: FaceAutoencoder, people: People, latents: Tensor, batch_size: int, device: str = "cpu",
                 encoded: float = 2 / 3, exact: float = 0.5, code: float = 0.05):
        self.model, self.people, self.batch_size, self.device = model, people, batch_size, device
        self.encoded, self.exact, self.code = encoded, exact, code
        self.drawing = MapperLoss(model.renderer, people, latents, None, batch_size, device)
        self.std = float((people.w - people.mean).std())

    def prepare(self, rng: np.random.Generator) -> tuple[np.ndarray, Tensor, Tensor]:
        """Indices, augmented pictures uint8 [M, S, S, 3] of the first M, exact codes [B - M, L, 512] of the others."""
        indices = rng.integers(len(self.people), size=self.batch_size)
        shown = max(1, round(self.batch_size * self.encoded))
        images = torch.from_numpy(_people_batch(self.people, indices[:shown], rng, white_background)[0])
        return indices, images, torch.from_numpy(self.drawing.exact(indices[shown:], rng))

    def __call__(self, rng: np.random.Generator, batch: tuple | None = None) -> tuple[Tensor, dict]:
        indices, images, exact = self.prepare(rng) if batch is None else batch
        shown = len(images)
        main = self.model.encoder.main_code(to_tensor(images.to(self.device))).float()
        code = ((main - torch.from_numpy(self.people.w[indices[:shown]]).to(self.device)) / self.std).square().mean()
        w_plus = main[:, None].expand(-1, self.model.encoder.config.num_styles, -1)
        drawn, from_exact = self.drawing.errors(torch.cat([w_plus, exact.to(self.device)]), indices).split([shown, len(exact)])
        loss = drawn.mean() + self.code * code + (self.exact * from_exact.mean() if len(exact) else 0)
        return loss, {"drawn": drawn.mean().detach(), "code": code.detach()}


@torch.no_grad()
def encoder_scores(model: nn.Module, people: People) -> dict[str, float]:
    """Held-out error: share of code variance not explained, and cosine of centred codes."""
    w = torch.cat([model(on_white(people, slice(i, i + 50), "cpu")).mean(1) for i in range(0, len(people), 50)]).numpy()
    got, want = w - people.mean, people.w - people.mean
    cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    return {"unexplained": float(((got - want) ** 2).mean() / (want ** 2).mean()), "cosine": float(cosine.mean())}


class MattingLoss:
    """Binary cross-entropy and L1 on alpha, on original and replaced backgrounds."""

    def __init__(self, model: nn.Module, people: People, batch_size: int, device: str = "cpu"):
        self.model, self.people, self.batch_size, self.device = model, people, batch_size, device

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, dict]:
        indices = rng.integers(len(self.people), size=self.batch_size)
        images, masks = _people_batch(self.people, indices, rng, any_background, amount=2.0)
        flip = rng.random() < 0.5
        images, masks = (images[:, :, ::-1], masks[:, :, ::-1]) if flip else (images, masks)
        target = torch.from_numpy(np.ascontiguousarray(masks)).to(self.device)[:, None]
        faces = to_tensor(images).to(self.device)
        if rng.random() < 0.7:                  # encoders read faces of several sizes
            faces, target = (F.interpolate(x, scale_factor=0.5, mode="area") for x in (faces, target))
        alpha = self.model(faces).float().clamp(1e-4, 1 - 1e-4)
        l1 = (alpha - target).abs().mean()
        cross_entropy = -(target * alpha.log() + (1 - target) * (1 - alpha).log()).mean()
        return cross_entropy + l1, {"l1": l1.detach()}
