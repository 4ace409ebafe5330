"""Building engines: the command line, one process per graph, what is kept when it ends badly. TensorRT-RTX is real where
it is installed (`-k real`); elsewhere, and for crashes, a builder of three lines takes its place."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

onnx = pytest.importorskip("onnx")

from tiny_bundle import edit, write_tiny_bundle
from tiny_engines import use_builder

from pidiff.export import engines, memory
from pidiff.export.__main__ import main
from pidiff.export.profiles import Range, Shapes, profiles_of
from pidiff.runtime.bundle import Bundle, sha256_file
from pidiff.runtime.cuda import Gpu
from pidiff.runtime.engines import tensorrt
from pidiff.runtime.preflight import ENGINE_GRAPHS

NAME = "tensorrt-rtx-sm86+sm89+sm120-9.9"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", "float16")


@pytest.fixture
def bundle(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "b")


@pytest.fixture
def builder(monkeypatch, tmp_path):
    """Return a function that puts the small builder in place; it returns a function: the graphs built since then."""
    return lambda *how, **more: use_builder(monkeypatch, tmp_path / "log", *how, **more)


def build(path, *options):
    return main(["--into", str(path), "--engine", "tensorrt-rtx", "--quiet", *options])


def refused(capsys, *arguments, status=1):
    assert main([*map(str, arguments), "--quiet"]) == status
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert said.out == "" and len(lines) == 1 and lines[0].startswith("pidiff-export: ") and "Traceback" not in said.err
    return lines[0]


def files(path):
    return sorted(p.name for p in path.rglob("*") if p.is_file() and "engine" in p.name)


# --- arguments -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, words", [
    (["--target", "sm87"],
     "target must be host or among sm80, sm86, sm89, sm120, sm121 for tensorrt-rtx, got sm87"),
    (["--target", "sm86,"], "target must be host or among .*, got nothing"),
    (["--target", "8.9"], "got 8.9"),
    (["--batch", "0"], "batch must be N or MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= 64, got 0"),
    (["--batch", "4:2:8"], "got 4:2:8"), (["--batch", "1:2"], "got 1:2"), (["--batch", "1:2:65"], "got 1:2:65"),
    (["--batch", "-1"], "got -1"), (["--batch", "one"], "got one"), (["--batch", "²"], "got ²"),
    (["--people", "9"], "people must be N or MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= 8, got 9"),
    (["--size", "64"], "size must be 32 for this model, whose graphs have a fixed size, got 64:64:64"),
    (["--size", "32:32:64"], "whose graphs have a fixed size, got 32:32:64"),
    (["--workspace", "0"], "workspace must be 1 to 1048576 MiB, got 0"),
    (["--attention", "fused"], "attention must be standard with --engine tensorrt-rtx, got fused: the plug-in is for tensorrt only"),
])
def test_impossible_wishes_are_one_sentence_and_cost_nothing(capsys, bundle, builder, options, words):
    built, before = builder(), (bundle / "manifest.json").read_bytes()
    assert re.search(words, refused(capsys, "--into", bundle, "--engine", "tensorrt-rtx", *options))
    assert built() == [] and (bundle / "manifest.json").read_bytes() == before and files(bundle) == []


def test_what_a_bundle_must_be(capsys, bundle, builder, tmp_path):
    builder()
    fused = edit(shutil.copytree(bundle, tmp_path / "fused"), lambda m: m.update(attention="fused"))
    new = ("--engine", "tensorrt-rtx", "--into")
    assert "which does not exist" in refused(capsys, *new, tmp_path / "none")
    assert ("attention must be standard with --engine tensorrt-rtx, got fused: the plug-in is for tensorrt only; export the bundle "
            "again with --engine tensorrt-rtx") in refused(capsys, *new, fused)
    assert f"got the bundle {bundle}: --into adds engines to it" in refused(capsys, "mini", bundle, *new[:2])
    assert "target must name GPUs, such as sm86,sm89,sm120, on this machine, got host: no" in _no_gpu(
        lambda: refused(capsys, *new, bundle, "--target", "host"))


def _no_gpu(action):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "find_gpu", lambda: (None, "no NVIDIA driver"))
        return action()


def test_host_is_the_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr(engines, "find_gpu", lambda: (Gpu("GPU", "sm120", "13.0"), ""))
    assert engines.parse_targets("host", "tensorrt-rtx") == ("sm120",)
    assert engines.parse_targets("sm89,host,sm80,sm89", "tensorrt-rtx") == ("sm80", "sm89", "sm120")


def test_tensorrt_builds_for_the_gpu_that_is_here(capsys, bundle, builder, monkeypatch):
    built = builder(version="10.3.0")
    monkeypatch.setattr(engines, "find_gpu", lambda: (Gpu("Orin", "sm87", "12.6"), ""))
    assert engines.parse_targets(None, "tensorrt") == engines.parse_targets("host", "tensorrt") == ("sm87",)
    said = refused(capsys, "--into", bundle, "--engine", "tensorrt", "--target", "sm89")
    assert "target must be host for tensorrt, which builds for the GPU that is here, got sm89" in said
    assert main(["--into", str(bundle), "--engine", "tensorrt", "--quiet"]) == 0 and built() == list(ENGINE_GRAPHS)
    built_here = Bundle.open(bundle).manifest.engines
    assert list(built_here) == ["tensorrt-sm87-10.3.0"] and {e.driver for e in built_here["tensorrt-sm87-10.3.0"].graphs.values()} == {"12.6"}
    monkeypatch.setattr(engines, "find_gpu", lambda: (Gpu("Orin", "sm87", "12.8"), ""))      # a newer driver makes them no others
    assert main(["--into", str(bundle), "--engine", "tensorrt", "--target", "orin", "--quiet"]) == 0 and built() == list(ENGINE_GRAPHS)
    monkeypatch.setattr(engines, "find_gpu", lambda: (None, "no NVIDIA driver"))
    assert "be a machine with a GPU for tensorrt, got host: no" in refused(capsys, "--into", bundle, "--engine", "tensorrt")


def test_not_installed_is_told_before_an_export_begins(capsys, bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "installed_version", lambda backend: (None, "tensorrt_rtx is not installed (pip install x)"))
    for arguments in (("--into", bundle), ("mini", tmp_path / "out")):
        assert "engine must be installed, got tensorrt-rtx: tensorrt_rtx is not" in refused(
            capsys, *arguments, "--engine", "tensorrt-rtx")
    assert not (tmp_path / "out").exists()


def test_weights_are_left_out_where_a_gpu_is(capsys, bundle, builder, monkeypatch, tmp_path):
    built, gpu = builder(), Gpu("GPU", "sm89", "13.0")
    monkeypatch.setattr(engines, "plugin_problem", lambda backend: "" if backend == "tensorrt" else "no plug-in")
    monkeypatch.setattr(engines, "find_gpu", lambda: (None, "no NVIDIA driver"))
    strip = ("--into", bundle, "--engine", "tensorrt-rtx", "--strip")
    assert ("strip must be used on a machine with a GPU, without which tensorrt-rtx leaves no weights out, got none: no NVIDIA driver"
            in refused(capsys, *strip))
    monkeypatch.setattr(engines, "find_gpu", lambda: (gpu, ""))
    assert "attention must be standard with --strip" in refused(capsys, *strip[:2], "--engine", "tensorrt", "--attention", "fused", "--strip")
    assert built() == [] and build(bundle) == 0 and _sizes(bundle) == {0}
    assert not json.loads((tmp_path / "log.job").read_text())["strip"]
    assert build(bundle, "--strip") == 0 and built() == 2 * list(ENGINE_GRAPHS), "another engine of the same graph"
    assert min(_sizes(bundle)) > 0 and json.loads((tmp_path / "log.job").read_text())["strip"]
    assert build(bundle, "--strip") == 0 and built() == 2 * list(ENGINE_GRAPHS)


def _sizes(bundle):
    return {e.left_out for e in Bundle.open(bundle).manifest.engines[NAME].graphs.values()}


def test_timings_lie_beside_the_bundle_and_are_the_users_own(bundle, builder, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "find_gpu", lambda: (Gpu("Orin", "sm87", "12.6"), ""))
    told = lambda: json.loads((tmp_path / "log.job").read_text())["timings"]
    file = bundle.with_name(f"{bundle.name}.tensorrt-sm87-10.3.0.timings")
    builder(version="10.3.0")
    assert main(["--into", str(bundle), "--engine", "tensorrt", "--quiet"]) == 0 and told() == str(file)
    set_ = engines.EngineSet("tensorrt", "10.3.0", ("sm87",), {})
    file.touch(0o600)
    assert engines._timings(bundle, set_) == str(file)
    for spoil in (lambda: file.chmod(0o660), lambda: (file.unlink(), file.symlink_to(tmp_path / "another")), lambda: (file.unlink(), file.mkdir())):
        spoil()
        with pytest.warns(UserWarning, match="timings must be a file of the user's own with mode 600: it is not used"):
            assert engines._timings(bundle, set_) is None
    builder()
    assert build(bundle) == 0 and told() is None


@pytest.mark.parametrize("arguments", [["--into", "b"], ["mini", "out", "--into", "b", "--engine", "tensorrt-rtx"], ["mini"],
                                       ["--check", "b", "--into", "b"], ["--check", "b", "--engine", "tensorrt-rtx"],
                                       ["mini", "out", "--rebuild"], ["--check", "b", "--rebuild", "--require-signature", "k.pub"],
                                       ["--check", "b", "--sign", "k.key"], ["mini", "out", "--engine", "cuda"], ["mini", "out", "--check", "b"], []])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "pidiff-export: error:" in capsys.readouterr().err


# --- shapes ----------------------------------------------------------------------------------------------------------

def test_profiles_are_static_and_the_unet_has_two(plain):
    opened = Bundle.open(plain, False)
    shape = lambda graph, name, shapes=Shapes(), **axes: [p[name] for p in profiles_of(opened, graph, axes, shapes)]
    axes = {"latents": ("B", 4, 4, 4), "id_mask": ("B", "P", 4, 4)}
    assert shape("unet", "id_mask", **axes) == [[[2, 1, 4, 4]] * 3, [[1, 1, 4, 4]] * 3]
    wide = Shapes(Range(1, 2, 4), Range(1, 2, 3))
    assert shape("unet", "id_mask", wide, **axes) == [[[2, 1, 4, 4], [4, 2, 4, 4], [8, 3, 4, 4]],
                                                      [[1, 1, 4, 4], [2, 2, 4, 4], [4, 3, 4, 4]]]
    assert shape("vae_decoder", "latents", wide, latents=("B", 4, 4, 4)) == [[[1, 4, 4, 4], [2, 4, 4, 4], [4, 4, 4, 4]]]
    assert shape("text_encoder", "input_ids", wide, input_ids=("B", 8)) == [[[1, 8]] * 3]
    assert shape("time_conditioner", "timesteps", timesteps=("N",)) == [[[1], [5], [1000]]]
    with pytest.raises(ValueError, match="graph unet x must have axes among B, P, N, h, w, H, W, got 'Q'"):
        shape("unet", "x", x=("Q",))


def test_sizes_of_a_model_that_takes_any(plain, monkeypatch):
    bundle = Bundle.open(plain, False)
    monkeypatch.setattr(bundle, "json", lambda name: {"block_out_channels": [8, 8]})
    axes = {"latents": ("B", 4, "h", "w")}
    sizes = lambda *size: profiles_of(bundle, "vae_decoder", axes, Shapes(size=Range(*size) if size else None))[0]["latents"]
    assert sizes() == [[1, 4, 4, 4]] * 3
    assert sizes(16, 32, 64) == [[1, 4, 2, 2], [1, 4, 4, 4], [1, 4, 8, 8]]
    for wrong, words in (((48, 48, 64), "include 32, the size of this model's pictures, got 48:48:64"),
                         ((24, 32, 64), "multiples of 16, got 24:32:64")):
        with pytest.raises(ValueError, match=f"size must {'be ' if 'mult' in words else ''}{words}"):
            sizes(*wrong)


# --- building --------------------------------------------------------------------------------------------------------

def test_what_is_there_is_not_built_again(bundle, builder):
    built = builder()
    assert build(bundle) == 0 and built() == list(ENGINE_GRAPHS)
    times = {p: p.stat().st_mtime_ns for p in bundle.rglob("*.engine")}
    assert len(times) == 7 and build(bundle) == 0 and built() == list(ENGINE_GRAPHS)
    assert times == {p: p.stat().st_mtime_ns for p in bundle.rglob("*.engine")}
    built = builder()
    assert build(bundle, "--batch", "1:2:4") == 0 and built() == ["unet", "vae_decoder"], "only these have the axis"
    assert build(bundle, "--batch", "1:2:4", "--target", "sm89") == 0 and built()[2:] == list(ENGINE_GRAPHS)
    assert len(Bundle.open(bundle).manifest.engines) == 2
    built = builder(version="9.10")
    assert build(bundle, "--target", "sm89") == 0 and built() == list(ENGINE_GRAPHS)
    assert set(Bundle.open(bundle).manifest.engines) == {NAME, "tensorrt-rtx-sm89-9.10"}, "9.9 for sm89 is replaced"


def test_other_weights_are_another_engine(tmp_path, builder, monkeypatch):
    """The digest of the files that the graph points into is part of an engine's identity."""
    built = builder()
    path = write_tiny_bundle(tmp_path / "x", "float16")
    read = engines.read_graph
    monkeypatch.setattr(engines, "read_graph", lambda file: (read(file)[0], {"schedule.json"}, 1000))
    assert build(path) == 0 and build(path) == 0 and len(built()) == 7
    first = Bundle.open(path).manifest.engines[NAME].graphs["unet"].weights_sha256
    monkeypatch.setattr(engines, "read_graph", lambda file: (read(file)[0], {"schedule.json", "directions.safetensors"}, 1000))
    assert build(path) == 0 and len(built()) == 14
    assert Bundle.open(path).manifest.engines[NAME].graphs["unet"].weights_sha256 != first
    monkeypatch.setattr(engines, "read_graph", lambda file: (read(file)[0], {"/etc/passwd"}, 1000))
    assert build(path) == 1 and len(built()) == 14


