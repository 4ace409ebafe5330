"""The localise stage: a constant on the logit of nobody's key, by that key alone."""

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import load_file
from trained_folder import run

from pidiff.model import load_model, shipped_mini
from pidiff.train import stages
from pidiff.train.base import BaseLoss
from pidiff.train.localise import LocaliseOptions, constant_shift, localise


def test_the_shift_is_the_least_squares_solution(rng):
    """Exact where the queries hold a constant, and as good as NumPy's solution where they do not."""
    q = torch.from_numpy(rng.standard_normal((500, 2, 8)) + 0.7)
    shift = constant_shift(q.sum(0), torch.einsum("nhd,nhe->hde", q, q), len(q))
    for head in range(2):
        best = np.linalg.lstsq(q[:, head].numpy() / 8 ** 0.5, np.ones(500), rcond=None)[0]
        np.testing.assert_allclose(shift[head], best, rtol=5e-3, atol=5e-3)
    q[..., 0] = 2.0
    shift = constant_shift(q.sum(0), torch.einsum("nhd,nhe->hde", q, q), len(q))
    torch.testing.assert_close((q * shift).sum(-1) / 8 ** 0.5, torch.ones(500, 2, dtype=torch.float64), rtol=5e-3, atol=5e-3)


def border(model, people) -> tuple[float, float]:
    """Mean identity map of all layers, outside the mask and on its border, and inside."""
    torch.manual_seed(0)
    loss = BaseLoss(model, people, 8)
    task = loss.draw(np.random.default_rng(0))
    with torch.no_grad():
        maps = torch.stack(loss.predict(task, task.w_plus, task.id_scale)[1])[:, task.real > 0, 0]
    mask = torch.nn.functional.interpolate(task.masks, size=(8, 8), mode="area").flatten(1)[task.real > 0]
    return float(maps[:, mask < 0.9].mean()), float(maps[:, mask >= 0.9].mean())


def test_the_identity_leaves_the_border_first(large_people):
    model = load_model(shipped_mini())
    before = border(model, large_people)
    torch.manual_seed(0)
    errors = localise(BaseLoss(model, large_people, 8), LocaliseOptions(2.0), 3, np.random.default_rng(0))
    after = border(model, large_people)
    assert len(errors) == len(model.adapter.layers) and max(errors) < 0.5
    assert after[0] / before[0] < 0.85 * after[1] / before[1] and after[0] < 0.6 * before[0]


def test_the_stage_moves_nobodys_keys_alone(trained, people_folder, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns(".state"))
    assert run("localise", people_folder, folder, "--log-odds", "1", "--steps", "1") == 0
    assert "log-odds of nobody: +1" in capsys.readouterr().out
    for file in sorted(trained.rglob("*.safetensors")):
        if ".state" in file.parts:
            continue
        old, new = load_file(file), load_file(folder / file.relative_to(trained))
        assert {k for k in old if not torch.equal(old[k], new[k])} == {k for k in old if k.endswith("k_null")}, file


@pytest.mark.parametrize("kind, arguments, sentence", [
    ("residual", (), "model must have an adapter with a null key (ours), got one without"),
    (None, ("--log-odds", "nan"), "log_odds must be in [-20, 20], got nan"),
])
def test_bad_input_gives_one_sentence(kind, arguments, sentence, trained, people_folder, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns(".state", *(["adapter"] if kind else [])))
    if kind:
        assert run("adapter", people_folder, folder, "--new-adapter", kind, "--steps", "1") == 0
    before = (folder / "adapter" / "model.safetensors").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(stages, "encoder_codes", None)          # it reads every picture: refused before
    assert run("localise", people_folder, folder, "--steps", "1", *arguments) == 1
    assert sentence in capsys.readouterr().err
    assert (folder / "adapter" / "model.safetensors").read_bytes() == before
