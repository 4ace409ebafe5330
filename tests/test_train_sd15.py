"""The adapter stage at full size: SD1.5's UNet at 512 pixels, a new adapter, photos, two steps. Slow: minutes, 5 GB of disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from pidiff.config import AdapterConfig, load_config
from pidiff.data.prepare import prepare

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "make_sd15_random.py"
# In a process of its own, so that the peak is the training's.
TRAIN = """
import json, resource, sys, time
from pidiff.train.__main__ import main
start = time.time()
status = main(sys.argv[1:])
print(json.dumps({"status": status, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "seconds": time.time() - start}))
"""


def test_a_new_adapter_trains_on_sd15_at_512_pixels(tmp_path, record_property):
    from safetensors.torch import load_file
    if not SCRIPT.is_file():
        pytest.skip("benchmarks/ is not part of the installed package")
    model, data, photos = tmp_path / "model", tmp_path / "data", tmp_path / "photos"
    subprocess.run([sys.executable, str(SCRIPT), str(model)], check=True, capture_output=True)
    shutil.rmtree(model / "adapter")
    photos.mkdir()
    for photo in sorted((ROOT / "examples").glob("person-*.jpg")):
        shutil.copy(photo, photos)
    import cv2
    for photo in photos.glob("*.jpg"):                  # 256 px: too small for 512 px training, which says so
        cv2.imwrite(str(photo), cv2.resize(cv2.imread(str(photo)), (512, 512), interpolation=cv2.INTER_CUBIC))
    assert prepare(data, photos, 512, aligned=False)[0] >= 4
    run = subprocess.run([sys.executable, "-c", TRAIN, "adapter", "--data", str(data), "--model", str(model), "--new-adapter", "parallel",
                          "--gradient-checkpointing", "--steps", "2", "--batch-size", "1", "--save-every", "2"],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    measured = json.loads(run.stdout.splitlines()[-1])
    record_property("measured", measured)
    assert measured["status"] == 0, run.stderr[-2000:]
    assert measured["gib"] < 13
    config = load_config(AdapterConfig, model / "adapter" / "config.json")
    assert config.mode == "parallel" and config.groups == (4, 4, 4, 6) and config.token_dim == 768
    weights = load_file(model / "adapter" / "model.safetensors")
    assert len([n for n in weights if n.endswith("k_null")]) == 16 and all(torch.isfinite(w).all() for w in weights.values())
    assert any(weights[n].abs().max() > 0 for n in weights if n.endswith("k_null")), "null keys start at zero: they have learned"
