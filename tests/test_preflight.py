"""What `pidiff-export --check` says, on machines that are made up, and the probe that looks at the real one."""

import shlex
import shutil
import subprocess
import types

import pytest
from tiny_bundle import edit, write_tiny_bundle
from tiny_engines import VERSION, add, use_builder

from pidiff.export.__main__ import build_parser, main
from pidiff.runtime import preflight as module
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.cuda import Gpu, find_gpu
from pidiff.runtime.engines import tensorrt
from pidiff.runtime.preflight import ENGINE_GRAPHS, preflight

ADA = Gpu("NVIDIA GeForce RTX 4090", "sm89", "13.0")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """All engines, for sm86 and sm89."""
    path = write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
    return add(path, **{graph: f"engine of {graph}".encode() for graph in ENGINE_GRAPHS})


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes up a machine; it keeps the headers that TensorRT-RTX was asked about."""
    def make(gpu=ADA, version=VERSION, validity=("valid", ()), size=6):
        asked = []
        fake = types.SimpleNamespace(
            installed_version=lambda backend: (version, "") if version else (None, "tensorrt_rtx is not installed (pip install x)"),
            header_size=lambda backend: size,
            validity=lambda backend, header: asked.append(header) or validity)
        monkeypatch.setattr(module, "tensorrt", fake)
        monkeypatch.setattr(module, "find_gpu", lambda: (gpu, "") if gpu else (None, "no NVIDIA driver"))
        return asked
    return make


A100, HOPPER, BLACKWELL = (Gpu("GPU", t, "13.0") for t in ("sm80", "sm90", "sm120"))
CASES = {
    "fits": ({}, "ok", 0, "ok", None),
    "no driver": ({"gpu": None}, "fallback", 5, "falls back to onnxruntime: no NVIDIA driver", None),
    "not installed": ({"version": None}, "fallback", 5, "falls back to onnxruntime: tensorrt_rtx is not installed", None),
    "no target": ({"gpu": HOPPER}, "fallback", 5, "sm90 is no target of tensorrt-rtx", None),
    "another version": ({"version": "1.8"}, "rebuild", 4, "rebuild: it was built by tensorrt-rtx 1.7.1.116, here is 1.8", "sm86,sm89"),
    "both differ": ({"version": "1.8", "gpu": BLACKWELL}, "rebuild", 4, "here is 1.8", "sm120"),
    "newer card": ({"gpu": BLACKWELL}, "slower", 3, "slower than it could be: it was built for sm86, sm89, here is sm120", "sm120"),
    "older card": ({"gpu": A100, "validity": ("invalid", ("unsupported_cc",))}, "rebuild", 4, "it was built for sm86, sm89, here is sm80",
                   "sm80"),
    "suboptimal": ({"validity": ("suboptimal", ())}, "slower", 3, "slower than it could be: tensorrt-rtx calls it suboptimal", "sm86,sm89"),
    "old driver": ({"validity": ("invalid", ("old_cuda_driver",))}, "fallback", 5, "the NVIDIA driver is too old for it", None),
    "little memory": ({"validity": ("invalid", ("insufficient_gpu_memory",))}, "fallback", 5, "too little memory", None),
    "refused": ({"validity": ("invalid", ("malformed_engine",))}, "rebuild", 4, "tensorrt-rtx refuses it (malformed engine)", "sm86,sm89"),
    "cannot be asked": ({"size": None}, "ok", 0, "ok", None),
    "cannot be asked, other card": ({"size": None, "gpu": BLACKWELL}, "rebuild", 4, "here is sm120", "sm120"),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case, built, machine, capsys):
    here, verdict, status, words, target = CASES[case]
    asked = machine(**here)
    found = preflight(Bundle.open(built))
    assert {f.graph for f in found.findings} == set(ENGINE_GRAPHS) and {f.verdict for f in found.findings} == {verdict}
    assert set(asked) <= {b"engine"}, "more than the header was read"
    assert main(["--check", str(built)]) == found.status == status
    said = capsys.readouterr().out
    assert words in said and said.count("\n") == 3 + len(ENGINE_GRAPHS)
    command = f"pidiff-export --into {built} --engine tensorrt-rtx --target {target}"
    assert said.count(f"rebuild with: {command}\n") == (len(ENGINE_GRAPHS) if target else 0)


def test_the_driver_of_the_build_is_told(built, machine, tmp_path):
    path = shutil.copytree(built, tmp_path / "b")
    edit(path, lambda m: next(iter(m["engines"].values()))["graphs"]["unet"].update(driver="12.6"))
    machine(version="1.8")
    found = {f.graph: f.why for f in preflight(Bundle.open(path)).findings}
    assert found["unet"] == "it was built by tensorrt-rtx 1.7.1.116 with a driver for CUDA 12.6, here is 1.8"
    assert found["vae_decoder"] == "it was built by tensorrt-rtx 1.7.1.116, here is 1.8"


def test_every_graph_counts_at_its_best_engine(built, machine, tmp_path):
    path = shutil.copytree(built, tmp_path / "b")
    add(path, ("sm89",), unet=b"the unet for one card")
    machine(validity=("suboptimal", ()))
    found = preflight(Bundle.open(path))
    assert found.status == 3 and len(found.findings) == len(ENGINE_GRAPHS) + 1
    machine(version="1.8")
    assert preflight(Bundle.open(path)).status == 4
    add(path, ("sm89",), version="1.8", **{graph: b"engine" for graph in ENGINE_GRAPHS})
    found = preflight(Bundle.open(path))
    assert found.status == 0 and {found.best(g).engines for g in ENGINE_GRAPHS} == {"tensorrt-rtx-sm89-1.8"}
    assert found.best("face_pnet") is None


def test_a_stopped_build_and_a_bundle_without_engines(tmp_path, machine, capsys):
    path = write_tiny_bundle(tmp_path / "tiny")
    machine()
    assert main(["--check", str(path)]) == 0 and "no engines: every graph runs on onnxruntime" in capsys.readouterr().out
    add(path, unet=b"engine of unet")
    assert main(["--check", str(path)]) == 4
    assert capsys.readouterr().out.count("rebuild: it was never built; rebuild with: pidiff-export --into") == len(ENGINE_GRAPHS) - 1
    machine(gpu=None)
    assert main(["--check", str(path), "--quiet"]) == 5 and capsys.readouterr().out == ""


def test_the_command_builds_the_same_shapes(built, machine, tmp_path, capsys):
    """The exporter's own parser reads it back, also from a folder with a space in its name."""
    path = shutil.copytree(built, tmp_path / "a b")

    def larger(m):
        engines = next(iter(m["engines"].values()))["graphs"]
        engines["vae_decoder"]["profiles"][0]["latents"] = [[1, 4, 4, 4], [2, 4, 4, 4], [4, 4, 8, 8]]
        engines["unet"]["profiles"][0]["id_mask"] = [[2, 1, 4, 4], [2, 2, 4, 4], [2, 3, 4, 4]]

    edit(path, larger)
    machine(gpu=BLACKWELL)
    command = preflight(Bundle.open(path)).findings[0].command
    args = build_parser().parse_args(shlex.split(command)[1:])
    assert (args.into, args.engine, args.target) == (path, "tensorrt-rtx", "sm120")
    assert (args.batch, args.people, args.size, args.strip) == ("1:2:4", "1:2:3", "32:32:64", False)
    edit(path, lambda m: next(iter(m["engines"].values()))["graphs"]["unet"].update(left_out=5))
    assert build_parser().parse_args(shlex.split(preflight(Bundle.open(path)).findings[0].command)[1:]).strip


