"""Weights packed for our kernels in the user's cache: packed once, mapped then, in memory once."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import spec_of

from pidiff.runtime.engines import call
from pidiff.runtime.engines import openvino as engine_module
from pidiff.runtime.engines.packed_weights import SPOT_BYTES, PackedWeights

REFERENCE = b"\n\x08location\x12\x0da.safetensors"      # of a graph into the file of its weights


@pytest.fixture
def folder(tmp_path):
    """With two graphs that take their weights from one file, and an empty cache."""
    for name, content in (("one.onnx", b"1" + REFERENCE), ("two.onnx", b"2" + REFERENCE), ("a.safetensors", b"weights")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cache").mkdir(mode=0o700)
    return tmp_path


@pytest.fixture
def weight(rng):
    return rng.standard_normal((64, 32 * SPOT_BYTES // 256), dtype=np.float32)


def got(folder, weight, *how, graph="one.onnx", cached=True, name="layer"):
    """(array, whether it had to be packed) of a model that is loaded anew"""
    packed = []
    pack = lambda: packed.append(0) or 2 * weight  # noqa: E731
    array = PackedWeights(folder / graph, folder / "cache" if cached else None).get(name, weight, pack, *how)
    assert np.array_equal(array, 2 * weight)
    return array, bool(packed)


def test_packed_once_then_mapped(folder, weight):
    first, packed = got(folder, weight)
    again, once_more = got(folder, weight)
    assert packed and not once_more and isinstance(first, np.memmap) and isinstance(again, np.memmap)
    assert not first.flags.writeable and first.ctypes.data % 64 == 0 and len(os.listdir(folder / "cache")) == 1
    assert not got(folder, weight, graph="two.onnx", name="another")[1], "the same weights in another graph"


def test_a_model_keeps_what_it_has(folder, weight):
    for cache in (None, folder / "cache"):
        model = PackedWeights(folder / "one.onnx", cache)
        array = model.get("layer", weight, lambda: 2 * weight)
        assert model.get("layer", weight, lambda: pytest.fail("packed twice")) is array


def test_whatever_it_depends_on_is_another_entry(folder, weight):
    got(folder, weight, "avx512")
    assert got(folder, weight, "avx2")[1]
    assert got(folder, weight.reshape(32, -1), "avx512")[1] and got(folder, weight.view(np.int32), "avx512")[1]
    for at in (0, weight.size // 2, -1):
        other = weight.copy()
        other.reshape(-1)[at] += 1
        assert got(folder, other, "avx512")[1], at
    os.utime(folder / "a.safetensors", (1, 1))
    assert got(folder, weight, "avx512")[1] and not got(folder, weight, "avx512")[1]


def test_weights_in_the_graph_itself(folder, weight):
    (folder / "one.onnx").write_bytes(b"weights in here")
    assert got(folder, weight)[1] and not got(folder, weight)[1] and got(folder, weight, graph="two.onnx")[1]


@pytest.mark.parametrize("left", [0, 64, 1000])
def test_a_torn_file_is_written_again(folder, weight, left):
    got(folder, weight)
    file, = (folder / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:left])
    assert got(folder, weight)[1] and not got(folder, weight)[1]


def test_two_that_write_at_once(folder, weight, monkeypatch):
    """Threads of one process: each writes a file of its own, and both map what was written whole."""
    save, others = np.save, []

    def interrupted(to, array):
        monkeypatch.setattr(np, "save", save)
        save(to, array[:1])
        others.append(got(folder, weight))      # comes and goes while the first one is writing
        to.seek(0)
        save(to, array)

    monkeypatch.setattr(np, "save", interrupted)
    for array, packed in (got(folder, weight), *others):
        assert packed and isinstance(array, np.memmap)
    assert len(os.listdir(folder / "cache")) == 1


def test_without_a_place_they_are_held_in_memory(folder, weight, monkeypatch):
    array, packed = got(folder, weight, cached=False)
    assert packed and not isinstance(array, np.memmap)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    array, packed = got(folder, weight)
    assert packed and not isinstance(array, np.memmap) and not os.listdir(folder / "cache")


# --- in an engine ----------------------------------------------------------------------------------------------------

OUTPUTS = 1024
SHARE = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
from test_packed_weights import convolved, opened
engine = opened(sys.argv[2])
convolved(sys.argv[2], engine)
found, file = {"Rss": 0, "Pss": 0}, ""
for line in open("/proc/self/smaps"):
    if re.match("[0-9a-f]+-", line):
        file = line
    elif "/packed-" in file and line.split(":")[0] in found:
        found[line.split(":")[0]] += int(line.split()[1]) << 10
print(json.dumps(found), flush=True)
sys.stdin.read()
"""


