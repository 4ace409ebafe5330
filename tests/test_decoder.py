"""The decoder stage: pictures through noise and the sampler, and a decoder that learns to finish them."""

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from pidiff.model import load_model, shipped_mini
from pidiff.sampling import make_scheduler
from pidiff.train.base import training_alphas
from pidiff.train.common import to_tensor
from pidiff.train.decoder import DecoderLoss, DecoderOptions, Sampled, denoise, finishing_error, sample_pairs


@pytest.fixture(scope="module")
def mini():
    model = load_model(shipped_mini())
    for module in (model.unet, model.text_encoder, model.adapter, model.vae, model.w_plus_encoder):
        module.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def sampled(mini, people_folder):
    from pidiff.data.people import load_people
    people = load_people(people_folder, 128)
    codes = np.broadcast_to(people.w[:, None], (len(people), 12, 512))
    return sample_pairs(mini, people, codes, DecoderOptions(pictures=8, steps=2), batch=4)


@torch.no_grad()
def test_denoise_is_diffusers_ddim(mini):
    """From the last timestep down in the trailing places of a 4-step DDIM, step by step the same latents."""
    torch.manual_seed(0)
    latents, w_plus, prompts = torch.randn(2, 64, 8, 8), torch.randn(2, 12, 512) * 0.3, ["a photo of a person", "a face"]
    scheduler = make_scheduler(mini.scheduler, "ddim", 4)
    from pidiff.sampling import sample_latents
    want = sample_latents(mini, w_plus, prompts, num_inference_steps=4, guidance_scale=3.0, solver="ddim", latents=latents)[0]
    got = denoise(mini, latents, int(scheduler.timesteps[0]), prompts, w_plus, DecoderOptions(steps=4))
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


def test_pairs_hold_the_picture_in_the_latents(mini, sampled):
    """The sampler gives back latents of the same picture, not exactly: else there would be nothing to learn, or too much."""
    assert sampled.images.shape == (8, 128, 128, 3) and sampled.latents.shape == (8, 64, 8, 8) and sampled.masks.shape == (8, 128, 128)
    with torch.no_grad():
        clean = mini.encode_image(to_tensor(sampled.images))
    own = (sampled.latents.float() - clean).square().mean()
    other = (sampled.latents.float() - clean.roll(1, 0)).square().mean()
    assert 0.001 * other < own < 0.5 * other


@pytest.mark.slow
def test_decoder_learns_to_finish(mini, sampled):
    import copy
    vae = copy.deepcopy(mini.vae)
    for p in vae.patch_out.parameters():
        p.mul_(0.9)                     # the shipped decoder knows its trade: this one has something to learn
    for part in (vae.patch_out, vae.decoder):
        part.requires_grad_(True)
    loss = DecoderLoss(vae, mini.w_plus_encoder, sampled, 4, options=DecoderOptions(clean=0.0))
    optimizer, rng, before = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], 3e-4), np.random.default_rng(0), finishing_error(vae, sampled)
    for _ in range(25):
        optimizer.zero_grad()
        loss(rng)[0].backward()
        optimizer.step()
    assert finishing_error(vae, sampled) < 0.85 * before
    assert all(torch.equal(a, b) for a, b in zip(vae.encoder.parameters(), mini.vae.encoder.parameters()))


def test_clean_share_decodes_the_encoders_latents(mini, sampled):
    """With clean = 1 the stored latents are not looked at."""
    wrong = Sampled(sampled.images, sampled.masks, torch.full_like(sampled.latents, float("nan")))
    loss, scalars = DecoderLoss(mini.vae, mini.w_plus_encoder, wrong, 4, options=DecoderOptions(clean=1.0))(np.random.default_rng(0))
    assert torch.isfinite(loss) and float(scalars["code"]) < 1


@pytest.mark.slow
def test_stage_changes_the_decoder_alone(people_folder, tmp_path):
    from safetensors.torch import load_file
    from pidiff.train.__main__ import main
    shutil.copytree(shipped_mini(), tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))
    file = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    before = load_file(file)
    assert main(["decoder", "--data", str(people_folder), "--model", str(tmp_path / "model"), "--steps", "2", "--batch-size", "2",
                 "--people-limit", "40", "--save-every", "1"]) == 0
    after = load_file(file)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder", "patch_out"}
    assert training_alphas(load_model(tmp_path / "model").scheduler).shape == (1000,)
