"""The TensorRT plug-in without TensorRT and without a GPU: compiled with TensorRT's own headers, called in TensorRT's order
(tensorrt_host/host.cc), its kernels emulated on the CPU and held to the references that the kernels are held to.

TensorRT-RTX, which can be installed from a package registry, then takes the library into its plug-in registry, parses a graph
with it and builds an engine. No engine with a plug-in has ever run.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from references import Array, attention_reference, identity_inputs, identity_mix_reference, require_close_16bit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Carries the headers of TensorRT 10.14.1 (Apache-2.0).
HEADERS = "kernel-lens==2.0.1 --hash=sha256:07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
NVCC = shutil.which("nvcc")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
PLUGIN = [f"csrc/plugins/{name}.cc" for name in
          ("nodes", "tensorrt/creator", "tensorrt/library", "tensorrt/log", "tensorrt/plugin")]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("tensorrt_plugin"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the repository's sources"),
    pytest.mark.skipif(NVCC is None, reason="needs nvcc, for the CUDA headers that TensorRT's headers include"),
]

# TensorRT's numbers: DataType, TensorFormat, PluginFieldType.
TYPES = {"float32": 0, "float16": 1, "bfloat16": 7}
INT8, INT32_TYPE, LINEAR, CHW2 = 2, 3, 0, 1
FLOAT32_FIELD, INT32_FIELD, INT64_FIELD = 1, 5, 10
ATTENTION, IDENTITY = "PidiffAttention", "PidiffIdentityAttention"
FIELDS = ("num_heads", "has_null", "residual")


def run(*command: str | Path, **more) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=590, **more)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with TensorRT's headers: those that are installed or named, else the pinned ones."""
    if os.environ.get("PIDIFF_TENSORRT_INCLUDE"):
        return Path(os.environ["PIDIFF_TENSORRT_INCLUDE"])
    for installed in Path("/usr/include").glob("*-linux-gnu/NvInferRuntime.h"):
        return installed.parent
    folder = tmp_path_factory.mktemp("tensorrt_headers")
    (folder / "pinned.txt").write_text(HEADERS + "\n")
    done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", str(folder), "-r",
                           str(folder / "pinned.txt")], capture_output=True, text=True, timeout=300)  # fmt: skip
    if "DO NOT MATCH THE HASHES" in done.stderr:
        pytest.fail(done.stderr[-2000:])
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"needs TensorRT's headers (PIDIFF_TENSORRT_INCLUDE, or a download): {reason}")
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    return folder / "kernel_lens" / "include" / "tensorrt"