@pytest.mark.parametrize("misfortune, words", [
    ("os.kill(os.getpid(), signal.SIGSEGV)", "its builder crashed (SIGSEGV)"),
    ("os.abort()", "its builder crashed (SIGABRT)"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "its builder killed, most likely because memory ran out"),
    ("sys.exit('warning\\nthe reason')", "got the reason; engines"),
    ("sys.exit('Error Code 2: OutOfMemory (Requested size was 1172729902 bytes.)')",
     "a layer that needs more scratch memory than 1024 MiB: try --workspace 2048;"),
    ("sys.exit(7)", "exit status 7 of its builder"),
    ("os._exit(0)", "exit status 0 of its builder"),
])
def test_a_crash_names_the_graph_and_keeps_the_rest(capsys, bundle, builder, misfortune, words):
    built = builder("time_conditioner", misfortune)
    said = refused(capsys, "--into", bundle, "--engine", "tensorrt-rtx")
    assert "graph time_conditioner must be built by tensorrt-rtx 9.9, got " in said and words in said
    done = ENGINE_GRAPHS[:ENGINE_GRAPHS.index("time_conditioner")]
    assert set(Bundle.open(bundle).manifest.engines[NAME].graphs) == set(done)
    assert files(bundle) == sorted(f"{g}.engine" for g in done), "no half engine"
    built = builder()
    assert build(bundle) == 0 and built() == list(ENGINE_GRAPHS[len(done):])


