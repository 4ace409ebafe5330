"""Reference sampler in PyTorch with diffusers' schedulers: what training looks at, and what the runtime is held to."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from .caching import keep_deep_features, outer_forward
from .model import Model

# name -> (diffusers class, settings that are not in scheduler_config.json)
SOLVERS: dict[str, tuple[str, dict]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}


def make_scheduler(config: dict, solver: str, num_inference_steps: int, use_karras_sigmas: bool = False,
                   timestep_spacing: str | None = None):
    """diffusers scheduler for `config` (a scheduler_config.json), its timesteps set.

    Keys that a class does not know are left out: a configuration written for one scheduler serves all of them.
    """
    import diffusers

    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    name, extra = SOLVERS[solver]
    cls = getattr(diffusers, name)
    config = {**config, **extra, **({"use_karras_sigmas": True} if use_karras_sigmas else {}),
              **({"timestep_spacing": timestep_spacing} if timestep_spacing else {})}
    known = inspect.signature(cls.__init__).parameters
    scheduler = cls.from_config({k: v for k, v in config.items() if k in known})
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def tokenize(model: Model, prompts: list[str]) -> Tensor:
    """[B, T] token ids int64, padded and cut to the text encoder's length."""
    length = model.text_encoder.config.max_position_embeddings
    return model.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def encode_prompts(model: Model, prompts: list[str]) -> Tensor:
    """[B, T, D] prompt embeddings of `tokenize`'s ids."""
    return model.encode_text(tokenize(model, prompts).to(model.unet.device))


@torch.no_grad()
def sample_latents(model: Model, w_plus: Tensor | None, prompt: str | list[str], negative_prompt: str = "", *,
                   num_inference_steps: int = 20, guidance_scale: float = 3.0, guidance_interval: tuple[float, float] = (0.0, 1.0),
                   cache_interval: int = 1, outer: int = 1, id_scale: float = 1.0, id_start: float = 0.0,
                   level_scale: Tensor | None = None, id_mask: Tensor | None = None, solver: str = "dpmpp_2m",
                   use_karras_sigmas: bool = False, timestep_spacing: str | None = None, eta: float = 0.3, latents: Tensor | None = None,
                   generator: torch.Generator | None = None, on_step: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor | None]:
    """Denoise and return (latents [B, c, h, w], identity map [B, P, h, w] or None).

    w_plus: [B, P, L, 512], [B, L, 512] for one person a picture, or None for nobody. prompt: one text, or one per
    picture. id_mask [B, P, h, w] or [P, h, w] in [0, 1] at latent size. level_scale [4]. id_start: part of the steps,
    from the start, without the identity. latents: unit noise [B, c, h, w], drawn with `generator` where not given.
    guidance_scale 1 or 0 = off; the unconditional half sees mapper(zeros) for everybody. guidance_interval: part of the steps
    with guidance (arXiv 2404.07724); the others run the conditional half alone. cache_interval: the whole UNet runs every so
    many steps, and at those that begin the guidance or the identity; the others run its `outer` last up layers
    (pidiff.caching). The identity map (`parallel` only) is the mean over layers and over the whole steps with identity, of
    the conditional half.
    """
    unet, device = model.unet, model.unet.device
    people = None if w_plus is None else (w_plus if w_plus.ndim == 4 else w_plus[:, None]).to(device)
    batch = len(latents) if latents is not None else len(prompt) if isinstance(prompt, list) else 1 if people is None else len(people)
    scheduler = make_scheduler(model.scheduler, solver, num_inference_steps, use_karras_sigmas, timestep_spacing)
    if latents is None:
        size = unet.config.sample_size
        latents = torch.randn(batch, unet.config.in_channels, size, size, generator=generator).to(device)
    latents = latents * scheduler.init_noise_sigma
    first, end = (round(x * num_inference_steps) if guidance_scale not in (0, 1) else 0 for x in guidance_interval)
    prompts = [prompt] * batch if isinstance(prompt, str) else prompt
    embeds = encode_prompts(model, [negative_prompt] * batch + prompts if first < end else prompts)
    conditions = {guided: _condition(model, people, batch, guided, id_scale, level_scale, id_mask) for guided in (False, True)}
    maps: list[Tensor] = []
    deep, age, was_guided = None, 0, False
    for step, timestep in enumerate(scheduler.timesteps):
        guided = first <= step < end
        active = id_scale > 0 and step >= round(id_start * num_inference_steps)
        inputs = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        renew = age % cache_interval == 0 or guided and not was_guided or step == round(id_start * num_inference_steps)
        age, was_guided = 1 if renew else age + 1, guided
        with conditions[guided]() if active else nullcontext() as seen:
            if renew:
                with keep_deep_features(unet, outer) as kept:
                    output = unet(inputs, timestep, embeds[-len(inputs):]).sample
                deep = kept[-1]
            else:
                output = outer_forward(unet, inputs, timestep, embeds[-len(inputs):], deep[-len(inputs):], outer)
        if renew and seen is not None and model.adapter.config.has_null:
            maps.append(mean_map(seen.maps, latents.shape[-2:])[-batch:])
        if guided:
            without, with_ = output.chunk(2)
            output = without + guidance_scale * (with_ - without)
        latents = scheduler.step(output, timestep, latents, **_noise(scheduler, generator, eta if solver == "tcd" else None)).prev_sample
        if on_step is not None:
            on_step(step)
    return latents, torch.stack(maps).mean(0) if maps else None


def generate(model: Model, w_plus: Tensor | None, prompt: str | list[str], negative_prompt: str = "", **options) -> Tensor:
    """Pictures [B, 3, H, W] in about [-1, 1]; arguments as in `sample_latents`."""
    latents, _ = sample_latents(model, w_plus, prompt, negative_prompt, **options)
    with torch.no_grad():
        return model.decode_latents(latents)


def mean_map(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Identity maps of all layers, [B, P, S] each, brought to `size` (nearest) and averaged: [B, P, h, w]."""
    aspect = size[0] / size[1]
    grids = [m.unflatten(2, (round((m.shape[2] * aspect) ** 0.5), -1)) for m in maps]
    return torch.stack([F.interpolate(g, size=tuple(size), mode="nearest") for g in grids]).mean(0)


def _condition(model: Model, people: Tensor | None, batch: int, guided: bool, id_scale: float,
               level_scale: Tensor | None, id_mask: Tensor | None):
    """A function that opens `adapter.condition` for one UNet call, rows [unconditional..., conditional...]."""
    if people is None:
        return nullcontext
    adapter, (rows, count) = model.adapter, people.shape[:2]
    if rows != batch:
        raise ValueError(f"w_plus must have one row per picture, {batch}, got {rows}")
    both = torch.cat([torch.zeros_like(people), people]) if guided else people
    embeds = adapter.mapper(both.flatten(0, 1)).unflatten(0, (-1, count))
    scale = None if level_scale is None else level_scale.to(both).expand(len(both), count, 4)
    if id_mask is not None:
        id_mask = id_mask.to(both).expand(batch, -1, -1, -1).repeat(2 if guided else 1, 1, 1, 1)
    return lambda: adapter.condition(embeds, id_scale, scale, id_mask, keep_maps=True)


def _noise(scheduler, generator: torch.Generator | None, eta: float | None) -> dict:
    """Stochastic schedulers take the generator, the others do not know the argument."""
    known = "generator" in inspect.signature(scheduler.step).parameters
    return {**({"generator": generator} if known else {}), **({} if eta is None else {"eta": eta})}
