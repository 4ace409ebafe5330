"""PyTorch against the runtime on the same exported bundle: the UNet call, and whole pictures from the same noise.

PyTorch runs the trained model with diffusers' schedulers (`pidiff.sampling`); the runtime runs the graphs with the C++
loop. Nothing but the bundle's folder is shared.
"""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("diffusers")

from tiny_model import shared

from pidiff import _C
from pidiff.caching import keep_deep_features
from pidiff.model import load_model
from pidiff.runtime import Identity, Pipeline
from pidiff.runtime.engines import call
from pidiff.runtime.sizes import latent_shape
from pidiff.sampling import encode_prompts, mean_map, sample_latents

PROMPT, NEGATIVE = "a pencil sketch of a person, smiling", "a dark photo"
# Largest error of latents (of about unit variance) after all steps, and of pictures in grey levels.
TOLERANCE = {"fp32": (2e-4, 1), "fp16": (5e-2, 6)}
BUNDLES = ("fused", "fp16", "standard23")


class Pair:
    """One bundle, opened by both sides; `options` are the runtime's."""

    def __init__(self, folder, **options):
        self.model, self.pipe = load_model(folder), Pipeline.from_bundle(folder, **{"threads": 2, **options})
        self.precision = self.pipe.bundle.manifest.precision
        average = self.model.w_plus_encoder.latent_avg.numpy()
        rng = np.random.default_rng(7)
        self.people = [Identity((average + 0.5 * rng.standard_normal(average.shape)).astype(np.float32)) for _ in range(2)]

    def codes(self, people, batch):
        """w_plus [B, P, L, 512] for PyTorch."""
        return torch.from_numpy(np.stack([p.w_plus for p in people]))[None].expand(batch, -1, -1, -1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return functools.cache(lambda name: Pair(shared(name, tmp_path_factory)))


def half_regions(side):
    """Left half and right half of the latents, meeting in the middle: [2, h, w]."""
    mask = np.zeros((2, side, side), np.float32)
    mask[0, :, :side // 2], mask[1, :, side // 2:] = 1, 1
    return mask


def compare(pair, monkeypatch, people, *, solver, steps=6, seeds=(3, 4), id_mask=None, size=(None, None), spacing=None, **options):
    """Both sides from the same noise; asserts latents, identity map and pictures agree, and returns the latents."""
    pipe, model = pair.pipe, pair.model
    decoded, options = [], {"guidance_scale": 3.0, **options}
    if spacing:
        monkeypatch.setitem(pipe.bundle.manifest.scheduler, "timestep_spacing", spacing)
        monkeypatch.setattr(pipe, "_kept", type(pipe._kept)(16))
    monkeypatch.setattr(pipe, "_decode", lambda latents, decode=pipe._decode, **tile: decoded.append(latents.copy()) or decode(latents, **tile))
    result = pipe.generate(people or None, PROMPT, NEGATIVE, seed=list(seeds), scheduler=solver, num_inference_steps=steps,
                           id_mask=id_mask, height=size[0], width=size[1], **options)
    monkeypatch.undo()
    noise = torch.from_numpy(_C.randn(list(seeds), latent_shape(pipe.bundle, *size)))
    if "level_scale" in options:
        options["level_scale"] = torch.tensor(options["level_scale"])
    latents, maps = sample_latents(
        model, pair.codes(people, len(seeds)) if people else None, PROMPT, NEGATIVE, solver=solver, num_inference_steps=steps,
        id_mask=None if id_mask is None else torch.from_numpy(id_mask), latents=noise, timestep_spacing=spacing,
        **options)
    atol, levels = TOLERANCE[pair.precision]
    np.testing.assert_allclose(np.concatenate(decoded), latents.numpy(), atol=atol, rtol=atol)
    if maps is None or result.identity_map is None:
        assert maps is None and result.identity_map is None
    else:
        np.testing.assert_allclose(result.identity_map, maps.numpy(), atol=atol)
    with torch.no_grad():
        pictures = ((model.decode_latents(latents).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack(result.images).astype(int) - pictures).max() <= levels
    return latents.numpy()


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddim", "euler", "unipc"])
def test_whole_picture_of_one_person(pairs, monkeypatch, solver):
    pair = pairs("fused")
    compare(pair, monkeypatch, pair.people[:1], solver=solver, guidance_scale=3.0)


@pytest.mark.parametrize("solver, spacing, eta", [("ddim", "leading", None), ("tcd", None, 0.0)])
def test_whole_picture_of_few_steps(pairs, monkeypatch, solver, spacing, eta):
    """Timesteps spaced in another way than the model's scheduler says (trailing); TCD without its noise, which each library draws by
    itself; guidance 0 is none, as in diffusers."""
    pair = pairs("fused")
    plain = compare(pair, monkeypatch, pair.people[:1], solver="ddim", steps=4, guidance_scale=0)
    few = compare(pair, monkeypatch, pair.people[:1], solver=solver, steps=4, guidance_scale=0, spacing=spacing, **({} if eta is None else {"eta": eta}))
    assert np.abs(few - plain).max() > 1e-2, "it must matter"


@pytest.mark.parametrize("name", BUNDLES)
def test_whole_picture_of_two_people_in_regions(pairs, monkeypatch, name):
    pair = pairs(name)
    mask = half_regions(pair.pipe.bundle.manifest.model.latent_shape[-1])
    first = compare(pair, monkeypatch, pair.people, solver="dpmpp_2m", guidance_scale=2.0, id_mask=mask, id_scale=0.8,
                    level_scale=(1.0, 0.5, 1.5, 0.0), id_start=0.34)
    swapped = compare(pair, monkeypatch, pair.people[::-1], solver="dpmpp_2m", guidance_scale=2.0, id_mask=mask, id_scale=0.8)
    assert np.abs(first - swapped).max() > 1e-3, "who is where must matter"


@pytest.mark.parametrize("size", [(32, 48), (64, 16)])
def test_pictures_of_other_sizes(pairs, monkeypatch, size):
    """height x width; the regions are given at the size of the latents."""
    pair = pairs("standard23")
    _, h, w = latent_shape(pair.pipe.bundle, *size)
    mask = np.zeros((2, h, w), np.float32)
    mask[0, :h // 2], mask[1, h // 2:] = 1, 1
    latents = compare(pair, monkeypatch, pair.people, solver="dpmpp_2m", size=size, id_mask=mask, cache_interval=2)
    assert latents.shape[2:] == (h, w)


@pytest.mark.parametrize("solver, zero_snr", [("ddim", False), ("dpmpp_2m", True), ("euler", True)])
def test_a_v_prediction_model_draws_what_diffusers_own_pipeline_draws(pairs, monkeypatch, solver, zero_snr):
    """Guided, without identity, not square: from diffusers' tokens to its latents and picture."""
    from diffusers import StableDiffusionPipeline

    from pidiff.sampling import make_scheduler

    pair = pairs("standard23")
    pipe, model = pair.pipe, pair.model
    sd15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True}
    config = model.scheduler | (sd15 if zero_snr else {})
    assert config["prediction_type"] == pipe._schedule_config["prediction_type"] == "v_prediction"
    monkeypatch.setattr(pipe, "_schedule_config", config)
    monkeypatch.setattr(pipe, "_kept", type(pipe._kept)(16))
    result = pipe.generate(None, PROMPT, NEGATIVE, seed=3, num_inference_steps=6, scheduler=solver, guidance_scale=4.0, height=32, width=48)
    theirs = StableDiffusionPipeline(model.vae, model.text_encoder, model.tokenizer, model.unet, make_scheduler(config, solver, 6), None, None,
                                     requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(_C.randn([3], latent_shape(pipe.bundle, 32, 48)))
    expected = theirs(PROMPT, 32, 48, 6, negative_prompt=NEGATIVE, guidance_scale=4.0, latents=noise, output_type="np").images[0]
    assert np.abs(result.images[0] - 255 * expected).max() < 1.5
    monkeypatch.setattr(pipe, "_schedule_config", {**config, "prediction_type": "epsilon"})
    monkeypatch.setattr(pipe, "_kept", type(pipe._kept)(16))
    other = pipe.generate(None, PROMPT, NEGATIVE, seed=3, num_inference_steps=6, scheduler=solver, guidance_scale=4.0, height=32, width=48)
    assert np.abs(other.images[0] - 255 * expected).max() > 20, "the prediction type must matter"


def test_latents_of_768_by_512_pixels(pairs, monkeypatch):
    """As many as with an autoencoder of factor 8; this one's is 2."""
    pair = pairs("standard23")
    latents = compare(pair, monkeypatch, pair.people[:1], solver="ddim", steps=1, seeds=(3,), guidance_scale=1.0, size=(192, 128))
    assert latents.shape[2:] == (96, 64)


@pytest.mark.parametrize("interval", [(0.2, 0.7), (0.0, 0.5), (0.5, 1.0)])
def test_guidance_in_a_part_of_the_steps(pairs, monkeypatch, interval):
    pair = pairs("fused")
    part = compare(pair, monkeypatch, pair.people[:1], solver="dpmpp_2m", guidance_interval=interval)
    everywhere = compare(pair, monkeypatch, pair.people[:1], solver="dpmpp_2m")
    assert np.abs(part - everywhere).max() > 1e-3


@pytest.mark.parametrize("name", ["fused", "standard23"])
@pytest.mark.parametrize("options", [{"cache_interval": 2}, {"cache_interval": 3, "guidance_interval": (0.35, 0.7), "id_start": 0.2}],
                         ids=["alone", "with the rest"])
def test_cached_features(pairs, monkeypatch, name, options):
    pair = pairs(name)
    cached = compare(pair, monkeypatch, pair.people[:1], solver="ddim", steps=9, **options)
    options = {k: v for k, v in options.items() if k != "cache_interval"}
    assert np.abs(cached - compare(pair, monkeypatch, pair.people[:1], solver="ddim", steps=9, **options)).max() > 1e-3


@pytest.mark.parametrize("name", BUNDLES)
def test_without_identity_both_sides_are_the_base_model(pairs, monkeypatch, name):
    pair = pairs(name)
    off = compare(pair, monkeypatch, pair.people[:1], solver="ddim", guidance_scale=1.0, id_scale=0.0)
    nobody = compare(pair, monkeypatch, [], solver="ddim", guidance_scale=1.0)
    on = compare(pair, monkeypatch, pair.people[:1], solver="ddim", guidance_scale=1.0)
    np.testing.assert_array_equal(off, nobody)
    assert np.abs(on - off).max() > 1e-3, "the identity must matter"


def unet_call(pair, dtype=torch.float32):
    """One call of three pictures and two people: what the runtime's engine makes of its own prepared inputs, and what
    PyTorch in `dtype` makes of the same, name -> float32 array both."""
    pipe, model, (c, h, w) = pair.pipe, pair.model, pair.pipe.bundle.manifest.model.latent_shape
    rng = np.random.default_rng(5)
    latents, mask = rng.standard_normal((3, c, h, w)).astype(np.float32), rng.random((3, 2, h, w)).astype(np.float32)
    scale, levels = np.array([0.0, 1.0, 0.5], np.float32), (0.2, 1.0, 1.4, 0.7)
    table = call(pipe._graph("time_conditioner"), {"timesteps": np.array([999, 411.5], np.float32)})["time_table"]
    outputs = call(pipe._graph("unet"), {
        "latents": latents, "time_row": table[1:], "text_kv": np.repeat(pipe.prepare(PROMPT), 3, 0),
        "id_fold": np.repeat(np.concatenate([pipe.fold(p, levels) for p in pair.people])[None], 3, 0), "id_mask": mask,
        "id_scale": scale})
    codes = pair.codes(pair.people, 3)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        tokens = model.adapter.mapper(codes.flatten(0, 1)).unflatten(0, (3, 2))
        with model.adapter.condition(tokens, torch.from_numpy(scale), torch.tensor(levels).expand(3, 2, 4),
                                     torch.from_numpy(mask), keep_maps=True) as seen, keep_deep_features(model.unet, 1) as deep:
            expected = model.unet(torch.from_numpy(latents), torch.tensor(411.5), encode_prompts(model, [PROMPT] * 3)).sample
    expected = {"model_output": expected.float().numpy(), "deep_features": deep[0].float().numpy()}
    if model.adapter.config.mode == "parallel":
        expected["identity_map"] = mean_map(seen.maps, (h, w)).float().numpy()
    return {k: v.astype(np.float32) for k, v in outputs.items()}, expected


@pytest.mark.parametrize("name", BUNDLES)
def test_unet_call(pairs, name):
    outputs, expected = unet_call(pairs(name))
    assert outputs.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(outputs[key], value, atol={"fp32": 2e-5, "fp16": 1e-2}[pairs(name).precision])
