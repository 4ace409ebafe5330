"""The adapter stage: its terms one by one, fresh adapters of every kind, the base model frozen."""

import dataclasses
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pidiff.config import new_adapter_config
from trained_folder import run


@pytest.fixture(scope="module")
def adapter_loss(trained, people_folder):
    """AdapterLoss of the trained tiny run, by the terms that are on."""
    from pidiff.data.people import load_people
    from pidiff.model import load_model
    from pidiff.train.adapter import AdapterLoss, AdapterOptions
    whole, people = load_model(trained), load_people(people_folder, 128)
    return lambda **terms: AdapterLoss(whole, people, 2, terms=AdapterOptions(**terms))


def test_adapter_terms_can_be_switched_off(adapter_loss):
    def parts(**terms):
        torch.manual_seed(0)
        return adapter_loss(**terms)(np.random.default_rng(3))[1]
    every = parts()
    assert set(every) == {"rec", "bg", "dis", "loc"} and all(v > 0 for v in every.values())
    for name in ("bg", "dis", "loc"):
        rest = parts(**{name: 0.0})
        assert set(rest) == set(every) - {name}
        torch.testing.assert_close(rest["rec"], every["rec"])
    torch.testing.assert_close(parts(bg=2.0)["bg"], 2 * parts(bg=1.0)["bg"])


def test_background_term_counts_only_what_the_identity_changes_outside(adapter_loss):
    loss = adapter_loss(dis=0.0, loc=0.0)
    draw = loss.draw

    def everything_is_face(*args):
        task = draw(*args)
        return dataclasses.replace(task, masks=torch.ones_like(task.masks))

    loss.draw = everything_is_face
    assert loss(np.random.default_rng(0))[1]["bg"] == 0

    def nobody(*args):
        task = everything_is_face(*args)
        return dataclasses.replace(task, w_plus=torch.zeros_like(task.w_plus), id_scale=torch.ones_like(task.id_scale))

    loss.draw = nobody
    parts = loss(np.random.default_rng(0))[1]
    assert parts["bg"] > 0, "the unconditional half of guidance, identity included, is the base model's, inside faces too"


def test_changes_count_as_they_are_seen(adapter_loss):
    """... whatever a channel's variance: a tint of the background is in the few that vary most."""
    def parts(factor):
        torch.manual_seed(0)
        loss = adapter_loss(preserve=1.0)
        loss.variance = loss.variance * factor
        return loss(np.random.default_rng(3))[1]
    one, other = parts(1), parts(5)
    assert one["rec"] != other["rec"] and all(one[name] == other[name] for name in ("bg", "dis", "preserve"))


def test_negative_codes_are_other_people_or_edits(adapter_loss):
    loss = adapter_loss(edited=0.0)
    codes = torch.randn(4, 12, 512)
    assert torch.equal(loss.negatives(codes, np.random.default_rng(0)), codes.roll(1, 0))
    edited = adapter_loss(edited=1.0, edit_strength=1.5).negatives(codes, np.random.default_rng(0)) - codes
    for move in edited:
        assert any(torch.allclose(move, sign * 1.5 * d, atol=1e-5) for d in loss.directions for sign in (-1, 1))


