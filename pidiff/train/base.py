"""Base stage: UNet, text encoder and identity adapter trained together on composed pictures.

Every picture is of a known person in a known setting. The text names the setting, the identity code comes from a
picture of the person, so neither can do the other's work. Where the text names the pose or the expression, the code's own
is moved at random, so that the text decides; else the code does. With probability `id_off` the identity branch is off (so
that id_scale = 0 is a proper text-to-image model), with `id_null` it sees mapper(zeros), and `text_drop` empties the
prompt, for classifier-free guidance. Loss: v-prediction (Salimans and Ho 2022, arXiv 2202.00512), the inner face of aligned
pictures weighing more, plus a small localisation loss on the identity map, and the mapper stage's alignment loss on identity attention. With `likeness`,
some nearly clean predictions are also decoded, and the person in them is compared with the real one in the encoder's feature
maps: squared error alone spends itself on texture that does not say who it is.
"""

import json
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..checkpoint import save_weights
from ..config import ADAPTER_MINI, save_config
from ..data.factors import EXPRESSIONS, caption
from ..data.people import People, compose
from ..identity import IdentityAdapter
from ..model import MINI_SCHEDULER, MINI_TEXT, Model, mini_text_encoder, mini_unet, save_diffusers_config
from ..sampling import make_scheduler, tokenize
from ..tokenizer import build_tokenizer
from ..unet import attach
from .common import on_white, to_tensor, training_timesteps
from .mapper import alignment_loss, face_window


@dataclass(frozen=True)
class BaseOptions:
    text_drop: float = 0.10
    id_off: float = 0.10
    id_null: float = 0.07
    id_same: float = 0.7                # share of references that are the very picture to draw
    moved: float = 0.7                  # share of codes whose pose or expression is moved when the text names it
    code_noise: float = 0.05            # W noise, standard deviation up to this (a code's own is about 0.34)
    encoded: float = 0.85               # share of references that went through the encoder, where there is one
    localisation: float = 0.05
    alignment: float = 0.1              # where the mapper stage has given the tokens their regions
    face: float = 3.0                   # weight of the inner face's errors where pictures are aligned, beside 1 elsewhere
    likeness: float = 0.0               # needs an encoder
    likeness_share: float = 0.25        # of a batch that it decodes, at most


NAMED_BY = {"pose": ("looking",), "smile": EXPRESSIONS}      # words of a caption that name what a direction changes
LIKENESS_ALPHA = 0.2                                         # least signal power of a prediction that `likeness` looks at: sigma 2
MOVES = {"pose": 2.0, "smile": 1.2}                          # standard deviation along the unit direction


@dataclass(frozen=True, eq=False)
class EncoderCodes:
    """people [N, L, 512]: the encoder's codes of the training pictures. errors [M, L, 512]: what the encoder errs more by on
    people it was not trained on, so that the identity branch meets the errors that it will meet in use (photos have
    them already: zeros)."""

    people: np.ndarray
    errors: np.ndarray


class BaseModel(nn.Module):
    """UNet + text encoder + adapter in one module, so that one optimiser and one average cover them."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, adapter: IdentityAdapter):
        super().__init__()
        self.unet, self.text_encoder, self.adapter = unet, text_encoder, adapter


def localisation_loss(maps: list[Tensor], mask: Tensor, weight: Tensor) -> Tensor:
    """L_loc: identity attention should be on inside the face mask and off outside.

    maps: per layer [B, 1, S]; mask [B, 1, h, w] in [0, 1]; weight [B], 0 for pictures without an identity.
    """
    total = mask.new_zeros(())
    for attention_map in maps:
        side = int(attention_map.shape[-1] ** 0.5)
        inside = F.interpolate(mask, size=(side, side), mode="area").flatten(1)
        m = attention_map[:, 0].float()
        on = (m * inside).sum(1) / inside.sum(1).clamp(min=1)
        off = (m * (1 - inside)).sum(1) / (1 - inside).sum(1).clamp(min=1)
        total = total + ((off + 1 - on) * weight).sum() / weight.sum().clamp(min=1)
    return total / len(maps)


class AttentionProbe:
    """Keeps what the last UNet call gave to identity attention: queries [B, S, C] and keys [B, P, T, C] per layer."""

    def __init__(self, adapter: IdentityAdapter):
        self.queries: list[Tensor] = [None] * len(adapter.layers)
        self.keys: list[Tensor] = [None] * len(adapter.layers)
        for i, layer in enumerate(adapter.layers):
            layer.to_q_id.register_forward_hook(lambda module, args, out, i=i: self.queries.__setitem__(i, out))
            layer.to_k_id.register_forward_hook(lambda module, args, out, i=i: self.keys.__setitem__(i, out))


@dataclass(frozen=True, eq=False)
class Task:
    """What the UNet is asked: noisy latents [B, C, h, w] at timesteps [B], target (v or epsilon), person masks [B, 1, h, w],
    prompt_embeds [B, T, D], w_plus [B, L, 512], id_scale [B]."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    masks: Tensor
    prompt_embeds: Tensor
    w_plus: Tensor
    id_scale: Tensor

    @property
    def real(self) -> Tensor:
        """1 for pictures with an identity, 0 for those without or with the null identity; [B]."""
        return self.id_scale * (self.w_plus.abs().sum((1, 2)) > 0)


