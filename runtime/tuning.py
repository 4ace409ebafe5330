"""What tuning one person changes in the folded identity: low-rank terms of to_k_id and to_v_id, already multiplied by that
person's tokens and by to_q_id, so that numpy adds them to id_fold and no graph changes."""

from dataclasses import dataclass

import numpy as np

from .errors import IdentityError, require

MAX_LAYERS, PREFIX = 64, "tuning"
PARTS = {"query": 3, "key": 2, "value": 2, "out": 2}        # name -> axes


@dataclass(frozen=True, eq=False)
class LayerChange:
    """Change of one layer with C channels, H heads, T tokens, at rank r; float arrays:

        A[c, h, t] += sum_r query[h, c, r] key[t, r]                       (the null key's column stays)
        V[t, c]    += level_scale[group of t] sum_r value[t, r] out[r, c]
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray

    def __post_init__(self):
        arrays = {name: getattr(self, name) for name in PARTS}
        fits = all(a.ndim == axes and a.size and a.dtype in (np.float16, np.float32) for a, axes in zip(arrays.values(), PARTS.values()))
        if fits:
            (_, channels, rank), (tokens, _) = self.query.shape, self.key.shape
            fits = self.key.shape == self.value.shape == (tokens, rank) and self.out.shape == (rank, channels) and tokens % 4 == 0
        shapes = {name: list(a.shape) for name, a in arrays.items()}
        require(fits, "tuning", "hold query [H,C,r], key [T,r], value [T,r], out [r,C] of each layer", shapes, IdentityError)
        require(all(np.isfinite(a).all() for a in arrays.values()), "tuning", "be finite", "values that are not", IdentityError)

    def columns(self, null):
        """Numbers of A and V in a fold, with or without a null key."""
        heads, channels, _ = self.query.shape
        return channels * heads * (len(self.key) + null), len(self.key) * channels


@dataclass(frozen=True, eq=False)
class Tuning:
    """The changes of all layers, in the fold's order. model: digest of the UNet and adapter that they were learned with."""

    layers: tuple
    model: str

    def add_to(self, fold, level_scale):
        """Return id_fold [1, F] with the changes; level_scale: four numbers. IdentityError for another model's fold."""
        sizes = {null: sum(sum(layer.columns(null)) for layer in self.layers) for null in (0, 1)}
        require(fold.shape[1] in sizes.values(), "identity", "be tuned for this bundle's model",
                "a person tuned for another one; run pidiff-train personalize again", IdentityError)
        null, start, result = int(fold.shape[1] == sizes[1]), 0, fold.astype(np.float32)
        for layer in self.layers:
            heads, channels, _ = layer.query.shape
            a, v = layer.columns(null)
            query, key, value, out = (getattr(layer, name).astype(np.float32) for name in PARTS)
            keys = result[0, start:start + a].reshape(channels, heads, -1)
            keys[..., :len(key)] += np.einsum("hcr,tr->cht", query, key, optimize=True)
            scale = np.repeat(np.float32(level_scale), len(key) // 4)[:, None]
            result[0, start + a:start + a + v].reshape(-1, channels)[:] += scale * (value @ out)
            start += a + v
        return result.astype(fold.dtype)

    def tensors(self):
        """Return name -> array for a safetensors file."""
        return {f"{PREFIX}.{i}.{name}": np.ascontiguousarray(getattr(layer, name)) for i, layer in enumerate(self.layers) for name in PARTS}

    @classmethod
    def from_tensors(cls, tensors, model):
        """Inverse of `tensors`; IdentityError for anything else."""
        count = len(tensors) // len(PARTS)
        wanted = {f"{PREFIX}.{i}.{name}" for i in range(count) for name in PARTS}
        require(0 < count <= MAX_LAYERS and set(tensors) == wanted, "tuning", "hold query, key, value and out of each layer",
                f"{len(tensors)} tensors, such as {min(tensors)}", IdentityError)
        return cls(tuple(LayerChange(**{name: tensors[f"{PREFIX}.{i}.{name}"] for name in PARTS}) for i in range(count)), model)
