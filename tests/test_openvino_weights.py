"""bfloat16 in the OpenVINO engine: where it computes in it, what it costs; and the weights of large graphs, kept on disk in what it computes in."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_openvino import PROMPT, compiled, drawn_inputs, make_pairs, needs_bfloat16, opened, somebody
from tiny_bundle import write_tiny_bundle

from pidiff.runtime import Pipeline
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engines import call
from pidiff.runtime.engines import openvino as engine_module
from pidiff.runtime.engines.openvino_ops import core
from pidiff.runtime.engines.openvino_weights import _rounded, rewritten

core()  # imports openvino as the runtime does
import openvino


pairs = pytest.fixture(make_pairs, scope="module")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {"fp32": write_tiny_bundle(folder / "32"), "fp16": write_tiny_bundle(folder / "16", "float16")}


@pytest.fixture
def large(monkeypatch, tmp_path):
    """A tiny graph counts as a large one; returns the folder of its cache."""
    monkeypatch.setattr(engine_module, "_is_large", lambda *_: True)
    monkeypatch.setenv("PIDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


@needs_bfloat16
def test_only_hot_graphs_are_rounded(bundles):
    """... so that an enrolled person is the same on every engine, and `full` rounds none."""
    for precision, rounded in (("auto", {"unet", "vae_decoder"}), ("full", set())):
        pipe = Pipeline.from_bundle(bundles["fp32"], engine="openvino", precision=precision, threads=1, keep=True)
        pipe.generate(somebody(pipe), PROMPT, num_inference_steps=1)
        kinds = {n: compiled(e).get_property("INFERENCE_PRECISION_HINT").to_string() for n, e in pipe._engines.items()}
        assert len(kinds) > 7 and {n for n, kind in kinds.items() if kind == "bf16"} == rounded


@pytest.mark.parametrize("native, precision, hint", [("bf16", "auto", "bf16"), ("bf16", "full", "f32"), ("f32", "auto", "f32"),
                                                     ("f16", "auto", "f32")])
def test_bfloat16_only_where_the_processor_has_it(monkeypatch, native, precision, hint):
    class Processor:
        def get_property(self, *_):
            return getattr(openvino.Type, native)

    monkeypatch.setattr(engine_module, "core", Processor)
    assert engine_module._config(None, precision)["INFERENCE_PRECISION_HINT"] == hint


@needs_bfloat16
@pytest.mark.parametrize("name", ["fused", "standard23"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_bfloat16_errs_like_pytorchs(pairs, name, size, request):
    """At most twice the error of PyTorch's autocast to bfloat16, and surely not float32."""
    if size == "large":
        request.getfixturevalue("large")
    torch = pytest.importorskip("torch")
    parity, pair = pairs(name, "auto", size)
    got, exact = parity.unet_call(pair)
    _, rounded = parity.unet_call(pair, torch.bfloat16)
    for key, value in exact.items():
        error = np.abs(got[key] - value).max()
        assert 1e-5 < error <= 2 * np.abs(rounded[key] - value).max() + 2**-8 * np.abs(value).max(), key


# --- large graphs ----------------------------------------------------------------------------------------------------

def drawn(bundle, rows=2):
    """(engine, its picture of the UNet) for the same inputs"""
    engine = opened(bundle, "unet", static=True, precision="auto")
    return engine, call(engine, drawn_inputs(bundle.graph("unet"), np.random.default_rng(0), B=rows, P=1))


@needs_bfloat16
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_weights_are_kept_in_bfloat16(bundles, large, name, monkeypatch):
    """Written once; then, and without a cache, the same numbers; no float32 copy of a weight is left."""
    bundle = Bundle.open(bundles[name])
    engine, first = drawn(bundle)
    kinds = {op.get_element_type().get_type_name() for op in engine._model.get_ops() if op.get_type_name() == "Constant"}
    assert "bf16" in kinds and not kinds & {"f16", "f32"}
    written = {file.name: file.stat().st_mtime_ns for file in large.iterdir()}
    assert sorted(name.partition(".")[2] for name in written) == ["bin", "xml"]
    _, second = drawn(bundle)
    assert {file.name: file.stat().st_mtime_ns for file in large.iterdir()} == written
    monkeypatch.setenv("PIDIFF_CACHE", "off")
    _, third = drawn(bundle)
    full = call(opened(bundle, "unet", static=True), drawn_inputs(bundle.graph("unet"), np.random.default_rng(0), B=2, P=1))
    for key, value in first.items():
        assert np.array_equal(value, second[key]) and np.array_equal(value, third[key]) and value.dtype == full[key].dtype
        assert 0 < np.abs(value.astype(float) - full[key]).max() < 0.05 * np.abs(full[key]).max()


