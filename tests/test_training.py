"""Every training stage runs, learns, writes what the next stage reads, and goes on after a stop."""

import dataclasses
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pidiff.autoencoder import MINI_VAE, PatchAutoencoder
from pidiff.model import shipped_mini
from pidiff.train.__main__ import main
from pidiff.train.base import localisation_loss
from trained_folder import run


def test_base_keeps_what_the_mapper_stage_learned(trained):
    from safetensors.torch import load_file
    learned, shipped = load_file(trained / "mapper" / "model.safetensors"), load_file(trained / "adapter" / "model.safetensors")
    names = [n for n in learned if n.startswith("mapper.") and "latent_avg" not in n]
    assert names and all(torch.equal(learned[n].half(), shipped[n]) for n in names)


def test_stages_make_a_model_folder_that_loads_and_adapts(trained, people_folder):
    from pidiff.model import load_model
    before = load_model(trained)
    assert run("adapter", people_folder, trained) == 0
    after = load_model(trained)
    same = [torch.equal(a, b) for a, b in zip(before.unet.parameters(), after.unet.parameters())]
    moved = [not torch.equal(a, b) for a, b in zip(before.adapter.parameters(), after.adapter.parameters())]
    assert all(same) and any(moved)


def test_mapper_stage_learns_to_draw(people):
    """Tokens of a person describe that person's latents: far less is left unexplained than by the mean."""
    from pidiff.config import ADAPTER_MINI
    from pidiff.train.mapper import MapperLoss, RenderingMapper, unexplained, white_latents
    torch.manual_seed(0)
    latents = white_latents(PatchAutoencoder(MINI_VAE).eval(), people)
    model = RenderingMapper(dataclasses.replace(ADAPTER_MINI, tokens_per_group=16, token_rows=4), *latents.shape[1:3])
    loss_fn, rng = MapperLoss(model, people, latents, None, 16), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    w_plus = torch.from_numpy(people.w)[:, None].expand(-1, 12, -1)
    before = unexplained(model, w_plus, latents)
    for _ in range(100):
        optimizer.zero_grad()
        loss_fn(rng)[0].backward()
        optimizer.step()
    assert unexplained(model, w_plus, latents) < 0.5 * before


def test_read_outs_are_fitted_to_a_mapper_that_is_there(people):
    """What a drawing mapper draws is recovered from its tokens alone, after its read-outs are lost."""
    from pidiff.config import ADAPTER_MINI
    from pidiff.train.mapper import RenderingMapper
    torch.manual_seed(0)
    model = RenderingMapper(dataclasses.replace(ADAPTER_MINI, tokens_per_group=16, token_rows=4), 64, 8).requires_grad_(False)
    w_plus = torch.from_numpy(people.w)[:, None].expand(-1, 12, -1)
    drawn = model(w_plus)
    for read in model.read:
        torch.nn.init.zeros_(read.weight)
    assert (model(w_plus) - drawn).abs().max() > 0.1
    model.learn_to_read(w_plus, drawn)
    torch.testing.assert_close(model(w_plus), drawn, rtol=1e-3, atol=1e-3)


