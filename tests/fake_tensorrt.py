"""TensorRT's Python module for the made-up GPU of fake_gpu/cuda.c: strict about order and arguments, exact in its results.

An engine is a JSON text that names the .onnx file it stands for; its kernel runs that file in ONNX Runtime, on device
memory. Only names that the real module has are here (test_tensorrt.py compares them).
"""

import ctypes
import enum
import json
import subprocess
import types
import weakref
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import onnxruntime

COUNTS = ("uploads", "downloads", "kernels", "launches", "captures", "allocations", "synchronizations", "live", "retained")
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}
KERNEL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
BACKENDS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
SOURCE = Path(__file__).parent / "fake_gpu" / "cuda.c"


class FakeDriver:
    """The driver library, compiled into `folder`. Attributes: path (what takes the place of libcuda.so.1)."""

    def __init__(self, folder):
        self.path = str(folder / "libcuda.so.1")
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", self.path, str(SOURCE)], check=True)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_counts.restype = ctypes.POINTER(ctypes.c_long)
        self.library.fake_setup.argtypes = (ctypes.c_int, ctypes.c_size_t)
        self.library.fake_resolve.argtypes, self.library.fake_resolve.restype = (ctypes.c_uint64, ctypes.c_size_t), ctypes.c_void_p
        self.library.fake_kernel.argtypes = (ctypes.c_void_p, KERNEL, ctypes.c_int)
        for name in ("fake_is_capturing", "fake_break_capture"):
            getattr(self.library, name).argtypes = (ctypes.c_void_p,)

    def counts(self):
        return types.SimpleNamespace(**dict(zip(COUNTS, self.library.fake_counts()[:len(COUNTS)])))

    def memory(self, address, size):
        """Device memory as bytes that numpy can write to, None where there is none."""
        host = self.library.fake_resolve(address, size)
        return (ctypes.c_uint8 * size).from_address(host) if host else None


def profiles(spec, *rows, people=1):
    """One profile per (smallest, best, largest) number of rows."""
    sizes = lambda n: {"B": n, "P": people, "N": 5}
    return [{t.name: [[sizes(n).get(d, d) for d in t.shape] for n in three] for t in spec.inputs} for three in rows]


def engine_bytes(onnx, spec, profiles, scratch=1000, **more):
    """What the fake deserialises: the engine of a GraphSpec."""
    tensor = lambda t, mode: {"mode": mode, "shape": [n if isinstance(n, int) else -1 for n in t.shape],
                              "dtype": {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}[t.dtype]}
    io = {t.name: tensor(t, "INPUT") for t in spec.inputs} | {t.name: tensor(t, "OUTPUT") for t in spec.outputs}
    return json.dumps({"onnx": str(onnx), "io": io, "profiles": profiles, "scratch": scratch, **more}).encode()


