"""Pictures of other sizes than the model's own, and decoding in tiles. Parity with PyTorch: test_parity.py."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from tiny_bundle import LAYERS, write_tiny_bundle
from tiny_model import shared

from pidiff.runtime import Identity, PidiffError, Pipeline
from pidiff.runtime.memory import Predictor
from pidiff.runtime.sizes import decode_in_tiles, latent_shape


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """A bundle whose graphs take any size."""
    return shared("standard23", tmp_path_factory)


def person(pipe):
    model = pipe.bundle.manifest.model
    return Identity(np.random.default_rng(0).standard_normal((model.w_plus_layers, 512)).astype(np.float32))


def pixels(latents):
    """A decoder that looks at one latent at a time, [1,c,n,m] -> [1,3,8n,8m]."""
    return latents[:, :3].repeat(8, 2).repeat(8, 3)


@pytest.mark.parametrize("size, tile", [((8, 8), 8), ((12, 20), 8), ((9, 31), 7), ((5, 40), 8), ((16, 16), 100)])
def test_tiles_of_a_local_decoder_are_the_whole_picture(size, tile):
    latents = np.random.default_rng(0).standard_normal((2, 4, *size)).astype(np.float32)
    seen = []
    whole = np.concatenate([pixels(latents[i:i + 1]) for i in range(2)])
    tiled = decode_in_tiles(lambda part: seen.append(part.shape) or pixels(part), latents, tile, 8)
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
    assert set(seen) == {(1, 4, min(tile, size[0]), min(tile, size[1]))}, "one shape: an engine compiles once"


def test_tiles_are_blended_without_a_step():
    """Tiles whose grey differs by 1 meet in a ramp, not in a step."""
    count = iter(range(100))
    tiled = decode_in_tiles(lambda part: np.full((1, 3, 64, 64), next(count), np.float32), np.zeros((1, 4, 8, 14), np.float32), 8, 8)
    assert tiled[0, 0, 0, 0] == 0 and tiled[0, 0, 0, -1] == 1
    assert np.abs(np.diff(tiled, axis=3)).max() < 0.1


def test_a_picture_can_be_decoded_in_tiles(free):
    pipe = Pipeline.from_bundle(free, threads=1)
    options = dict(seed=1, num_inference_steps=2, height=64, width=96)
    whole, tiled = (pipe.generate(person(pipe), "a person", tiled_decode=t, **options).images[0] for t in (None, True))
    assert whole.shape == tiled.shape == (64, 96, 3)
    difference = np.abs(whole.astype(int) - tiled)
    assert 0 < difference.max() and difference.mean() < 25, "group norms see a part of it"


def test_memory_chooses_smaller_batches_then_tiles(free):
    """Whole pictures as long as one fits; then tiles; what fits no way is refused."""
    pipe = Pipeline.from_bundle(free, threads=1, max_memory=8 << 30)
    asked = []
    decode = pipe._decode
    pipe._decode = lambda latents, tile: asked.append((len(latents), tile)) or decode(latents, tile)
    pipe._budget._predictor._activations = lambda graph, batch, h, w: batch * h * w << 20 if graph == "vae_decoder" else 0
    side, _ = pipe.bundle.manifest.model.latent_shape[1:]
    options = dict(seed=1, num_images=2, num_inference_steps=2, height=32, width=32)
    pipe.generate(person(pipe), "a person", **options)
    for size in (16, side):
        pipe._budget._limit = pipe._budget.need(decode={"size": (size, size)}, denoise={"batch": 2, "size": (16, 16)},
                                                text={}, identity={}, plan={"steps": 2})
        pipe.generate(person(pipe), "a person", **options)
    assert asked[:3] == [(2, None), (1, None), (1, None)] and set(asked[3:]) == {(2, side)}, "tiles are decoded one by one, whatever the batch"
    pipe._budget._limit = 1 << 20
    with pytest.raises(PidiffError, match="max_memory must be at least"):
        pipe.generate(person(pipe), "a person", **options)


def test_larger_pictures_are_predicted_to_need_more(free):
    pipe = Pipeline.from_bundle(free)
    need = [Predictor(pipe.bundle).stage("denoise", size=(n, n)) for n in (8, 16, 32)]
    assert 3 * (need[1] - need[0]) < need[2] - need[1]


@pytest.mark.parametrize("size, sentence", [
    ({"height": 18}, "height must be a multiple of 4 up to 8192, got 18"), ({"width": 0}, "width must be a multiple of 4 up to 8192, got 0"),
    ({"height": 16384}, "height must be a multiple"), ({"width": 64.0}, "width must be a multiple"), ({"height": True}, "height must be")])
def test_impossible_sizes(free, size, sentence):
    pipe = Pipeline.from_bundle(free)
    with pytest.raises(PidiffError, match=sentence):
        pipe.generate(None, "a person", **size)
    assert latent_shape(pipe.bundle, 32, 48)[1:] == (16, 24)


def test_a_bundle_of_one_size_says_so(tmp_path):
    pipe = Pipeline.from_bundle(write_tiny_bundle(tmp_path / "bundle"))
    own = pipe.bundle.manifest.model.image_size
    identity = Identity(np.zeros((LAYERS, 512), np.float32))
    pipe.generate(identity, "a photo of person", height=own, width=own, num_inference_steps=1)
    with pytest.raises(PidiffError, match=f"width must be {own} for this bundle, whose graphs have a fixed size, got 512"):
        pipe.generate(identity, "a photo of person", width=512)
    with pytest.raises(PidiffError, match="tiled_decode must be None or False for this bundle"):
        pipe.generate(identity, "a photo of person", tiled_decode=True)
