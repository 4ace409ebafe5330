"""Weights on disk: one safetensors file per part, written as a stream, and found again by the graphs.

A safetensors file is an 8-byte little-endian header length, a JSON header and raw data, so an ONNX graph can use a
tensor in it as external data by location, offset and length. That is how a bundle stores every weight once.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from .errors import ExportError

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
         "I32": torch.int32, "I8": torch.int8, "BOOL": torch.bool}
_NAMES = {v: k for k, v in TYPES.items()}
_ALIGNMENT = 64


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file relative to the bundle, key, dtype, shape, position and size in bytes."""

    file: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    length: int

    def read(self, root: Path) -> Tensor:
        with open(root / self.file, "rb") as file:
            file.seek(self.offset)
            data = bytearray(file.read(self.length))
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, dict]:
    """Key -> {"dtype", "shape", "data_offsets" (absolute)} of a safetensors file; ExportError if it is none."""
    try:
        with open(path, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            if size > 100 << 20:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return {k: {**v, "data_offsets": [8 + size + o for o in v["data_offsets"]]} for k, v in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ExportError(f"weights must be a safetensors file, got {path} ({str(error)[:100]})") from error


def stored_tensors(root: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of the bundle's safetensors file `file`, by key."""
    result = {}
    for key, item in read_header(root / file).items():
        start, end = item["data_offsets"]
        result[key] = StoredTensor(file, key, TYPES[item["dtype"]], tuple(item["shape"]), start, end - start)
    return result


def write_safetensors(path: Path, state: dict[str, Tensor], dtype: torch.dtype | None, part: str) -> None:
    """Write `state`, floating tensors as `dtype`, one tensor at a time so that no second copy is ever in memory.

    Raises ExportError for NaN or infinity, and for a finite value that `dtype` cannot hold.
    """
    targets = {k: dtype if dtype is not None and v.is_floating_point() else v.dtype for k, v in state.items()}
    # Wide types first, as the format's own writer does: every tensor is then aligned to its element.
    keys = sorted(state, key=lambda k: (-targets[k].itemsize, k))
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for key in keys:
        size = state[key].numel() * targets[key].itemsize
        header[key] = {"dtype": _NAMES[targets[key]], "shape": list(state[key].shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            file.write(_bytes(_checked(state[key].detach(), targets[key], f"{part} {key}")))


def drop_tensors(root: Path, file: str, keys: set[str]) -> None:
    """Write the bundle's safetensors file `file` again without those of `keys` that no graph uses, and point the graphs at what
    has moved."""
    paths, before = sorted(root.glob("*.onnx")), stored_tensors(root, file)
    models = {path: ir.load(path) for path in paths}
    uses = [(path, value) for path, model in models.items() for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor) and str(value.const_value.location) == file]
    names = {entry.offset: key for key, entry in before.items()}
    used = {names[value.const_value.offset] for _, value in uses}
    write_safetensors(root / f"{file}.new", {k: e.read(root) for k, e in before.items() if k in used or k not in keys}, None, file)
    os.replace(root / f"{file}.new", root / file)
    after = stored_tensors(root, file)
    for _, value in uses:
        old = value.const_value
        entry = after[names[old.offset]]
        value.const_value = ir.ExternalTensor(file, entry.offset, entry.length, old.dtype, shape=old.shape, name=old.name, base_dir=root)
    for path in {path for path, _ in uses}:
        ir.save(models[path], path)


def _checked(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if value.is_floating_point() and value.numel():
        ends = torch.stack(value.aminmax())         # NaN, if there is one
        if not torch.isfinite(ends).all():
            raise ExportError(f"weights must be finite, got NaN or infinity in {name}")
        if not torch.isfinite(ends.to(dtype)).all():
            raise ExportError(f"weights must fit {str(dtype).removeprefix('torch.')}, got {ends.abs().max().item():.4g} in {name}")
    return value.to(dtype).contiguous()


def _bytes(value: Tensor):
    if value.numel() == 0:
        return b""
    return memoryview(value.reshape(-1).view(torch.uint8).numpy())


class WeightIndex:
    """Finds the stored tensor of a module's parameter or buffer, by the identity of the tensor object."""

    def __init__(self, root: Path):
        self.root = root
        self._found: dict[int, StoredTensor] = {}
        self._alive: list[Tensor] = []       # ids are only good while their objects live
        self._added: list[tuple[nn.Module, str, str]] = []

    def add(self, module: nn.Module, file: str, prefix: str = "") -> None:
        """Register a module whose state dict lies in `file` under the same keys after `prefix`."""
        self._added.append((module, file, prefix))
        stored = stored_tensors(self.root, file)
        for key, tensor in module.state_dict(keep_vars=True).items():
            self._found[id(tensor)] = stored[prefix + key]
            self._alive.append(tensor)

    def refresh(self) -> None:
        """Find the tensors of the same modules again: a change of dtype makes new objects of buffers."""
        added = list(self._added)
        self.clear()
        for item in added:
            self.add(*item)

    def clear(self) -> None:
        self._found.clear()
        self._alive.clear()
        self._added.clear()

    def names(self, module: nn.Module) -> dict[str, StoredTensor]:
        """Stored tensors by the names that `module` (a graph's wrapper) has for them."""
        return {name: self._found[id(tensor)] for name, tensor in _all_tensors(module) if id(tensor) in self._found}


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def load_stored(module: nn.Module, root: Path, file: str, prefix: str = "") -> None:
    """Copy the stored values back into `module`: it then holds exactly what the bundle holds, rounding included."""
    stored = stored_tensors(root, file)
    with torch.no_grad():
        for key, tensor in module.state_dict(keep_vars=True).items():
            tensor.copy_(stored[prefix + key].read(root))


def source_dtype(files: list[Path]) -> torch.dtype:
    """float16 when every floating tensor of a checkpoint is, else float32 (bfloat16 and float64 become float32)."""
    found = set()
    for file in files:
        if file.suffix == ".safetensors":
            found |= {TYPES.get(item["dtype"], torch.float32) for item in read_header(file).values()}
        else:
            state = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
            found |= {v.dtype for v in state.values() if isinstance(v, Tensor)}
    return torch.float16 if {t for t in found if t.is_floating_point} == {torch.float16} else torch.float32
