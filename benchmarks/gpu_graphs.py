"""The UNet of Stable Diffusion 1.5 with random float16 weights, and its step as ONNX graphs without them.

    python benchmarks/gpu_graphs.py OUT [--small] [--forms fused standard standard-23]

Writes OUT/unet/diffusion_pytorch_model.safetensors (1.7 GB), OUT/unet-FORM.onnx, which point into it, and OUT/inputs.npz. The
same weights come out on every machine, so the graphs alone (1 MB) can be taken to another one and the weights made there:
gpu_step.py does. FORM is an attention form of the exporter, with its opset where that is not 18; no FORM: the weights alone.
--small: a UNet for a rehearsal on a processor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from make_sd15_random import UNET, random_state

from pidiff.config import AdapterConfig
from pidiff.export import parts
from pidiff.export.attention import Form
from pidiff.export.step import step_unet
from pidiff.export.to_onnx import write_graph
from pidiff.export.weights import WeightIndex, load_stored, write_safetensors
from pidiff.identity import IdentityAdapter
from pidiff.unet import cross_attention_layers

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BATCH, PEOPLE, TOKENS = 2, 1, 77     # of the inputs
ADAPTER = AdapterConfig(mode="residual")
SMALL = {**UNET, "block_out_channels": (32, 64, 64, 64), "attention_head_dim": 2, "cross_attention_dim": 64, "norm_num_groups": 8}


def make_unet(small: bool = False):
    """UNet2DConditionModel without values."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**(SMALL if small else UNET)).half().eval()


def write_weights(root: Path, small: bool = False) -> None:
    unet = make_unet(small)
    write_safetensors(root / WEIGHTS, random_state(unet, torch.Generator().manual_seed(0)), torch.float16, "unet")


def side_of(small: bool) -> int:
    """Of the latents."""
    return 16 if small else 64


def write_inputs(root: Path, small: bool = False) -> None:
    """Random inputs of a step in ROOT/inputs.npz, in the graph's order."""
    (time_row, text_kv, id_fold), side = widths(make_unet(small)), side_of(small)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator).half().numpy()  # noqa: E731
    np.savez(root / "inputs.npz", latents=draw(BATCH, 4, side, side), time_row=draw(1, time_row), text_kv=draw(BATCH, TOKENS, text_kv),
             id_fold=draw(BATCH, PEOPLE, id_fold) * np.float16(0.3), id_mask=np.ones((BATCH, PEOPLE, side, side), np.float16),
             id_scale=np.array([0, 1], np.float16))  # fmt: skip


def load_unet(root: Path, small: bool = False, device: str = "cpu"):
    unet = make_unet(small).to_empty(device="cpu")
    load_stored(unet, root, WEIGHTS, "")
    return unet.to(device)


def widths(unet) -> tuple[int, int, int]:
    """Of time_row, text_kv and id_fold."""
    with torch.device("meta"):
        return parts.widths(unet, IdentityAdapter(ADAPTER, cross_attention_layers(unet)))


def write_form(root: Path, unet, form: str) -> Path:
    attention, _, opset = form.partition("-")
    chosen, weights = Form(attention, int(opset or 18)), WeightIndex(root)
    sizes, wide = parts.Sizes(free=True, prompt_dim=unet.config.cross_attention_dim), widths(unet)
    weights.add(unet, WEIGHTS, "")
    with torch.no_grad(), step_unet(unet, ADAPTER, chosen, 0) as step:
        graph = parts.unet_graphs(step, sizes, wide, torch.float16)[0]
        weights.refresh()
        write_graph(graph, parts.example_of(graph, sizes), chosen.opset, weights)
    return (root / "unet.onnx").rename(root / f"unet-{form}.onnx")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--forms", nargs="*", default=["fused", "standard", "standard-23"])
    args = parser.parse_args(argv)
    write_weights(args.out, args.small)
    write_inputs(args.out, args.small)
    unet = load_unet(args.out, args.small) if args.forms else None
    for form in args.forms:
        print(write_form(args.out, unet, form), flush=True)


if __name__ == "__main__":
    main()
