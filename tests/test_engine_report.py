"""Engines that are added to a bundle are in its report, and the bundle is whole at every moment of that."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("onnx")

from test_engines import build, builder
from test_tensorrt_pipeline import with_engines
from tiny_bundle import write_tiny_bundle
from tiny_engines import add

from pidiff.export import engine_report
from pidiff.export.__main__ import main
from pidiff.export.engine_report import engines_section, update_report
from pidiff.export.pages import page
from pidiff.runtime.bundle import REPORTS, Bundle, BundleError, BundleWriter
from pidiff.runtime.engine_store import EngineStore
from pidiff.runtime.preflight import ENGINE_GRAPHS

assert builder, "a fixture"
NAME = "tensorrt-rtx-sm86+sm89+sm120-9.9"


def with_report(plain, path):
    """Copy a tiny bundle and put a report into it, as an export does."""
    fields = {k: v for k, v in json.loads((plain / "manifest.json").read_text()).items() if k not in ("files", "schema_version")}
    with BundleWriter(path) as writer:
        shutil.copytree(plain, writer.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        content = {"version": engine_report.VERSION, "graphs": {"unet": {"onnxruntime": {"max_abs": 0.5}}}, "compiled_engines": {}}
        (writer.path / "report.json").write_text(json.dumps(content))
        body = f"<h1>Verification</h1>{engines_section({})}<p class=note>Made with onnx.</p>"
        (writer.path / "report.html").write_text(page("Verification", body))
        writer.commit(**fields)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def bundle(plain, tmp_path):
    return with_report(plain, tmp_path / "b")


def read(path):
    """(compiled_engines of report.json, report.html), of a bundle whose hashes were checked."""
    Bundle.open(path)
    content = json.loads((path / "report.json").read_text())
    assert content["graphs"] == {"unet": {"onnxruntime": {"max_abs": 0.5}}}, "what the export measured stays"
    return content["compiled_engines"], (path / "report.html").read_text()


def test_new_engines_are_listed(bundle, builder):
    built, (before, page) = builder(), read(bundle)
    assert before == {} and "None. <code>pidiff-export --into" in page
    assert build(bundle) == 0
    found, page = read(bundle)
    files = Bundle.open(bundle).manifest.files
    assert set(found) == {NAME} and set(found[NAME]) == set(ENGINE_GRAPHS)
    for graph, entry in found[NAME].items():
        assert entry["state"] == "built, not run here: no NVIDIA driver"
        spec = files[f"engines/{NAME}/{graph}.engine"]
        assert (entry["sha256"], entry["bytes"]) == (spec.sha256, spec.size)
        assert f"<td>{NAME}<td>{graph}<td>0.0<td>built, not run here: no NVIDIA driver<td" in page
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("<p class=note>Made with onnx.</p></body></html>")
    assert page.count("<h2>Compiled engines</h2>") == 1 and "None." not in page
    manifest = (bundle / "manifest.json").read_bytes()
    assert build(bundle) == 0 and len(built()) == 7 and (bundle / "manifest.json").read_bytes() == manifest, "nothing new, nothing written"


def test_what_was_built_before_a_crash_is_listed_and_engines_that_go_are_not(bundle, builder):
    builder("unet", "sys.exit(1)")
    assert build(bundle) == 1
    found, _ = read(bundle)
    assert 0 < len(found[NAME]) < 7 and "unet" not in found[NAME]
    builder(version="10.0")
    assert build(bundle) == 0
    found, page = read(bundle)
    assert list(found) == [NAME.replace("9.9", "10.0")] and NAME not in page


def test_a_new_signature_covers_the_report(bundle, builder, tmp_path):
    pytest.importorskip("cryptography")
    from pidiff.runtime.signature import new_key

    secret, public = new_key(tmp_path / "k")
    builder()
    assert build(bundle, "--sign", str(secret)) == 0
    assert NAME in read(bundle)[0]
    (bundle / "report.html").write_text("another")
    with pytest.raises(BundleError, match="report.html must have"):
        Bundle.open(bundle, require_signature=public)


def test_a_bundle_without_a_report_gets_none(plain, builder, tmp_path):
    path = shutil.copytree(plain, tmp_path / "b")
    builder()
    assert build(path) == 0
    assert not set(REPORTS) & set(Bundle.open(path).manifest.files) and not list(path.glob("report*"))


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"version": 2}'])
def test_a_report_of_another_program_is_left_alone(plain, builder, tmp_path, text):
    path = with_report(plain, tmp_path / "b")
    with EngineStore(path) as store:
        store.replace_report({"report.json": text.encode()})
    builder()
    assert build(path) == 0 and (path / "report.json").read_text() == text
    Bundle.open(path)


def test_a_report_of_the_first_version_is_brought_up(bundle, builder):
    old = {"version": 1, "graphs": {"unet": {"onnxruntime": {"max_abs": 0.5}}}, "compiled_engines": "built, not run here"}
    with EngineStore(bundle) as store:
        store.replace_report({"report.json": json.dumps(old).encode()})
    builder()
    assert build(bundle) == 0 and set(read(bundle)[0]) == {NAME}


def test_an_exchange_that_was_killed_leaves_a_whole_bundle(bundle, tmp_path, monkeypatch):
    """... at each of its moments: the report is listed as it is, or not at all."""
    for moment in range(5):
        path, calls = shutil.copytree(bundle, tmp_path / f"{moment}"), []
        replace = EngineStore._replace

        def stop(self, name, data):
            if len(calls) == moment:
                raise KeyboardInterrupt
            calls.append(name)
            replace(self, name, data)

        add(path, unet=b"code")
        with monkeypatch.context() as patch:
            patch.setattr(EngineStore, "_replace", stop)
            try:
                with EngineStore(path) as store:
                    update_report(store)
            except KeyboardInterrupt:
                pass
        assert calls == ["manifest.json", "report.json", "report.html", "manifest.json"][:moment]
        Bundle.open(path)
        with EngineStore(path) as store:
            update_report(store)
        assert list(read(path)[0].values())[0].keys() == {"unet"}
        assert set(REPORTS) <= set(Bundle.open(path).manifest.files)


def test_only_an_unsigned_bundle_may_have_an_unlisted_report(plain, tmp_path):
    path = shutil.copytree(plain, tmp_path / "b")
    (path / "report.html").write_text("<script>")
    Bundle.open(path)
    (path / "manifest.sig").write_text("any")
    with pytest.raises(BundleError, match="must be listed in manifest.json, got the unlisted report.html"):
        Bundle.open(path)


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_engines_that_run_here_are_measured(bundle, gpu, backend):
    """On the made-up GPU, whose engines are ONNX Runtime with a mistake in one of them."""
    gpu(backend)
    with_engines(bundle, backend=backend)
    with EngineStore(bundle) as store:
        update_report(store)
    graphs, page = next(iter(read(bundle)[0].values())), read(bundle)[1]
    assert set(graphs) == set(ENGINE_GRAPHS)
    assert all(entry["max_abs"] < 1e-5 and entry["max_rel"] < 1e-5 and "state" not in entry for entry in graphs.values()), graphs
    assert page.count("<td>run here<td") == len(ENGINE_GRAPHS)


def test_what_cannot_be_measured_is_said(bundle, gpu, monkeypatch):
    trt = gpu()
    with_engines(bundle, ("unet", "vae_decoder"))
    trt.fail = "create_execution_context"
    with EngineStore(bundle) as store:
        update_report(store)
    graphs = next(iter(read(bundle)[0].values()))
    assert all(entry["state"].startswith("built, does not run here: graph ") for entry in graphs.values()), graphs
    trt.fail = None
    with EngineStore(bundle) as store:
        update_report(store)
    figures = read(bundle)[0]
    assert all("max_abs" in entry for entry in next(iter(figures.values())).values()), "it is tried again"
    # Figures of the same engine stay where there is no GPU.
    from pidiff.runtime import cuda

    monkeypatch.setattr(cuda, "LIBRARY", "no-such-driver.so")
    with EngineStore(bundle) as store:
        update_report(store)
    assert read(bundle)[0] == figures


def test_a_mistake_of_an_engine_is_in_the_figures(bundle, gpu, monkeypatch):
    gpu()
    with_engines(bundle, ("vae_decoder",))
    call = engine_report.call
    wrong = lambda engine, inputs, **axes: {n: a + np.float32(0.25 if hasattr(engine, "captured") else 0)
                                            for n, a in call(engine, inputs, **axes).items()}
    monkeypatch.setattr(engine_report, "call", wrong)
    with EngineStore(bundle) as store:
        update_report(store)
    assert next(iter(read(bundle)[0].values()))["vae_decoder"]["max_abs"] == pytest.approx(0.25, abs=1e-4)


def test_the_command_line_says_the_same(bundle, builder, capsys):
    builder()
    assert main(["--into", str(bundle), "--engine", "tensorrt-rtx"]) == 0
    assert NAME in capsys.readouterr().out and NAME in read(bundle)[0]
