"""The benchmark suite: what it writes for rivals, how it judges pictures, and its arithmetic. Rivals themselves are not run here."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
run = pytest.importorskip("benchmarks.run")
rivals = run.table
ablation = pytest.importorskip("benchmarks.ablation")


def test_measurements_in_the_repositorys_root_use_the_installed_package():
    """... whose `pidiff` has more in it than the folder of that name there."""
    done = subprocess.run([sys.executable, "-c", "import benchmarks, pidiff.runtime"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_processes_of_the_benchmarks_use_the_installed_package(tmp_path, monkeypatch):
    """... wherever the benchmark was started, and whatever paths it was given."""
    monkeypatch.chdir(ROOT)
    rivals.run([sys.executable, "-c", "import pidiff.runtime"], tmp_path / "log")
    (tmp_path / "model").mkdir()
    calls = []
    monkeypatch.setattr(ablation.subprocess, "run", lambda command, cwd, **more: calls.append((command, Path(cwd))))
    monkeypatch.setattr(sys, "argv", ["ablation", "--model", str(tmp_path / "model"), "--data", "tests", "--embedder", "tests/e.onnx", "--out",
                                      os.path.relpath(tmp_path / "out"), "--variants", "ours", "all terms"])
    ablation.main()
    assert [c[2] for c, _ in calls] == ["pidiff.train", "pidiff.evaluate"] * 2
    for command, cwd in calls:
        assert ROOT not in (cwd, *cwd.parents) and cwd.is_dir()
        given = dict(zip(command[3:], command[4:]))
        assert all(Path(given[name]).is_absolute() for name in ("--data", "--model", "--checkpoint", "--embedder", "--out") if name in given)


def test_names_of_the_first_release_are_read_back():
    """Every tensor of Stable Diffusion 1.5's UNet and autoencoder gets a name that diffusers' converter turns back."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
    from benchmarks.make_sd15_random import UNET, VAE
    from benchmarks.single_file import unet_name, vae_name

    with torch.device("meta"):
        unet, vae = diffusers.UNet2DConditionModel(**UNET), diffusers.AutoencoderKL(**VAE)
    written = {f"model.diffusion_model.{unet_name(k)}": torch.empty(v.shape, device="meta") for k, v in unet.state_dict().items()}
    back = convert_ldm_unet_checkpoint(written, dict(unet.config))
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in unet.state_dict().items()}
    written = {f"first_stage_model.{vae_name(k)}": v[..., None, None] if "attentions" in k and v.ndim == 2 else v for k, v in vae.state_dict().items()}
    assert convert_ldm_vae_checkpoint(written, dict(vae.config)).keys() == vae.state_dict().keys()


WORKER = """
import numpy as np
from protocol import work

def load(job):
    def generate(steps, clock):
        if job.get("broken"):
            raise RuntimeError("out of luck")
        for _ in range(steps):
            clock.tick()
        return np.load(job["noise"])[:, :3].transpose(0, 2, 3, 1).repeat(8, 1).repeat(8, 2).clip(-1, 1) * 100 + 100 + job.get("shift", 0)
    return generate, {"version": "none"}

work(load)
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A Bench whose workers draw their noise."""
    workers = tmp_path / "workers"
    workers.mkdir()
    (workers / "protocol.py").write_text((rivals.WORKERS / "protocol.py").read_text())
    for name in ("pidiff_worker", "other_worker"):
        (workers / f"{name}.py").write_text(WORKER)
    monkeypatch.setattr(rivals, "WORKERS", workers)
    return run.Bench(tmp_path, 1)


OURS = [rivals.Way(f"pidiff {p}", "pidiff_worker", job={"precision": "auto", "preset": p}) for p in ("exact", "balanced", "fast")]
JUDGE = rivals.Way("pidiff exact, full precision", "pidiff_worker", job={"precision": "full"})
RIVAL = rivals.Way("rival", "other_worker", job={"precision": "fp32"})


def test_a_picture_that_differs_is_not_timed(bench):
    ways = [*OURS, JUDGE, RIVAL, rivals.Way("wrong", "other_worker", job={"precision": "bf16", "shift": 60}),
            rivals.Way("broken", "other_worker", job={"precision": "fp32", "broken": True}),
            rivals.Way("own noise", "other_worker", job={"precision": "f16", "shift": 60}, same=False)]
    found = run.check(bench, ways)
    assert found["rival"] == found["pidiff exact"] == "inf dB" and found["own noise"].startswith("not comparable")
    assert found["wrong"].startswith("failed: picture must agree to 25.0 dB, got 1") and "out of luck" in found["broken"]


