"""Graphs in NVIDIA's own tool for looking into them: the commands that docs/engines.md names."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("polygraphy") is None, reason="needs polygraphy")


@pytest.fixture
def bundle(tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    from tiny_model import shared

    return shared("standard23", tmp_path_factory)


def polygraphy(*command):
    done = subprocess.run([Path(sys.executable).with_name("polygraphy"), *map(str, command)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_inspect(bundle):
    onnx = pytest.importorskip("onnx")
    status, text = polygraphy("inspect", "model", bundle / "unet.onnx")
    nodes = len(onnx.load(bundle / "unet.onnx", load_external_data=False).graph.node)
    assert status == 0 and f"---- {nodes} Node(s) ----" in text and "id_fold" in text


def test_every_layer_is_finite(bundle):
    status, text = polygraphy("run", bundle / "vae_decoder.onnx", "--onnxrt", "--validate", "--onnx-outputs", "mark", "all")
    valid = re.findall(r"PASSED \| Output: (\S+) is valid", text)
    assert status == 0 and "image" in valid and len(valid) > 20, text[-2000:]


def test_a_layer_that_is_not_finite_is_named(bundle, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "vae_decoder.onnx")
    bias = next(t for t in model.graph.initializer if ".bias" in t.name)
    bias.raw_data = b"\xff" * len(bias.raw_data)        # NaN in all float formats
    onnx.save(model, tmp_path / "broken.onnx")
    status, text = polygraphy("run", tmp_path / "broken.onnx", "--onnxrt", "--validate", "--onnx-outputs", "mark", "all")
    assert status != 0 and re.search(r"FAILED \| Errors detected in output: \S+", text), text[-2000:]