def test_alignment_loss_wants_each_place_to_read_its_own_token():
    """Keys that are orthogonal, queries that point at the wanted key: the loss is near 0; shuffled queries cost more."""
    from types import SimpleNamespace
    from pidiff.config import AdapterConfig
    from pidiff.train.mapper import alignment_loss
    config, heads, side = AdapterConfig(tokens_per_group=4, token_dim=9, token_rows=2), 4, 4
    layer = SimpleNamespace(num_heads=heads, k_null=torch.eye(17)[16].repeat(heads))
    keys = torch.eye(17)[:16].repeat(1, heads)[None, None]                              # [1, 1, 16, heads * 17]
    regions = torch.tensor([[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2).flatten()           # 2 x 2 regions on a 4 x 4 map
    mask = torch.ones(1, 1, 8, 8)
    mask[..., 4:] = 0                                                                   # the right half is background
    inside = torch.tensor([True, True, False, False]).repeat(side)
    wanted = torch.stack([torch.where(inside, h * 4 + regions, 16) for h in range(heads)])
    queries = 100 * torch.eye(17)[wanted].permute(1, 0, 2).flatten(1)[None]             # [1, 16, heads * 17]
    adapter = SimpleNamespace(config=config, layers=[layer])
    assert alignment_loss(adapter, [queries], [keys], mask, torch.ones(1)) < 1e-4
    assert alignment_loss(adapter, [queries.roll(1, 1)], [keys], mask, torch.ones(1)) > 1
    assert alignment_loss(adapter, [queries.roll(1, 1)], [keys], mask, torch.zeros(1)) == 0


def test_what_a_caption_names_is_moved_in_the_code_and_nothing_else_is(people):
    from types import SimpleNamespace
    from pidiff.train.base import BaseLoss, BaseOptions
    loss = SimpleNamespace(people=people, options=BaseOptions(moved=1.0))
    rng = np.random.default_rng(0)
    assert not BaseLoss.move(loss, "a photo of a person, blue background", rng).any()
    pose = BaseLoss.move(loss, "a person, looking left", rng)
    assert abs(pose @ people.directions["pose"]) > 0.99 * np.linalg.norm(pose) > 0
    smile = BaseLoss.move(loss, "a serious face", rng)
    assert abs(smile @ people.directions["smile"]) > 0.99 * np.linalg.norm(smile) > 0


def test_a_finished_stage_is_not_trained_again(trained, people_folder):
    log = trained / ".state" / "vae" / "state.pt"
    before = log.read_bytes()
    assert run("vae", people_folder, trained) == 0
    assert torch.load(log, weights_only=True)["step"] == 2 and len(before) == log.stat().st_size


def test_a_folder_without_state_is_gone_on_with(trained, people_folder, tmp_path):
    """A copy of a model (or bundle) is a starting point: the weights move on from it, they do not start afresh."""
    from safetensors.torch import load_file
    shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns(".state"))
    file = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    before = load_file(file)["conv_in.weight"].float()
    assert run("base", people_folder, tmp_path / "copy", "--steps", "1", "--learning-rate", "1e-5") == 0
    after = load_file(file)["conv_in.weight"].float()
    assert 0 < (after - before).abs().max() < 0.01 * before.abs().max()


@pytest.mark.parametrize("stage, keep, move", [pytest.param("base", ["--keep-mapper"], [], marks=pytest.mark.slow), ("adapter", [], ["--no-keep-mapper"])])
def test_a_bundle_copy_keeps_its_mapper_where_asked(stage, keep, move, trained, people_folder, tmp_path):
    """Without MODEL/mapper, as in a bundle, the adapter's is frozen by --keep-mapper, the adapter stage's default; else it is trained on."""
    from safetensors.torch import load_file

    def mapper_after(name, *options):
        shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns(".state", "mapper"))
        assert run(stage, people_folder, tmp_path / name, *options) == 0
        state = load_file(tmp_path / name / "adapter" / "model.safetensors")
        return {k: v for k, v in state.items() if k.startswith("mapper.") and "latent_avg" not in k}

    before = load_file(trained / "adapter" / "model.safetensors")
    kept, moved = mapper_after("kept", *keep), mapper_after("moved", *move)
    assert kept and all(torch.equal(v, before[k]) for k, v in kept.items())
    assert any(not torch.equal(v, before[k]) for k, v in moved.items())


