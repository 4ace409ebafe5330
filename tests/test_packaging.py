"""What is built and shipped: the type stub, the ABI slots, object files, the source distribution and its wheel."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import pidiff._C as core

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "models" / "mini" / "manifest.json"

needs_sources = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the repository's sources")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@needs_sources
@pytest.mark.skipif(importlib.util.find_spec("pybind11_stubgen") is None, reason="needs pybind11-stubgen")
def test_the_stub_is_fresh(tmp_path):
    """After changing a binding: pybind11-stubgen pidiff._C -o . (in the repository's root)."""
    run(sys.executable, "-m", "pybind11_stubgen", "pidiff._C", "-o", tmp_path, cwd=tmp_path)
    assert (ROOT / "pidiff" / "_C.pyi").read_text() == (tmp_path / "pidiff" / "_C.pyi").read_text()


def test_everything_public_is_documented():
    for name in (n for n in dir(core) if not n.startswith("_")):
        assert (getattr(core, name).__doc__ or "").strip(), name


def test_the_operator_library_lies_beside_the_module():
    library = Path(core.__file__).parent / "lib" / "libpidiff_ort.so"
    assert library.is_file()
    if shutil.which("nm"):
        defined = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
        assert [name for name in defined if not name.startswith(("_init", "_fini", "_ZNSt", "_ZSt", "_ZZNSt"))] == ["RegisterCustomOps"]


# --- ONNX Runtime's ABI ---------------------------------------------------------------------------------------------

ABI_CHECK = """
#include <onnxruntime_c_api.h>
#include <cstddef>
#include "plugins/ort/abi.h"
#define SLOT(official, name, slot, result, parameters) \\
  static_assert(offsetof(OrtApi, official) == slot * sizeof(void*), #official);
PIDIFF_ORT_SLOTS(SLOT)
#define MEMBER(official, name) \\
  static_assert(offsetof(OrtCustomOp, official) == offsetof(pidiff::ort::CustomOp, name), #official);
MEMBER(version, version)
MEMBER(CreateKernel, create_kernel)
MEMBER(GetName, get_name)
MEMBER(GetExecutionProviderType, get_execution_provider_type)
MEMBER(GetInputType, get_input_type)
MEMBER(GetInputTypeCount, get_input_type_count)
MEMBER(GetOutputType, get_output_type)
MEMBER(GetOutputTypeCount, get_output_type_count)
MEMBER(KernelCompute, kernel_compute)
MEMBER(KernelDestroy, kernel_destroy)
MEMBER(GetInputCharacteristic, get_input_characteristic)
MEMBER(GetOutputCharacteristic, get_output_characteristic)
MEMBER(GetInputMemoryType, get_input_memory_type)
MEMBER(GetVariadicInputMinArity, get_variadic_input_min_arity)
MEMBER(GetVariadicInputHomogeneity, get_variadic_input_homogeneity)
MEMBER(GetVariadicOutputMinArity, get_variadic_output_min_arity)
MEMBER(GetVariadicOutputHomogeneity, get_variadic_output_homogeneity)
MEMBER(CreateKernelV2, create_kernel_v2)
MEMBER(KernelComputeV2, kernel_compute_v2)
MEMBER(InferOutputShapeFn, infer_output_shape)
MEMBER(GetStartVersion, get_start_version)
MEMBER(GetEndVersion, get_end_version)
static_assert(offsetof(OrtApiBase, GetApi) == offsetof(pidiff::ort::ApiBase, get_api), "GetApi");
static_assert(offsetof(OrtApiBase, GetVersionString) == offsetof(pidiff::ort::ApiBase, get_version_string), "version");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == pidiff::ort::kFloat, "float");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == pidiff::ort::kFloat16, "float16");
static_assert(ORT_FAIL == pidiff::ort::kFail && ORT_INVALID_ARGUMENT == pidiff::ort::kInvalidArgument, "codes");
static_assert(INPUT_OUTPUT_REQUIRED == pidiff::ort::kRequired && OrtMemTypeDefault == pidiff::ort::kDefaultMemory, "");
static_assert(ORT_API_VERSION >= pidiff::ort::kApiVersion, "the header is older than the version asked for");
"""


def onnxruntime_include() -> Path | None:
    """Where onnxruntime_c_api.h is: PIDIFF_ORT_INCLUDE, or a system package (libonnxruntime-dev)."""
    folders = [os.environ.get("PIDIFF_ORT_INCLUDE"), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    return next((Path(f) for f in folders if f and (Path(f) / "onnxruntime_c_api.h").is_file()), None)


@needs_sources
@needs_compiler
@pytest.mark.skipif(onnxruntime_include() is None, reason="the official ONNX Runtime header is not installed")
def test_abi_slots_match_the_official_header(tmp_path):
    source = tmp_path / "check.cc"
    source.write_text(ABI_CHECK)
    include = onnxruntime_include()
    run("g++", "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{include}/core/session", f"-I{ROOT}/csrc", source)


@needs_sources
def test_abi_check_covers_every_member():
    """The list above names each member of our CustomOp."""
    text = (ROOT / "csrc/plugins/ort/abi.h").read_text()
    struct = text[text.index("struct CustomOp {") :]
    members = re.findall(r"\(\*(\w+)\)", struct[: struct.index("};")])
    assert members and all(f", {name})" in ABI_CHECK for name in members)


# --- object files ---------------------------------------------------------------------------------------------------

AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"


@pytest.mark.slow
@needs_sources
@needs_compiler
@pytest.mark.skipif("x86_64" not in sysconfig.get_platform(), reason="x86-64 flags")
@pytest.mark.parametrize("name,flags", [("avx2", "-mavx2 -mfma -mf16c"), ("avx512", AVX512), ("avx512bf16", f"{AVX512} -mavx512bf16"),
                                        ("amx", f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"), ("portable", "")])
def test_files_with_processor_flags_define_one_symbol(tmp_path, name, flags):
    """Any other global symbol could replace, at link time, a plainly compiled copy that older processors need."""
    target = tmp_path / "kernels.o"
    run("g++", "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-exceptions", *flags.split(), f"-I{ROOT}/csrc", "-c",
        ROOT / f"csrc/kernels/attention_{name}.cc", "-o", target)  # fmt: skip
    defined = [line.split() for line in run("nm", "-C", "--defined-only", target).splitlines()]
    shared = [" ".join(parts[2:]) for parts in defined if len(parts) > 2 and (parts[1].isupper() or parts[1] in "uvw")]
    assert shared == [f"pidiff::{name}_kernels"]


# --- distributions --------------------------------------------------------------------------------------------------

OUTSIDE = """
import sys
sys.path[:0] = {path!r}
import numpy as np
import pidiff, pidiff._C as core, pidiff.runtime
assert all(p.startswith({target!r}) for p in (pidiff.__file__, core.__file__, pidiff.runtime.__file__)), core.__file__
assert "torch" not in sys.modules
x = np.ones((1, 5, 16), np.float32)
assert np.allclose(core.attention(x, x, x, 2), 1)
import onnxruntime, pathlib
onnxruntime.SessionOptions().register_custom_ops_library(str(pathlib.Path(core.__file__).parent / "lib/libpidiff_ort.so"))
from pidiff.runtime import Pipeline
Pipeline.from_bundle()
assert "torch" not in sys.modules
print("fine")
"""


@pytest.mark.slow
@needs_sources
@needs_compiler
@pytest.mark.skipif(not SHIPPED.is_file(), reason="this checkout has no shipped model")
@pytest.mark.skipif(importlib.util.find_spec("scikit_build_core") is None, reason="needs scikit-build-core")
def test_the_wheel_from_the_sdist_runs_outside_the_checkout(tmp_path):
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    sdist = tmp_path / run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1]
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "models/mini/manifest.json" in names and "csrc/kernels/attention.h" in names and "pidiff/_C.pyi" in names
    junk = re.compile(r"(^|/)(build|dist|out|runs|shared|__pycache__|\.git|\.venv|\.ci)/|\.(so|pyc|o)$")
    assert not [name for name in names if junk.search(name)]

    environment = {**os.environ, "PIDIFF_CUDA": "OFF"}
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist,
        cwd=tmp_path, env=environment)  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for wanted in ["pidiff/_C.pyi", "pidiff/lib/libpidiff_ort.so", "pidiff/models/mini/manifest.json",
                   "pidiff/runtime/pipeline.py", "pidiff/export/__init__.py"]:  # fmt: skip
        assert wanted in names, wanted
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "export/", "runtime/")) or junk.search(n.replace("_ort.so", ""))
                and not n.startswith("pidiff/_C.")]  # fmt: skip

    target = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    # -S keeps an editable install's import hook out; the dependencies are this interpreter's.
    path = [str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    script = OUTSIDE.format(path=path, target=str(target))
    assert run(sys.executable, "-I", "-S", "-c", script, cwd=tmp_path).strip() == "fine"