def make_module(driver, name="tensorrt_rtx", version="1.7.1.116", capturable=True):
    """Return the module; `events` lists what became of its objects, `fail` names a method that refuses from now on."""
    trt = types.ModuleType(name)
    trt.__spec__, trt.__version__ = ModuleSpec(name, None), version
    trt.events, trt.fail = [], None
    members = {
        "TensorIOMode": ("NONE", "INPUT", "OUTPUT"), "TensorLocation": ("DEVICE", "HOST"), "DataType": tuple(NUMPY),
        "ExecutionContextAllocationStrategy": ("STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"), "EngineValidity": ("VALID",),
    }
    if name == "tensorrt_rtx":
        members["DynamicShapesKernelSpecializationStrategy"] = ("LAZY", "EAGER", "NONE")
    for kind, names in members.items():
        setattr(trt, kind, enum.Enum(kind, names))
    sessions = {}

    class ILogger:
        Severity = enum.IntEnum("Severity", ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"), start=0)

        def __init__(self):
            self.ready = True

    def refuse(log, message, answer=False):
        log.log(ILogger.Severity.WARNING, "nothing to worry about")
        log.log(ILogger.Severity.ERROR, message)
        return answer

    class IPluginRegistry:
        """Knows the creators of libpidiff_trt.so from the moment on when that is loaded, which it refuses to be twice."""

        def __init__(self):
            self._known = False

        def get_creator(self, type, version, plugin_namespace=""):
            ours = (version, plugin_namespace) == ("1", "pidiff") and type in ("PidiffAttention", "PidiffIdentityAttention")
            return object() if ours and self._known else None

        def load_library(self, plugin_path):
            trt.events.append(f"load {plugin_path}")
            if self._known or trt.fail == "load_library" or Path(plugin_path).name != "libpidiff_trt.so":
                return None
            self._known = True
            return object()

    registry = IPluginRegistry()

    class Runtime:
        engine_header_size = 8

        def __init__(self, logger):
            assert logger.ready
            self._log = logger

        def deserialize_cuda_engine(self, data):
            assert driver.library.fake_is_current(), "no context is current"
            try:
                data = json.loads(bytes(data))
            except ValueError:
                return refuse(self._log, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization\n(magic tag)", None)
            if "plugin" in data and registry.get_creator(*data["plugin"]) is None:
                return refuse(self._log, f"Cannot find plugin: {data['plugin'][0]}", None)
            return ICudaEngine(self, data)

        def get_engine_validity(self, header):
            assert len(header) == 8
            return trt.EngineValidity.VALID, 0

        def __del__(self):
            trt.events.append("runtime")

    class ICudaEngine:
        def __init__(self, runtime, data):
            self._runtime, self._log, self._data, self._names = runtime, runtime._log, data, list(data["io"])
            self.num_io_tensors, self.num_optimization_profiles = len(self._names), len(data["profiles"])
            self._filled = not data.get("stripped")

        def get_tensor_name(self, index):
            return self._names[index]

        def get_tensor_mode(self, name):
            return trt.TensorIOMode[self._data["io"][name]["mode"]]

        def get_tensor_dtype(self, name):
            return trt.DataType[self._data["io"][name]["dtype"]]

        def get_tensor_location(self, name):
            return trt.TensorLocation[self._data.get("location", "DEVICE")]

        def get_tensor_profile_shape(self, name, index):
            return [list(shape) for shape in self._data["profiles"][index][name]]

        def create_execution_context(self, choice):
            config = choice if name == "tensorrt_rtx" else types.SimpleNamespace(_strategy=choice)
            assert config._strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
            if name == "tensorrt_rtx":
                assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
            return None if trt.fail == "create_execution_context" else IExecutionContext(self)

        def __del__(self):
            trt.events.append("engine")

    class Refitter:
        """Takes the weights of one graph, the engine's own."""

        def __init__(self, engine, logger):
            self._engine, self._log, self._read = engine, logger, False

        def refit_cuda_engine(self):
            if not self._read or trt.fail == "refit_cuda_engine":
                return refuse(self._log, "weights are missing")
            self._engine._filled = True
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter, logger):
            self._refitter, self._log = refitter, logger

        def refit_from_file(self, model):
            self._refitter._read = model == self._refitter._engine._data["onnx"]
            return self._refitter._read or refuse(self._log, f"not the model of this engine: {model}")

    class IRuntimeConfig:
        def set_execution_context_allocation_strategy(self, strategy):
            self._strategy = strategy

        dynamic_shapes_kernel_specialization_strategy = None

    class IExecutionContext:
        def __init__(self, engine):
            self._engine, self._log, self._data, self._profile = engine, engine._log, engine._data, 0
            self._shapes, self._addresses, self._scratch, self._warm, self._kernels = {}, {}, (0, 0), False, {}
            me = weakref.ref(self)             # the callback must not keep its context alive
            self._callback = KERNEL(lambda number: me()._run(number))

        def set_optimization_profile_async(self, index, stream):
            assert not driver.library.fake_is_capturing(stream)
            self._profile, self._shapes, self._warm = index, {}, False
            return 0 <= index < len(self._data["profiles"])

        def set_input_shape(self, name, shape):
            low, _, high = self._data["profiles"][self._profile][name]
            if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high)):
                return refuse(self._log, f"{name} is outside of the profile")
            self._warm = self._warm and self._shapes.get(name) == tuple(shape)
            self._shapes[name] = tuple(shape)
            return True

        def update_device_memory_size_for_shapes(self):
            assert set(self._shapes) == set(self._data["profiles"][0]), "shapes are missing"
            return self._data["scratch"] * next(iter(self._shapes.values()))[0]

        def set_device_memory(self, address, size):
            assert address % 256 == 0
            self._scratch = address, size

        def set_tensor_address(self, name, address):
            assert name in self._data["io"] and type(address) is int
            self._addresses[name] = address
            return address % 256 == 0

        def execute_async_v3(self, stream):
            assert driver.library.fake_is_current(), "no context is current"
            assert self._engine._filled, "an engine without its weights was run"
            if trt.fail == "execute_async_v3" or driver.library.fake_is_capturing(stream) and not (self._warm and capturable):
                driver.library.fake_break_capture(stream)
                return refuse(self._log, "Error Code 9: the stream is being captured")
            address, size = self._scratch
            if size < self.update_device_memory_size_for_shapes() or size and driver.memory(address, size) is None:
                return refuse(self._log, "no scratch memory")
            views = {n: self._view(n, self._addresses, self._shapes) for n in self._data["io"]}
            if None in views.values():
                return refuse(self._log, "an address is missing or its memory too small")
            self._warm, number = True, len(self._kernels)
            self._kernels[number] = dict(self._addresses), dict(self._shapes), self._scratch    # as they are now
            return driver.library.fake_kernel(stream, self._callback, number) == 0

        def _view(self, name, addresses, shapes):
            """(address, shape, dtype, bytes), None where the memory is not there. An output has the inputs' rows and people."""
            io, shape = self._data["io"][name], shapes.get(name)
            if shape is None:
                rows, people = max(s[0] for s in shapes.values()), shapes.get("id_mask", (0, 1))[1]
                shape = tuple(n if n > 0 else people if i == 1 else rows for i, n in enumerate(io["shape"]))
            dtype = NUMPY[io["dtype"]]
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            address = addresses.get(name)
            return None if address is None or driver.memory(address, size) is None else (address, shape, dtype, size)

        def _run(self, number):
            """The kernel: in the driver's hands, so an exception is an error status."""
            try:
                addresses, shapes, (address, size) = self._kernels[number]
                if size:
                    driver.memory(address, size)[:] = b"\xff" * size
                load = lambda n, view: np.frombuffer(driver.memory(view[0], view[3]), view[2]).reshape(view[1])
                arrays = {n: load(n, self._view(n, addresses, shapes)) for n in self._data["io"]}
                path = self._data["onnx"]
                if path not in sessions:
                    sessions[path] = onnxruntime.InferenceSession(path)
                inputs = {n: a.copy() for n, a in arrays.items() if n in shapes}
                outputs = [n for n in arrays if n not in inputs]
                for n, value in zip(outputs, sessions[path].run(outputs, inputs)):
                    arrays[n][...] = value * np.nan if self._data.get("nan") == n else value
                return 0
            except Exception as error:
                trt.events.append(error)
                return 1

        def __del__(self):
            gone = [n for n in self._addresses if self._shapes and self._view(n, self._addresses, self._shapes) is None]
            trt.events.append(f"context, after the memory of {gone}" if gone else "context")

    if name == "tensorrt_rtx":
        ICudaEngine.create_runtime_config = lambda self: IRuntimeConfig()
        IExecutionContext.is_stream_capturable = lambda self, stream: capturable
        trt.IRuntimeConfig = IRuntimeConfig
    else:
        del Runtime.engine_header_size, Runtime.get_engine_validity
    trt.ILogger, trt.Runtime, trt.ICudaEngine, trt.IExecutionContext = ILogger, Runtime, ICudaEngine, IExecutionContext
    trt.IPluginRegistry, trt.get_plugin_registry = IPluginRegistry, lambda: registry
    trt.Refitter, trt.OnnxParserRefitter = Refitter, OnnxParserRefitter
    return trt
