"""Packed graphs in the user's cache: the same pictures, what hits them, what is torn or has no room, and memory that processes share."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pidiff.runtime import Pipeline
from pidiff.runtime.bundle import Bundle, shipped_bundle
from pidiff.runtime.engines import bind_new, load_engine, onnxruntime_cache

pytestmark = pytest.mark.skipif(not (shipped_bundle() / "manifest.json").exists(), reason="models/mini is not there")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnxruntime"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The graph and weights of mini's VAE decoder, to be changed."""
    folder, mini = tmp_path_factory.mktemp("decoder"), shipped_bundle()
    shutil.copy(mini / "vae_decoder.onnx", folder)
    shutil.copytree(mini / "vae", folder / "vae")
    return folder


def decoded(folder):
    """Return what the decoder in a folder makes of the same latents."""
    spec = Bundle.open().graph("vae_decoder")
    engine = load_engine("onnxruntime")(folder / "vae_decoder.onnx", spec, threads=1)
    image = bind_new(engine, {"latents": np.linspace(-1, 1, 64 * 8 * 8, dtype=np.float32).reshape(1, 64, 8, 8)}, H=128, W=128)["image"]
    engine.run()
    return image.copy()


def entries(cache):
    """Names of graphs and of weights."""
    names = sorted(os.listdir(cache))
    return [[n for n in names if n.endswith(end)] for end in (".onnx", ".bin")]


def test_pictures_stay_the_same_and_graphs_are_not_made_again(cache, monkeypatch):
    def picture():
        pipe = Pipeline.from_bundle(engine="onnxruntime", threads=1)
        person = pipe.enroll(Path(__file__).parent.parent / "examples" / "person-1.jpg") if examples else None
        return pipe.generate(person, "a photo of a person", seed=1, num_inference_steps=2, cache_interval=2).images[0]

    examples = (Path(__file__).parent.parent / "examples").is_dir()
    first = picture()
    graphs, weights = entries(cache)
    assert len(graphs) == len(weights) >= 4 and cache.stat().st_mode & 0o777 == 0o700
    assert sum(f.stat().st_size for f in cache.iterdir()) < onnxruntime_cache.ROOM * sum(
        f.size for name, f in Bundle.open().manifest.files.items() if name.endswith(".safetensors"))
    monkeypatch.setattr(onnxruntime_cache, "_write", lambda *_: pytest.fail("it is there"))
    second = picture()
    monkeypatch.setenv("PIDIFF_CACHE", "off")
    assert np.array_equal(first, second) and np.array_equal(second, picture()) and first.std() > 1


def test_other_weights_and_other_processors_are_other_entries(folder, cache, monkeypatch):
    first = decoded(folder)
    os.utime(folder / "vae" / "diffusion_pytorch_model.safetensors", (1, 1))
    assert np.array_equal(decoded(folder), first) and len(entries(cache)[0]) == 2
    monkeypatch.setattr(onnxruntime_cache, "_processor", lambda: "another")
    assert np.array_equal(decoded(folder), first) and len(entries(cache)[0]) == 3


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="reads /proc")
def test_a_processor_is_known_by_its_instructions():
    known = " ".join(onnxruntime_cache._processor()).lower()
    assert ("flags" in known or "features" in known) and "mhz" not in known and onnxruntime_cache._processor() == onnxruntime_cache._processor()


@pytest.mark.parametrize("end", [".onnx", ".bin"])
@pytest.mark.parametrize("harm", [lambda f: os.truncate(f, f.stat().st_size // 2), lambda f: f.unlink()])
def test_a_torn_entry_is_made_again(folder, cache, end, harm):
    first = decoded(folder)
    harm(next(cache.glob(f"*{end}")))
    assert np.array_equal(decoded(folder), first)
    (graph,), weights = entries(cache)
    assert len(weights) == 1, "nothing is left of the torn one"
    written = (cache / graph).stat().st_ino
    assert np.array_equal(decoded(folder), first) and (cache / graph).stat().st_ino == written


def test_what_was_used_last_is_trimmed_last(folder, cache):
    decoded(folder)
    for file in cache.iterdir():
        os.utime(file, (1, 1))
    decoded(folder)
    assert all(file.stat().st_mtime > 1 for file in cache.iterdir())


def test_a_disk_without_room(folder, cache, monkeypatch):
    monkeypatch.setenv("PIDIFF_CACHE", "off")
    first = decoded(folder)
    monkeypatch.setenv("PIDIFF_CACHE", str(cache.parent))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))
        assert np.array_equal(decoded(folder), first) and entries(cache) == [[], []]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert np.array_equal(decoded(folder), first) and not os.listdir(cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_interrupts_it_leaves_nothing(folder, cache, monkeypatch):
    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoded(folder)
    assert not os.listdir(cache)


HOLD = """
import json, re, sys
from pidiff.runtime import Pipeline
engine, cache = sys.argv[1:]
pipe = Pipeline.from_bundle(engine=engine, threads=1)
pipe.generate(None, "a photo of a person", seed=1, num_inference_steps=1)
found, file = {"Rss": 0, "Pss": 0}, ""
for line in open("/proc/self/smaps"):
    if re.match("[0-9a-f]+-", line):
        file = line
    elif cache in file and line.split(":")[0] in found:
        found[line.split(":")[0]] += int(line.split()[1]) << 10
print(json.dumps(found), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_processes_share_their_weights(engine, tmp_path):
    """Two processes that draw with one model hold its weights once: each is charged half of the pages."""
    if engine != "onnxruntime":
        pytest.importorskip(engine)
    (tmp_path / "hold.py").write_text(HOLD)
    env = {**os.environ, "PIDIFF_CACHE": str(tmp_path / "cache")}
    start = lambda: subprocess.Popen([sys.executable, str(tmp_path / "hold.py"), engine, str(tmp_path / "cache")], env=env, text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path)
    warm = start()          # fills the cache
    warm.communicate(timeout=120)
    held = [start()]
    try:
        alone = json.loads(held[0].stdout.readline())
        held.append(start())
        beside = json.loads(held[1].stdout.readline())
    finally:
        for process in held:
            process.communicate(timeout=60)
    assert alone["Pss"] == pytest.approx(alone["Rss"], rel=0.02) and alone["Rss"] > 50 << 20
    assert beside["Pss"] == pytest.approx(beside["Rss"] / 2, rel=0.02) and beside["Rss"] == pytest.approx(alone["Rss"], rel=0.05)