def test_mapper_stage_goes_on_in_the_language_of_a_bundle(trained, people_folder, tmp_path):
    """Without MODEL/mapper the adapter's is trained on, and what says where a token is stays, so that the UNet still finds it."""
    from safetensors.torch import load_file
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns(".state", "mapper"))
    for steps in ("2", "4"):                    # the second run resumes, and holds them too
        assert run("mapper", people_folder, tmp_path / "model", "--steps", steps) == 0
    before, after = load_file(trained / "adapter" / "model.safetensors"), load_file(tmp_path / "model" / "mapper" / "model.safetensors")
    same = {k: torch.equal(v.float(), after[k]) for k, v in before.items() if k.startswith("mapper.") and "latent_avg" not in k}
    assert all(same[k] for k in ("mapper.position", "mapper.norm.weight", "mapper.norm.bias"))
    assert not any(same[f"mapper.proj_{i}.tokens.weight"] for i in range(4))


def test_encoder_and_mapper_train_together(trained, people_folder, tmp_path):
    """Both move from a bundle's weights and are written; offsets and the tokens' language stay; a second run resumes."""
    from safetensors.torch import load_file
    folder = tmp_path / "model"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(".state", "mapper"))
    before = load_file(folder / "w_plus_encoder" / "model.safetensors")
    for steps in "12":
        assert run("encoder", people_folder, folder, "--with-mapper", "--steps", steps) == 0
    after = load_file(folder / "w_plus_encoder" / "model.safetensors")
    assert not torch.equal(before["styles.0.linear.weight"], after["styles.0.linear.weight"])
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("styles.") and not k.startswith("styles.0."))
    known, mapper = load_file(trained / "adapter" / "model.safetensors"), load_file(folder / "mapper" / "model.safetensors")
    assert torch.equal(known["mapper.norm.weight"].float(), mapper["mapper.norm.weight"])
    assert not torch.equal(known["mapper.proj_0.tokens.weight"].float(), mapper["mapper.proj_0.tokens.weight"])
    assert torch.load(folder / ".state" / "encoder-with-mapper" / "state.pt", weights_only=True)["step"] == 2


@pytest.mark.slow
def test_autoencoder_draws_photos_better(people):
    from pidiff.config import ADAPTER_MINI, W_PLUS_MINI
    from pidiff.train.face import AutoencoderLoss, FaceAutoencoder
    from pidiff.train.mapper import RenderingMapper, white_latents
    from pidiff.w_plus_encoder import WPlusEncoder
    torch.manual_seed(0)
    latents = white_latents(PatchAutoencoder(MINI_VAE).eval(), people)
    renderer = RenderingMapper(dataclasses.replace(ADAPTER_MINI, tokens_per_group=16, token_rows=4), *latents.shape[1:3])
    renderer.measure(latents)
    model = FaceAutoencoder(WPlusEncoder(W_PLUS_MINI), renderer)
    loss_fn, rng = AutoencoderLoss(model, people, latents, 12), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def drawn() -> float:
        with torch.no_grad():
            return float(loss_fn(np.random.default_rng(1))[1]["drawn"])

    before = drawn()
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(rng)[0].backward()
        optimizer.step()
    assert drawn() < 0.8 * before


def test_codes_get_only_the_errors_they_do_not_have():
    from pidiff.train.stages import excess_errors
    rng = np.random.default_rng(0)
    known, unseen = rng.normal(0, 3, (50, 2, 512)), rng.normal(0, 5, (20, 2, 512))
    assert excess_errors(known, unseen).std() == pytest.approx(4, rel=0.02)
    assert not excess_errors(unseen, known).any()


def test_inner_face_and_coarse_channels_weigh_most():
    from pidiff.train.mapper import face_window, likeness_weight
    weight = likeness_weight(torch.tensor([4.0, 1.0]).view(2, 1, 1), 16)
    assert weight.mean() == pytest.approx(1)
    assert weight[0, 8, 8] == pytest.approx(16 * weight[0, 0, 0].item()) == pytest.approx(8 * weight[1, 8, 8].item())
    assert torch.equal(face_window(8, 3.0)[[0, 3, 5, 6], [0, 2, 5, 3]], torch.tensor([1.0, 3.0, 3.0, 1.0]))


