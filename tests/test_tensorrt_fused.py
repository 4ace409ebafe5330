"""Fused graphs as TensorRT engines: who takes them, what the builder process gets, and that the plug-in is there before an
engine is loaded. TensorRT is made up here (fake_tensorrt.py); test_tensorrt_plugin.py has the plug-in itself."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx")

from fake_tensorrt import engine_bytes, profiles
from test_engines import refused
from tiny_bundle import edit, write_tiny_bundle

from pidiff.export import engine_commands, engines
from pidiff.export.__main__ import main
from pidiff.export.plugin_nodes import read_for_plugins
from pidiff.runtime import EngineError, cuda
from pidiff.runtime import preflight as preflight_module
from pidiff.runtime.bundle import Bundle, sha256_file
from pidiff.runtime.compiled import CompiledEngines
from pidiff.runtime.cuda import Gpu
from pidiff.runtime.engine_specs import EngineFile, EngineSet, engine_path
from pidiff.runtime.engine_store import EngineStore
from pidiff.runtime.engines import tensorrt
from pidiff.runtime.preflight import ENGINE_GRAPHS, preflight

MINI = Path(__file__).resolve().parent.parent / "models" / "mini"
PLUGIN = ("PidiffIdentityAttention", "1", "pidiff")
ORIN = Gpu("Orin", "sm87", "12.6")
NO_LIBRARY = "this pidiff has no libpidiff_trt.so, it was built without nvcc or the headers of TensorRT 10.3 or newer"
# A builder that keeps what it was told, and the nodes of the graph that it was given.
BUILDER = """
import json, sys, onnx
job = json.load(sys.stdin)
if job["fused"]:
    job["nodes"] = [n.op_type for n in onnx.load_model_from_string(open(job["fused"]["graph"], "rb").read()).graph.node]
open({log!r}, "a").write(json.dumps(job) + "\\n")
open(job["out"], "wb").write(b"engine")
print(json.dumps({{"peak_rss": 1 << 20}}))
"""


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """A bundle that says that it is fused, and has a node of ours, though nothing could compute it."""
    path = write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
    model = onnx.load(path / "unet.onnx")
    node = next(n for n in model.graph.node if n.op_type == "Sigmoid")
    node.op_type, node.domain = "IdentityAttention", "pidiff"
    onnx.save(model, path / "unet.onnx")
    entry = {"sha256": sha256_file(path / "unet.onnx"), "size": (path / "unet.onnx").stat().st_size}
    return edit(path, lambda m: (m.update(attention="fused"), m["files"].update({"unet.onnx": entry})))


@pytest.fixture
def bundle(fused, tmp_path):
    return shutil.copytree(fused, tmp_path / "b")


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Return a function that installs the plug-in, or makes sure that there is none."""
    def use(installed=True):
        path = tmp_path / "libpidiff_trt.so"
        path.write_bytes(b"library") if installed else path.unlink(missing_ok=True)
        monkeypatch.setattr(tensorrt, "plugin_library", lambda: path)
        monkeypatch.setattr(engines, "plugin_library", lambda: path)
        return path
    return use


# --- export -----------------------------------------------------------------------------------------------------------

def test_the_parser_gets_the_plugins_names():
    """Of mini's UNet, which is fused as it is shipped."""
    before = onnx.load(MINI / "unet.onnx", load_external_data=False)
    after = onnx.load_model_from_string(read_for_plugins(MINI / "unet.onnx"))
    ours = [(a, b) for a, b in zip(before.graph.node, after.graph.node, strict=True) if a.domain == "pidiff"]
    assert {(a.op_type, b.op_type) for a, b in ours} == {("Attention", "PidiffAttention"), ("IdentityAttention", "PidiffIdentityAttention")}
    for a, b in ours:
        added = {x.name: x.s.decode() for x in b.attribute[len(a.attribute):]}
        assert added == {"plugin_namespace": "pidiff", "plugin_version": "1"}
        assert list(a.attribute) == list(b.attribute[:len(a.attribute)]) and (a.input, a.output) == (b.input, b.output)
    rest = [(a, b) for a, b in zip(before.graph.node, after.graph.node) if a.domain != "pidiff"]
    assert all(a == b for a, b in rest) and before.graph.initializer == after.graph.initializer


def test_a_build_gets_library_and_graph(bundle, library, monkeypatch, tmp_path):
    path, log = library(), tmp_path / "log"
    monkeypatch.setattr(engines, "installed_version", lambda backend: ("10.3.0", ""))
    monkeypatch.setattr(engines, "find_gpu", lambda: (ORIN, ""))
    monkeypatch.setattr(engines, "_BUILDER", [sys.executable, "-c", BUILDER.format(log=str(log))])
    assert main(["--into", str(bundle), "--engine", "tensorrt", "--attention", "fused", "--quiet"]) == 0
    jobs = [json.loads(line) for line in log.read_text().splitlines()]
    assert [Path(j["onnx"]).stem for j in jobs] == list(ENGINE_GRAPHS)
    for job in jobs:
        assert job["fused"]["library"] == str(path) and not Path(job["fused"]["graph"]).exists(), "a temporary file"
        assert ("PidiffIdentityAttention" in job["nodes"]) == (Path(job["onnx"]).stem == "unet")
    assert list(Bundle.open(bundle).manifest.engines) == ["tensorrt-sm87-10.3.0"]