def test_interrupt_ends_the_builder_and_keeps_the_rest(capsys, bundle, builder, tmp_path):
    builder("unet", f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
                    "os.kill(os.getppid(), signal.SIGINT); time.sleep(600)")
    said = refused(capsys, "--into", bundle, "--engine", "tensorrt-rtx", status=130)
    assert f"interrupted; {bundle} is whole, with the engines that are done" in said
    assert not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text()}")
    assert "unet.engine" not in files(bundle) and not [f for f in files(bundle) if f.endswith(".part")]
    assert set(Bundle.open(bundle).manifest.engines[NAME].graphs) == set(ENGINE_GRAPHS) - {"unet", "vae_decoder"}


def test_a_builder_dies_with_the_exporter(tmp_path):
    code = ("from pidiff.export import build_engine; build_engine._die_with_parent(); print('ready', flush=True); "
            "import time; time.sleep(600)")
    parent = ("import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE);"
              "p.stdout.readline(); print(p.pid, flush=True); time.sleep(600)")
    exporter = subprocess.Popen([sys.executable, "-c", parent, code], stdout=subprocess.PIPE, cwd=tmp_path)
    child = int(exporter.stdout.readline())
    exporter.kill()
    exporter.wait()
    exporter.stdout.close()
    for _ in range(100):
        if _gone(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the builder was still there")


def _gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# --- memory and disk -------------------------------------------------------------------------------------------------

def test_too_little_memory_is_refused_before_anything_is_built(capsys, bundle, builder, monkeypatch):
    built = builder()
    monkeypatch.setattr(memory, "available_memory", lambda: 100 << 20)
    said = refused(capsys, "--into", bundle, "--engine", "tensorrt-rtx")
    assert "memory must be at least 0.5 GiB to build id_conditioner, got 0.1 GiB available" in said and "--force" in said
    assert built() == []
    assert build(bundle, "--force") == 0 and len(built()) == 7
    assert build(bundle) == 0, "nothing is left to build"


def test_too_little_disk(capsys, bundle, builder, monkeypatch):
    built = builder()
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: memory.shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))
    assert "bundle must be on a disk with 0.2 GiB free for its engines, got 0.0 GiB" in refused(
        capsys, "--into", bundle, "--engine", "tensorrt-rtx")
    assert built() == []