def test_a_check_may_rebuild(built, machine, tmp_path, monkeypatch, capsys):
    """After an update of TensorRT-RTX; what is as good as it can be is left alone."""
    pytest.importorskip("onnx")
    path = shutil.copytree(built, tmp_path / "a b")
    machine(version="1.8")
    made = use_builder(monkeypatch, tmp_path / "log", version="1.8")
    assert main(["--check", str(path), "--rebuild"]) == 0 and made() == list(ENGINE_GRAPHS)
    said = capsys.readouterr().out
    command = f"pidiff-export --into '{path}' --engine tensorrt-rtx --target sm86,sm89"
    assert said.count(f"\n{command}\n") == 1 and said.index("rebuild: it was built by") < said.index(f"\n{command}\n") < said.index("  ok\n")
    assert main(["--check", str(path), "--rebuild", "--quiet"]) == 0 and made() == list(ENGINE_GRAPHS) and capsys.readouterr().out == ""
    assert [e.version for e in Bundle.open(path).manifest.engines.values()] == ["1.8"]
    machine(gpu=None)
    assert main(["--check", str(path), "--rebuild"]) == 5 and made() == list(ENGINE_GRAPHS), "nothing to be built would help"
    machine(version="1.9")
    use_builder(monkeypatch, tmp_path / "log", "unet", "sys.exit('the reason')", version="1.9")
    assert main(["--check", str(path), "--rebuild", "--quiet"]) == 1 and "got the reason" in capsys.readouterr().err


