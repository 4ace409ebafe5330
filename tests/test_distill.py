"""Distillation into few steps: the algebra of one step, the teacher's path against diffusers' sampler, and the stage."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import load_file

from pidiff.data.people import load_people
from pidiff.model import load_model
from pidiff.sampling import encode_prompts, make_scheduler, sample_latents
from pidiff.train.__main__ import main
from pidiff.train.base import clean_latents
from pidiff.train.distill import DistillLoss, DistillOptions, clean_for_step, ddim_step, output_for

ALPHA, TO = torch.tensor(0.1), torch.tensor(0.6)


@pytest.fixture(scope="module")
def people(people_folder):
    return load_people(people_folder, 128)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_one_step_lands_where_it_shall(kind):
    scheduler = {"prediction_type": kind}
    noisy, landed = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    clean = clean_for_step(noisy, landed, ALPHA, TO)
    torch.testing.assert_close(ddim_step(noisy, clean, ALPHA, TO), landed)
    torch.testing.assert_close(clean_latents(scheduler, noisy, output_for(scheduler, noisy, clean, ALPHA), ALPHA), clean)


def test_a_step_is_diffusers(trained):
    config = load_model(trained).scheduler
    scheduler = make_scheduler(config, "ddim", 4)
    noisy, output = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    alphas = [scheduler.alphas_cumprod[t] for t in scheduler.timesteps]
    clean = clean_latents(config, noisy, output, alphas[1])
    expected = scheduler.step(output, scheduler.timesteps[1], noisy).prev_sample
    torch.testing.assert_close(ddim_step(noisy, clean, alphas[1], alphas[2]), expected)


def test_the_teachers_path_is_the_samplers(trained, people):
    """From the first timestep through all of the student's steps: what guided DDIM makes of the same noise (diffusers' own steps are
    not even where their number does not divide 1000)."""
    student, teacher = load_model(trained), load_model(trained)
    loss = DistillLoss(student, teacher, people, 2, options=DistillOptions(few_steps=1, substeps=5, guidance_scale=2.0))
    task = loss.draw(np.random.default_rng(0))
    assert (task.timesteps == 999).all()
    prompt = "a photo of a person, blue background"
    with torch.no_grad():
        embeds = encode_prompts(student, [prompt] * 2)
    task = replace(task, noisy=torch.randn(task.noisy.shape), prompt_embeds=embeds, id_scale=torch.ones(2))
    landed, to = loss.guide(task)
    expected, _ = sample_latents(teacher, task.w_plus, prompt, num_inference_steps=5, guidance_scale=2.0, solver="ddim", latents=task.noisy)
    assert (to == 1).all()
    torch.testing.assert_close(landed, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_student_learns_the_teachers_steps(trained, people):
    """A student that begins as the teacher cannot do five guided steps in one; training brings it nearer."""
    torch.manual_seed(0)
    student, teacher = load_model(trained), load_model(trained)
    for module in (student.adapter, student.text_encoder, student.vae, teacher.unet, teacher.adapter):
        module.requires_grad_(False)
    with torch.no_grad():                       # a few training steps leave the last layer near zero: give guidance something to guide
        teacher.unet.conv_out.weight.mul_(20)
    loss = DistillLoss(student, teacher, people, 8)
    error = lambda: loss(np.random.default_rng(3))[0]
    torch.manual_seed(1)
    before = float(error().detach())
    optimizer, rng = torch.optim.Adam(student.unet.parameters(), 1e-3), np.random.default_rng(0)
    for _ in range(12):
        optimizer.zero_grad()
        loss(rng)[0].backward()
        optimizer.step()
    torch.manual_seed(1)
    assert float(error().detach()) < 0.9 * before


def test_the_stage_changes_the_unet_alone(trained, people_folder, tmp_path, capsys):
    """MODEL becomes a whole model; it resumes; the teacher is as it was."""
    few = tmp_path / "few"
    before = (trained / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for steps in "12":
        arguments = ["--data", str(people_folder), "--model", str(few), "--teacher", str(trained), "--batch-size", "2"]
        assert main(["distill", *arguments, "--steps", steps, "--substeps", "2", "--few-steps", "2"]) == 0
    assert "--solver ddim --steps 2 --guidance-scale 1" in capsys.readouterr().out
    assert torch.load(few / ".state" / "distill" / "state.pt", weights_only=True)["step"] == 2
    assert (trained / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    for part in ("adapter", "text_encoder", "w_plus_encoder"):
        assert (few / part / "model.safetensors").read_bytes() == (trained / part / "model.safetensors").read_bytes()
    a, b = (load_file(m / "unet" / "diffusion_pytorch_model.safetensors") for m in (trained, few))
    assert a.keys() == b.keys() and not torch.equal(a["conv_in.weight"], b["conv_in.weight"])
    assert load_model(few).unet.config.sample_size == load_model(trained).unet.config.sample_size


@pytest.mark.parametrize("arguments, sentence", [
    (["distill"], "teacher must be another model folder than model, got None"),
    (["distill", "--few-steps", "0"], "few_steps must be at least 1, got 0"),
    (["base", "--few-steps", "4"], "--few-steps must be given to the distill stage, got it for base"),
    (["base", "--teacher", "x"], "teacher must be given to the distill or isolate stage, got it for base")])
def test_wrong_use_is_one_sentence(arguments, sentence, people_folder, tmp_path, capsys):
    assert main([*arguments, "--data", str(people_folder), "--model", str(tmp_path / "m")]) == 1
    assert capsys.readouterr().err == f"pidiff-train: {sentence}\n"
