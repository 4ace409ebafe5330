"""Bundles with a UNet in int8: what they hold, how far they are from float, and what they leave as it is."""

import contextlib
import io
import shutil
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("diffusers")

from safetensors.numpy import load_file
from tiny_model import shared, write_overflowing

from pidiff.checkpoint import CheckpointError
from pidiff.export import bundle as exporter
from pidiff.export.__main__ import main
from pidiff.export.calibrate import BOUND, choose, record
from pidiff.export.quantize import INT8_FILE
from pidiff.export.verify import BOUNDS, open_session
from pidiff.model import load_model
from pidiff.runtime import Pipeline
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.identity import Identity
from pidiff.runtime.preflight import ENGINE_GRAPHS

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def float_bundle(tmp_path_factory):
    return Bundle.open(shared("fused", tmp_path_factory))


@pytest.fixture
def same_graphs(float_bundle, monkeypatch):
    """Exports of the bundle `fused` take its graphs as they are: tracing them takes longest."""
    monkeypatch.setattr(exporter._Export, "_write", copy_of(float_bundle))


def copy_of(bundle):
    def write(self, graph, case):
        shutil.copyfile(bundle.path / f"{graph.name}.onnx", self.root / f"{graph.name}.onnx")
        self.graphs[graph.name] = bundle.graph(graph.name)
        return graph.name, case

    return write


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory):
    """By the command line, from the bundle `fused`; opening it checks every hash."""
    source, out = shared("fused", tmp_path_factory), tmp_path_factory.mktemp("int8") / "out"
    with mock.patch.object(exporter._Export, "_write", copy_of(Bundle.open(source))):
        assert main([str(source), str(out), "--int8", "--quiet", "--report", "short"]) == 0
    return Bundle.open(out)


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """Of plain operators, its graphs traced, with a picture of each engine."""
    out, said = tmp_path_factory.mktemp("standard") / "out", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([str(shared("residual", tmp_path_factory)), str(out), "--int8", "--attention", "standard", "--report", "full"]) == 0
    assert "unet keeps in float32" in said.getvalue()
    return Bundle.open(out)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The same in float16, of a model with layers that overflow it: (model folder, bundle)"""
    folder = tmp_path_factory.mktemp("half")
    model = write_overflowing(folder / "model")
    assert main([str(model), str(folder / "out"), "--int8", "--fp16", "--attention", "standard", "--quiet", "--report", "full"]) == 0
    return model, Bundle.open(folder / "out")


def average(bundle):
    return load_file(bundle.path / "w_plus_encoder/model.safetensors")["latent_avg"].astype(np.float32)


def somebody(bundle, seed=1):
    return Identity(average(bundle) + np.random.default_rng(seed).standard_normal(512).astype(np.float32))


def nodes(bundle, name):
    return onnx.load(bundle.path / f"{name}.onnx", load_external_data=False).graph.node


def rounding(name, stored, before):
    """The largest error of a layer's int8 weight, in units of its scales."""
    weight, scale, value = (x.astype(np.float32) for x in (stored[f"{name}.weight"], stored[f"{name}.scale"], before[f"{name}.weight"]))
    axis = int(weight.ndim == 2)        # a MatMul takes its weight as [in, out], a Conv as [out, in, ...]
    scale = np.expand_dims(scale, [i for i in range(weight.ndim) if i != axis])
    return (np.abs(weight * scale - (value.T if axis else value)) / scale).max()


def test_manifest_and_report_say_what_was_kept_and_why(int8_bundle):
    m = int8_bundle.manifest
    report = int8_bundle.json("report.json")["int8"]
    assert m.precision == "int8" and set(m.float32_layers) == {"unet"}
    assert m.float32_layers["unet"] == report["kept_in_float32"] and all("alone in int8" in why for why in report["kept_in_float32"].values())
    assert 0 < report["relative_error"] <= report["bound"] == BOUND and report["int8_layers"] > 20
    assert 0 < m.parity["unet"]["max_rel"] <= BOUNDS["int8"] and m.parity["vae_decoder"]["max_rel"] <= BOUNDS["fp32"]
    page = (int8_bundle.path / "report.html").read_text()
    assert all(layer in page for layer in report["kept_in_float32"])


