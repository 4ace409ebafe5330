"""Personalising one person: the code moves, the model does not, and the result is an ordinary identity file."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from pidiff.model import load_model
from pidiff.runtime import Pipeline
from pidiff.runtime.identity import Identity
from pidiff.train.__main__ import main
from pidiff.train.personalize import PersonalizeOptions, Photos, tuned_code

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
    options = PersonalizeOptions(steps=3, batch_size=2)
    code = tuned_code(model, photos, options)
    assert code.shape == photos.codes[0].shape and code.dtype == np.float32
    assert (np.abs(code - photos.codes[0]).max(1) > 1e-4).all()
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.unet.parameters(), *model.adapter.parameters())))
    np.testing.assert_array_equal(code, tuned_code(model, photos, options))


def test_decay_holds_the_code_back(model, photos):
    free, held = (tuned_code(model, photos, PersonalizeOptions(steps=8, batch_size=1, decay=d)) for d in (0.0, 100.0))
    assert np.abs(held - photos.codes[0]).mean() < 0.7 * np.abs(free - photos.codes[0]).mean()


def test_the_command_writes_an_identity_that_the_pipeline_takes(pipeline, tmp_path):
    out = tmp_path / "me.safetensors"
    assert main(["personalize", str(PHOTO), "--steps", "1", "--batch-size", "1", "--out", str(out)]) == 0
    person = Identity.load(out)
    assert person.encoder == pipeline.bundle.encoder_id() and person.face is not None
    assert pipeline.generate(person, "a photo of a person", num_inference_steps=1, seed=0).images[0].shape == (128, 128, 3)


@pytest.mark.parametrize("arguments, sentence", [
    (["nowhere.jpg"], "photo must be a picture file, got nowhere.jpg"),
    ([str(PHOTO)] * 11, "photos must be 1 to 10, got 11"),
    ([str(PHOTO), "--steps", "0"], "steps must be at least 1, got 0"),
])
def test_bad_input_gives_one_sentence(arguments, sentence, tmp_path, capsys):
    out = tmp_path / "me.safetensors"
    assert main(["personalize", *arguments, "--out", str(out)]) == 1
    assert sentence in capsys.readouterr().err and not out.exists()
