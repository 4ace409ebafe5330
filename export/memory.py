"""Whether a build will fit, known before it begins: a killed build costs more than a sentence."""

import shutil
from pathlib import Path

from pidiff.runtime.memory import available_memory

from .errors import ExportError

# Peak memory of a builder process, from its VmHWM on builds of SD1.5 (UNet: 6.3 GiB for 1.51 GiB of weights, the others
# 2.5 to 3.5 bytes for a byte, and 0.25 GiB) and of `mini` (UNet: 0.51 GiB for 27 MiB); tests hold it against new builds.
BASE_BYTES = 512 << 20
BYTES_PER_WEIGHT_BYTE = 4.2
_ENGINE_BYTES = 32 << 20                    # of an engine, beside its weights


def needed_memory(weight_bytes: int) -> int:
    """Bytes of memory that building a graph with so many bytes of weights takes at its peak."""
    return BASE_BYTES + int(BYTES_PER_WEIGHT_BYTE * weight_bytes)


def check_memory(weights: dict[str, int]) -> None:
    """Raise ExportError if the largest of these graphs (name -> bytes of weights) will not fit; they are built in turn."""
    available = available_memory()
    if not weights or available is None:
        return
    graph = max(weights, key=weights.get)
    needed = needed_memory(weights[graph])
    if needed > available:
        raise ExportError(f"memory must be at least {needed / 2**30:.1f} GiB to build {graph}, got {available / 2**30:.1f} GiB "
                          "available: close programs, build on a larger machine (none needs a GPU), or try with --force")


def check_disk(path: Path, weights: dict[str, int]) -> None:
    """Raise ExportError if engines with these weights will not fit on the bundle's disk."""
    needed = sum(int(1.1 * size) + _ENGINE_BYTES for size in weights.values())
    free = shutil.disk_usage(path).free
    if needed > free:
        raise ExportError(f"bundle must be on a disk with {needed / 2**30:.1f} GiB free for its engines, "
                          f"got {free / 2**30:.1f} GiB at {path}")
