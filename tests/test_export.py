"""The exporter on tiny models: what a bundle holds, that graphs and weights are the model's, and bad input."""

import functools
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("diffusers")

from onnx.external_data_helper import ExternalDataInfo
from safetensors.torch import load_file
from tiny_model import make_adapter, make_unet, printed, shared

from pidiff.export.attention import Form
from pidiff.export.bundle import ExportOptions
from pidiff.export.parts import Sizes, example_of, unet_cases, unet_graphs, widths
from pidiff.export.step import step_unet
from pidiff.export.to_onnx import write_graph
from pidiff.export.verify import BOUNDS, custom_op_library, open_session, verify_graph
from pidiff.export.weights import ExportError, WeightIndex, load_stored, write_safetensors
from pidiff.model import load_model
from pidiff.runtime.bundle import Bundle

# name -> (mode of the model, options)
BUNDLES = {
    "fused": ("parallel", ExportOptions()),
    "standard23": ("residual", ExportOptions(Form("standard", 23))),
    "fp16": ("parallel", ExportOptions(fp16=True)),
}
GRAPHS = {"text_encoder", "w_plus_encoder", "text_conditioner", "id_conditioner", "time_conditioner", "unet", "unet_cached",
          "vae_decoder", "vae_encoder"}
FACES = {"face_pnet", "face_rnet", "face_onet"}
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def sources(tmp_path_factory):
    return {mode: shared(mode, tmp_path_factory) for mode in ("parallel", "residual")}


@pytest.fixture
def bundles(tmp_path_factory):
    return lambda name: shared(name, tmp_path_factory)


def nodes(path):
    return onnx.load(path, load_external_data=False).graph.node


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_opens_and_states_what_was_verified(bundles, name):
    mode, options = BUNDLES[name]
    bundle = Bundle.open(bundles(name))
    m = bundle.manifest
    assert GRAPHS | FACES <= set(m.graphs) and GRAPHS <= set(m.parity)
    for graph in GRAPHS:
        assert 0 <= m.parity[graph]["max_rel"] <= BOUNDS[m.precision], graph
        assert m.parity[graph]["mean_abs"] <= m.parity[graph]["max_abs"]
    assert (m.precision, m.attention, m.opset) == ("fp16" if options.fp16 else "fp32", options.form.attention, options.form.opset)
    dtype = "float16" if options.fp16 else "float32"
    assert {t.dtype for t in m.graphs["unet"].inputs} == {dtype}
    assert m.graphs["time_conditioner"].inputs[0].dtype == "float32" and m.graphs["time_conditioner"].outputs[0].dtype == dtype
    assert [t.name for t in m.graphs["unet"].outputs] == ["model_output", *["identity_map"][:mode == "parallel"], "deep_features"]
    assert m.model.unet.channels == (16, 16, 16, 32) and m.model.unet.heads == (2,) * 4
    size = (4, 8, 8) if mode == "parallel" else (4, "h", "w")      # an AutoencoderKL takes any
    assert m.model.image_size == (64 if mode == "parallel" else 16) and m.graphs["unet"].tensor("latents").shape[1:] == size
    assert UNET_FILE in m.sources and m.licences["model"] == "see LICENSE"
    assert bundle.json("schedule.json") == bundle.json("scheduler/scheduler_config.json")
    usual = {} if mode == "parallel" else {"guidance_scale": 7.5}
    assert m.scheduler == ({"num_inference_steps": 7} if name == "fp16" else usual)


@pytest.mark.parametrize("name", BUNDLES)
def test_custom_nodes_are_in_the_fused_form_only(bundles, name):
    fused = BUNDLES[name][1].form.fused
    own = [n for n in nodes(bundles(name) / "unet.onnx") if n.domain == "pidiff"]
    assert sorted(n.op_type for n in own) == (["Attention"] * 4 + ["IdentityAttention"] * 4 if fused else [])
    for node in own:
        values = {a.name: a.i for a in node.attribute}
        assert values == {"num_heads": 2, **({"has_null": 1, "residual": 0} if node.op_type == "IdentityAttention" else {})}
    if BUNDLES[name][1].form.opset == 23:
        assert sum(n.op_type == "Attention" and not n.domain for n in nodes(bundles(name) / "unet.onnx")) == 8
    for path in bundles(name).glob("*.onnx"):
        if not (own and path.stem.startswith("unet")):          # the checker knows no other domain than ONNX's
            onnx.checker.check_model(str(path), full_check=True)
        domains = {o.domain for o in onnx.load(path, load_external_data=False).opset_import}
        assert domains == ({"", "pidiff"} if own and path.stem.startswith("unet") else {""}), path


