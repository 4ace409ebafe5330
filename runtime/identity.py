"""An enrolled person: a W+ code (or the code of a bundle with another encoder), optionally the aligned face it came from and what tuning has learned, in a small
safetensors file."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .errors import IdentityError, require
from .files import reason, write_atomic
from .tuning import MAX_LAYERS, PARTS, PREFIX, Tuning

FORMAT, VERSION, TUNED_VERSION = "pidiff-identity", "1", "2"     # a file with a tuning is one that older versions refuse
MAX_BYTES = 8 << 20
MAX_ABS = 1e4  # W+ codes have entries of a few units; more is a damaged file


@dataclass(frozen=True, eq=False)
class Identity:
    """One person. w_plus: float32 [L, 512], or [L, D] of an encoder that is not a W+ encoder (`Pipeline`). face: RGB uint8 [E, E, 3] or None. encoder: digest of the W+ encoder. tuning: what
    `pidiff-train personalize` has changed in the fold, or None; edits keep it as it is."""

    w_plus: np.ndarray
    face: np.ndarray | None = None
    encoder: str = ""
    tuning: Tuning | None = None

    def __post_init__(self):
        w = self.w_plus
        ok = (isinstance(w, np.ndarray) and w.ndim == 2 and w.dtype == np.float32 and 0 < w.shape[0] <= 64
              and 0 < w.shape[1] <= 4096)
        require(ok, "w_plus", "be a float32 array [L, D] of at most [64, 4096]", _describe(w), IdentityError)
        require(np.isfinite(w).all() and np.abs(w).max() < MAX_ABS, "w_plus", f"be finite and below {MAX_ABS:g}",
                "values that are not", IdentityError)
        f = self.face
        ok = f is None or (isinstance(f, np.ndarray) and f.dtype == np.uint8 and f.ndim == 3 and f.shape[2] == 3
                           and 0 < f.shape[0] == f.shape[1] <= 1024)
        require(ok, "face", "be a uint8 array [E, E, 3]", _describe(f), IdentityError)

    def save(self, path):
        """Write the identity to a safetensors file, whole or not at all."""
        write_atomic(path, self.to_bytes(), IdentityError)

    def to_bytes(self):
        """Return what `save` writes."""
        from safetensors.numpy import save

        tensors = {"w_plus": np.ascontiguousarray(self.w_plus)}
        if self.face is not None:
            tensors["face"] = np.ascontiguousarray(self.face)
        notes = {"format": FORMAT, "version": VERSION, "encoder": self.encoder}
        if self.tuning is not None:
            tensors |= self.tuning.tensors()
            notes |= {"version": TUNED_VERSION, "model": self.tuning.model}
        return save(tensors, notes)

    @classmethod
    def load(cls, path):
        """Read an identity that `save` wrote; IdentityError says in one sentence what is wrong with another file."""
        path = Path(path)
        try:
            require(path.is_file(), "identity", "be a file written by pidiff-enroll", path, IdentityError)
            require(path.stat().st_size <= MAX_BYTES, "identity", f"be at most {MAX_BYTES >> 20} MiB",
                    f"{path.stat().st_size} bytes in {path}", IdentityError)
            tensors, notes = _read(path)
        except OSError as e:
            raise IdentityError(f"identity must be readable, got {path}: {reason(e)}") from e
        version = notes.get("version")
        require(notes.get("format") == FORMAT and version in (VERSION, TUNED_VERSION), "identity",
                "be a file written by this version of pidiff-enroll", path, IdentityError)
        tuned = {k: tensors.pop(k) for k in list(tensors) if k.startswith(f"{PREFIX}.")}
        require("w_plus" in tensors and set(tensors) <= {"w_plus", "face"} and bool(tuned) == (version == TUNED_VERSION), "identity",
                "hold w_plus and at most a face and a tuning", f"{sorted({*tensors, *tuned})[:4]} in {path}", IdentityError)
        try:
            tuning = Tuning.from_tensors(tuned, notes.get("model", "")) if tuned else None
            return cls(tensors["w_plus"], tensors.get("face"), notes.get("encoder", ""), tuning)
        except IdentityError as e:
            raise IdentityError(f"identity {path} cannot be used: {e}") from e

    def edit(self, name, strength, directions):
        """Return the identity moved by `strength` standard deviations along directions[name], [L,512]."""
        require(name in directions, "edit", f"be one of {', '.join(sorted(directions)) or '(the bundle has none)'}",
                repr(name), IdentityError)
        require(np.isfinite(strength) and abs(strength) <= 20, f"edit {name}", "be a strength in [-20, 20]", strength,
                IdentityError)
        require(directions[name].shape == self.w_plus.shape, f"edit {name}", f"be used on codes of shape {list(directions[name].shape)}",
                list(self.w_plus.shape), IdentityError)
        return replace(self, w_plus=(self.w_plus + np.float32(strength) * directions[name]).astype(np.float32))

    def mix(self, other, layers, amount=1.0):
        """Return the identity with the W+ layers listed in `layers` moved towards `other` (amount 1: taken from it). It is
        somebody else then, and has no tuning."""
        require(self.w_plus.shape == other.w_plus.shape, "other", f"have a code of shape {list(self.w_plus.shape)}",
                list(other.w_plus.shape), IdentityError)
        layers = sorted({int(i) for i in layers})
        inside = all(0 <= i < len(self.w_plus) for i in layers)
        require(inside, "layers", f"lie in [0, {len(self.w_plus)})", layers, IdentityError)
        require(0 <= amount <= 1, "amount", "lie in [0, 1]", amount, IdentityError)
        w_plus = self.w_plus.copy()
        w_plus[layers] += np.float32(amount) * (other.w_plus[layers] - w_plus[layers])
        return replace(self, w_plus=w_plus, tuning=None)


def _read(path):
    """Return (name -> array, metadata) of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}
            most = 2 + MAX_LAYERS * len(PARTS)
            require(len(shapes) <= most, "identity", f"hold at most {most} tensors", f"{len(shapes)} in {path}", IdentityError)
            return {k: file.get_tensor(k) for k in shapes}, file.metadata() or {}
    except (SafetensorError, TypeError) as e:  # TypeError: a dtype that numpy does not have
        raise IdentityError(f"identity must be a safetensors file written by pidiff-enroll, got {path}: {e}") from e


def _describe(value):
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