@torch.no_grad()
def latent_variance(model: Model, people: People) -> Tensor:
    """Variance [C, 1, 1] of each latent channel."""
    some = people.images[::max(1, len(people) // 200)]
    latents = [model.encode_image(to_tensor(some[i:i + 8]).to(model.unet.device)).float() for i in range(0, len(some), 8)]
    return torch.cat(latents).var((0, 2, 3)).view(-1, 1, 1)


class BaseLoss:
    """Draws a batch and computes the loss; see the module docstring. Everything is on the UNet's device."""

    def __init__(self, model: Model, people: People, batch_size: int, codes: "EncoderCodes | None" = None,
                 options: BaseOptions = BaseOptions(), aligned: bool = False):
        self.model, self.people, self.batch_size, self.options = model, people, batch_size, options
        self.device, self.alphas_cumprod = model.unet.device, training_alphas(model.scheduler).to(model.unet.device)
        self.variants, self.encoder_codes = people.variants(), codes
        self.levels = sum(model.adapter.config.groups)
        self.variance = latent_variance(model, people)
        window = face_window(model.unet.config.sample_size, options.face if people.faces is None else 1.0, device=self.device)
        self.window = window / window.mean()
        self.probe = AttentionProbe(model.adapter) if aligned else None
        if options.likeness and (model.w_plus_encoder is None or people.faces is not None):
            raise ValueError(f"likeness must be 0 without an encoder and for photos that are not aligned, got {options.likeness}")

    def prepare(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What needs no model: pictures uint8 [B, S, S, 3], person masks uint8 [B, S, S], captions as token ids [B, T], and their `codes`."""
        indices = rng.integers(len(self.people), size=self.batch_size)
        pictures = [compose(self.people, int(i), rng) for i in indices]
        captions = ["" if rng.random() < self.options.text_drop else caption(p[2], rng) for p in pictures]
        images, masks = (torch.from_numpy(x) for x in (np.stack([p[0] for p in pictures]), self.people.masks[indices]))
        return images, masks, tokenize(self.model, captions), *self.codes(indices, captions, rng)

    def codes(self, indices: np.ndarray, captions: list[str], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """w_plus [B, L, 512] of a reference picture per person (zeros = null identity), id_scale [B]."""
        o, w_plus, scale = self.options, [], []
        for index, text in zip(indices, captions):
            others = self.variants[int(self.people.identity[index])]
            reference = index if rng.random() < o.id_same else rng.choice(others)
            kind = rng.random()
            code = np.zeros((self.levels, 512)) if kind < o.id_null else self.code(reference, rng) + self.move(text, rng)
            w_plus.append(code)
            scale.append(0.0 if o.id_null <= kind < o.id_null + o.id_off else 1.0)
        return torch.from_numpy(np.stack(w_plus).astype(np.float32)), torch.tensor(scale)

    def code(self, reference: int, rng: np.random.Generator) -> np.ndarray:
        """Code [L, 512] of a reference picture: exact with some noise, or the encoder's with the encoder's errors."""
        if self.people.w is None or self.encoder_codes is not None and rng.random() < self.options.encoded:
            known = self.encoder_codes
            return known.people[reference] + rng.random() * known.errors[rng.integers(len(known.errors))]
        exact = self.people.w[reference] + rng.normal(0, self.options.code_noise * rng.random(), 512)
        return np.broadcast_to(exact, (self.levels, 512))

    def move(self, text: str, rng: np.random.Generator) -> np.ndarray:
        """Random move [512] along the directions of what a caption names."""
        step = np.zeros(512)
        for name, words in NAMED_BY.items():
            if name in self.people.directions and any(word in text for word in words) and rng.random() < self.options.moved:
                step += rng.normal(0, MOVES[name]) * self.people.directions[name]
        return step

    def timesteps(self, count: int, rng: np.random.Generator) -> Tensor:
        """Timesteps [count] to train at."""
        return training_timesteps(count, self.alphas_cumprod)

    def draw(self, rng: np.random.Generator, batch: tuple | None = None) -> "Task":
        """A batch (of `prepare`) with noise added and its conditions."""
        batch = self.prepare(rng) if batch is None else batch
        images, masks, ids, w_plus, id_scale = (x.to(self.device, non_blocking=True) for x in batch)
        with torch.no_grad():
            latents = self.model.encode_image(to_tensor(images)).float()
        masks = F.interpolate(masks[:, None].float() / 255, size=latents.shape[-2:], mode="area")
        prompt_embeds = self.model.encode_text(ids)
        timesteps = self.timesteps(len(latents), rng)
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy, target = add_noise(self.model.scheduler, latents, torch.randn_like(latents), alpha)
        return Task(noisy, timesteps, target, masks, prompt_embeds, w_plus, id_scale)

    def predict(self, task: "Task", w_plus: Tensor, id_scale: Tensor, held: ExitStack | None = None) -> tuple[Tensor, list[Tensor]]:
        """Model output [B, C, h, w] for an identity, and the identity maps of all layers. `held` keeps the identity on."""
        adapter = self.model.adapter
        with ExitStack() if held is None else nullcontext(held) as stack:
            condition = stack.enter_context(adapter.condition(adapter.mapper(w_plus), id_scale, keep_maps=True))
            output = self.model.unet(task.noisy, task.timesteps, task.prompt_embeds).sample
        return output.float(), list(condition.maps)

    def weight(self, task: "Task") -> Tensor:
        """Loss weight [B, C, 1, 1]: one over the variance of the target. Channels run from coarse structure to fine texture,
        with variances a hundredfold apart; unweighted, texture is never learned and pictures stay noisy."""
        return target_weight(self.model.scheduler, self.alphas_cumprod[task.timesteps].view(-1, 1, 1, 1), self.variance)

    def __call__(self, rng: np.random.Generator, batch: tuple | None = None) -> tuple[Tensor, dict]:
        task = self.draw(rng, batch)
        output, maps = self.predict(task, task.w_plus, task.id_scale)
        diffusion = ((output - task.target).square() * self.weight(task) * self.window).mean()
        local = localisation_loss(maps, task.masks, task.real)
        loss, scalars = diffusion + self.options.localisation * local, {"diffusion": diffusion.detach(), "localisation": local.detach()}
        if self.probe is not None:
            some = slice(None, None, 4)     # noise levels are in order, so these have all of them
            align = alignment_loss(self.model.adapter, *([x[some] for x in kept] for kept in (self.probe.queries, self.probe.keys)),
                                   task.masks[some], task.real[some])
            loss, scalars["alignment"] = loss + self.options.alignment * align, align.detach()
        if self.options.likeness:
            likeness = self.likeness(task, output)
            loss, scalars["likeness"] = loss + self.options.likeness * likeness, likeness.detach()
        return loss, scalars

    def likeness(self, task: "Task", output: Tensor) -> Tensor:
        """`likeness_loss` of the predictions that have an identity and not much noise; 0 where the batch has none."""
        alpha = self.alphas_cumprod[task.timesteps]
        chosen = ((alpha > LIKENESS_ALPHA) & (task.real > 0)).nonzero().flatten()
        most = max(1, int(self.options.likeness_share * len(alpha)))
        chosen = chosen[torch.randperm(len(chosen))[:most].to(chosen.device)]
        if not len(chosen):
            return output.new_zeros(())
        noisy, alpha = task.noisy[chosen], alpha[chosen].view(-1, 1, 1, 1)
        return predicted_likeness(self.model, noisy, output[chosen], task.target[chosen], alpha, task.masks[chosen])


def target_weight(scheduler: dict, alpha: Tensor, variance: Tensor) -> Tensor:
    """One over the variance of what a model predicts, at signal power alpha [B, 1, 1, 1]; variance: of latents, by channel. Noise has 1."""
    if scheduler.get("prediction_type") != "v_prediction":
        return torch.ones_like(alpha)
    return 1 / (alpha + (1 - alpha) * variance)


def predicted_likeness(model: Model, noisy: Tensor, output: Tensor, target: Tensor, alpha: Tensor, masks: Tensor) -> Tensor:
    """`likeness_loss` of the pictures that a model's output and its target [B, C, h, w] stand for; alpha [B, 1, 1, 1], masks [B, 1, h, w]."""
    picture, wanted = (model.decode_latents(clean_latents(model.scheduler, noisy, o, alpha)).float() for o in (output, target))
    mask = F.interpolate(masks, size=picture.shape[-2:], mode="bilinear")
    return likeness_loss(model.w_plus_encoder, picture, wanted, mask)


def likeness_loss(encoder: nn.Module, picture: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Squared distance of two pictures [B, 3, H, W] of a person (mask [B, 1, H, W]) in the W+ encoder's feature maps, each map by
    its variance: a perceptual loss (Johnson et al. 2016, arXiv 1603.08155; in diffusion training, arXiv 2401.00110)."""
    size = encoder.config.input_size

    def features(x: Tensor) -> list[Tensor]:
        white = F.interpolate(mask * x + 1 - mask, size=(size, size), mode="area")
        return [m.float() for m in encoder.feature_maps(white).values()]

    with torch.no_grad():
        targets = features(wanted)
    return sum((a - b).square().mean() / b.var() for a, b in zip(features(picture), targets)) / len(targets)


def add_noise(scheduler: dict, latents: Tensor, noise: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents at signal power `alpha` (broadcastable), and what the UNet should answer: v or the noise."""
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    target = signal * noise - sigma * latents if scheduler.get("prediction_type") == "v_prediction" else noise
    return signal * latents + sigma * noise, target


def clean_latents(scheduler: dict, noisy: Tensor, output: Tensor, alpha: Tensor) -> Tensor:
    """Latents without noise, x0_hat, by a model's output at signal power `alpha` (broadcastable)."""
    if scheduler.get("prediction_type") == "v_prediction":
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * output
    return (noisy - (1 - alpha).sqrt() * output) / alpha.sqrt()


def build_base(folder: Path, latent_avg: np.ndarray) -> tuple[BaseModel, object]:
    """Fresh UNet, text encoder and adapter in `mini`'s configuration, and the tokenizer (written to the folder)."""
    tokenizer = build_tokenizer(folder / "tokenizer", MINI_TEXT["max_position_embeddings"])
    unet = mini_unet()
    adapter = attach(unet, ADAPTER_MINI)
    adapter.mapper.latent_avg.copy_(torch.from_numpy(latent_avg).expand_as(adapter.mapper.latent_avg))
    return BaseModel(unet, mini_text_encoder(tokenizer), adapter), tokenizer


def save_base(model: BaseModel, folder: Path) -> None:
    """Write unet/, text_encoder/, adapter/ and scheduler/ of the model folder."""
    save_diffusers_config(model.unet, folder / "unet")
    save_weights(model.unet, folder / "unet" / "diffusion_pytorch_model.safetensors", torch.float16)
    model.text_encoder.config.save_pretrained(folder / "text_encoder")
    save_weights(model.text_encoder, folder / "text_encoder" / "model.safetensors", torch.float16)
    save_weights(model.adapter, folder / "adapter" / "model.safetensors", torch.float16)
    save_config(model.adapter.config, folder / "adapter" / "config.json")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(MINI_SCHEDULER, indent=2) + "\n")


def training_alphas(scheduler: dict) -> Tensor:
    """alphas_cumprod [1000] of a scheduler_config.json."""
    return make_scheduler(scheduler, "ddim", 1).alphas_cumprod


@torch.no_grad()
def encoder_bank(encoder: nn.Module, people: People, batch: int = 50) -> np.ndarray:
    """Codes [N, L, 512] of every picture, background painted white as in `enroll`. Computed where the encoder is."""
    encoder, device = encoder.to(memory_format=torch.channels_last), encoder.latent_avg.device
    parts = [encoder(on_white(people, slice(start, start + batch), device, encoder.config.input_size)).cpu()
             for start in tqdm(range(0, len(people), batch), desc="codes", disable=None)]
    return torch.cat(parts).numpy()