def test_weights_are_stored_once_and_the_bundle_shrinks(float_bundle, int8_bundle):
    stored, left, before = (load_file(b.path / f) for b, f in ((int8_bundle, INT8_FILE), (int8_bundle, UNET_FILE), (float_bundle, UNET_FILE)))
    layers = {k.removesuffix(".weight") for k in stored if k.endswith(".weight")}
    assert not layers & set(int8_bundle.manifest.float32_layers["unet"])
    assert {stored[f"{n}.weight"].dtype.name for n in layers} == {"int8"}
    assert set(before) - set(left) == {f"{n}.weight" for n in layers}
    assert all(np.array_equal(left[k], before[k]) for k in left)
    assert all(rounding(name, stored, before) <= 0.51 for name in layers)
    size = lambda b: sum(f.size for k, f in b.manifest.files.items() if k.startswith("unet/"))
    assert size(int8_bundle) < 0.8 * size(float_bundle)


def test_only_the_unet_is_changed(float_bundle, int8_bundle):
    """Attention stays in float, and whoever was enrolled stays the same person."""
    kinds = [(n.domain, n.op_type) for n in nodes(int8_bundle, "unet")]
    assert kinds.count(("pidiff", "IdentityAttention")) == kinds.count(("pidiff", "Attention")) == 4
    assert kinds.count(("", "QuantizeLinear")) > 20 and ("", "QuantizeLinear") in [(n.domain, n.op_type) for n in nodes(int8_bundle, "unet_cached")]
    for name in set(int8_bundle.manifest.graphs) - {"unet", "unet_cached"}:
        assert not any("Quantize" in n.op_type for n in nodes(int8_bundle, name)), name
    zero = {t.name: t for t in onnx.load(int8_bundle.path / "unet.onnx", load_external_data=False).graph.initializer if t.name.endswith(".zero")}
    assert zero and all(t.data_type == onnx.TensorProto.INT8 and not any(onnx.numpy_helper.to_array(t).ravel()) for t in zero.values()), \
        "TensorRT takes symmetric int8 only"
    before, after = (Pipeline(b, "onnxruntime", threads=1) for b in (float_bundle, int8_bundle))
    assert np.array_equal(before.fold(somebody(float_bundle)), after.fold(somebody(float_bundle)))
    assert np.array_equal(before.prepare("a person"), after.prepare("a person"))


def test_the_graph_is_within_the_stated_error_of_float(float_bundle, int8_bundle):
    """On calls of the sampling loop that set no range: other people, half of the strength."""
    calls = [{**c, "id_scale": np.full_like(c["id_scale"], 0.5)} for c in record(float_bundle, average(float_bundle) + 0.1)]
    results = [[open_session(b.path / "unet.onnx", True).run(["model_output"], c)[0] for c in calls[::6]] for b in (float_bundle, int8_bundle)]
    expected, got = map(np.array, results)
    error = np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean())
    assert 1e-4 < error < 2 * BOUND


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_picture_is_drawn_and_strength_0_is_the_base_model(int8_bundle, float_bundle, engine):
    pytest.importorskip(engine)
    pipeline = Pipeline(int8_bundle, engine, threads=1)
    options = dict(prompt="a photo of a person", num_inference_steps=3, seed=3)
    draw = lambda person, **more: pipeline.generate(person, **options, **more).images[0]
    one, other = somebody(int8_bundle, 1), somebody(int8_bundle, 2)
    assert np.array_equal(draw(one, id_scale=0.0), draw(other, id_scale=0.0))
    assert not np.array_equal(draw(one), draw(other))
    assert np.ptp(draw(one, cache_interval=2)) > 0
    expected = Pipeline(float_bundle, "onnxruntime", threads=1).generate(one, **options).images[0]
    assert np.abs(draw(one).astype(float) - expected).mean() < 6


def test_the_fewest_layers_are_kept_and_the_worst_first():
    harm = np.array([0.01, 0.02, 0.5, 0.001, 0.04])
    error = lambda on, calls: float(np.sqrt((harm[on] ** 2).sum()))
    kept, left = choose(error, list("abcde"), [{}] * 3)
    assert list(kept) == ["c", "e"] and left == pytest.approx(np.sqrt(0.01**2 + 0.02**2 + 0.001**2)) and "50.00 %" in kept["c"]


@pytest.mark.parametrize("options, said", [
    (["--opset", "23", "--attention", "standard"], "opset must be 18 with int8, got 23"),
])
def test_what_does_not_go_together_is_one_sentence(options, said, tmp_path, tmp_path_factory, capsys):
    assert main([str(shared("fused", tmp_path_factory)), str(tmp_path / "out"), "--int8", "--quiet", *options]) == 1
    assert capsys.readouterr().err == f"pidiff-export: {said}\n" and not list(tmp_path.iterdir())


