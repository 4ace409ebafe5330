"""The builder process beside TensorRT: timings of kernels that builds share. Whole builds: test_engines.py."""

import os
import types

import pytest

pytest.importorskip("onnx")

from pidiff.export import build_engine


class Config:
    """What a builder is told about weights and timings; it takes timings of its own GPU, as `known` begins, and new ones."""

    def __init__(self, known):
        self.known = known

    def create_timing_cache(self, content):
        return None if content == b"torn" else types.SimpleNamespace(content=content, serialize=lambda: self.known + b" and more")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        self.used = cache.content
        return cache.content in (b"", self.known)


@pytest.mark.parametrize("content, used", [(None, b""), (b"ours", b"ours"), (b"another GPU's", b""), (b"torn", b"")])
def test_timings_are_used_and_kept(tmp_path, content, used):
    path, config, log = tmp_path / "timings", Config(b"ours"), types.SimpleNamespace(first="")
    if content is not None:
        path.write_bytes(content)
    cache = build_engine._timings(config, str(path), log)
    assert config.used == used and log.first == ""
    build_engine._keep(str(path), cache.serialize())
    assert path.read_bytes() == b"ours and more" and os.listdir(tmp_path) == ["timings"] and path.stat().st_mode & 0o777 == 0o600
    build_engine._keep(str(tmp_path / "none" / "timings"), b"x")            # no error, and nothing is left
    (tmp_path / "taken").mkdir()
    build_engine._keep(str(tmp_path / "taken"), b"x")
    assert sorted(os.listdir(tmp_path)) == ["taken", "timings"]
    assert build_engine._timings(config, None, log) is None


def test_what_is_asked_of_tensorrt_is_there():
    trt = pytest.importorskip("tensorrt_rtx")
    assert trt.BuilderFlag.STRIP_PLAN and trt.ITimingCache.serialize and "ignore_mismatch: bool" in trt.IBuilderConfig.set_timing_cache.__doc__
