"""Personalising one person: the code moves, the model does not, and the result is an ordinary identity file."""

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from pidiff.model import load_model
from pidiff.runtime import Pipeline
from pidiff.runtime.identity import Identity
from pidiff.train.__main__ import main
from pidiff.train.personalize import LowRank, PersonalizeOptions, Photos, tuned

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PHOTO = EXAMPLES / "person-2.jpg"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_bundle()


@pytest.fixture(scope="module")
def model(pipeline):
    return load_model(pipeline.bundle.path)


@pytest.fixture(scope="module")
def photos(pipeline):
    return Photos.read(pipeline, [PHOTO])


def test_photos_are_aligned_at_the_models_size_and_masked(photos):
    assert photos.faces.shape == (1, 128, 128, 3) and photos.masks.shape == (1, 128, 128)
    assert photos.masks[0, 40:80, 50:78].min() > 0.9 and photos.masks[0, :8, :8].max() < 0.1


def test_the_code_moves_every_level_and_the_model_stays(model, photos):
    before = [p.clone() for p in (*model.unet.parameters(), *model.adapter.parameters())]
    options = PersonalizeOptions(steps=3, batch_size=2, rank=4)
    person = tuned(model, photos, options)
    code = person.w_plus
    assert code.shape == photos.codes[0].shape and code.dtype == np.float32
    assert (np.abs(code - photos.codes[0]).max(1) > 1e-4).all()
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.unet.parameters(), *model.adapter.parameters())))
    again = tuned(model, photos, options)
    np.testing.assert_array_equal(code, again.w_plus)
    for name, value in person.tuning.tensors().items():
        np.testing.assert_array_equal(value, again.tuning.tensors()[name])
    assert all(np.abs(value).max() > 1e-5 for value in person.tuning.tensors().values())
    assert tuned(model, photos, PersonalizeOptions(steps=1, batch_size=1)).tuning is None


def test_decay_holds_the_code_back(model, photos):
    free, held = (tuned(model, photos, PersonalizeOptions(steps=8, batch_size=1, rank=0, decay=d)).w_plus for d in (0.0, 100.0))
    assert np.abs(held - photos.codes[0]).mean() < 0.7 * np.abs(free - photos.codes[0]).mean()


def test_what_was_learned_is_divided_by_the_guidance(model, photos):
    once, halved = (tuned(model, photos, PersonalizeOptions(steps=2, batch_size=1, guidance_scale=g)).w_plus for g in (1.0, 2.0))
    np.testing.assert_allclose(once - photos.codes[0], 2 * (halved - photos.codes[0]), atol=1e-5)


def test_the_command_writes_an_identity_that_the_pipeline_takes(pipeline, tmp_path):
    out = tmp_path / "me.safetensors"
    assert main(["personalize", str(PHOTO), "--steps", "1", "--batch-size", "1", "--out", str(out)]) == 0
    person = Identity.load(out)
    assert person.encoder == pipeline.bundle.encoder_id() and person.face is not None
    assert pipeline.generate(person, "a photo of a person", num_inference_steps=1, seed=0).images[0].shape == (128, 128, 3)


def test_the_runtime_adds_what_was_learned(pipeline, model, photos):
    """The fold with a tuning is the fold of an adapter whose to_k_id and to_v_id have the low-rank changes in their weights."""
    change = LowRank(model.adapter, 3, torch.Generator().manual_seed(0))
    for up in (*change.up["to_k_id"], *change.up["to_v_id"]):
        torch.nn.init.normal_(up, std=0.2)
    w_plus, levels = torch.from_numpy(photos.codes[0]), (1.0, 0.5, 0.0, 2.0)
    person = Identity(photos.codes[0], tuning=change.tuning(w_plus, pipeline.bundle.adapter_id()))
    changed = copy.deepcopy(model.adapter)
    with torch.no_grad():
        for i, layer in enumerate(changed.layers):
            for name in change.up:
                getattr(layer, name).weight += change.up[name][i] @ change.down[name][i].T
        want, plain = (a.fold(w_plus[None], torch.tensor([levels])).numpy() for a in (changed, model.adapter))
        tokens = torch.randn(5, model.adapter.config.token_dim)
        with change.active():
            torch.testing.assert_close(model.adapter.layers[0].to_k_id(tokens), changed.layers[0].to_k_id(tokens), atol=1e-4, rtol=0)
    got = pipeline.fold(person, levels)
    moved = np.abs(want - plain).max()
    assert moved > 0.1 and np.abs(got - want).max() < 2e-3 * moved + 1e-4
    assert np.abs(pipeline.fold(Identity(photos.codes[0]), levels) - plain).max() < 1e-4


def test_a_tuned_person_is_a_small_file(pipeline, model, photos, tmp_path):
    person = tuned(model, photos, PersonalizeOptions(steps=1, batch_size=1, rank=4), pipeline.bundle.adapter_id())
    person.save(tmp_path / "me.safetensors")
    assert (tmp_path / "me.safetensors").stat().st_size < 1 << 20
    back = Identity.load(tmp_path / "me.safetensors")
    assert back.tuning.model == pipeline.bundle.adapter_id()
    for name, value in person.tuning.tensors().items():
        np.testing.assert_array_equal(value, back.tuning.tensors()[name])
    assert back.mix(person, [0]).tuning is None and back.edit("smile", 1.0, pipeline.directions).tuning is back.tuning


@pytest.mark.parametrize("arguments, sentence", [
    (["nowhere.jpg"], "photo must be a picture file, got nowhere.jpg"),
    ([str(PHOTO)] * 11, "photos must be 1 to 10, got 11"),
    ([str(PHOTO), "--steps", "0"], "steps must be at least 1, got 0"),
    ([str(PHOTO), "--rank", "65"], "rank must lie in [0, 64], got 65"),
])
def test_bad_input_gives_one_sentence(arguments, sentence, tmp_path, capsys):
    out = tmp_path / "me.safetensors"
    assert main(["personalize", *arguments, "--out", str(out)]) == 1
    assert sentence in capsys.readouterr().err and not out.exists()
