"""benchmarks/gpu_train.py on the processor: the stages and what they leave, on drawn people. (A captured step needs a GPU.)"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from safetensors.numpy import load, load_file

from pidiff.data.people import load_people

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_train.py"


def write_arrays(people_folder, folder):
    """The people of the training tests as `draw` leaves them."""
    folder.mkdir()
    people = load_people(people_folder, 128)
    for name in ("images", "masks"):
        np.save(folder / f"{name}.npy", getattr(people, name))
    np.savez(folder / "codes.npz", w=people.w, identity=people.identity, mean=people.mean,
             **{f"dir_{d}": v for d, v in people.directions.items()})
    (folder / "done.json").write_text(json.dumps({"count": len(people)}))
    return folder


@pytest.mark.slow
def test_encoder_and_base_are_trained_in_the_time_given(people_folder, trained, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(trained, model, ignore=shutil.ignore_patterns(".state"))
    before = {file.relative_to(model): file.read_bytes() for file in model.rglob("*.safetensors")}
    done = subprocess.run([sys.executable, SCRIPT, "train", write_arrays(people_folder, tmp_path / "people"), "--model", model, "--out", out,
                           "--device", "cpu", "--seconds", "20", "--encoder-seconds", "1", "--encoder-batch", "4", "--batch", "4",
                           "--held-out", "8", "--workers", "0"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "held-out error of drawings" in done.stdout and "not captured" in done.stdout
    unet = load(b"".join((out / f"unet.{i}").read_bytes() for i in range(3)))
    old = load(before[Path("unet/diffusion_pytorch_model.safetensors")])
    assert unet.keys() == old.keys() and any((unet[k] != old[k]).any() for k in unet)
    assert all(np.isfinite(v.astype(np.float32)).all() for v in unet.values())
    for part in ("adapter", "w_plus_encoder"):
        new, old = load_file(out / f"{part}.safetensors"), load(before[Path(part) / "model.safetensors"])
        assert new.keys() == old.keys() and any((new[k] != old[k]).any() for k in new)
    assert (model / "text_encoder" / "model.safetensors").read_bytes() == before[Path("text_encoder/model.safetensors")]
