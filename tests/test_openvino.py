"""The OpenVINO engine: ONNX Runtime's and PyTorch's graphs and pictures, the caller's memory, the choice of the engine."""

import functools
import importlib.util
import json
import sys
import warnings

import numpy as np
import onnx
import pytest
from drawn_face import drawn_face
from references import attention_reference, identity_inputs, identity_mix_reference, require_close
from tiny_bundle import spec_of, write_tiny_bundle

if importlib.util.find_spec("openvino") is None:
    pytest.skip("needs openvino", allow_module_level=True)

from pidiff.runtime import EngineError, Pipeline, engines
from pidiff.runtime.__main__ import enroll, generate
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engines import call, choose_engine, load_engine
from pidiff.runtime.engines import openvino as engine_module
from pidiff.runtime.engines.openvino_ops import core
from pidiff.runtime.images import encode_png
from pidiff.runtime.pipeline import HOT_GRAPHS

core()  # imports openvino as the runtime does
import openvino

PROMPT = "a photo of person"
AXES = {"B": 3, "P": 2, "N": 4, "batch": 3, "height": 48, "width": 40, "rows": 19, "columns": 15}
BFLOAT16 = core().get_property("CPU", "INFERENCE_PRECISION_HINT") == openvino.Type.bf16
needs_bfloat16 = pytest.mark.skipif(not BFLOAT16, reason="the processor has no bfloat16 instructions")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Name -> folder of a bundle; None is the shipped one, whose attention is fused."""
    folder = tmp_path_factory.mktemp("tiny")
    return {"fp32": write_tiny_bundle(folder / "32"), "fp16": write_tiny_bundle(folder / "16", "float16"), "mini": None}


def opened(bundle, graph, name="openvino", **options):
    spec = bundle.graph(graph)
    return load_engine(name)(bundle.file(spec.file), spec, fused=bundle.manifest.attention == "fused",
                             **{"threads": 1, **options})


def drawn_inputs(spec, rng, **axes):
    def draw(tensor):
        shape = [{**AXES, **axes}.get(a, a) for a in tensor.shape]
        return rng.integers(0, 10, shape) if tensor.dtype == "int64" else rng.random(shape).astype(tensor.dtype)

    return {t.name: draw(t) for t in spec.inputs}


def compiled(engine):
    return engine._request.get_compiled_model()


def somebody(pipe):
    return pipe.enroll(drawn_face(256))


# --- the same numbers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["fp32", "fp16", "mini"])
def test_every_graph_equals_onnx_runtime(bundles, name, rng):
    bundle = Bundle.open(bundles[name])
    for graph, spec in bundle.manifest.graphs.items():
        inputs, sizes = drawn_inputs(spec, rng), {"rows": AXES["rows"], "columns": AXES["columns"]}
        expected = call(opened(bundle, graph, "onnxruntime"), inputs, **sizes)
        # float16 graphs: ONNX Runtime rounds after every node, OpenVINO at the end.
        unit = np.finfo(np.float16).eps if "float16" in [t.dtype for t in spec.outputs] else 1e-5
        ways = [(False, "full", unit), (True, "full", unit), (True, "auto", 8 * 2**-8)]
        if name == "mini":  # each compilation takes seconds: only as a pipeline loads them
            ways = ways[1:] if graph in HOT_GRAPHS else ways[:1]
        for static, precision, allowed in ways:
            got = call(opened(bundle, graph, static=static, precision=precision), inputs, **sizes)
            for key, value in expected.items():
                error = np.abs(got[key].astype(np.float64) - value).max() / np.abs(value).max()
                assert error <= allowed, f"{graph} {key} {precision}: {error:.2g}"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("null, residual, people, dim, queries, keys", [
    (True, False, 1, 40, 129, 77), (False, True, 2, 8, 9, 7), (True, True, 3, 80, 1, 77), (False, False, 1, 160, 64, 1)])
def test_fused_nodes(tmp_path, rng, dtype, null, residual, people, dim, queries, keys):
    """Against float64, by the rule of references.py. With one head more than tokens, no axis can pass for another."""
    heads, tokens = 5, 4
    _, x, a, v_id, mask, scale = identity_inputs(rng, dtype, queries, heads, dim, people, tokens, null)
    q = rng.standard_normal(x.shape).astype(dtype)
    k, v = (rng.standard_normal((2, keys, heads * dim)).astype(dtype) for _ in range(2))
    inputs = {"q": q, "k": k, "v": v, "x": x, "a": a, "v_id": v_id, "mask": mask, "scale": scale}
    attributes = {"num_heads": heads, "has_null": int(null), "residual": int(residual)}
    path = save_node(tmp_path, "IdentityAttention", inputs, {"out": q.shape, "id_mass": mask.shape}, attributes)
    got = call(load_engine("openvino")(path, spec_of(path), fused=True, threads=1), inputs)

    def reference(kind):
        h = attention_reference(q, k, v, heads, kind)
        return (h, *identity_mix_reference(h, h if residual else x, a, v_id, mask, scale, heads, null, kind))

    exact, rounded = reference(np.float64), reference(dtype)
    for key, e, r in zip(("out", "id_mass"), exact[1:], rounded[1:]):
        require_close(got[key], e, r, exact[0], v_id)
    path = save_node(tmp_path, "Attention", {n: inputs[n] for n in "qkv"}, {"out": q.shape}, {"num_heads": heads})
    got = call(load_engine("openvino")(path, spec_of(path), fused=True, threads=1), inputs)
    require_close(got["out"], exact[0], rounded[0], v)


def save_node(folder, op, inputs, outputs, attributes):
    """Write a graph of one node of the domain `pidiff`, batch and tokens free."""
    helper = onnx.helper
    kind = helper.np_dtype_to_tensor_dtype(next(iter(inputs.values())).dtype)
    value = lambda name, shape: helper.make_tensor_value_info(name, kind, ["B", *(f"{name}{i}" for i in range(1, len(shape)))])
    values = [[value(n, getattr(x, "shape", x)) for n, x in group.items()] for group in (inputs, outputs)]
    for output, shape in zip(values[1], outputs.values()):
        for axis, size in zip(output.type.tensor_type.shape.dim, shape):
            axis.dim_value = size
    node = helper.make_node(op, list(inputs), list(outputs), domain="pidiff", **attributes)
    model = helper.make_model(helper.make_graph([node], "g", *values), ir_version=9,
                              opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("pidiff", 1)])
    onnx.save(model, folder / f"{op}.onnx")
    return folder / f"{op}.onnx"


def make_pairs(tmp_path_factory):
    """(name, precision) -> (test_parity, its Pair in OpenVINO), made once for each `size` that graphs pass for."""
    parity, model = pytest.importorskip("test_parity"), pytest.importorskip("tiny_model")
    return functools.cache(lambda name, precision, size="small": (parity, parity.Pair(
        model.shared(name, tmp_path_factory), engine="openvino", precision=precision, threads=1)))


pairs = pytest.fixture(make_pairs, scope="module")


@pytest.mark.parametrize("name", ["fused", "fp16", "standard23"])
def test_whole_pictures_equal_pytorch(pairs, monkeypatch, name):
    parity, pair = pairs(name, "full")
    mask = parity.half_regions(pair.pipe.bundle.manifest.model.latent_shape[-1])
    on = parity.compare(pair, monkeypatch, pair.people, solver="dpmpp_2m", guidance_scale=2.0, id_mask=mask, id_scale=0.8,
                        level_scale=(1.0, 0.5, 1.5, 0.0), id_start=0.34)
    off = parity.compare(pair, monkeypatch, [], solver="dpmpp_2m", guidance_scale=2.0)
    assert np.abs(on - off).max() > 1e-3


def test_cached_features_equal_pytorchs(pairs, monkeypatch):
    """Two graphs take turns on the same memory, with guidance and without."""
    parity, pair = pairs("fused", "full")
    parity.compare(pair, monkeypatch, pair.people[:1], solver="ddim", steps=6, cache_interval=2, guidance_interval=(0.35, 0.7), id_start=0.2)


# --- whole pictures --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, precision", [*((name, "full") for name in ("fp32", "fp16")), ("mini", "auto"),
                                             *(pytest.param(name, "auto", marks=needs_bfloat16) for name in ("fp32", "fp16"))])
def test_pictures(bundles, name, precision):
    """The picture of ONNX Runtime; nobody and a strength of 0 are the base model bit for bit; seeds stay themselves."""
    pipe = Pipeline.from_bundle(bundles[name], engine="openvino", precision=precision, threads=1)
    other = Pipeline.from_bundle(bundles[name], engine="onnxruntime", threads=1)
    me, options = somebody(pipe), {"num_inference_steps": 2}
    assert np.allclose(me.w_plus, somebody(other).w_plus, atol=2e-3 if name == "fp16" else 1e-4)
    levels = {"full": 3 if name == "fp16" else 1, "auto": 12 if BFLOAT16 else 1}[precision]       # the worst pixel of three pictures
    result = pipe.generate(me, PROMPT, seed=[5, 6, 2**40], **options)
    expected = other.generate(me, PROMPT, seed=[5, 6, 2**40], **options)
    assert result.engine == "openvino"
    difference = np.abs(np.array(result.images, int) - expected.images)
    assert difference.max() <= levels and difference.mean() <= max(1, levels / 8)
    assert np.abs(result.identity_map - expected.identity_map).max() <= levels / 100
    for seed, image in zip([5, 6], result.images):
        assert np.abs(pipe.generate(me, PROMPT, seed=seed, **options).images[0].astype(int) - image).max() <= 2 * levels
    again = pipe.generate(me, PROMPT, seed=[5, 6, 2**40], **options)
    assert np.array_equal(again.images, result.images)
    base = pipe.generate(None, PROMPT, seed=5, **options).images[0]
    for off in ({"id_scale": 0}, {"id_start": 1.0}):
        assert np.array_equal(pipe.generate(me, PROMPT, seed=5, **off, **options).images[0], base)
    assert not np.array_equal(pipe.generate(me, PROMPT, seed=5, **options).images[0], base)


# --- arrays and shapes -----------------------------------------------------------------------------------------------

@pytest.fixture
def conditioner(bundles):
    return opened(Bundle.open(bundles["fp32"]), "text_conditioner")


def test_the_callers_memory_is_used(conditioner):
    embeds, out = np.zeros((1, 8, 6), np.float32), np.full((1, 8, 20), 7, np.float32)
    conditioner.bind({"prompt_embeds": embeds, "text_kv": out})
    for name, array in (("prompt_embeds", embeds), ("text_kv", out)):
        assert conditioner._request.get_tensor(name).data.ctypes.data == array.ctypes.data
    conditioner.run()
    assert not out.any()
    embeds += 1
    conditioner.run()
    assert out.any() and np.array_equal(out, call(conditioner, {"prompt_embeds": embeds})["text_kv"])


def test_binding_again_leaves_the_old_arrays_alone(conditioner):
    embeds, old, new = np.ones((1, 8, 6), np.float32), np.zeros((1, 8, 20), np.float32), np.zeros((1, 8, 20), np.float32)
    conditioner.bind({"prompt_embeds": embeds, "text_kv": old}, constant=("prompt_embeds",))
    conditioner.run()
    kept = old.copy()
    conditioner.bind({"text_kv": new})
    embeds *= 2
    conditioner.run()
    assert kept.any() and np.array_equal(old, kept) and np.allclose(new, 2 * kept, atol=1e-6)


def test_read_only_inputs_are_used_in_place(conditioner):
    base, out = np.ones((1, 8, 6), np.float32), np.zeros((1, 8, 20), np.float32)
    view = base.view()
    view.flags.writeable = False
    conditioner.bind({"prompt_embeds": view, "text_kv": out})
    conditioner.run()
    once = out.copy()
    base *= 3
    conditioner.run()
    assert once.any() and np.allclose(out, 3 * once, atol=1e-5)
    out.flags.writeable = False
    with pytest.raises(EngineError, match="text_kv must be writable, got a read-only array"):
        conditioner.bind({"text_kv": out})


@pytest.mark.parametrize("tensors, match", [
    ({}, "tensors must include prompt_embeds, text_kv, got"),
    ({"prompt_embeds": np.zeros((1, 8, 6), np.float32)}, "tensors must include text_kv, got"),
    ({"embeds": np.zeros(1, np.float32)}, "tensors must be among prompt_embeds, text_kv, got 'embeds'"),
    ({"prompt_embeds": np.zeros((1, 8, 6))}, "prompt_embeds must be a contiguous .* float32 array, got .* float64"),
    ({"prompt_embeds": np.zeros((1, 8, 7), np.float32)}, r"\['B', 8, 6\] float32 array, got \[1, 8, 7\]"),
    ({"prompt_embeds": np.zeros((1, 6, 8), np.float32).transpose(0, 2, 1)}, "contiguous"),
])
def test_wrong_tensors(conditioner, tensors, match):
    with pytest.raises(EngineError, match=match):
        conditioner.bind(tensors)
    with pytest.raises(EngineError, match="tensors must be bound before a run, got none"):
        conditioner.run()


@pytest.mark.parametrize("static", [True, False])
def test_several_shapes(bundles, rng, static):
    """Each shape is compiled for itself when static, the last few are kept; else one serves all."""
    bundle = Bundle.open(bundles["fp32"])
    engine, other = opened(bundle, "unet", static=static), opened(bundle, "unet", "onnxruntime")
    for batch, people in ((2, 1), (1, 1), (2, 1), (3, 2), (2, 1)):
        inputs = drawn_inputs(bundle.graph("unet"), rng, B=batch, P=people)
        expected = call(other, inputs)
        for name, value in call(engine, inputs).items():
            np.testing.assert_allclose(value, expected[name], atol=1e-5)
        assert compiled(engine).input("latents").partial_shape.is_static == static
    assert len(engine._requests) == (engine_module.KEPT_SHAPES if static else 1)


@pytest.mark.parametrize("lean, room, kept", [(True, None, (1, 1, 1, 2, 2)), (False, 1, (1, 1, 1, 2, 2)), (False, None, (1, 2, 1, 2, 2)), (False, 1 << 40, (1, 2, 1, 2, 2)),
                                              (False, "one graph", (1, 1, 1, 1, 1))])
def test_large_graphs_are_compiled_once_for_any_batch_where_memory_counts(bundles, rng, monkeypatch, lean, room, kept):
    """Asked to, short of memory or from the third number of pictures on (the second where memory is there for one graph), their weights are
    packed once, whatever that number; other shapes are compiled for themselves."""
    bundle = Bundle.open(bundles["fp32"])
    if room == "one graph":
        room = int(2.9 * 4 * sum(op.data.size for op in engine_module._constants(core().read_model(bundle.file("unet.onnx")))))
    monkeypatch.setattr(engine_module, "_is_large", lambda *_: True)
    monkeypatch.setattr(engine_module, "available_memory", lambda: room)
    engine, other = opened(bundle, "unet", static=True, lean=lean), opened(bundle, "unet", "onnxruntime")
    for (batch, people), compiled_now in zip(((2, 1), (1, 1), (3, 1), (2, 2), (1, 1)), kept):
        inputs = drawn_inputs(bundle.graph("unet"), rng, B=batch, P=people)
        expected = call(other, inputs)
        for name, value in call(engine, inputs).items():
            np.testing.assert_allclose(value, expected[name], atol=1e-5)
        assert len(engine._requests) == compiled_now


def test_other_shapes_than_batches_are_compiled_for_themselves(bundles, rng, monkeypatch):
    """However many numbers of people there were."""
    monkeypatch.setattr(engine_module, "_is_large", lambda *_: True)
    bundle = Bundle.open(bundles["fp32"])
    engine = opened(bundle, "unet", static=True)
    for batch, people in ((2, 1), (2, 2), (2, 3), (1, 3), (2, 1)):
        call(engine, drawn_inputs(bundle.graph("unet"), rng, B=batch, P=people))
        assert compiled(engine).input("latents").partial_shape.is_static


def test_threads(bundles):
    for threads in (1, 2):
        engine = opened(Bundle.open(bundles["fp32"]), "text_conditioner", threads=threads)
        call(engine, {"prompt_embeds": np.zeros((1, 8, 6))})
        assert compiled(engine).get_property("INFERENCE_NUM_THREADS") == threads


# --- graphs and installations that do not work -----------------------------------------------------------------------

def test_unusable_graphs(bundles, tmp_path):
    bundle = Bundle.open(bundles["fp32"])
    with pytest.raises(EngineError, match="device must be cpu with openvino, got 'cuda'"):
        opened(bundle, "unet", device="cuda")
    spec = bundle.graph("unet")
    with pytest.raises(EngineError, match="must have the tensors of its manifest, got .*prompt_embeds"):
        load_engine("openvino")(bundle.file("text_conditioner.onnx"), spec)
    (tmp_path / "unet.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="unet.onnx must load in OpenVINO [0-9.]+, got: ") as caught:
        load_engine("openvino")(tmp_path / "unet.onnx", spec)
    assert "\n" not in str(caught.value) and "src/" not in str(caught.value)


def test_not_installed(bundles, monkeypatch):
    find = engines.importlib.util.find_spec
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: find(name) if name == "onnxruntime" else None)
    with pytest.raises(EngineError, match=r"installed: onnxruntime\), got 'openvino': pip install 'pidiff-edge\[openvino\]'"):
        Pipeline.from_bundle(bundles["fp32"], engine="openvino")
    assert choose_engine("cpu", 1 << 40) == "onnxruntime"


@pytest.fixture
def too_old(monkeypatch):
    monkeypatch.setattr(openvino, "__version__", "2025.1.0-1-releases/2025/1")
    core.cache_clear()
    yield
    core.cache_clear()


def test_versions_that_compute_wrong_pictures_are_refused(bundles, too_old):
    with pytest.raises(EngineError, match="'openvino': openvino must be version 2025.2 or newer, got 2025.1.0"):
        opened(Bundle.open(bundles["fp32"]), "unet")


def test_broken_installation(bundles, monkeypatch):
    engine = load_engine("openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    core.cache_clear()
    with pytest.raises(EngineError, match="engine must work on this machine, got 'openvino': import of openvino halted"):
        engine(bundles["fp32"] / "unet.onnx", Bundle.open(bundles["fp32"]).graph("unet"))
    core.cache_clear()


# --- auto ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def worth_it(monkeypatch):
    """The tiny bundle counts as a large one, on a processor that OpenVINO was measured on."""
    monkeypatch.setattr(engines, "OPENVINO_BYTES", 0)
    monkeypatch.setattr(engines.platform, "machine", lambda: "x86_64")


def test_auto_chooses(bundles, worth_it, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Pipeline.from_bundle(bundles["fp32"]).engine == "openvino"
        assert choose_engine("cuda", 1 << 40) == "onnxruntime"
        monkeypatch.setattr(engines.platform, "machine", lambda: "aarch64")
        assert choose_engine("cpu", 1 << 40) == "onnxruntime"
        monkeypatch.undo()
        assert Pipeline.from_bundle(bundles["fp32"]).engine == "onnxruntime"  # too small


def test_auto_says_which_engine_it_cannot_use(bundles, worth_it, too_old):
    with pytest.warns(UserWarning, match="engine openvino cannot be used: .*2025.1.0; onnxruntime is used instead"):
        pipe = Pipeline.from_bundle(bundles["fp32"])
    assert pipe.engine == "onnxruntime" and pipe.generate(None, PROMPT, num_inference_steps=1).engine == "onnxruntime"


def test_auto_falls_back_when_a_graph_does_not_load(bundles, worth_it, monkeypatch):
    def fail(*_, **__):
        raise EngineError("unet.onnx must load in OpenVINO, got: no")

    pipe, named = Pipeline.from_bundle(bundles["fp32"]), Pipeline.from_bundle(bundles["fp32"], engine="openvino")
    monkeypatch.setattr(engine_module.OpenVinoEngine, "__init__", fail)
    with pytest.raises(EngineError, match="got: no"):
        named.generate(None, PROMPT, num_inference_steps=1)
    with pytest.warns(UserWarning, match="engine openvino cannot be used: unet.onnx .*; onnxruntime is used instead"):
        result = pipe.generate(None, PROMPT, seed=1, num_inference_steps=1)
    plain = Pipeline.from_bundle(bundles["fp32"], engine="onnxruntime").generate(None, PROMPT, seed=1, num_inference_steps=1)
    assert result.engine == "onnxruntime" and np.array_equal(result.images, plain.images)


def test_command_line(bundles, worth_it, tmp_path, capsys, monkeypatch):
    (tmp_path / "photo.png").write_bytes(encode_png(drawn_face(256)))
    bundle = ["--bundle", str(bundles["fp32"]), "--json"]
    base = ["--face", str(tmp_path / "photo.png"), "--prompt", PROMPT, "--out", str(tmp_path / "o.png"), *bundle]
    for more in ([], ["--engine", "openvino", "--precision", "full", "--threads", "1"]):
        assert generate(base + more) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["engine"] == "openvino" and report["precision"] == ("full" if more else "auto")
    assert enroll([str(tmp_path / "photo.png"), "--out", str(tmp_path / "me.safetensors"), *bundle]) == 0
    assert json.loads(capsys.readouterr().out)["engine"] == "openvino"
    monkeypatch.setattr(engine_module.OpenVinoEngine, "problem", staticmethod(lambda: "it is broken"))
    assert generate(base) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["engine"] == "onnxruntime"
    assert err == "pidiff-generate: warning: engine openvino cannot be used: it is broken; onnxruntime is used instead\n"
    assert generate([*base, "--engine", "openvino"]) == 1 and "got 'openvino': it is broken" in capsys.readouterr().err
