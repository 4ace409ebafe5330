"""Who may import whom, read from the sources: Python by its syntax tree, C++ by its includes."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"pidiff": ROOT / "pidiff", "pidiff.export": ROOT / "export", "pidiff.runtime": ROOT / "runtime"}
VENDORS = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "polygraphy", "cuda"}
# What the exporter knows of the runtime beside the bundle's format: engines in it, and where they can run.
ENGINE_BUILDS = ("pidiff.runtime.engine_specs", "pidiff.runtime.engine_store", "pidiff.runtime.preflight", "pidiff.runtime.cuda",
                 "pidiff.runtime.engines.tensorrt", "pidiff.runtime.signature", "pidiff.runtime.memory", "pidiff.runtime.files")
# What the runtime can sample is asked before an export.
SCHEDULE = ("pidiff.runtime.schedule",)
# With what the verification report runs graphs and draws its picture: as a user would.
REPORT = ("pidiff.runtime.engines", "pidiff.runtime.errors", "pidiff.runtime.identity", "pidiff.runtime.images",
          "pidiff.runtime.faces", "pidiff.runtime.pipeline")
RUNTIME_DEPENDENCIES = {"numpy", "cv2", "tokenizers", "safetensors", "tqdm"}

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the repository's sources")


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the three Python folders."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


def imports(name: str, path: Path) -> list[tuple[str, bool]]:
    """(absolute module, whether it is imported at the top level) for each import in a file.

    `from x import y` counts as `x.y` too where x is ours, because y may be a module.
    """
    tree = ast.parse(path.read_text(), str(path))
    # Imports under `if TYPE_CHECKING:` never run.
    ignored = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names = [f"{base}.{alias.name}" for alias in node.names] if base.split(".")[0] == "pidiff" else [base]
            found += [(full, id(node) not in inside) for full in names]
    return found


def under(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def owner(module: str) -> str:
    if under(module, "pidiff.train.personalize", "pidiff.data.prepare"):        # read photos and bundles, as the evaluation does
        return "pidiff.evaluate"
    return next((p for p in ("pidiff.export", "pidiff.runtime", "pidiff.evaluate") if under(module, p)), "pidiff")


MODULES = modules() if (ROOT / "csrc").is_dir() else {}


@pytest.mark.parametrize("name", [n for n in MODULES if owner(n) == "pidiff"])
def test_training_knows_neither_export_nor_runtime(name):
    wrong = [m for m, _ in imports(name, MODULES[name]) if under(m, "pidiff.export", "pidiff.runtime")]
    assert not wrong


@pytest.mark.parametrize("name", [n for n in MODULES if owner(n) == "pidiff.evaluate"])
def test_evaluation_stands_on_top_of_training_and_runtime(name):
    """It may use both; nothing uses it, and a bundle is evaluated without torch."""
    assert not [m for m, _ in imports(name, MODULES[name]) if under(m, "pidiff.export")]
    if under(name, "pidiff.evaluate"):
        assert not [m for m, top_level in imports(name, MODULES[name]) if top_level and m.split(".")[0] in ("torch", "diffusers")]
    others = [n for n in MODULES if owner(n) != "pidiff.evaluate"]
    assert not [n for n in others for m, _ in imports(n, MODULES[n]) if under(m, "pidiff.evaluate")]


@pytest.mark.parametrize("name", [n for n in MODULES if owner(n) == "pidiff.runtime"])
def test_runtime_needs_only_its_dependencies(name):
    """No torch; of ours only the C++ core; a vendor's module only in its own engine, and not at import time."""
    is_engine = name.startswith("pidiff.runtime.engines.")
    for module, top_level in imports(name, MODULES[name]):
        first = module.split(".")[0]
        if first == "pidiff":
            assert under(module, "pidiff.runtime", "pidiff._C"), module
        elif first in VENDORS:
            assert is_engine, f"{module} belongs in runtime/engines"
            file = name.rpartition(".")[2]
            assert first == "cuda" or f"{file}_".startswith(f"{first}_"), f"{module} belongs in files of its engine's own"
            assert not top_level, f"{module} must be imported where it is used"
        elif first == "cryptography":
            assert name == "pidiff.runtime.signature" and not top_level, "an extra, for signatures"
        else:
            assert first in RUNTIME_DEPENDENCIES or first in sys.stdlib_module_names, module
            assert not under(module, "safetensors.torch"), module


@pytest.mark.parametrize("name", [n for n in MODULES if owner(n) == "pidiff.export"])
def test_export_takes_only_the_bundle_format_from_the_runtime(name):
    wrong = [m for m, _ in imports(name, MODULES[name])
             if under(m, "pidiff.runtime") and not under(m, "pidiff.runtime.bundle", *ENGINE_BUILDS, *SCHEDULE, *REPORT)]
    assert not wrong


@pytest.mark.parametrize("name", ["engine_commands", "engines", "engine_report", "build_engine", "plugin_nodes", "profiles", "memory", "errors"])
def test_engines_are_built_without_torch(name):
    """Followed through the exporter's own modules; the builder process needs the memory."""
    pending, seen = [f"pidiff.export.{name}"], set()
    while pending:
        module = pending.pop()
        seen.add(module)
        found = [m for m, _ in imports(module, MODULES[module])]
        assert not [m for m in found if m.split(".")[0] in ("torch", "diffusers", "transformers")], module
        pending += [m for m in found if m in MODULES and under(m, "pidiff") and m not in seen]


def test_the_package_itself_imports_no_part_of_it():
    assert [m for m, _ in imports("pidiff", MODULES["pidiff"])] == ["os"]


def test_the_declared_dependencies_are_the_runtimes():
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    names = {re.match(r"[\w-]+", item).group() for item in re.findall(r'"([^"]+)"', block.group(1))}
    rename = {"opencv-python-headless": "cv2"}
    assert {rename.get(n, n) for n in names} == RUNTIME_DEPENDENCIES | {"onnxruntime"}


# --- C++ ------------------------------------------------------------------------------------------------------------

SYSTEM = {
    "kernels": {"cpuid.h", "sched.h", "sys/syscall.h", "unistd.h", "immintrin.h", "arm_neon.h"},
    "sampler": set(),
    "plugins": set(),
    "bindings": set(),
}
OURS = {
    "kernels": ("kernels/",),
    "sampler": ("sampler/", "kernels/"),
    "plugins": ("plugins/", "kernels/"),
    "bindings": ("bindings/", "sampler/", "kernels/"),
}
SDK = {"plugins": ("NvInfer", "cuda_runtime"), "bindings": ("pybind11/",)}
CUDA = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")


def cpp_files() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cc", ".cu", ".cuh"))


@pytest.mark.parametrize("path", cpp_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_cpp_includes(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for kind, header in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.M):
        if kind == '"':
            emulated = path.name in ("cuda_device.cuh", "cuda_launch.cuh") and header == "cuda_emulation.h"
            assert emulated or header.startswith(OURS[folder]), f"{folder} must not include {header}"
        elif "/" in header or "." in header:
            cuda = path.suffix in (".cu", ".cuh") and header in CUDA
            sdk = header.startswith(SDK.get(folder, ("\0",)))
            assert cuda or sdk or header in SYSTEM[folder], f"{folder} must not include <{header}>"


def test_only_bindings_know_pybind11():
    users = {p.relative_to(ROOT / "csrc").parts[0] for p in cpp_files() if "#include <pybind11" in p.read_text()}
    assert users == {"bindings"}


def test_files_are_short():
    """No source file of more than 400 lines."""
    files = [*MODULES.values(), *cpp_files(), ROOT / "CMakeLists.txt"]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 400}
    assert not long