def test_gradient_checkpointing_does_not_change_the_gradient(adapter_loss):
    def gradients():
        torch.manual_seed(0)
        loss = adapter_loss()
        loss.model.adapter.zero_grad()
        loss(np.random.default_rng(0))[0].backward()
        return loss, [p.grad.clone() for p in loss.model.adapter.parameters() if p.grad is not None]

    loss, plain = gradients()
    loss.model.unet.enable_gradient_checkpointing()
    loss.model.unet.train()
    try:
        for a, b in zip(plain, gradients()[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    finally:
        loss.model.unet.disable_gradient_checkpointing()
        loss.model.unet.eval()
    assert max(g.abs().max() for g in plain) > 0


def test_preserving_the_whole_picture_holds_the_background_term(adapter_loss):
    """W+ Adapter's term is unmasked: with a mask that is all background both are the same number."""
    loss = adapter_loss(dis=0.0, loc=0.0, bg=1.0, preserve=1.0)
    draw = loss.draw
    loss.draw = lambda *args: (lambda task: dataclasses.replace(task, masks=torch.zeros_like(task.masks)))(draw(*args))
    parts = loss(np.random.default_rng(0))[1]
    torch.testing.assert_close(parts["preserve"], parts["bg"])
    assert parts["preserve"] > 0


def test_identity_term_looks_at_clear_pictures_and_reaches_the_adapter(adapter_loss):
    loss = adapter_loss(bg=0.0, dis=0.0, loc=0.0, id=1.0)
    torch.manual_seed(0)
    task = next(t for t in (loss.draw(np.random.default_rng(i)) for i in range(50)) if t.real.all())
    clear, noisy = (dataclasses.replace(task, timesteps=torch.full_like(task.timesteps, t)) for t in (20, 980))
    output, _ = loss.predict(clear, clear.w_plus, clear.id_scale)
    assert loss.identity_loss(noisy, output) == 0
    value = loss.identity_loss(clear, output)
    loss.model.adapter.zero_grad()
    value.backward()
    assert 0 < value < 2 and any(p.grad is not None and p.grad.abs().max() > 0 for p in loss.model.adapter.parameters())
    alpha = loss.alphas_cumprod[clear.timesteps].view(-1, 1, 1, 1)
    exact = (alpha.sqrt() * clear.noisy - loss_clean(loss, clear)) / (1 - alpha).sqrt()
    encoder = loss.model.w_plus_encoder
    picture = loss.model.decode_latents(loss_clean(loss, clear))
    mask = torch.nn.functional.interpolate(clear.masks, size=picture.shape[-2:], mode="bilinear")
    white = torch.nn.functional.interpolate(mask * picture + 1 - mask, size=(64, 64), mode="area")
    own = dataclasses.replace(clear, w_plus=encoder(white).detach())
    assert loss.identity_loss(own, exact) < 1e-3, "the very picture of the code costs nothing"


def loss_clean(loss, task):
    """Some latents, fixed."""
    return torch.randn(task.noisy.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind, null", [("parallel", True), ("residual", False), ("single", False)])
def test_a_new_adapter_of_every_kind_is_trained_saved_and_gone_on_with(kind, null, trained, people_folder, tmp_path):
    from pidiff.model import load_model
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns(".state", "adapter"))
    assert run("adapter", people_folder, tmp_path / "model", "--new-adapter", kind) == 0
    model = load_model(tmp_path / "model")
    config = model.adapter.config
    assert config.has_null == null and config.num_tokens == 4 and config.groups == (4, 4, 2, 2)
    assert (model.adapter.layers[0].k_null is not None) == null
    assert run("adapter", people_folder, tmp_path / "model", "--new-adapter", kind, "--steps", "3") == 0
    state = torch.load(tmp_path / "model" / ".state" / "adapter" / "state.pt", weights_only=True)
    assert state["step"] == 3


def test_gradient_checkpointing_runs_in_the_trainer(trained, people_folder, tmp_path):
    """Backward computes activations again: with other attention kernels than forward's it would stop with an error."""
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns(".state"))
    assert run("adapter", people_folder, tmp_path / "model", "--gradient-checkpointing") == 0


def test_a_new_adapter_does_not_replace_one(trained, people_folder, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns(".state"))
    before = (tmp_path / "model" / "adapter" / "model.safetensors").read_bytes()
    assert run("adapter", people_folder, tmp_path / "model", "--new-adapter", "residual") == 1
    assert "new-adapter must be given for a model without adapter/" in capsys.readouterr().err
    assert (tmp_path / "model" / "adapter" / "model.safetensors").read_bytes() == before


def test_new_adapter_configurations_cover_the_encoders_levels():
    for levels in (12, 14, 16, 18):
        config = new_adapter_config("parallel", levels, 768)
        assert sum(config.groups) == levels and config.num_tokens == 4
    assert new_adapter_config("residual", 18, 768).groups == (4, 4, 4, 6)
    with pytest.raises(ValueError, match="adapter must be one of parallel, residual, single, got 'both'"):
        new_adapter_config("both", 18, 768)
