"""Synthetic people six times faster: the generator is cut before its high resolutions, and a small network reads the
picture and its mask off what it has computed by then. Fitted on pictures of the whole generator, at 128 pixels.
"""

import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..checkpoint import load_strict, read_tensors, save_weights
from ..train.muon import Muon, split_parameters
from .people import DIRECTIONS, People, load_people
from .synth import PER_TAR, BatchGenerator, Generator, add_file, write_latents, write_manifest

SIZE, CUT, MARGIN = 128, 64, 4                      # pixels, features per side, features lost at a crop's border


class Readout(nn.Module):
    """Generator features [B, 512, h, w] and w [B, 512] -> rgb in [-1, 1] and mask logit [B, 4, 2h, 2w]."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.style = nn.Linear(512, 512)
        self.inner = nn.ModuleList((nn.Conv2d(512, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)))
        self.film = nn.ModuleList(nn.Linear(512, 2 * width) for _ in range(2))
        self.linear, self.out = nn.Conv2d(512, 16, 1), nn.Conv2d(width, 16, 1)
        nn.init.normal_(self.style.weight, std=0.01)
        nn.init.ones_(self.style.bias)
        for layer in self.film:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("scale", torch.ones(512))
        self.register_buffer("mean", torch.zeros(512))

    def modulated(self, x: Tensor, w: Tensor, i: int) -> Tensor:
        gain, bias = self.film[i](w)[:, :, None, None].chunk(2, 1)
        return F.leaky_relu(x * (1 + gain) + bias, 0.2)

    def forward(self, features: Tensor, w: Tensor) -> Tensor:
        w = w - self.mean
        first = self.inner[0], self.linear                           # both 1 x 1: the style goes into their weights, not the features
        weight = torch.cat([layer.weight for layer in first]).flatten(1) * (self.style(w) / self.scale)[:, None]
        x = (weight @ features.flatten(2) + torch.cat([layer.bias for layer in first])[:, None]).unflatten(2, features.shape[2:])
        x, linear = x.split([layer.out_channels for layer in first], 1)
        x = self.modulated(x, w, 0)
        x = x + self.modulated(self.inner[1](x), w, 1)
        x = x + F.leaky_relu(self.inner[2](x), 0.2)
        return F.pixel_shuffle(linear + self.out(x), 2)


def fit(generator: Generator, people: People, pictures: int = 860, steps: int = 3000, seed: int = 0) -> Readout:
    """Read-out for `pictures` known pictures at SIZE pixels. About 2 GB and ten minutes on two cores."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(people))[:pictures]
    features = np.zeros((len(chosen), CUT, CUT, 512), np.float16)
    for row, i in enumerate(tqdm(chosen, desc="features", disable=None)):
        features[row] = generator.features(people.w[i:i + 1])[0].permute(1, 2, 0).cpu()
    torch.manual_seed(seed)
    model = Readout().to(memory_format=torch.channels_last)
    model.scale.copy_(torch.from_numpy(features[:60, ::4, ::4].astype(np.float32).std((0, 1, 2)) + 1e-3))
    model.mean.copy_(torch.from_numpy(people.mean))
    matrices, others = split_parameters(model)
    optimizers = (Muon(matrices, 0.01), torch.optim.AdamW(others, 2e-3))
    start = [o.param_groups[0]["lr"] for o in optimizers]
    for step in tqdm(range(steps), desc="read-out", disable=None):
        rate = min(1.0, (step + 1) / 50) * min(1.0, max(0.01, 2 * (1 - step / steps)))
        for optimizer, lr in zip(optimizers, start):
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.zero_grad()
        _loss(model, features, people, chosen, rng).backward()
        for optimizer in optimizers:
            optimizer.step()
    return model.eval()