def test_without_the_plugin_fused_is_refused_in_one_sentence(bundle, library, monkeypatch, capsys, tmp_path):
    library(installed=False)
    monkeypatch.setattr(engines, "installed_version", lambda backend: ("10.3.0", ""))
    monkeypatch.setattr(engines, "find_gpu", lambda: (ORIN, ""))
    said = refused(capsys, "--into", bundle, "--engine", "tensorrt")
    assert said.endswith(f"attention must be standard with --engine tensorrt, got fused: {NO_LIBRARY}; export the bundle again with "
                         "--engine tensorrt")
    said = refused(capsys, "mini", tmp_path / "out", "--engine", "tensorrt", "--attention", "fused")
    assert said.endswith(f"attention must be standard with --engine tensorrt, got fused: {NO_LIBRARY}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, attention", [([], "standard"), (["--attention", "fused"], "fused"),
                                                (["--attention", "standard"], "standard")])
def test_the_form_is_standard_unless_fused_is_asked_for(options, attention, library, monkeypatch, tmp_path):
    library()
    ran = []

    class Process:
        def __init__(self, command, **more):
            ran.append(command)

        def wait(self):
            return 7                # ends the command here

    monkeypatch.setattr(engines, "installed_version", lambda backend: ("10.3.0", ""))
    monkeypatch.setattr(engines, "find_gpu", lambda: (ORIN, ""))
    monkeypatch.setattr(engine_commands, "subprocess", types.SimpleNamespace(Popen=Process))
    assert main(["mini", str(tmp_path / "out"), "--engine", "tensorrt", *options]) == 7
    assert ran[0][-2:] == ["--attention", attention]


# --- runtime ----------------------------------------------------------------------------------------------------------

def with_engines(path, graphs=("vae_decoder", "text_conditioner")):
    """Engines of graphs that the fake can compute, which say that they hold a plug-in."""
    bundle, made = Bundle.open(path), EngineSet("tensorrt", "10.3.0", ("sm87",), {})
    with EngineStore(path) as store:
        for graph in graphs:
            spec = bundle.graph(graph)
            shapes = profiles(spec, (1, 1, 1))
            store.part(made, graph).write_bytes(engine_bytes(path / spec.file, spec, shapes, plugin=PLUGIN))
            frozen = tuple({n: tuple(map(tuple, s)) for n, s in p.items()} for p in shapes)
            store.add(made, graph, EngineFile(engine_path(made.id, graph), bundle.manifest.files[spec.file].sha256, "0" * 64, frozen))
    return Bundle.open(path)


@pytest.fixture
def here(gpu, monkeypatch):
    monkeypatch.setattr(preflight_module, "find_gpu", lambda: (ORIN, ""))
    return gpu("tensorrt", version="10.3.0")


def loads(trt):
    return [e for e in trt.events if isinstance(e, str) and e.startswith("load ")]


def test_the_plugin_is_loaded_once_before_the_first_engine(bundle, library, here):
    path = library()
    compiled = CompiledEngines(with_engines(bundle), "tensorrt")
    assert loads(here) == []
    kept = [compiled.load(graph) for graph in ("vae_decoder", "text_conditioner", "vae_decoder")]
    assert loads(here) == [f"load {path}"] and len(kept) == 3


def test_a_standard_bundle_needs_no_plugin(bundle, library, here):
    library()
    opened = with_engines(edit(bundle, lambda m: m.update(attention="standard")))
    with pytest.raises(EngineError, match="must deserialise in tensorrt 10.3.0, got: Cannot find plugin: PidiffIdentityAttention"):
        CompiledEngines(opened, "tensorrt").load("vae_decoder")
    assert loads(here) == []


def test_a_plugin_that_cannot_be_loaded_is_one_sentence(bundle, library, here):
    library()
    compiled, here.fail = CompiledEngines(with_engines(bundle), "tensorrt"), "load_library"
    with pytest.raises(EngineError, match="graph vae_decoder must load its plug-in in tensorrt 10.3.0, got: no reason given"):
        compiled.load("vae_decoder")


def test_without_the_plugin_another_engine_is_used(bundle, library, here, capsys):
    """Known before an engine is loaded, and to --check."""
    library(installed=False)
    opened = with_engines(bundle, ENGINE_GRAPHS)
    found = preflight(opened)
    assert {(f.verdict, f.why) for f in found.findings} == {("fallback", NO_LIBRARY)} and found.status == 5
    assert main(["--check", str(bundle)]) == 5
    assert f"falls back to onnxruntime: {NO_LIBRARY}" in capsys.readouterr().out
    with pytest.raises(EngineError, match="engine tensorrt must run .* on this machine, got: this pidiff has no"):
        CompiledEngines(opened, "tensorrt")
    spec = opened.graph("vae_decoder")
    with pytest.raises(EngineError, match="graph vae_decoder must have its plug-in for tensorrt, got this pidiff has no libpidiff_trt"):
        tensorrt.TensorRtEngine("tensorrt", b"", spec, (), cuda.Scratch(cuda.Device()), str, fused=True)
    library()
    assert preflight(opened).status == 0