def opened(path):
    """The engine of a graph, which counts as large, in float32."""
    engine_module._is_large = lambda *_: True
    return engine_module.OpenVinoEngine(path, spec_of(path), static=True, threads=1)


def convolved(path, engine=None):
    """What the graph draws."""
    return call(engine or opened(path), {"x": np.random.default_rng(1).standard_normal((1, 32, 16, 16)).astype(np.float32)})["y"]


@pytest.fixture
def graph(tmp_path, rng, monkeypatch):
    """One convolution."""
    pytest.importorskip("openvino")
    from pidiff.runtime.engines.openvino_convolution import faster_kernel

    if not faster_kernel(False):
        pytest.skip("our kernel is not the faster one here")
    monkeypatch.setattr(engine_module, "_is_large", engine_module._is_large)    # put back what `opened` does
    monkeypatch.setenv("PIDIFF_CACHE", str(tmp_path / "cache"))
    kinds = {"weight": (OUTPUTS, 32, 3, 3), "bias": (OUTPUTS,)}
    weights = [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in kinds.items()]
    value = lambda name, channels: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", channels, 16, 16])  # noqa: E731
    node = helper.make_node("Conv", ["x", "weight", "bias"], ["y"], pads=[1, 1, 1, 1])
    made = helper.make_graph([node], "g", [value("x", 32)], [value("y", OUTPUTS)], weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_an_engine_maps_them(graph, monkeypatch):
    """Packed for the first engine; the next one takes them from the cache, and draws the same as without a cache, as OpenVINO does."""
    from pidiff import _C

    first = convolved(graph)
    files = [file for file in os.listdir(graph.parent / "cache" / "openvino") if file.startswith("packed-")]
    assert len(files) == 1
    with monkeypatch.context() as patch:
        patch.setattr(_C, "pack_convolution", lambda *_: pytest.fail("packed once more"))
        second = convolved(graph)
    monkeypatch.setenv("PIDIFF_CACHE", "off")
    third = convolved(graph)
    monkeypatch.setattr(engine_module.OpenVinoEngine, "_use_kernels", lambda *_: None)
    own = convolved(graph)
    assert np.array_equal(first, second) and np.array_equal(first, third)
    assert 0 < np.abs(first - own).max() < 1e-5 * np.abs(own).max()


def test_what_packing_took_is_given_back(graph, monkeypatch):
    """Before the first run, whose peak it would raise."""
    from pidiff import _C

    real, done = _C.pack_convolution, []
    monkeypatch.setattr(_C, "pack_convolution", lambda *args: done.append("packed") or real(*args))
    monkeypatch.setattr(engine_module, "give_back", lambda: done.append("given back"))
    convolved(graph)
    assert "packed" in done and done[-1] == "given back"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_that_is_let_go_holds_nothing(graph):
    """Neither packed weights, nor its nodes, which OpenVINO's own way of making them would keep for ever; without the garbage collector."""
    engine = opened(graph)
    convolved(graph, engine)
    nodes, mapped = [weakref.ref(node) for node in engine._request.kernels.nodes], f"{graph.parent}/cache/openvino/packed-"
    assert len(nodes) > 1 and mapped in Path("/proc/self/maps").read_text()
    gc.disable()
    try:
        del engine
        assert not any(node() for node in nodes) and mapped not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_share_them(graph, tmp_path):
    """Two processes that draw hold packed weights once: each is charged half of the pages."""
    (tmp_path / "share.py").write_text(SHARE)
    start = lambda: subprocess.Popen([sys.executable, str(tmp_path / "share.py"), os.path.dirname(__file__), str(graph)], text=True,  # noqa: E731
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path)
    held = []
    try:
        for _ in range(2):
            held.append(start())
            found = json.loads(held[-1].stdout.readline())
    finally:
        for process in held:
            process.communicate(timeout=60)
    assert found["Rss"] > OUTPUTS * 32 * 16 * 4 * 0.95 and found["Pss"] == pytest.approx(found["Rss"] / 2, rel=0.05)