def _loss(model: Readout, features: np.ndarray, people: People, chosen: np.ndarray, rng: np.random.Generator, side: int = 20) -> Tensor:
    """Squared error of colours and cross-entropy of masks on random crops."""
    parts = ([], [], [], [])
    for row, top, left in zip(rng.integers(len(chosen), size=24), *rng.integers(0, CUT - side + 1, (2, 24))):
        i, window = chosen[row], np.s_[2 * top:2 * (top + side), 2 * left:2 * (left + side)]
        for part, value in zip(parts, (features[row, top:top + side, left:left + side], people.images[i][window],
                                       people.masks[i][window], people.w[i])):
            part.append(value)
    x, image, mask, w = (torch.from_numpy(np.stack(p)).float() for p in parts)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x.permute(0, 3, 1, 2), w + 0.02 * torch.randn_like(w)).float()
    inner = np.s_[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    colour = (output[:, :3] - image.permute(0, 3, 1, 2) / 127.5 + 1)[inner].square().mean()
    return colour + 0.02 * F.binary_cross_entropy_with_logits(output[:, 3][inner], mask[inner] / 255)


@torch.no_grad()
def draw(model: Readout, features: Tensor, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, 128, 128, 3] RGB and masks uint8 [N, 128, 128] of features [N, 512, 64, 64] and codes [N, 512]."""
    output = model(features, torch.from_numpy(w.astype(np.float32)).to(features.device))
    rgb = (output[:, :3].clamp(-1, 1) + 1).mul(127.5).round().byte().permute(0, 2, 3, 1)
    return rgb.cpu().numpy(), (output[:, 3].sigmoid() * 255).byte().cpu().numpy()


def draft(out: Path, like: Path, people: int, seed: int, device: str = "cpu") -> None:
    """Write new people to train on, one picture each, in the layout of `people.py`: drawn like the whole generator's
    pictures in the folder `like`. Goes on where an earlier run with the same arguments stopped."""
    out.mkdir(parents=True, exist_ok=True)
    generator, known = Generator() if device == "cpu" else BatchGenerator(device), load_people(like, SIZE)
    file = out / "readout.safetensors"
    if file.is_file():
        model = load_strict(Readout(), read_tensors(file), "readout").eval()
    else:
        model = fit(generator, known)
        save_weights(model, file)
    model = model.to(device, memory_format=torch.channels_last)
    rng = np.random.default_rng((seed, 1))                           # others than `synth` draws with this seed
    identities = [10 * (i // 8) + i % 8 for i in range(people)]      # all for training: none ends in 8 or 9
    codes = generator.w(rng.standard_normal((identities[-1] + 1, 512)))
    rows = [{"file": f"{i:05d}_0.jpg", "identity": i, "variant": 0, "psi": round(float(rng.uniform(0.55, 0.85)), 4),
             **{d: round(float(m), 3) for d, m in zip(DIRECTIONS, rng.normal(0, (2.0, 1.2, 0.7)) * (rng.random() < 2 / 3))}}
            for i in identities]
    write_latents(out, codes, known.mean[None], known.directions)
    bar = tqdm(total=people, unit="picture", disable=None)
    for number, start in enumerate(range(0, people, PER_TAR)):
        path, part = out / f"faces-{number:02d}.tar", rows[start:start + PER_TAR]
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            with tarfile.open(temporary, "w") as tar:
                for first in range(0, len(part), generator.batch):
                    some = part[first:first + generator.batch]
                    w = np.stack([known.mean + row["psi"] * (codes[row["identity"]] - known.mean)
                                  + sum(row[d] * known.directions[d] for d in DIRECTIONS) for row in some])
                    for row, image, mask in zip(some, *draw(model, generator.features(w), w)):
                        add_file(tar, row["file"], cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1])
                        add_file(tar, row["file"].replace(".jpg", ".mask.png"), cv2.imencode(".png", mask)[1])
                    bar.update(len(some))
            os.replace(temporary, path)
        else:
            bar.update(len(part))
        write_manifest(out, rows[:start + PER_TAR])                  # what an interrupted run has drawn can be used
