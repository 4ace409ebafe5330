"""The cache of compiled graphs: what hits it, where it is, whom it trusts, how large it grows."""

import os

import numpy as np
import onnx
import pytest
from test_openvino import compiled, opened
from tiny_bundle import write_tiny_bundle

from pidiff.runtime import files
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engines import call, load_engine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.open(write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def hit(bundle, **options):
    """(whether the graph came from the cache, its output)"""
    engine = opened(bundle, "text_conditioner", **options)
    out = call(engine, {"prompt_embeds": np.ones((1, 8, 6))})["text_kv"]
    return compiled(engine).get_property("LOADED_FROM_CACHE"), out


def test_the_second_load_hits_the_cache(bundle, cache):
    (first, out), (second, again) = hit(bundle, static=True), hit(bundle, static=True)
    assert (first, second) == (False, True) and np.array_equal(out, again)
    assert not hit(bundle, static=False)[0]  # compiled for other shapes
    assert cache.stat().st_mode & 0o777 == 0o700 and len(os.listdir(cache)) == 2


def test_other_weights_are_another_entry(bundle, cache, tmp_path):
    _, out = hit(bundle)
    model = onnx.load(bundle.file("text_conditioner.onnx"))
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[-1, -1] += 1
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, tmp_path / "text_conditioner.onnx")
    engine = load_engine("openvino")(tmp_path / "text_conditioner.onnx", bundle.graph("text_conditioner"), threads=1)
    other = call(engine, {"prompt_embeds": np.ones((1, 8, 6))})["text_kv"]
    assert not compiled(engine).get_property("LOADED_FROM_CACHE") and np.abs(other - out).max() > 0.5


def test_a_torn_entry_is_made_again(bundle, cache):
    _, out = hit(bundle)
    (entry,) = cache.iterdir()
    os.chmod(entry, 0o600)
    os.truncate(entry, entry.stat().st_size // 2)
    found, again = hit(bundle)
    assert not found and np.array_equal(again, out)


def test_a_folder_that_others_can_write_to_is_not_trusted(bundle, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.warns(UserWarning, match="PIDIFF_CACHE must be a folder of the user's own with mode 700, or off, got .*: "):
        assert not hit(bundle)[0]
    assert not os.listdir(cache)


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDIFF_CACHE", "off")
    assert files.private_cache("x") is None
    monkeypatch.delenv("PIDIFF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    assert files.private_cache("x") == tmp_path / "home" / ".cache" / "pidiff" / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.private_cache("x") == tmp_path / "xdg" / "pidiff" / "x" and files.private_cache("x").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIDIFF_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="got .*x: part of the path is not a folder; nothing is cached"):
        assert files.private_cache("x") is None


def test_the_cache_stays_small(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    files.trim_folder(tmp_path, 25)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    files.trim_folder(tmp_path, 1)
    assert os.listdir(tmp_path) == ["a"]  # the newest is what was just made
