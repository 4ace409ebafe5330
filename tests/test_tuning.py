"""What tuning adds to a fold, and tuned identity files: no torch."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from pidiff.runtime.errors import IdentityError
from pidiff.runtime.identity import Identity
from pidiff.runtime.tuning import PARTS, LayerChange, Tuning

HEADS, CHANNELS, TOKENS, RANK = 2, 6, 8, 3
SHAPES = {"query": (HEADS, CHANNELS, RANK), "key": (TOKENS, RANK), "value": (TOKENS, RANK), "out": (RANK, CHANNELS)}
W_PLUS = np.zeros((12, 512), np.float32)


def layer(rng, dtype=np.float32, **changed):
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
    return {**arrays, **changed}


@pytest.mark.parametrize("null", [0, 1])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 2e-2)])
def test_changes_reach_their_places_in_the_fold(null, dtype, tolerance):
    rng, levels = np.random.default_rng(0), (1.0, 0.5, 0.0, 2.0)
    layers = [layer(rng), layer(rng)]
    folds, want = [], []
    for parts in layers:
        a, v = rng.normal(size=(CHANNELS, HEADS, TOKENS + null)), rng.normal(size=(TOKENS, CHANNELS))
        folds += [a.ravel(), v.ravel()]
        a, v = a.copy(), v.copy()
        for c, h, t in np.ndindex(CHANNELS, HEADS, TOKENS):
            a[c, h, t] += sum(parts["query"][h, c, r] * parts["key"][t, r] for r in range(RANK))
        for t, c in np.ndindex(TOKENS, CHANNELS):
            v[t, c] += levels[t // 2] * sum(parts["value"][t, r] * parts["out"][r, c] for r in range(RANK))
        want += [a.ravel(), v.ravel()]
    fold = np.concatenate(folds)[None].astype(dtype)
    before, tuning = fold.copy(), Tuning(tuple(LayerChange(**parts) for parts in layers), "")
    got = tuning.add_to(fold, levels)
    assert got.dtype == dtype and np.array_equal(fold, before)
    np.testing.assert_allclose(got[0], np.concatenate(want), atol=tolerance)
    with pytest.raises(IdentityError, match="identity must be tuned for this bundle's model, got a person tuned for another one"):
        tuning.add_to(fold[:, :-1], levels)


@pytest.mark.parametrize("damage, sentence", [
    ({"key": np.zeros((TOKENS + 4, RANK), np.float32)}, "hold query"),
    ({"out": np.zeros((CHANNELS, RANK), np.float32)}, "hold query"),
    ({"query": np.zeros((CHANNELS, RANK), np.float32)}, "hold query"),
    ({"value": np.zeros((TOKENS, RANK), np.int32)}, "hold query"),
    ({"value": np.full((TOKENS, RANK), np.nan, np.float32)}, "be finite"),
])
def test_damaged_changes_are_refused(damage, sentence):
    with pytest.raises(IdentityError, match=f"tuning must {sentence}"):
        LayerChange(**layer(np.random.default_rng(0), **damage))


@pytest.mark.parametrize("names, version, sentence", [
    ([f"tuning.0.{part}" for part in PARTS][:3], "2", "tuning must hold query, key, value and out of each layer"),
    (["tuning.0.query", "tuning.0.key", "tuning.0.value", "tuning.1.out"], "2", "tuning must hold query, key, value and out"),
    ([f"tuning.0.{part}" for part in PARTS], "1", "identity must hold w_plus and at most a face and a tuning"),
    ([], "2", "identity must hold w_plus and at most a face and a tuning"),
    ([f"tuning.0.{part}" for part in PARTS], "3", "identity must be a file written by this version of pidiff-enroll"),
    ([f"tuning.{i}.{part}" for i in range(65) for part in PARTS], "2", "identity must hold at most 258 tensors"),
])
def test_files_that_are_no_tuned_identity_are_refused(tmp_path, names, version, sentence):
    tensors = {name: np.zeros(SHAPES[name.split(".")[2]], np.float32) for name in names}
    save_file({"w_plus": W_PLUS, **tensors}, tmp_path / "me.safetensors", {"format": "pidiff-identity", "version": version})
    with pytest.raises(IdentityError, match=sentence):
        Identity.load(tmp_path / "me.safetensors")


def test_an_untuned_file_is_one_that_older_versions_read(tmp_path):
    from safetensors import safe_open

    rng = np.random.default_rng(0)
    for tuning, version in ((None, "1"), (Tuning((LayerChange(**layer(rng)),), "abc"), "2")):
        Identity(W_PLUS, tuning=tuning).save(tmp_path / "me.safetensors")
        with safe_open(tmp_path / "me.safetensors", framework="numpy") as file:
            assert file.metadata()["version"] == version
        back = Identity.load(tmp_path / "me.safetensors").tuning
        assert back is None if tuning is None else back.model == "abc"
