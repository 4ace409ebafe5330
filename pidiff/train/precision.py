"""Which arithmetic trains fastest here. Processors that have bfloat16 instructions run them at anything from half to four times
the speed of float32, so it is measured, not looked up."""

import functools
import time
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AUTO = "auto"
PRECISIONS = (AUTO, *DTYPES)


@functools.cache
def fastest_precision(device: str) -> str:
    """"bf16" or "fp32": the faster on a device for a convolution and its gradients."""
    if torch.device(device).type != "cpu":
        return "bf16"
    return "bf16" if _seconds(torch.bfloat16) < _seconds(torch.float32) else "fp32"


def agreed(precision: str) -> str:
    """The first process's choice: all must train in one precision, and timings differ."""
    choice = [precision]
    if dist.is_initialized():
        dist.broadcast_object_list(choice, 0)
    return choice[0]


@torch.enable_grad()            # whoever asks: latents are made without gradients
def _seconds(dtype: torch.dtype, runs: int = 4) -> float:
    """Least time of a convolution like those of `mini`, forwards and backwards."""
    layer = nn.Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)
    x, taken = torch.randn(8, 128, 16, 16).to(memory_format=torch.channels_last), []
    for _ in range(runs):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            F.relu(layer(x)).float().square().mean().backward()
        taken.append(time.perf_counter() - started)
    return min(taken)


def autocast(device: str, precision: str = AUTO) -> AbstractContextManager:
    """Autocast to a precision; weights stay float32."""
    precision = fastest_precision(device) if precision == AUTO else precision
    return torch.autocast(torch.device(device).type, DTYPES[precision], enabled=precision != "fp32")