def test_a_rebuilt_bundle_may_be_signed_again(built, machine, tmp_path, monkeypatch, capsys):
    pytest.importorskip("cryptography"), pytest.importorskip("onnx")
    path, key = shutil.copytree(built, tmp_path / "b"), str(tmp_path / "k")
    assert main(["--new-key", key]) == main(["--into", str(path), "--sign", f"{key}.key"]) == 0
    machine(version="1.8")
    use_builder(monkeypatch, tmp_path / "log", version="1.8")
    assert main(["--check", str(path), "--rebuild", "--quiet", "--require-signature", f"{key}.pub", "--sign", f"{key}.key"]) == 0
    assert Bundle.open(path, require_signature=f"{key}.pub").manifest.engines.keys() == {"tensorrt-rtx-sm86+sm89-1.8"}


def test_a_tampered_engine_is_an_error_and_no_verdict(built, machine, tmp_path, capsys):
    path = shutil.copytree(built, tmp_path / "b")
    asked = machine()
    file = next(path.rglob("unet.engine"))
    file.write_bytes(b"ENGINE of unet")
    assert main(["--check", str(path)]) == 1
    said = capsys.readouterr()
    assert "unet.engine must have the sha256" in said.err and said.out == "" and asked == []


# --- the probe -------------------------------------------------------------------------------------------------------

DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int* n) { *n = COUNT; return 0; }
int cuDriverGetVersion(int* v) { *v = 13020; return 0; }
int cuDeviceGet(int* d, int i) { *d = 7 + i; return 0; }
int cuDeviceGetName(char* name, int n, int d) { strncpy(name, d == 7 ? "A GPU" : "?", n); return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { *v = a == 75 ? 12 : a == 76 ? 1 : a == 18 ? SHARED : -1; return 0; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("flags, expected", [
    (["-DINIT=0", "-DCOUNT=2", "-DSHARED=0"], (Gpu("A GPU", "sm121", "13.2", False), "")),
    (["-DINIT=0", "-DCOUNT=1", "-DSHARED=1"], (Gpu("A GPU", "sm121", "13.2", True), "")),
    (["-DINIT=0", "-DCOUNT=0", "-DSHARED=0"], (None, "an NVIDIA driver without a usable GPU")),
    (["-DINIT=100", "-DCOUNT=1", "-DSHARED=0"], (None, "an NVIDIA driver without a usable GPU (error 100)")),
])
def test_the_driver_is_asked(flags, expected, tmp_path):
    """A driver library with seven answers, compiled for the test."""
    (tmp_path / "cuda.c").write_text(DRIVER)
    subprocess.run(["gcc", "-shared", "-fPIC", *flags, "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"], check=True)
    assert find_gpu(str(tmp_path / "libcuda.so.1")) == expected


def test_no_driver_and_a_driver_without_the_functions(tmp_path):
    assert find_gpu(str(tmp_path / "none.so")) == (None, "no NVIDIA driver")
    gpu, reason = find_gpu("libc.so.6")
    assert gpu is None and reason.startswith("an NVIDIA driver that cannot be asked (") and "cuInit" in reason


def test_an_absent_or_broken_module_is_told(monkeypatch):
    monkeypatch.setitem(tensorrt.ENGINES, "tensorrt-rtx", ("", "", "no_such_module_here", "pip install 'pidiff-edge[rtx]'"))
    assert tensorrt.installed_version("tensorrt-rtx") == (None, "no_such_module_here is not installed (pip install 'pidiff-edge[rtx]')")

    def broken(name):
        raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr(tensorrt.importlib, "import_module", broken)
    assert "cannot be imported: libtensorrt_rtx.so.1" in tensorrt.installed_version("tensorrt-rtx")[1]