# --- TensorRT-RTX ----------------------------------------------------------------------------------------------------

@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def test_real_engines_of_a_tiny_bundle(bundle, rtx, capsys):
    version = rtx.__version__
    assert main(["--into", str(bundle), "--engine", "tensorrt-rtx", "--batch", "1:2:4", "--people", "1:1:2"]) == 0
    said = capsys.readouterr().out
    opened = Bundle.open(bundle)
    engine_set = opened.manifest.engines[f"tensorrt-rtx-sm86+sm89+sm120-{version}"]
    assert list(engine_set.graphs) == list(ENGINE_GRAPHS) and engine_set.id in said
    for graph in ENGINE_GRAPHS:
        engine = opened.engine(engine_set.id, graph)
        assert engine[:4] == b"vtrt" and len(engine) > 1000
        header = bytes(engine[:tensorrt.header_size("tensorrt-rtx")])
        assert tensorrt.validity("tensorrt-rtx", header)[0] in ("valid", "suboptimal", "invalid")
    table = onnx.load(bundle / "text_encoder.onnx").graph.initializer[0].raw_data
    assert len(table) > 100 and table in opened.engine(engine_set.id, "text_encoder"), "the weights are the graph's"
    assert len(engine_set.graphs["unet"].profiles) == 2
    times = {p: p.stat().st_mtime_ns for p in bundle.rglob("*.engine")}
    assert build(bundle, "--batch", "1:2:4", "--people", "1:1:2") == 0
    assert times == {p: p.stat().st_mtime_ns for p in bundle.rglob("*.engine")}
    assert main(["--check", str(bundle), "--quiet"]) in (0, 3, 4, 5)