def test_base_loss_counts_the_inner_face_of_aligned_pictures(trained, people):
    from pidiff.model import load_model
    from pidiff.train.base import BaseLoss, BaseOptions
    model = load_model(trained)
    assert BaseLoss(model, people, 2, options=BaseOptions(face=3.0)).window.max() > 2
    photos = dataclasses.replace(people, faces=people.images)
    assert (BaseLoss(model, photos, 2).window == 1).all(), "a face can be anywhere in a photo"


def test_keep_mapper_without_a_mapper_is_one_sentence(people_folder, trained, tmp_path, capsys):
    shutil.copytree(trained / "vae", tmp_path / "vae")
    assert run("base", people_folder, tmp_path, "--keep-mapper") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run("vae", people_folder, tmp_path, "--keep-mapper") == 1
    assert "keep-mapper must be given to the base or adapter stage, got it for vae" in capsys.readouterr().err
    assert run("base", people_folder, tmp_path, "--no-keep-mapper") == 1
    assert "no-keep-mapper must be given to the adapter stage, got it for base" in capsys.readouterr().err
    assert run("adapter", people_folder, tmp_path, "--keep-mapper", "--new-adapter", "parallel") == 1
    assert "keep-mapper must be left out for a new adapter, got it with parallel" in capsys.readouterr().err
    assert run("encoder", people_folder, tmp_path, "--with-mapper") == 1
    assert "with-mapper must be given with a mapper to train" in capsys.readouterr().err
    assert run("mapper", people_folder, tmp_path, "--with-mapper") == 1
    assert "with-mapper must be given to the encoder stage, got it for mapper" in capsys.readouterr().err


def test_likeness_compares_the_person_alone_by_the_encoders_features(trained, people_folder):
    from pidiff.data.people import load_people
    from pidiff.model import load_model
    from pidiff.train.base import BaseLoss, BaseOptions, likeness_loss
    model, people = load_model(trained), load_people(people_folder, 128)
    loss = BaseLoss(model, people, 16, options=BaseOptions(likeness=0.5, likeness_share=0.5))
    torch.manual_seed(0)
    task = loss.draw(np.random.default_rng(0))
    assert loss.likeness(task, task.target) == 0, "the true answer is the real person"
    guess = (task.target + 0.1 * torch.randn_like(task.target)).requires_grad_()
    loss.likeness(task, guess).backward()
    moved = guess.grad.abs().sum((1, 2, 3)) > 0
    nearly_clean = (loss.alphas_cumprod[task.timesteps] > 0.2) & (task.real > 0)
    assert 0 < moved.sum() <= 8 and not (moved & ~nearly_clean).any()
    picture, mask = torch.rand(2, 3, 128, 128), torch.zeros(2, 1, 128, 128)
    mask[..., 32:96, 32:96] = 1
    behind = torch.where(mask > 0, picture, torch.rand_like(picture))
    assert likeness_loss(model.w_plus_encoder, behind, picture, mask) == 0
    assert likeness_loss(model.w_plus_encoder, 1 - picture, picture, mask) > 0


@pytest.mark.slow
def test_sample_sheets_are_written(trained, people_folder, tmp_path):
    import cv2
    shutil.copytree(trained, tmp_path / "m", ignore=shutil.ignore_patterns(".state"))
    assert run("adapter", people_folder, tmp_path / "m", "--steps", "1", "--sample-every", "1") == 0
    sheet = cv2.imread(str(tmp_path / "m" / ".state" / "adapter" / "samples" / "step-000001.png"))
    assert sheet.shape == (4 * 128, 6 * 128, 3)


def test_autoencoder_starts_at_the_principal_components():
    g = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(40, 3, 8, 8, generator=g) * 2 - 1, size=64, mode="bilinear")
    model = PatchAutoencoder()
    model.init_from_patches(images)
    latents = model.encode(images)
    assert latents.shape == (40, 16, 8, 8) and abs(latents.var((0, 2, 3)).mean().item() - 1) < 0.05
    variance = latents.var((0, 2, 3))
    assert (variance.diff() <= 1e-4).all(), "coarse structure first"
    assert (model.decode(latents) - images).square().mean() < 0.01 * images.var()


