"""Weights in the order in which our kernels read them, in the user's cache: packed the first time, then mapped.

Mapped weights are in memory once for all processes and all graphs that share them, and give way where it is short.
"""

import contextlib
import hashlib
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from ..files import trim_folder
from ..graph_files import weights_key

SPOTS, SPOT_BYTES = 9, 1 << 14      # of a layer's numbers, its first, middle and last among them: what tells it from the file's others of its shape


class PackedWeights:
    """Those of the graph at `path`, by the name of a layer. folder: of the user's own, None for none: they are held in memory then."""

    def __init__(self, path, folder=None):
        self._path, self._folder, self._kept = Path(path), folder, {}

    def get(self, name, weight, pack, *how):
        """Return the array, mapped where that can be.

        weight: the layer's numbers as the graph has them. pack: returns what they are packed to, which depends on `how` beside them.
        """
        if name not in self._kept:
            self._kept[name] = self._mapped(weight, pack, how) if self._folder else pack()
        return self._kept[name]

    def _mapped(self, weight, pack, how):
        file = self._folder / f"packed-{self._name(weight, how)}.npy"
        found = _read(file)
        if found is not None:
            return found
        packed = pack()
        return _read(file) if _write(file, packed) else packed

    def _name(self, weight, how):
        numbers = weight.reshape(-1).view(np.uint8)
        digest = hashlib.sha256(repr((self._key, how, weight.shape, str(weight.dtype))).encode())
        for start in np.linspace(0, max(numbers.size - SPOT_BYTES, 0), SPOTS).astype(np.int64):
            digest.update(numbers[start:start + SPOT_BYTES])
        return digest.hexdigest()[:32]

    @cached_property
    def _key(self):
        from pidiff import _C

        made_by = os.stat(_C.__file__)      # another build may pack in another way
        return weights_key(self._path.read_bytes(), self._path.parent, made_by.st_size, made_by.st_mtime_ns)


def _read(file):
    """Return the array in a file of the cache, None where there is none or it is torn."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        array = np.load(file, mmap_mode="r")
        os.utime(file)      # trim_folder goes by the last use
        return array
    return None


def _write(file, packed):
    """Write an array whole or not at all; returns whether that went well. What a kill leaves goes when the cache is trimmed."""
    part = file.with_name(f".{file.stem}-{os.urandom(4).hex()}.part")      # other threads, too, may be writing it
    try:
        with open(part, "wb") as to:
            np.save(to, packed)
        os.replace(part, file)
        trim_folder(file.parent)
        return True
    except OSError:     # a disk that is full
        return False
    finally:
        part.unlink(missing_ok=True)
