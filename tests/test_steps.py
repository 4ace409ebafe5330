"""Cheaper steps in the runtime: guidance in a part of them, and presets."""

import importlib.util

import numpy as np
import pytest
from tiny_bundle import LAYERS, write_tiny_bundle

from pidiff.runtime import Identity, PidiffError, Pipeline
from pidiff.runtime.presets import PRESETS, resolve_preset

PROMPT = "a photo of person"
ENGINES = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs openvino"))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module", params=ENGINES)
def pipe(request, tiny):
    return Pipeline.from_bundle(tiny, engine=request.param, threads=1, precision="full")


def person(seed=0):
    return Identity(np.random.default_rng(seed).standard_normal((LAYERS, 512)).astype(np.float32))


def images(pipe, **options):
    return np.stack(pipe.generate(person(), PROMPT, **{"seed": [1, 2, 3], "num_inference_steps": 8, "batch_size": 2, **options}).images)


class Watch:
    """Wraps an engine and counts the rows of every run."""

    def __init__(self, engine):
        self._engine, self.rows, self.binds = engine, [], 0

    def bind(self, tensors, constant=()):
        self._engine.bind(tensors, constant)
        self.latents, self.binds = tensors["latents"], self.binds + 1

    def run(self, stream=None):
        self.rows.append(len(self.latents))
        self._engine.run(stream)

    def __getattr__(self, name):
        return getattr(self._engine, name)


@pytest.fixture
def watch(pipe, monkeypatch):
    watch = Watch(pipe._graph("unet"))
    monkeypatch.setitem(pipe._engines, "unet", watch)
    return watch


def test_the_whole_interval_is_plain_guidance_bit_for_bit(pipe):
    assert np.array_equal(images(pipe, guidance_interval=(0, 1)), images(pipe))
    assert not np.array_equal(images(pipe, guidance_interval=(0.25, 0.75)), images(pipe))


def test_steps_without_guidance_run_the_conditional_rows_only(pipe, watch):
    images(pipe, guidance_interval=(0.25, 0.75))
    assert watch.rows == [2] * 2 + [4] * 4 + [2] * 2 + [1] * 2 + [2] * 4 + [1] * 2
    assert watch.binds <= 2 * 4  # both shapes when it is prepared, then one bind for every change


@pytest.mark.parametrize("interval", [(0.0, 0.01), (0.99, 1.0)])
def test_an_interval_without_a_step_is_no_guidance_bit_for_bit(pipe, watch, interval):
    assert np.array_equal(images(pipe, guidance_interval=interval), images(pipe, guidance_scale=1.0))
    assert set(watch.rows) == {1, 2}


def test_the_negative_prompt_matters_inside_only(pipe):
    short = {"guidance_interval": (0.5, 1.0), "num_inference_steps": 2}
    assert not np.array_equal(images(pipe, **short), images(pipe, **short, negative_prompt="blue"))
    none = {"guidance_interval": (0.9, 1.0), "num_inference_steps": 2}
    assert np.array_equal(images(pipe, **none), images(pipe, **none, negative_prompt="blue"))


# --- presets ---------------------------------------------------------------------------------------------------------

GIVEN = {"num_inference_steps": None, "guidance_interval": None, "cache_interval": None, "id_start": None}


def test_presets_are_options_and_each_can_be_overridden():
    exact = resolve_preset("exact", GIVEN, 20)
    assert exact == {"num_inference_steps": 20, "guidance_interval": (0.0, 1.0), "cache_interval": 1, "id_start": 0.0}
    for name, options in PRESETS.items():
        found = resolve_preset(name, GIVEN, 20)
        assert found == {**exact, **{k: v for k, v in options.items() if k != "steps"},
                         "num_inference_steps": round(20 * options.get("steps", 1))}
        for key, value in (("num_inference_steps", 7), ("guidance_interval", (0, 0.5)), ("cache_interval", 4), ("id_start", 0.0)):
            assert resolve_preset(name, {**GIVEN, key: value}, 20) == {**found, key: value}
        assert resolve_preset(name, GIVEN, 1)["num_inference_steps"] == 1


def test_a_preset_draws_what_its_options_draw(pipe):
    options = {"num_inference_steps": None, "preset": "balanced"}
    spelled = images(pipe, num_inference_steps=2, guidance_interval=PRESETS["balanced"]["guidance_interval"])
    assert np.array_equal(images(pipe, **options), spelled)  # the tiny bundle's own number of steps is 5
    assert not np.array_equal(images(pipe, **{**options, "num_inference_steps": 3}), spelled)
    assert np.array_equal(images(pipe, preset="exact"), images(pipe))
    with pytest.raises(PidiffError, match="preset must be one of exact, balanced, fast, got 'best'"):
        images(pipe, preset="best")