def test_localisation_loss_is_zero_for_the_mask_itself():
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:6, 2:6] = 1
    ones = torch.ones(2)
    perfect, inverted = mask.flatten(2), 1 - mask.flatten(2)
    assert localisation_loss([perfect], mask, ones) == 0 and localisation_loss([inverted], mask, ones) == 2
    assert localisation_loss([inverted], mask, torch.zeros(2)) == 0


@pytest.mark.parametrize("arguments, sentence", [
    (("--steps", "0"), "steps must be at least 1, got 0"),
    (("--precision", "int4"), "precision must be one of auto, bf16, fp16, fp32, got 'int4'"),
    (("--bg", "0"), "--bg must be given to the adapter stage, got it for vae"),
    (("--likeness", "0.1"), "likeness must be at least 0, and given to the base stage only, got 0.1 for vae"),
])
def test_bad_arguments_give_one_sentence(arguments, sentence, people_folder, tmp_path, capsys):
    code = main(["vae", "--data", str(people_folder), "--model", str(tmp_path), *arguments])
    assert code == 1 and capsys.readouterr().err.strip() == f"pidiff-train: {sentence}"


def test_missing_data_gives_one_sentence(tmp_path, capsys):
    assert main(["vae", "--data", str(tmp_path), "--model", str(tmp_path)]) == 1
    assert "data must be a folder with manifest.csv" in capsys.readouterr().err


def test_a_bundle_is_not_trained(people_folder, tmp_path, capsys):
    """Its manifest holds hashes of the weights: trained, it would be a bundle that nothing opens. A copy without the manifest is a model."""
    bundle = shutil.copytree(shipped_mini(), tmp_path / "mini")
    before = {f: f.stat().st_mtime_ns for f in bundle.rglob("*")}
    assert main(["base", "--data", str(people_folder), "--model", str(bundle), "--steps", "1"]) == 1
    assert f"model must be a model folder, got the bundle {bundle}" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in bundle.rglob("*")} == before


def test_logs_hold_losses(trained):
    state = torch.load(trained / ".state" / "base" / "state.pt", weights_only=True)
    assert state["step"] == 2 and state["seconds"] > 0


def test_directions_are_the_datas_and_the_encoders_own(trained, people):
    from pidiff.model import load_encoder
    from pidiff.train.stages import edit_directions
    from pidiff.train.base import encoder_bank
    encoder = load_encoder(trained / "w_plus_encoder")
    moves = edit_directions(people, encoder)
    assert {"pose", "smile", "age", "pc1", "pc2"} <= set(moves) and moves["pc1"].shape == (12, 512)
    first = moves["pc1"][0].numpy()
    along = encoder_bank(encoder, people)[:, 0] @ (first / np.linalg.norm(first))
    assert along.std() == pytest.approx(np.linalg.norm(first), rel=1e-3), "one unit is one standard deviation"
    assert abs(float(moves["pc1"][0] @ moves["pc2"][0])) < 1e-3 * float(moves["pc1"][0].norm() * moves["pc2"][0].norm())


def test_on_white_is_what_enrolling_shows(people):
    """As `composite` on a white background, rounded to uint8, and reduced as OpenCV does by area."""
    import cv2
    from pidiff.data.factors import composite
    from pidiff.train.common import on_white, to_images
    rows = slice(1, 4)
    want = [composite(i, m.astype(np.float32) / 255, np.full_like(i, 255)) for i, m in zip(people.images[rows], people.masks[rows])]
    assert np.abs(to_images(on_white(people, rows, "cpu")).astype(int) - np.stack(want)).max() <= 1
    half = np.stack([cv2.resize(w, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for w in want])
    got = to_images(on_white(people, rows, "cpu", half.shape[1])).astype(int)
    assert np.abs(got - half).max() <= 1 and np.abs(got - half).mean() < 0.2
