"""The graphs of each part of a model, with the inputs they are traced and verified on.

A part is handled alone and freed before the next one is loaded: that bounds the memory of an export by its largest part.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pidiff.caching import deep_channels, keep_deep_features, outer_forward
from pidiff.identity import IdentityAdapter
from pidiff.unet import cross_attention_layers

from .attention import Form
from .graphs import (Graph, IdConditioner, Tensors, TextConditioner, TextEncoder, TimeConditioner, VaeDecoder, VaeEncoder)
from .step import CachedUNet, StepUNet, time_projections
from .verify import Case

TIMESTEPS = (999.0, 640.5, 21.0, 0.0)


@dataclass
class Sizes:
    """What the parts say about the model; each fills in its own, the UNet last.

    free: latents may have any size (axes h, w) in the .onnx files; else they have `side`.
    """

    free: bool = False
    scale_factor: int = 8
    text_length: int = 77
    prompt_dim: int = 768
    layers: int = 18
    style_dim: int = 512
    face_size: int = 256
    channels: int = 4
    side: int = 64
    levels: int = 4
    samples: dict[str, Tensor] = field(default_factory=dict)     # outputs of earlier parts, as inputs of later ones

    @property
    def latent_axes(self) -> tuple:
        return ("h", "w") if self.free else (self.side, self.side)

    @property
    def image_axes(self) -> tuple:
        return ("H", "W") if self.free else (self.side * self.scale_factor,) * 2

    @property
    def latent_size(self) -> tuple[int, int]:
        """Size to trace and verify at: small and not square where it is free."""
        step = 2 ** (self.levels - 1)
        return (2 * step, 3 * step) if self.free else (self.side, self.side)

    @property
    def image_size(self) -> tuple[int, int]:
        return tuple(n * self.scale_factor for n in self.latent_size)


def example_of(graph: Graph, sizes: Sizes) -> dict[str, Tensor]:
    """Zeros in the shapes a graph is traced with; free axes get sizes of their own."""
    (h, w), (height, width) = sizes.latent_size, sizes.image_size
    free = {"B": 2, "P": 3, "N": 5, "h": h, "w": w, "H": height, "W": width}
    return {n: torch.zeros([free.get(s, s) for s in shape]) for n, shape in zip(graph.inputs.names, graph.inputs.shapes)}


def smooth(batch: int, height: int, width: int) -> Tensor:
    """Random pictures in [-1, 1] with structure at a tenth of their size, [B, 3, H, W]."""
    coarse = torch.randn(batch, 3, max(2, height // 10), max(2, width // 10))
    return F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False).clamp(-1, 1)


# --- text encoder ---------------------------------------------------------------------------------------------------

def text_graph(clip: nn.Module, form: Form, dtype: torch.dtype) -> Graph:
    length, width = clip.config.max_position_embeddings, clip.config.hidden_size
    return Graph("text_encoder", TextEncoder(clip, form).eval(), Tensors(("input_ids",), (("B", length),)),
                 Tensors(("prompt_embeds",), (("B", length, width),)), dtype, int64=("input_ids",))


def text_case(clip: nn.Module, sizes: Sizes) -> Case:
    ids = torch.randint(0, clip.config.vocab_size, (3, sizes.text_length))
    expected = clip(ids).last_hidden_state
    sizes.samples["prompt_embeds"] = expected
    return Case({"input_ids": ids}, (expected,))


# --- encoder of faces -----------------------------------------------------------------------------------------------

def encoder_graph(encoder: nn.Module, sizes: Sizes, dtype: torch.dtype) -> Graph:
    side = sizes.face_size
    return Graph("w_plus_encoder", encoder, Tensors(("face",), (("B", 3, side, side),)),
                 Tensors(("w_plus",), (("B", sizes.layers, sizes.style_dim),)), dtype)


def encoder_case(encoder: nn.Module, sizes: Sizes, dtype: torch.dtype) -> Case:
    face = smooth(3, sizes.face_size, sizes.face_size).to(dtype)
    sizes.samples["latent_avg"] = encoder.latent_avg.float().clone()
    return Case({"face": face}, (encoder(face.float()),))


def matting_graph(matting: nn.Module, sizes: Sizes) -> Graph:
    side = sizes.face_size
    return Graph("face_matting", matting, Tensors(("face",), (("B", 3, side, side),)),
                 Tensors(("alpha",), (("B", 1, side, side),)))


# --- autoencoder ----------------------------------------------------------------------------------------------------

def vae_graphs(vae: nn.Module, sizes: Sizes, dtype: torch.dtype) -> list[Graph]:
    latents, image = ("B", sizes.channels, *sizes.latent_axes), ("B", 3, *sizes.image_axes)
    return [Graph("vae_decoder", VaeDecoder(vae), Tensors(("latents",), (latents,)), Tensors(("image",), (image,)), dtype),
            Graph("vae_encoder", VaeEncoder(vae), Tensors(("image",), (image,)), Tensors(("latents",), (latents,)), dtype)]


def vae_cases(decode, encode, sizes: Sizes, dtype: torch.dtype) -> dict[str, Case]:
    """decode, encode: `Model.decode_latents` and `Model.encode_image`."""
    latents = torch.randn(3, sizes.channels, *sizes.latent_size).to(dtype)
    image = smooth(3, *sizes.image_size).to(dtype)
    sizes.samples["image_latents"] = encode(image.float())
    return {"vae_decoder": Case({"latents": latents}, (decode(latents.float()),)),
            "vae_encoder": Case({"image": image}, (sizes.samples["image_latents"],))}


# --- UNet and its conditioners --------------------------------------------------------------------------------------

def conditioner_graphs(unet: nn.Module, adapter: IdentityAdapter, sizes: Sizes, dtype: torch.dtype) -> list[Graph]:
    t = sizes.text_length
    return [
        Graph("text_conditioner", TextConditioner(unet, dtype), Tensors(("prompt_embeds",), (("B", t, sizes.prompt_dim),)),
              Tensors(("text_kv",), (("B", t, 2 * sum(_channels(unet))),)), dtype),
        Graph("id_conditioner", IdConditioner(adapter, dtype),
              Tensors(("w_plus", "level_scale"), (("B", sizes.layers, sizes.style_dim), ("B", len(adapter.config.groups)))),
              Tensors(("id_fold",), (("B", fold_width(unet, adapter)),)), dtype),
        Graph("time_conditioner", TimeConditioner(unet, dtype), Tensors(("timesteps",), (("N",),)),
              Tensors(("time_table",), (("N", time_width(unet)),)), dtype, float32=("timesteps",)),
    ]


def unet_graphs(step: StepUNet, sizes: Sizes, widths: tuple[int, int, int], dtype: torch.dtype) -> list[Graph]:
    """The UNet, and with deep features the graph that reuses them.

    widths: of time_row, text_kv and id_fold, taken before the UNet was put into its step form.
    """
    latents, size = ("B", sizes.channels, *sizes.latent_axes), sizes.latent_axes
    inputs = Tensors(("latents", "time_row", "text_kv", "id_fold", "id_mask", "id_scale"),
                     (latents, (1, widths[0]), ("B", sizes.text_length, widths[1]), ("B", "P", widths[2]), ("B", "P", *size),
                      ("B",)))
    deep = [("deep_features", ("B", deep_channels(step.unet, step.outer), *size))] if step.outer else []
    outputs = [("model_output", latents), *([("identity_map", ("B", "P", *size))] if step.has_null else []), *deep]
    whole = Graph("unet", step, inputs, Tensors(*map(tuple, zip(*outputs))), dtype)
    if not deep:
        return [whole]
    more = Tensors((*inputs.names, deep[0][0]), (*inputs.shapes, deep[0][1]))
    return [whole, Graph("unet_cached", CachedUNet(step).eval(), more, Tensors(("model_output",), (latents,)), dtype)]


def unet_cases(unet: nn.Module, adapter: IdentityAdapter, sizes: Sizes, dtype: torch.dtype, outer: int = 0) -> dict[str, Case]:
    """Cases of the conditioners and of the UNet: 3 pictures of 2 people each, own scales, own region masks."""
    batch, people = 3, 2
    embeds = sizes.samples["prompt_embeds"][:batch].to(dtype)
    w_plus = (sizes.samples["latent_avg"] + 0.35 * torch.randn(batch * people, sizes.layers, sizes.style_dim)).to(dtype)
    w_plus[0] = 0                                                        # the unconditional identity
    levels = (1.5 * torch.rand(batch * people, len(adapter.config.groups))).to(dtype)
    times = torch.tensor(TIMESTEPS)
    text_kv = TextConditioner(unet, torch.float32)(embeds)
    id_fold = adapter.fold(w_plus.float(), levels.float())
    table = TimeConditioner(unet, torch.float32)(times)
    inputs = {
        "latents": torch.randn(batch, sizes.channels, *sizes.latent_size), "time_row": table[1:2], "text_kv": text_kv,
        "id_fold": id_fold.unflatten(0, (batch, people)), "id_mask": torch.rand(batch, people, *sizes.latent_size),
        "id_scale": torch.tensor([0.0, 1.0, 0.6]),
    }
    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    whole, cached, deep = _unfolded(unet, adapter, inputs, embeds, w_plus, levels, outer)
    return {
        "text_conditioner": Case({"prompt_embeds": embeds}, (text_kv,)),
        "id_conditioner": Case({"w_plus": w_plus, "level_scale": levels}, (id_fold,)),
        "time_conditioner": Case({"timesteps": times}, (table,)),
        "unet": Case(inputs, whole),
        **({"unet_cached": Case({**inputs, "deep_features": deep}, cached)} if outer else {}),
    }


def step_runs(cases: dict[str, Case], scheduler: dict, sizes: Sizes) -> list[dict[str, Tensor]]:
    """Inputs of the UNet at every one of TIMESTEPS, each with as much noise on encoded pictures as belongs to it."""
    from pidiff.sampling import make_scheduler

    inputs, table = cases["unet"].inputs, cases["time_conditioner"].expected[0]
    alphas, runs = make_scheduler(scheduler, "ddim", 10).alphas_cumprod, []
    for t, row in zip(TIMESTEPS, table):
        alpha = alphas[min(int(t), len(alphas) - 1)]
        latents = alpha.sqrt() * sizes.samples["image_latents"] + (1 - alpha).sqrt() * inputs["latents"].float()
        runs.append({**inputs, "latents": latents, "time_row": row[None]})
    return runs


def _unfolded(unet, adapter, inputs: dict[str, Tensor], embeds: Tensor, w_plus: Tensor, levels: Tensor, outer: int):
    """The trained model on the same step: timestep, prompt and W+ codes instead of prepared slices.

    Returns the outputs of a whole call, those of a cached one, and the deep features of an earlier step that it takes.
    """
    from pidiff.sampling import mean_map

    f = {k: v.float() for k, v in inputs.items()}
    (batch, people), now = f["id_mask"].shape[:2], torch.tensor(TIMESTEPS[1])
    tokens, prompt = adapter.mapper(w_plus.float()).unflatten(0, (batch, people)), embeds.float()
    with adapter.condition(tokens, f["id_scale"], levels.float().unflatten(0, (batch, people)), f["id_mask"],
                           keep_maps=True) as seen, keep_deep_features(unet, outer) if outer else nullcontext([]) as kept:
        output = unet(f["latents"], now, prompt).sample
        maps = (mean_map(seen.maps, tuple(output.shape[-2:])),) if adapter.config.has_null else ()
        whole = (output, *maps, *kept)
        if not outer:
            return whole, (), None
        unet(f["latents"] + 0.1, torch.tensor(TIMESTEPS[0]), prompt)
        deep = kept[-1].to(inputs["latents"].dtype)
        return whole, (outer_forward(unet, f["latents"], now, prompt, deep.float(), outer),), deep


def _channels(unet: nn.Module) -> list[int]:
    return [channels for _, channels, _ in cross_attention_layers(unet)]


def fold_width(unet: nn.Module, adapter: IdentityAdapter) -> int:
    """F of id_fold: per layer A [C, H T'] and V [T, C]."""
    tokens, null = adapter.config.num_tokens, adapter.config.has_null
    return sum(c * h * (tokens + null) + tokens * c for _, c, h in cross_attention_layers(unet))


def time_width(unet: nn.Module) -> int:
    return sum(projection.out_features for _, projection in time_projections(unet))


def widths(unet: nn.Module, adapter: IdentityAdapter) -> tuple[int, int, int]:
    """Widths of time_row, text_kv and id_fold."""
    return time_width(unet), 2 * sum(_channels(unet)), fold_width(unet, adapter)