@pytest.mark.parametrize("name", ["fused", "standard23"])
def test_onnx_runtime_makes_one_kernel_of_gelu(bundles, name, tmp_path):
    """With opset 23 the exporter writes it as one node. (In float16 it does so where it has kernels for it, on GPUs.)"""
    import onnxruntime as ort

    root = shutil.copytree(bundles(name), tmp_path / "bundle")
    found = nodes(root / "unet.onnx")
    if BUNDLES[name][1].form.opset < 20:
        assert sum(n.op_type == "Erf" for n in found) == 4
        options = ort.SessionOptions()
        if BUNDLES[name][1].form.fused:
            options.register_custom_ops_library(str(custom_op_library()))
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(root / "optimised.onnx")
        ort.InferenceSession(str(root / "unet.onnx"), options, providers=["CPUExecutionProvider"])
        found = nodes(root / "optimised.onnx")
    assert sum(n.op_type == "Gelu" for n in found) == 4 and not any(n.op_type == "Erf" for n in found)


@pytest.mark.parametrize("name", BUNDLES)
def test_weights_are_stored_once_and_graphs_point_at_them(bundles, name):
    root, used = bundles(name), 0
    for graph in GRAPHS:
        inside = 0
        for tensor in onnx.load(root / f"{graph}.onnx", load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                inside += len(tensor.raw_data)
                continue
            info = ExternalDataInfo(tensor)
            key, value = tensors(root / info.location)[info.offset]
            assert tensor.name.split(".")[-1] == key.split(".")[-1]
            assert list(tensor.dims) == list(value.shape) and info.length == value.numel() * value.itemsize
            data = (root / info.location).read_bytes()[info.offset:info.offset + info.length]
            assert data == value.contiguous().view(torch.uint8).numpy().tobytes()
            used += 1
        assert inside < 16_384, f"{graph} holds {inside} bytes of constants"
    assert used > 200
    text = (root / "unet.onnx").read_bytes()
    assert b"site-packages" not in text and b"stack_trace" not in text, "paths of the exporting machine"


@functools.cache
def tensors(path):
    """Position in a safetensors file -> (key, tensor), read with the format's own library."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:8 + size])
    values = load_file(path)
    return {8 + size + header[k]["data_offsets"][0]: (k, v) for k, v in values.items() if v.numel()}


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_is_a_model_folder_with_equal_weights(bundles, sources, name):
    mode, options = BUNDLES[name]
    old, new = load_model(sources[mode]), load_model(bundles(name))
    for part in ("unet", "text_encoder", "vae", "w_plus_encoder", "adapter"):
        before, after = getattr(old, part).state_dict(), getattr(new, part).state_dict()
        assert before.keys() == after.keys()
        for key, value in before.items():
            want = value.half().float() if options.fp16 and value.is_floating_point() else value
            assert torch.equal(after[key], want), f"{part} {key}"
    stored = {v.dtype for v in load_file(bundles(name) / UNET_FILE).values()}
    assert stored == {torch.float32 if name == "standard23" else torch.float16}
    assert torch.equal(old.directions["smile"], new.directions["smile"])
    assert old.tokenizer("a photo of a person").input_ids == new.tokenizer("a photo of a person").input_ids


def test_a_bundle_can_be_exported_again(bundles):
    """The bundle fp16 was made from the bundle fused through the command line; it passes the origin on."""
    first, again = Bundle.open(bundles("fused")).manifest, Bundle.open(bundles("fp16")).manifest
    assert again.name == "again" and again.scheduler == {"num_inference_steps": 7} and first.name == "parallel"
    assert again.sources == first.sources and again.licences == first.licences
    for file, spec in first.files.items():
        if file.endswith(".safetensors"):
            assert again.files[file] == spec, file
    assert "again, fp16, fused attention, opset 18" in printed("fp16")
    for graph, figures in again.parity.items():
        assert f"{graph:<18}{figures['max_abs']:>11.2e}" in printed("fp16")


def step_case(mode, sizes, dtype=torch.float32):
    torch.manual_seed(1)
    unet = make_unet()
    adapter = make_adapter(unet, mode)
    sizes.samples = {"prompt_embeds": torch.randn(3, 12, 16), "latent_avg": torch.zeros(6, 512)}
    sizes.text_length, sizes.prompt_dim, sizes.layers, sizes.levels, sizes.side = 12, 16, 6, 2, 8
    with torch.no_grad():
        return unet, adapter, unet_cases(unet, adapter, sizes, dtype)["unet"]


@pytest.mark.parametrize("mode", ["parallel", "residual", "single"])
@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
def test_folded_equals_unfolded_and_the_unet_is_put_back(mode, size):
    sizes = type("Fixed", (Sizes,), {"latent_size": size})()
    unet, adapter, case = step_case(mode, sizes)
    hidden, before = torch.randn(1, 12, 16), dict(unet.attn_processors)
    with torch.no_grad():
        whole = unet(case.inputs["latents"][:1], 3, hidden).sample
        with step_unet(unet, adapter.config, Form("standard")) as step:
            outputs = step(**case.inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert torch.equal(unet(case.inputs["latents"][:1], 3, hidden).sample, whole)
    assert unet.attn_processors == before
    assert len(outputs) == len(case.expected) == (2 if mode == "parallel" else 1)
    for got, want in zip(outputs, case.expected):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    # The identity and its regions are really in these numbers.
    with torch.no_grad(), step_unet(unet, adapter.config, Form("standard")) as step:
        for name in ("id_fold", "id_mask", "id_scale", "text_kv", "time_row"):
            other = step(**{**case.inputs, name: case.inputs[name] * 0.5})
            assert not torch.allclose(other[0] if mode == "parallel" else other, outputs[0], atol=1e-4), name


FORMS = [("standard", 18, False, "parallel"), ("standard", 18, True, "residual"), ("standard", 23, True, "parallel"), ("fused", 23, True, "residual"),
         ("fused", 23, False, "parallel"), ("fused", 18, True, "residual"), ("fused", 18, False, "single")]


@pytest.mark.slow
@pytest.mark.parametrize("attention, opset, fp16, mode", FORMS)
def test_every_form_of_the_unet_agrees_with_pytorch_at_any_size(attention, opset, fp16, mode, tmp_path):
    dtype, form = torch.float16 if fp16 else torch.float32, Form(attention, opset)
    sizes = Sizes(free=True)
    unet, adapter, _ = step_case(mode, sizes)
    write_safetensors(tmp_path / "unet.safetensors", unet.state_dict(), dtype, "unet")
    load_stored(unet, tmp_path, "unet.safetensors")
    cases = {}
    for size in ((4, 6), (8, 8), (2, 12)):
        with torch.no_grad():
            fixed = type("Fixed", (Sizes,), {"latent_size": size})(free=True, samples=sizes.samples, text_length=12, prompt_dim=16,
                                                                  layers=6, levels=2)
            cases[size] = unet_cases(unet, adapter, fixed, dtype)["unet"]
    width = widths(unet, adapter)
    unet.to(dtype)
    weights = WeightIndex(tmp_path)
    weights.add(unet, "unet.safetensors")
    with step_unet(unet, adapter.config, form) as step:
        graph, = unet_graphs(step, sizes, width, dtype)
        spec = write_graph(graph, example_of(graph, sizes), opset, weights)
    for size, case in cases.items():
        parity = verify_graph(tmp_path / "unet.onnx", spec, case, "fp16" if fp16 else "fp32", form.fused)
        assert parity.max_rel < (1e-2 if fp16 else 5e-5), size
    session = open_session(tmp_path / "unet.onnx", form.fused)
    one = {k: v[:1, :1] if k in ("id_fold", "id_mask") else v[:1] for k, v in cases[(8, 8)].inputs.items()}
    one["id_scale"] = torch.zeros_like(one["id_scale"])
    alone = session.run(["model_output"], {k: v.numpy() for k, v in one.items()})[0]
    np.testing.assert_allclose(alone.astype(np.float32), cases[(8, 8)].expected[0][:1].numpy(), atol=1e-2 if fp16 else 1e-5)


def test_a_graph_must_use_the_stored_bytes(tmp_path):
    unet = make_unet()
    write_safetensors(tmp_path / "unet.safetensors", unet.state_dict(), None, "unet")
    weights = WeightIndex(tmp_path)
    weights.add(unet, "unet.safetensors")
    with torch.no_grad():
        unet.time_embedding.linear_1.weight[0, 0] += 1
    from pidiff.export.graphs import Graph, Tensors, TimeConditioner

    graph = Graph("time_conditioner", TimeConditioner(unet, torch.float32), Tensors(("timesteps",), (("N",),)),
                  Tensors(("time_table",), (("N", 112),)))
    with pytest.raises(ExportError, match="must use the stored time_embedding.linear_1.weight .* other values"):
        write_graph(graph, example_of(graph, Sizes()), 18, weights)


def test_safetensors_are_written_as_the_format_says(tmp_path):
    state = {"b": torch.randn(3, 5), "a": torch.arange(4), "half": torch.randn(7).half(), "none": torch.zeros(0, 2)}
    write_safetensors(tmp_path / "x.safetensors", state, torch.float16, "x")
    read = load_file(tmp_path / "x.safetensors")
    assert {k: v.dtype for k, v in read.items()} == {"b": torch.float16, "a": torch.int64, "half": torch.float16, "none": torch.float16}
    assert all(torch.equal(read[k], v.to(read[k].dtype)) for k, v in state.items())
    with pytest.raises(ExportError, match="weights must fit float16, got 1e.05 in x big"):
        write_safetensors(tmp_path / "y.safetensors", {"big": torch.tensor([1e5])}, torch.float16, "x")
    write_safetensors(tmp_path / "y.safetensors", {"edge": torch.tensor([65519.0])}, torch.float16, "x")
    assert load_file(tmp_path / "y.safetensors")["edge"] == 65504, "it is rounded down"
    for number in ("nan", "inf"):
        with pytest.raises(ExportError, match="weights must be finite, got NaN or infinity in x bad"):
            write_safetensors(tmp_path / "z.safetensors", {"bad": torch.tensor([1.0, float(number)])}, torch.float16, "x")