def test_an_int8_bundle_is_no_model_to_export_or_train(int8_bundle, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="model must hold float weights, got the int8 bundle"):
        load_model(int8_bundle.path)
    assert main([str(int8_bundle.path), str(tmp_path / "out"), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pidiff-export: MODEL must hold float weights, got the int8 bundle") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_stopped_leaves_nothing(float_bundle, same_graphs, tmp_path, monkeypatch, capsys):
    def stop(*_):
        assert (next(tmp_path.glob(".out.*.part")) / "unet.onnx").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter._Export, "_verify", lambda self, written: None)
    monkeypatch.setattr(exporter, "calibrate", stop)
    assert main([str(float_bundle.path), str(tmp_path / "out"), "--int8", "--quiet"]) == 130
    assert "nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_whole_export_in_the_standard_form(standard):
    """PyTorch's picture is drawn before its weights are dropped."""
    assert standard.json("report.json")["picture"]["figures"]["onnxruntime"]["psnr_db"] > 15
    assert Pipeline(standard, "onnxruntime", threads=1).generate(None, "a person", num_inference_steps=2, seed=1).images


@pytest.mark.slow
def test_beside_float16_scales_are_in_float16_and_islands_stay_in_float32(half):
    """So that nothing is cast around a layer."""
    model, bundle = half
    m, report = bundle.manifest, bundle.json("report.json")
    assert m.precision == "int8-fp16" and set(m.float32_layers["unet"]) == {"unet.up_blocks.1.attentions.1", "unet.conv_norm_out"}
    assert report["graphs"]["unet"]["onnxruntime"]["computed_in"].startswith("int8 where quantised, else float16")
    assert report["int8"]["relative_error"] <= BOUND and report["picture"]["figures"]["onnxruntime"]["psnr_db"] > 15
    stored, before = load_file(bundle.path / INT8_FILE), load_file(model / UNET_FILE)
    layers = {k.removesuffix(".weight") for k in stored if k.endswith(".weight")}
    kept = report["int8"]["kept_in_float16"]
    assert len(layers) > 20 and not layers & set(kept) and not [n for n in (*layers, *kept) if n.startswith("up_blocks.1.attentions.1.")]
    assert all(rounding(name, stored, before) <= 0.57 for name in layers)      # a scale may have been rounded, 127 times
    graph = onnx.load(bundle.path / "unet.onnx", load_external_data=False)
    kinds = {t.name: t.data_type for t in graph.graph.initializer}
    assert {kinds[n.input[1]] for n in graph.graph.node if "Quantize" in n.op_type} == {onnx.TensorProto.FLOAT16}
    assert [o.version for o in graph.opset_import if not o.domain] == [19] == [bundle.manifest.opset]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_picture_beside_float16(half, engine):
    pytest.importorskip(engine)
    bundle = half[1]
    draw = lambda strength, seed: Pipeline(bundle, engine, threads=1).generate(  # noqa: E731
        somebody(bundle, seed), "a person", num_inference_steps=3, seed=3, id_scale=strength).images[0]
    assert np.array_equal(draw(0.0, 1), draw(0.0, 2)) and not np.array_equal(draw(1.0, 1), draw(1.0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["float32", "float16"])
def test_tensorrt_takes_its_layers_in_int8(rest, request):
    """TensorRT-RTX builds without a GPU. Its engine holds the weights of every int8 layer, a convolution's with the channels last."""
    pytest.importorskip("tensorrt_rtx")
    path = (request.getfixturevalue("standard") if rest == "float32" else request.getfixturevalue("half")[1]).path
    assert main(["--into", str(path), "--engine", "tensorrt-rtx", "--target", "sm86,sm89,sm120", "--quiet"]) == 0
    bundle = Bundle.open(path)
    (engines,) = bundle.manifest.engines.values()
    assert list(engines.graphs) == list(ENGINE_GRAPHS)
    built, weights = bytes(bundle.engine(engines.id, "unet")), load_file(bundle.path / INT8_FILE)
    rows = {k: v if v.ndim == 2 else np.moveaxis(v, 1, -1) for k, v in weights.items() if k.endswith(".weight")}
    assert len(rows) > 20 and not [k for k, v in rows.items() if any(np.ascontiguousarray(row).tobytes() not in built for row in v)]
