"""The isolate stage: a background does not depend on whose face is before it."""

import copy
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import load_file
from tiny_model import shared

from pidiff.model import load_model, shipped_mini
from pidiff.train import stages
from pidiff.train.__main__ import main
from pidiff.train.base import clean_latents
from pidiff.train.isolate import LEAST_SIGMA, IsolateLoss, IsolateOptions
from pidiff.unet import set_processors


@pytest.fixture(scope="module")
def teacher():
    model = load_model(shipped_mini())
    for module in (model.unet, model.text_encoder, model.adapter, model.vae, model.w_plus_encoder):
        module.requires_grad_(False)
    return model


def test_two_people_stand_before_one_background(large_people, teacher):
    """Pictures of a pair agree where neither is, and only there; those that keep their own backgrounds count nowhere."""
    loss = IsolateLoss(teacher, teacher, large_people, 24)
    images, behind, ids, w_plus, id_scale = loss.prepare(np.random.default_rng(0))
    change = (images[:24].float() - images[24:].float()).abs().mean(-1)
    counted = behind.flatten(1).any(1)
    assert 12 <= counted.sum() < 24 and len(ids) == 24 and w_plus.shape == (48, 12, 512)
    assert (change * behind).flatten(1).sum(1).div(behind.flatten(1).sum(1).clamp(min=1)).max() < 3
    someone = w_plus.abs().sum((1, 2)) > 0
    assert 2 <= (~someone[:24] & ~someone[24:]).sum() <= 12
    assert np.mean([float(change[i][~behind[i]].mean()) for i in range(24) if counted[i]]) > 10
    assert (id_scale[24:] == 0).sum() > (id_scale[:24] == 0).sum()
    unguided = IsolateLoss(teacher, teacher, large_people, 4, options=IsolateOptions(unguided=1.0, second_off=0.0)).prepare(np.random.default_rng(0))
    assert (unguided[2] == unguided[2][0]).all() and not unguided[3].any() and (unguided[4] == 1).all()


def test_the_loss_is_its_formula(large_people, teacher):
    """By hand for every pair, of a teacher that answers half as much again."""
    louder = replace(teacher, unet=copy.deepcopy(teacher.unet), adapter=copy.deepcopy(teacher.adapter))
    set_processors(louder.unet, louder.adapter)
    for p in louder.unet.conv_out.parameters():
        p.mul_(1.5)
    loss = IsolateLoss(teacher, louder, large_people, 6)
    batch = loss.prepare(np.random.default_rng(1))
    torch.manual_seed(0)
    total, scalars = loss(None, batch)
    torch.manual_seed(0)
    task, behind = loss.draw(None, batch)
    output = loss.predict(task, task.w_plus, task.id_scale)[0]
    assert torch.equal(task.timesteps[:6], task.timesteps[6:]) and torch.equal(task.masks[:6], task.masks[6:])
    squares, count = 0.0, 0.0
    for i in range(6):
        alpha = loss.alphas_cumprod[task.timesteps[i]]
        first, second = (clean_latents(teacher.scheduler, task.noisy[k], output[k], alpha) for k in (i, 6 + i))
        patches = teacher.vae.patch_out(teacher.vae.unpack((first - second)[None])) - teacher.vae.patch_out.bias[None, :, None, None]
        pixels = torch.nn.functional.pixel_shuffle(patches, 8)[0] / max(float(1 - alpha) ** 0.5, LEAST_SIGMA)
        squares += float((pixels.square().mean(0) * behind[i, 0]).sum())
        count += float(behind[i].sum())
    assert float(scalars["dependence"]) == pytest.approx(squares / count, rel=1e-3) and squares > 0
    where = (0.1 + 0.9 * task.masks) * loss.window
    kept = float((where * (0.5 * output).square() * loss.weight(task))[:6].mean())
    assert float(scalars["kept"]) == pytest.approx(kept, rel=1e-3) and kept > 0
    assert float(total) == pytest.approx(kept + 15 * squares / count, rel=1e-3)


@pytest.mark.slow
def test_the_background_learns_to_ignore_the_face(large_people, teacher):
    """Without the term it depends on the face as before."""
    found = {}
    for isolation in (0.0, 50.0):
        student = replace(teacher, unet=copy.deepcopy(teacher.unet).requires_grad_(True), adapter=copy.deepcopy(teacher.adapter))
        set_processors(student.unet, student.adapter)
        torch.manual_seed(0)
        loss = IsolateLoss(student, teacher, large_people, 4, options=IsolateOptions(isolation=isolation))
        optimizer, rng = torch.optim.Adam(student.unet.parameters(), 3e-4), np.random.default_rng(0)
        for _ in range(20):
            optimizer.zero_grad()
            loss(rng)[0].backward()
            optimizer.step()
        torch.manual_seed(1)
        with torch.no_grad():
            found[isolation] = np.mean([float(loss(np.random.default_rng(i))[1]["dependence"]) for i in range(4)])
    assert found[50.0] < 0.7 * found[0.0]


def test_the_stage_changes_the_unet_alone(trained, people_folder, tmp_path):
    """MODEL becomes a whole model, and the teacher is as it was."""
    new, file = tmp_path / "new", "unet/diffusion_pytorch_model.safetensors"
    before = (trained / file).read_bytes()
    assert main(["isolate", "--data", str(people_folder), "--model", str(new), "--teacher", str(trained), "--batch-size", "2", "--steps", "2"]) == 0
    assert (trained / file).read_bytes() == before
    assert (new / "unet/config.json").read_bytes() == (trained / "unet/config.json").read_bytes()
    for part in ("adapter", "text_encoder", "w_plus_encoder"):
        assert (new / part / "model.safetensors").read_bytes() == (trained / part / "model.safetensors").read_bytes()
    assert not torch.equal(load_file(trained / file)["conv_in.weight"], load_file(new / file)["conv_in.weight"])


@pytest.mark.parametrize("arguments, sentence", [
    (["isolate"], "teacher must be another model folder than model, got None"),
    (["isolate", "--isolation", "-1"], "isolation must be at least 0, got -1.0"),
    (["isolate", "--log-sigma", "nan"], "log_sigma must be in [-5, 5], got nan"),
    (["isolate", "--second-off", "2"], "second_off must be in [0, 1], got 2.0"),
    (["base", "--isolation", "5"], "--isolation must be given to the isolate stage, got it for base")])
def test_wrong_use_is_one_sentence(arguments, sentence, people_folder, tmp_path, capsys):
    assert main([*arguments, "--data", str(people_folder), "--model", str(tmp_path / "m")]) == 1
    assert capsys.readouterr().err == f"pidiff-train: {sentence}\n"


def test_another_autoencoder_is_refused_before_the_encoder_reads_every_picture(people_folder, tmp_path, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.setattr(stages, "encoder_codes", None)
    teacher, new = shared("residual", tmp_path_factory), tmp_path / "new"
    assert main(["isolate", "--data", str(people_folder), "--model", str(new), "--teacher", str(teacher), "--steps", "1"]) == 1
    assert capsys.readouterr().err.endswith("pidiff-train: teacher must have the autoencoder of mini, got AutoencoderKL\n")
    assert not (new / "unet").exists()