def test_rows_are_medians_and_failures_say_so(bench):
    broken = dataclasses.replace(RIVAL, name="broken", job={"precision": "fp32", "broken": True})
    rows = run.measure(bench, [*OURS, RIVAL, broken], rounds=2, quick=True)
    assert rows["broken"]["picture_s"] is None and "out of luck" in rows["broken"]["error"]
    row = rows["rival"]
    assert row["rival"] and row["derived"] and len(row["all"]["picture_s"]) == 2 and len(row["all"]["step_s"]) == 2 * 3
    assert row["picture_s"] == pytest.approx(row["rest_s"] + run.STEPS * row["step_s"])
    assert not rows["pidiff fast"]["derived"]                       # few steps are all of its steps
    report = {"rows": rows, "pictures": {}, "growth": [], "mini": {}, "package_bytes": {}, "environment": run.environment()}
    for key, need in (("speedup_over_fastest_rival", False), ("speedup_over_fastest_rival_with_identity", True)):
        report[key] = run.speedups(rows, need)
    assert json.loads(json.dumps(report)) and "| broken |" in run.markdown(report)


def test_speedup_is_over_the_fastest_rival():
    row = lambda seconds, rival, identity=True: {"rival": rival, "picture_s": seconds, "identity": identity}
    rows = {"pidiff exact": row(50, False), "pidiff balanced": row(20, False), "pidiff fast": row(10, False), "a": row(100, True), "b": row(60, True, False),
            "c": row(None, True)}
    assert run.speedups(rows, False) == {"exact": 1.2, "balanced": 3.0, "fast": 6.0}
    assert run.speedups(rows, True) == {"exact": 2.0, "balanced": 5.0, "fast": 10.0}


def test_pidiff_worker_draws_a_person(tmp_path):
    """The real worker, `mini`, one step."""
    from pidiff.model import shipped_mini

    way = rivals.Way("mini", "pidiff_worker", job={"model": str(shipped_mini()), "engine": "onnxruntime", "precision": "auto", "native": True,
                                                   "photo": str(ROOT / "examples" / "person-1.jpg"), "seed": 7, "preset": "exact"})
    result = run.Bench(tmp_path, 1).draw(way, [1, 2], keep=str(tmp_path / "picture.npy"))
    assert "error" not in result and result["engine"] == "onnxruntime" and result["shape"] == [1, 128, 128, 3]
    assert [len(r["step_s"]) for r in result["rows"]] == [0, 1] and 0 < result["enroll_warm_s"] < result["first_s"]
    assert np.load(tmp_path / "picture.npy").dtype == np.uint8


def test_disruption_at_equal_similarity():
    """Half of the rival's disruption for every similarity, in every draw; who never gets there is said to."""
    def curve(slope, best):
        return [{"person": str(p), "id_scale": s, "id_start": start, "similarity": 0.1 + 0.01 * p + best * s, "disruption": slope * best * s + start}
                for p in range(5) for s in (0.0, 0.5, 1.0) for start in (0.0, 0.4)]

    lines = ablation.equal_similarity({"ours": curve(5, 0.8), "W+ Adapter": curve(10, 0.4), "weak": curve(5, 0.2)}, draws=20)
    assert lines == ["W+ Adapter at id_scale 1: similarity 0.520, disruption 4.00 (5 people). Disruption at that similarity, as a share of it:",
                     "ours 0.50 (0.50 - 0.50; not reached in 0% of the draws).", "weak nan (nan - nan; not reached in 100% of the draws)."]


def test_pictures_on_a_gpu_must_agree_before_they_are_timed(tmp_path, monkeypatch):
    """A row for every way: its median, or why it has none."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_picture

    class Worker:
        def __init__(self, way, args):
            self.way, self.row, self.times, self.left = way, {"way": way}, [], [0.3, 0.5, 0.1]

        def ask(self, line=""):
            kind, _, file = line.partition(" ")
            if self.way == "broken":
                raise RuntimeError("broken must not stop, got: no word")
            if kind == "base":
                picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
                np.save(file, 255 - picture if self.way == "other" else picture)
            return {"seconds": self.left.pop() if kind == "person" else 9.0}

        def close(self):
            self.row["closed"] = True

    monkeypatch.setattr(gpu_picture, "Worker", Worker)
    args = types.SimpleNamespace(ways=["ours", "other", "broken"], device="cpu", work=tmp_path, pictures=2)
    rows = {row["way"]: row for row in gpu_picture.measure(args)}
    assert rows["ours"] | {"first_s": 0.1, "picture_s": 0.4, "range_s": [0.3, 0.5]} == rows["ours"]
    assert "must be the first way's within" in rows["other"]["error"] and "no word" in rows["broken"]["error"]
    assert all(row["closed"] for row in rows.values())