@pytest.mark.parametrize("graph", ["w_plus_encoder", "unet"])
def test_sixteen_bits_are_kept_in_float32_where_that_is_computed_in(bundles, large, graph, monkeypatch):
    """Written once; the same numbers as without; float32 weights are mapped from the bundle itself, and OpenVINO writes nothing."""
    def drawn_in_full(bundle):
        return call(opened(bundle, graph, static=graph == "unet"), drawn_inputs(bundle.graph(graph), np.random.default_rng(0), B=2, P=1))

    drawn_in_full(Bundle.open(bundles["fp32"]))
    assert not large.is_dir() or not list(large.iterdir())
    bundle = Bundle.open(bundles["fp16"])
    first = drawn_in_full(bundle)
    written = {file.name: file.stat().st_mtime_ns for file in large.iterdir()}
    assert sorted(name.partition(".")[2] for name in written) == ["bin", "xml"] and all(name.startswith("f32-") for name in written)
    second = drawn_in_full(bundle)
    assert {file.name: file.stat().st_mtime_ns for file in large.iterdir()} == written
    monkeypatch.setenv("PIDIFF_CACHE", "off")
    third = drawn_in_full(bundle)
    for key, value in first.items():
        assert np.array_equal(value, second[key]) and value.dtype == bundle.graph(graph).tensor(key).dtype
        assert np.abs(value.astype(float) - third[key]).max() <= 1e-3 * np.abs(third[key]).max()


@needs_bfloat16
def test_a_torn_or_other_file_is_made_again(bundles, large, tmp_path):
    bundle = Bundle.open(bundles["fp32"])
    _, first = drawn(bundle)
    (kept,) = large.glob("*.bin")
    os.truncate(kept, kept.stat().st_size // 2)
    _, second = drawn(bundle)
    assert all(np.array_equal(value, second[key]) for key, value in first.items())
    model = onnx.load(bundle.file("unet.onnx"))
    model.doc_string = "another"
    onnx.save(model, tmp_path / "other.onnx")
    rewritten(core().read_model(tmp_path / "other.onnx"), tmp_path / "other.onnx", large, "bf16")
    assert len(list(large.glob("*.bin"))) == 2


@needs_bfloat16
def test_a_full_disk_is_no_error(bundles, large, monkeypatch):
    def fail(model, path, **_):
        path.with_suffix(".bin").write_bytes(b"half")
        raise RuntimeError("no space")

    _, first = drawn(Bundle.open(bundles["fp32"]))
    for file in large.iterdir():
        file.unlink()
    monkeypatch.setattr(openvino, "save_model", fail)
    _, second = drawn(Bundle.open(bundles["fp32"]))
    assert all(np.array_equal(value, second[key]) for key, value in first.items()) and not list(large.iterdir())


def test_int8_graphs_are_left_alone(tmp_path):
    weights = [numpy_helper.from_array(np.ones((4, 4), np.int8), "w"), numpy_helper.from_array(np.float32(0.1), "scale")]
    nodes = [helper.make_node("DequantizeLinear", ["w", "scale"], ["wide"]), helper.make_node("MatMul", ["x", "wide"], ["y"])]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4])] for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", *ends, weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
              tmp_path / "g.onnx")
    assert rewritten(core().read_model(tmp_path / "g.onnx"), tmp_path / "g.onnx", None, "bf16") is None


def test_rounding_is_pytorchs():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal((3, 1 << 21)).astype(np.float32) * 1e3
    values[0, :4] = 1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40          # two ties, a zero with a sign, a denormal
    got = _rounded(values).data.view(np.uint16)
    assert np.array_equal(got, torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())


@needs_bfloat16
def test_more_memory_is_predicted_where_no_weights_can_be_mapped(large, monkeypatch):
    loading = engine_module.OpenVinoEngine.loading
    mapped, full, other = (loading(1 << 30, *how) for how in ((True, "auto"), (True, "full"), (False, "auto")))
    monkeypatch.setenv("PIDIFF_CACHE", "off")
    assert 0.5 * 2**30 < mapped < 2**30 < loading(1 << 30, True, "auto") < loading(1 << 30, True, "full")
    assert 2**30 < full == other < loading(1 << 30, True, "full") == loading(1 << 30, False, "auto")


@needs_bfloat16
def test_our_convolutions_memory_is_predicted_where_they_are_used(monkeypatch):
    """By graphs that draw and are compiled for their shape; a graph that draws counts as large earlier."""
    loading, size = engine_module.OpenVinoEngine.loading, 1 << 30
    for faster in (None, "avx512"):
        monkeypatch.setattr(engine_module, "faster_kernel", lambda rounding, faster=faster: faster)
        for precision, more in (("auto", 0.13), ("full", 0.26)):
            assert loading(size, True, precision, lean=False) - loading(size, True, precision) == pytest.approx(more * size * bool(faster), abs=2)
        assert loading(size, False, "auto", lean=False) == loading(size, False, "auto")
    assert loading(100 << 20, True, "auto") > loading(150 << 20, True, "auto"), "a small graph is packed once for each of two shapes"
    assert loading(150 << 20, False, "auto") > 2 * loading(150 << 20, True, "auto")