@pytest.fixture(scope="session")
def library(headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libpidiff_trt.so as it is built for a GPU, but for its kernels, which are emulated."""
    folder = tmp_path_factory.mktemp("tensorrt_plugin")
    kernels, target = folder / "kernels.o", folder / "libpidiff_trt.so"
    run("g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DPIDIFF_CUDA_EMULATION", f"-I{HERE}/cuda_emulation",
        f"-I{ROOT}/csrc", "-x", "c++", "-c", ROOT / "csrc/kernels/attention_cuda.cu", "-o", kernels)  # fmt: skip
    # nvcc knows where its headers are; it hands .cc files to the host's compiler.
    flags = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"
    run(NVCC, "-std=c++17", "-O1", "-shared", "-cudart=none", "-Xcompiler", flags, "-isystem", headers, f"-I{ROOT}/csrc",
        "-Xlinker", "--no-undefined", *(ROOT / s for s in PLUGIN), kernels, "-o", target)  # fmt: skip
    return target


class Plugin:
    """A plug-in, made from fields: name -> (value, PluginFieldType)."""

    def __init__(self, host: ctypes.CDLL, name: str, fields: dict[str, tuple[int, int]], handle: int | None = None):
        self.host, self.name = host, name
        values = list(fields.values())
        self.handle = handle or host.host_create(
            name.encode(), len(fields), (ctypes.c_char_p * len(fields))(*(f.encode() for f in fields)),
            (ctypes.c_int * len(fields))(*(t for _, t in values)), (ctypes.c_int64 * len(fields))(*(v for v, _ in values)))
        self.inputs, self.outputs = (8, 2) if name == IDENTITY else (3, 1)

    def call(self, function: str, *arguments) -> int:
        return getattr(self.host, f"host_{function}")(ctypes.c_void_p(self.handle), *arguments)

    def supports(self, position: int, types: list[int], formats: list[int]) -> bool:
        return bool(self.call("supports", position, self.inputs, self.outputs, numbers(types), numbers(formats)))

    def described(self, function: str, types: list[int], shapes: list[tuple[int, ...]], *more) -> int:
        ranks, sizes = numbers(map(len, shapes)), numbers((n for s in shapes for n in s), ctypes.c_int64)
        return self.call(function, self.inputs, self.outputs, numbers(types), ranks, sizes, *more)

    def run(self, inputs: list[Array]) -> list[Array]:
        """Outputs of one run; filled with NaN before it, so that what is not written shows."""
        shapes = [inputs[0].shape, *([inputs[6].shape] if self.name == IDENTITY else [])]
        outputs = [np.full(shape, np.nan, inputs[0].dtype) for shape in shapes]
        types = [TYPES[x.dtype.name] for x in (*inputs, *outputs)]
        status = self.described("run", types, [x.shape for x in (*inputs, *outputs)], pointers(inputs), pointers(outputs))
        assert status == 0, messages(self.host)
        return outputs


def numbers(values, kind=ctypes.c_int):
    values = list(values)
    return (kind * len(values))(*values)


def pointers(arrays: list[Array]):
    return numbers((x.__array_interface__["data"][0] for x in arrays), ctypes.c_void_p)


def messages(host: ctypes.CDLL) -> str:
    return host.host_messages().decode()


@pytest.fixture(scope="session")
def opened(library: Path, headers: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, str]:
    """TensorRT's side with the library opened, and what creators it found there."""
    target = tmp_path_factory.mktemp("tensorrt_host") / "host.so"
    run(NVCC, "-std=c++17", "-O1", "-shared", "-cudart=none", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror", "-isystem", headers,
        HERE / "tensorrt_host" / "host.cc", "-ldl", "-o", target)  # fmt: skip
    host, listing = ctypes.CDLL(str(target)), ctypes.create_string_buffer(1000)
    for name in ("open", "messages", "description"):
        getattr(host, f"host_{name}").restype = ctypes.c_char_p
    for name in ("create", "reload", "clone"):
        getattr(host, f"host_{name}").restype = ctypes.c_void_p
    assert host.host_open(str(library).encode(), listing) is None
    return host, listing.value.decode()


@pytest.fixture
def host(opened: tuple[ctypes.CDLL, str]) -> ctypes.CDLL:
    messages(opened[0])
    return opened[0]


def make(host: ctypes.CDLL, name: str, num_heads=2, has_null=1, residual=1) -> Plugin:
    values = dict(zip(FIELDS, (num_heads, has_null, residual)))
    plugin = Plugin(host, name, {f: (values[f], INT32_FIELD) for f in (FIELDS if name == IDENTITY else FIELDS[:1])})
    assert plugin.handle, messages(host)
    return plugin


SHAPES = [(2, 20, 80), (2, 77, 80), (2, 77, 80), (2, 20, 80), (2, 1, 80, 10), (2, 1, 4, 80), (2, 1, 20), (2,)]


# --- the library ------------------------------------------------------------------------------------------------------

def test_the_library_shows_what_tensorrt_looks_for(opened):
    assert opened[1] == "pidiff PidiffAttention 1 num_heads\npidiff PidiffIdentityAttention 1 num_heads has_null residual\n"


@needs_cmake
def test_cmake_builds_it_with_nothing_else_to_see_and_without_tensorrt(headers, tmp_path):
    """For one GPU architecture; the flags are CMakeLists.txt's."""
    pybind = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    run("cmake", "-S", ROOT, "-B", tmp_path, "-DPIDIFF_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=87-real",
        f"-DPIDIFF_TENSORRT_INCLUDE={headers}", f"-Dpybind11_DIR={pybind}", f"-DPython_EXECUTABLE={sys.executable}")  # fmt: skip
    run("cmake", "--build", tmp_path, "--target", "pidiff_trt", "-j", "2")
    library = tmp_path / "libpidiff_trt.so"
    symbols = [line.split()[-2:] for line in run("nm", "-D", "-C", library).splitlines()]
    assert {name for kind, name in symbols if kind == "T"} == {"getCreators", "setLoggerFinder"}
    needed = [line for line in run("readelf", "-d", library).splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if "nvinfer" in line or "cuda" in line]
    ctypes.CDLL(str(library))        # no driver is needed to load it


@needs_cmake
def test_cmake_refuses_a_folder_without_headers(tmp_path):
    done = subprocess.run(["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DPIDIFF_CUDA=OFF", f"-DPIDIFF_TENSORRT_INCLUDE={tmp_path}",
                           f"-DPython_EXECUTABLE={sys.executable}", "-DPIDIFF_PYBIND11_INCLUDE=/"], capture_output=True, text=True)
    assert done.returncode != 0 and "PIDIFF_TENSORRT_INCLUDE must be a folder with the headers" in done.stderr


# --- attributes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [INT32_FIELD, INT64_FIELD])
def test_attributes_survive_an_engine(host, kind):
    """32 bits from the ONNX parser, 64 as ONNX has them; what is written is read again, and a clone is a copy."""
    plugin = Plugin(host, IDENTITY, {"residual": (0, kind), "num_heads": (5, kind), "has_null": (1, kind)})
    expected = b"num_heads=5 has_null=1 residual=0"
    assert plugin.call("description") == expected
    clone = Plugin(host, IDENTITY, {}, plugin.call("clone"))
    again = Plugin(host, IDENTITY, {}, plugin.call("reload"))
    assert clone.handle != plugin.handle and clone.call("description") == expected
    assert again.call("description") == expected and messages(host) == ""
    assert clone.call("outputs") == 2 and make(host, ATTENTION).call("outputs") == 1
    for one in (clone, again):
        one.call("destroy")


@pytest.mark.parametrize("name,fields,message", [
    (ATTENTION, {}, "fields must include num_heads, got none"),
    (IDENTITY, {"num_heads": (2, INT32_FIELD)}, "fields must include has_null, residual, got none"),
    (ATTENTION, {"num_heads": (2, INT32_FIELD), "scale": (1, INT32_FIELD)}, "fields must be num_heads, got 2 of them"),
    (ATTENTION, {"num_heads": (0, INT32_FIELD)}, "num_heads must be 1 or more, got 0"),
    (ATTENTION, {"num_heads": (2**40, INT64_FIELD)}, "num_heads must be 1 or more, got 1099511627776"),
    (ATTENTION, {"num_heads": (2, FLOAT32_FIELD)}, "num_heads must be an integer, got a field of type 1"),
    (IDENTITY, {"num_heads": (2, INT32_FIELD), "has_null": (2, INT32_FIELD), "residual": (0, INT32_FIELD)},
     "has_null must be 0 or 1, got 2"),
])  # fmt: skip
def test_wrong_attributes_are_refused(host, name, fields, message):
    assert not Plugin(host, name, fields).handle
    assert messages(host) == f"{name} layer: {message}\n"


# --- types and shapes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [ATTENTION, IDENTITY])
def test_types(host, name):
    """One of three for all tensors, contiguous."""
    plugin = make(host, name)
    count = plugin.inputs + plugin.outputs
    for kind in TYPES.values():
        assert all(plugin.supports(i, [kind] * count, [LINEAR] * count) for i in range(count))
        assert not any(plugin.supports(i, [kind] * count, [LINEAR] * i + [CHW2] * (count - i)) for i in range(count))
        mixed = [plugin.supports(i, [kind] * i + [(kind + 1) % 2] * (count - i), [LINEAR] * count) for i in range(count)]
        assert mixed == [True] + [False] * (count - 1)
        found = numbers([-1] * plugin.outputs)
        assert plugin.call("types", plugin.inputs, numbers([kind] * plugin.inputs), plugin.outputs, found) == 0
        assert list(found) == [kind] * plugin.outputs
    for kind in (INT8, INT32_TYPE):
        assert not plugin.supports(0, [kind] * count, [LINEAR] * count)
    assert not plugin.supports(count, [0] * (count + 1), [LINEAR] * (count + 1))


@pytest.mark.parametrize("types,message", [
    ([0] * 6 + [1, 0], "mask must have q's data type 0, got 1"),
    ([INT8] * 8, "q must be float32, float16 or bfloat16, got TensorRT's data type 2"),
])  # fmt: skip
def test_wrong_types_are_refused(host, types, message):
    found = numbers([-1, -1])
    assert make(host, IDENTITY).call("types", 8, numbers(types), 2, found) != 0
    assert messages(host) == f"{IDENTITY} getOutputDataTypes: {message}\n"


def test_output_shapes_follow_the_inputs(host):
    """Each size is told apart by its value."""
    sizes = [(2, 3, 5), (2, 7, 5), (2, 7, 5), (2, 3, 5), (2, 11, 5, 13), (2, 11, 17, 5), (2, 11, 3), (2,)]
    flat = numbers((n for s in sizes for n in s), ctypes.c_int64)
    result = numbers([-1] * 8, ctypes.c_int64)
    assert make(host, IDENTITY).call("shapes", 8, numbers(map(len, sizes)), flat, 2, result) == 0
    assert list(result) == [3, 2, 3, 5, 3, 2, 11, 3]
    assert make(host, ATTENTION).call("shapes", 3, numbers([3, 3, 3]), flat, 1, result) == 0
    assert list(result)[:4] == [3, 2, 3, 5]
    assert make(host, IDENTITY).call("shapes", 8, numbers([3, 3, 3, 3, 4, 4, 2, 1]), flat, 2, result) != 0
    assert messages(host) == f"{IDENTITY} getOutputShapes: mask must have 3 axes, got (-1, -1)\n"
    assert make(host, IDENTITY).call("shapes", 3, numbers([3, 3, 3]), flat, 1, result) != 0
    assert messages(host) == f"{IDENTITY} getOutputShapes: inputs and outputs must be 8 and 2, got 3 and 1\n"


@pytest.mark.parametrize("heads,changes,message", [
    (2, {}, ""),
    (2, {0: (-1, -1, 80), 6: (-1, -1, -1)}, ""),
    (2, {0: (-1, -1, -1)}, ""),
    (3, {}, "num_heads must divide the channels into heads of at most 160, got 3 for 80 channels"),
    (2, {0: (2, 20, 640)}, "num_heads must divide the channels into heads of at most 160, got 2 for 640 channels"),
    (2, {5: (2, 1, 320)}, "v_id must have 4 axes, got (2, 1, 320)"),
])  # fmt: skip
def test_what_can_never_run_is_refused_when_the_engine_is_built(host, heads, changes, message):
    shapes = [changes.get(i, shape) for i, shape in enumerate((*SHAPES, SHAPES[0], SHAPES[6]))]
    status = make(host, IDENTITY, heads).described("configure", [1] * 10, shapes)
    assert messages(host) == (f"{IDENTITY} configurePlugin: {message}\n" if message else "")
    assert (status == 0) == (not message)


@pytest.mark.parametrize("changes,message", [
    ({1: (2, 77, 40)}, "k must have shape (2, 77, 80), got (2, 77, 40)"),
    ({4: (2, 1, 80, 8)}, "a must have shape (2, 1, 80, 10), got (2, 1, 80, 8)"),
    ({6: (2, 2, 20)}, "mask must have shape (2, 1, 20), got (2, 2, 20)"),
    ({7: (3,)}, "scale must have shape (2), got (3)"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_before_a_run(host, changes, message):
    shapes = [changes.get(i, shape) for i, shape in enumerate((*SHAPES, SHAPES[0], SHAPES[6]))]
    assert make(host, IDENTITY).described("run", [0] * 10, shapes, pointers([]), pointers([])) != 0
    assert messages(host) == f"{IDENTITY} onShapeChange: {message}\n"


# --- results ----------------------------------------------------------------------------------------------------------

def dtype_of(name: str) -> type:
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else getattr(np, name)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("batch,queries,keys", [(2, 20, 77), (1, 65, 33)])
def test_attention(rng, host, name, batch, queries, keys):
    q, k, v = (rng.standard_normal((batch, n, 80)).astype(dtype_of(name)) for n in (queries, keys, keys))
    (out,) = make(host, ATTENTION).run([q, k, v])
    require_close_16bit(out, attention_reference(q, k, v, 2, np.float64), v)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("people,null,residual", [(1, 1, 1), (2, 0, 0), (2, 1, 0), (1, 0, 1)])
def test_identity_attention(rng, host, name, people, null, residual):
    """One plug-in, two sizes one after the other, as with dynamic shapes; through a written engine."""
    dtype = dtype_of(name)
    plugin = make(host, IDENTITY, 2, null, residual)
    plugin = Plugin(host, IDENTITY, {}, plugin.call("reload"))
    for queries in (20, 9):
        _, x, a, v_id, mask, scale = identity_inputs(rng, dtype, queries, 2, 40, people, 4, null)
        q, k, v = (rng.standard_normal((2, n, 80)).astype(dtype) for n in (queries, 33, 33))
        out, mass = plugin.run([q, k, v, x, a, v_id, mask, scale])
        h = attention_reference(q, k, v, 2, np.float64)
        exact = identity_mix_reference(h, h if residual else x, a, v_id, mask, scale, 2, bool(null), np.float64)
        require_close_16bit(out, exact[0], v, v_id, terms=4 * people)
        require_close_16bit(mass, exact[1], terms=4)
    plugin.call("destroy")


def test_a_failed_launch_is_an_error(host, rng):
    """Too many people for a block's shared memory."""
    _, x, a, v_id, mask, scale = identity_inputs(rng, np.float32, 2, 2, 8, 700, 8, True)
    q, k, v = (rng.standard_normal((2, 2, 16)).astype(np.float32) for _ in range(3))
    arrays = [q, k, v, x, a, v_id, mask, scale, np.zeros_like(q), np.zeros_like(mask)]
    status = make(host, IDENTITY).described("run", [0] * 10, [t.shape for t in arrays], pointers(arrays[:8]), pointers(arrays[8:]))
    assert status != 0 and "enqueue: people * heads * columns must fit" in messages(host)


# --- a real parser and builder ----------------------------------------------------------------------------------------

def test_tensorrt_rtx_parses_mini_with_it_and_builds_an_engine(library, tmp_path):
    """The builder process on mini's UNet, fused as it is shipped, with TensorRT-RTX in the place of TensorRT: its registry
    takes the library, its parser makes the plug-ins from the nodes, and its builder asks them for types, formats and shapes.
    What runs there is unknown: an engine cannot be loaded without a driver."""
    trt, libraries = pytest.importorskip("tensorrt_rtx"), pytest.importorskip("tensorrt_rtx_libs")
    onnx = pytest.importorskip("onnx")
    from pidiff.export.engines import read_graph
    from pidiff.export.plugin_nodes import read_for_plugins
    from pidiff.export.profiles import Range, Shapes, profiles_of
    from pidiff.runtime.bundle import Bundle

    graph, file = tmp_path / "unet.onnx", ROOT / "models" / "mini" / "unet.onnx"
    graph.write_bytes(read_for_plugins(file))
    profiles = profiles_of(Bundle.open(file.parent), "unet", read_graph(file)[0], Shapes(people=Range(1, 1, 2)))
    # The parser adds plug-ins through a library that it looks for under this name, which the wheel does not have.
    (tmp_path / "libtensorrt_rtx.so").symlink_to(next(Path(libraries.__file__).parent.glob("libtensorrt_rtx.so.*")))
    job = {"module": "tensorrt_rtx", "version": trt.__version__, "onnx": str(file), "out": str(tmp_path / "unet.engine"),
           "targets": ["sm89"], "workspace": 1 << 30, "profiles": profiles, "fused": {"library": str(library), "graph": str(graph)}, "strip": False, "timings": None}
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    command = [sys.executable, "-c", "from pidiff.export.build_engine import main; main()"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    engine = (tmp_path / "unet.engine").read_bytes()
    nodes = [n for n in onnx.load(file, load_external_data=False).graph.node if n.domain == "pidiff"]
    for name, fields in ((ATTENTION, FIELDS[:1]), (IDENTITY, FIELDS)):
        count = sum("Pidiff" + n.op_type == name for n in nodes)
        assert count and engine.count(name.encode()) >= count and all(engine.count(f.encode()) >= count for f in fields)