@pytest.mark.slow
def test_real_refusal_names_the_graph(capsys, tmp_path, rtx):
    """A graph with a node that TensorRT-RTX does not have."""
    path = write_tiny_bundle(tmp_path / "x", "float16")
    model = onnx.load(path / "text_conditioner.onnx")
    model.graph.node[0].op_type, model.graph.node[0].domain = "Unheard", "of"
    model.opset_import.append(onnx.helper.make_opsetid("of", 1))
    onnx.save(model, path / "text_conditioner.onnx")
    entry = {"sha256": sha256_file(path / "text_conditioner.onnx"), "size": (path / "text_conditioner.onnx").stat().st_size}
    edit(path, lambda m: m["files"].update({"text_conditioner.onnx": entry}))
    said = refused(capsys, "--into", path, "--engine", "tensorrt-rtx")
    assert "graph text_conditioner must be built by tensorrt-rtx" in said and "Unheard" in said


@pytest.mark.slow
def test_real_engines_of_mini_from_one_command(rtx, tmp_path):
    """The user's command: export in a process with torch, builds in processes without."""
    pytest.importorskip("torch")
    command = ["pidiff-export", "mini", str(tmp_path / "out"), "--fp16", "--engine", "tensorrt-rtx", "--target", "sm120,sm89,sm86"]
    code = (f"import sys; sys.argv = {command!r}; from pidiff.export.__main__ import main; status = main(); "
            "assert 'torch' not in sys.modules; sys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mini, fp16, standard attention, opset 18" in done.stdout
    bundle = Bundle.open(tmp_path / "out")
    built = bundle.manifest.engines[f"tensorrt-rtx-sm86+sm89+sm120-{rtx.__version__}"].graphs
    weights = {g: engines.read_graph(bundle.file(f"{g}.onnx"))[2] for g in ENGINE_GRAPHS}
    peaks = {line.split()[0]: int(line.split()[2]) << 20 for line in done.stdout.splitlines() if line.split()[0] in ENGINE_GRAPHS
             and len(line.split()) == 3}
    assert set(built) == set(peaks) == set(ENGINE_GRAPHS)
    for graph, engine in built.items():
        assert bundle.manifest.files[engine.file].size > weights[graph], "an engine holds its weights"
        assert peaks[graph] < memory.needed_memory(weights[graph]), graph
    assert built["unet"].profiles[0]["latents"] == ((2, 64, 8, 8),) * 3
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["schema_version"] == 4
