"""The UNet as one denoising step runs it: time, text and identity come in as prepared slices.

Everything that does not depend on the latents has left the graph (graphs.py: TimeConditioner, TextConditioner,
IdConditioner). The UNet itself is not copied: its modules are swapped inside a `with` block and put back after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pidiff.caching import keep_deep_features, outer_forward
from pidiff.config import AdapterConfig
from pidiff.unet import cross_attention_layers

from .attention import FoldedIdentityAttention, Form, SelfAttention, StepInputs

# UNet features that the step graph has no input for; all are off in SD1.x.
_UNSUPPORTED = ("time_cond_proj_dim", "class_embed_type", "addition_embed_type", "encoder_hid_dim_type",
                "dual_cross_attention", "only_cross_attention", "timestep_post_act", "time_embedding_act_fn")


def check_unet(unet: nn.Module) -> None:
    """Raise ValueError for a UNet that takes other inputs than SD1.x's."""
    for key in _UNSUPPORTED:
        value = unet.config.get(key)
        if any(value) if isinstance(value, (list, tuple)) else value not in (None, False):
            raise ValueError(f"UNet {key} must be off for export, got {value!r}")


def time_projections(unet: nn.Module) -> list[tuple[nn.Module, nn.Linear]]:
    """(residual block, its time projection) in module order: the order of the time table's columns."""
    return [(m, m.time_emb_proj) for m in unet.modules() if isinstance(getattr(m, "time_emb_proj", None), nn.Linear)]


def layer_level(name: str, unet: nn.Module) -> int:
    """Halvings of the latent size at an attention layer, from its name."""
    deepest = len(unet.config.block_out_channels) - 1
    kind, index = name.split(".")[:2]
    return deepest if kind == "mid_block" else int(index) if kind == "down_blocks" else deepest - int(index)


class _TimeSlice(nn.Module):
    """Stands for a `time_emb_proj`: its columns of the time row."""

    def __init__(self, start: int, width: int):
        super().__init__()
        self.start, self.width = start, width

    def forward(self, time_row: Tensor) -> Tensor:
        return time_row[:, self.start:self.start + self.width]


class _TimeRow(nn.Module):
    """Stands for the timestep MLP: the row that was computed beforehand."""

    def __init__(self, inputs: StepInputs):
        super().__init__()
        self.inputs = inputs

    def forward(self, *_) -> Tensor:
        return self.inputs.time_row


class StepUNet(nn.Module):
    """latents [B,c,h,w], time_row [1,sumCt], text_kv [B,T,2 sumC], id_fold [B,P,F], id_mask [B,P,h,w], id_scale [B]
    -> model_output [B,c,h,w], with a null key identity_map [B,P,h,w], and with `outer` deep_features [B,C,h,w] (the cut of
    pidiff.caching). h and w divide by 2^(levels - 1).

    Works inside `step_unet` only.
    """

    def __init__(self, unet: nn.Module, inputs: StepInputs, levels: set[int], has_null: bool, outer: int):
        super().__init__()
        self.unet, self.inputs, self.levels, self.has_null, self.outer = unet, inputs, sorted(levels), has_null, outer

    def forward(self, latents: Tensor, time_row: Tensor, text_kv: Tensor, id_fold: Tensor, id_mask: Tensor,
                id_scale: Tensor):
        self._set(time_row, id_fold, id_mask, id_scale)
        with keep_deep_features(self.unet, self.outer) if self.outer else nullcontext([]) as deep:
            # Not __call__: the hook of `pidiff.unet.set_processors` has no part in this graph. Timesteps are not read (_TimeRow); they are a
            # tensor that is there already, which can be captured in a CUDA graph.
            output = self.unet.forward(latents, time_row[:, 0], text_kv, return_dict=False)[0]
        found = [output, *([self._identity_map()] if self.has_null else []), *deep]
        return tuple(found) if len(found) > 1 else output

    def _set(self, time_row: Tensor, id_fold: Tensor, id_mask: Tensor, id_scale: Tensor) -> None:
        inputs = self.inputs
        inputs.time_row, inputs.id_fold, inputs.id_scale = time_row, id_fold, id_scale
        # Area averaging as in pidiff.identity.resample_mask: exact, because sizes halve exactly.
        inputs.masks = {n: F.avg_pool2d(id_mask, 2**n) if n else id_mask for n in self.levels}
        inputs.maps = {}

    def _identity_map(self) -> Tensor:
        """Mean over layers of the identity maps, repeated up to latent size."""
        total, count = None, 0
        for level, maps in self.inputs.maps.items():
            part = torch.stack(maps).sum(0).reshape(self.inputs.masks[level].shape)
            if level:
                part = F.interpolate(part, scale_factor=float(2**level), mode="nearest")
            total, count = part if total is None else total + part, count + len(maps)
        return total / count


class CachedUNet(nn.Module):
    """The step with another step's deep_features [B,C,h,w] as its last input -> model_output [B,c,h,w]."""

    def __init__(self, step: StepUNet):
        super().__init__()
        self.step = step

    def forward(self, latents: Tensor, time_row: Tensor, text_kv: Tensor, id_fold: Tensor, id_mask: Tensor,
                id_scale: Tensor, deep_features: Tensor) -> Tensor:
        self.step._set(time_row, id_fold, id_mask, id_scale)
        return outer_forward(self.step.unet, latents, 0, text_kv, deep_features, self.step.outer)


@contextmanager
def step_unet(unet: nn.Module, config: AdapterConfig, form: Form, outer: int = 0) -> Iterator[StepUNet]:
    """Turn a diffusers UNet2DConditionModel into its step form for the length of the block.

    outer: up layers that `CachedUNet` of this step runs; 0: the step gives no deep features.
    """
    check_unet(unet)
    inputs, processors, levels = StepInputs(), dict(unet.attn_processors), set()
    kv_start = fold_start = 0
    for name in processors:
        if name.endswith("attn1.processor"):
            processors[name] = SelfAttention(form)
    for name, channels, heads in cross_attention_layers(unet):
        level = layer_level(name, unet)
        levels.add(level)
        processors[name] = FoldedIdentityAttention(inputs, form, kv_start, fold_start, config.num_tokens, config.has_null,
                                                   config.mode == "residual", level)
        kv_start += 2 * channels
        fold_start += channels * heads * (config.num_tokens + config.has_null) + config.num_tokens * channels
    with _swapped(unet, inputs, processors):
        yield StepUNet(unet, inputs, levels, config.has_null, outer).eval()


@contextmanager
def _swapped(unet: nn.Module, inputs: StepInputs, processors: dict) -> Iterator[None]:
    before, blocks, embedding = dict(unet.attn_processors), time_projections(unet), unet.time_embedding
    activations = [block.skip_time_act for block, _ in blocks]
    start = 0
    try:
        for block, projection in blocks:
            block.time_emb_proj, block.skip_time_act = _TimeSlice(start, projection.out_features), True
            start += projection.out_features
        unet.time_embedding = _TimeRow(inputs)
        unet.set_attn_processor(processors)
        yield
    finally:
        for (block, projection), activation in zip(blocks, activations):
            block.time_emb_proj, block.skip_time_act = projection, activation
        unet.time_embedding = embedding
        unet.set_attn_processor(before)
