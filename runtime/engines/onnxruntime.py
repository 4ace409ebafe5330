"""ONNX Runtime engine: CPU everywhere, CUDA where onnxruntime-gpu and a device are present."""

from pathlib import Path

import numpy as np

from ..cuda import shared_stream
from ..errors import EngineError, require
from ..files import private_cache
from ..memory import MIB, PACKED
from . import check_names, rebound
from .onnxruntime_cache import open_session

# More options of the CUDA provider for a static session, best first. Layouts: convolutions read channels last without transposing.
# With enable_cuda_graph it refuses graphs that have nodes on the processor.
_STATIC_CUDA = ({"prefer_nhwc": "1", "enable_cuda_graph": "1"}, {"enable_cuda_graph": "1"}, {"prefer_nhwc": "1"}, {})
# What ONNX Runtime says when an arena has reached its limit.
_OUT_OF_MEMORY = ("Available memory of", "Failed to allocate memory")


def custom_op_library():
    """Return the path of the library with the `pidiff` ONNX nodes, installed beside the compiled core."""
    from pidiff import _C

    path = Path(_C.__file__).parent / "lib" / "libpidiff_ort.so"
    if not path.is_file():
        raise EngineError(f"the custom-op library must be installed with pidiff, got no {path}: install pidiff again, "
                          "or export the bundle with --attention standard")
    return path


class OnnxRuntimeEngine:
    """One InferenceSession with I/O binding on the caller's arrays (protocol: engines.DeviceEngine).

    On CUDA all sessions work in one stream of ours, so that the step loop can put its kernels between their runs, and capture both
    in one graph where the session is `static` and has no node on the processor. On the processor graphs are kept as they were packed. limits: bytes of the GPU's memory for this session, and for
    the tensors of the step loop around it; None for all.
    """

    device = stream = loop = None

    def __init__(self, path, spec, device="cpu", threads=None, fused=False, static=False, precision="full", lean=False, limits=None):
        import onnxruntime as ort

        ort.disable_telemetry_events()
        self._ort, self._spec, self._device, self._file = ort, spec, device, Path(path).name
        self._bound, self._device_values, self._limits = {}, {}, limits
        providers, options = _providers(ort, device, precision, limits), lambda: _options(ort, threads, fused, precision)
        self._session, self._capturable = self._load(str(path), options, self._on_our_stream(providers), static)
        if device == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():  # it has only printed why
            raise EngineError("device must be cpu where ONNX Runtime cannot load CUDA and cuDNN or finds no GPU, got 'cuda'")
        check_names(Path(path), spec, [v.name for v in (*self._session.get_inputs(), *self._session.get_outputs())])
        self._binding, self._run_options = self._session.io_binding(), ort.RunOptions()
        if device == "cuda":
            self._run_options.add_run_config_entry("gpu_graph_id", "-1")        # we capture, it shall not

    def _load(self, path, options, providers, static):
        """Return the session and whether its runs can be captured. Tries what is fastest first where that is worth it."""
        for more in _STATIC_CUDA if static and self._device == "cuda" else [{}]:
            chosen = [(providers[0][0], {**providers[0][1], **more}), *providers[1:]] if more else providers
            try:
                if self._device == "cpu":
                    return open_session(self._ort, path, options, private_cache("onnxruntime")), False
                return self._ort.InferenceSession(path, options(), providers=chosen), "enable_cuda_graph" in more
            except Exception as e:  # ONNX Runtime raises a dozen unrelated types
                error = self._failed(f"load in ONNX Runtime {self._ort.__version__}", e)
                error.__cause__ = e
        raise error

    def _on_our_stream(self, providers):
        """Return the providers with the stream that the CUDA provider shall work in."""
        if self._device == "cuda":
            self.stream = shared_stream()
            self.device = self.stream.device
            providers[0][1]["user_compute_stream"] = str(self.stream.handle)
        return providers

    @staticmethod
    def loading(weights, static, precision, lean=True):
        """See engines.Engine."""
        return PACKED * weights

    def inputs(self):
        return self._spec.inputs

    def outputs(self):
        return self._spec.outputs

    def bind(self, tensors, constant=()):
        bound = rebound(self._spec, self._bound, tensors)
        names = {t.name for t in self._spec.inputs}
        for name, array in tensors.items():
            on_device = self._device != "cpu"
            value = self._ort.OrtValue.ortvalue_from_numpy(array, *((self._device, 0) if on_device else ()))
            bind = self._binding.bind_ortvalue_input if name in names else self._binding.bind_ortvalue_output
            bind(name, value)
            if on_device and name not in constant:
                self._device_values[name] = (name in names, value)
        self._bound = bound  # keeps the arrays alive: on the CPU the session reads and writes their memory

    def run(self, stream=None):
        for name, (is_input, value) in self._device_values.items():
            if is_input:
                value.update_inplace(self._bound[name])
        try:
            self._session.run_with_iobinding(self._binding, self._run_options)
        except Exception as e:
            raise self._failed("run in ONNX Runtime", e) from e
        for name, (is_input, value) in self._device_values.items():
            if not is_input:
                self._bound[name][...] = value.numpy()

    def bind_device(self, tensors):
        binding, inputs = self._session.io_binding(), {t.name for t in self._spec.inputs}
        for spec in (*self._spec.inputs, *self._spec.outputs):
            address, shape = tensors[spec.name]
            bind = binding.bind_input if spec.name in inputs else binding.bind_output
            bind(spec.name, "cuda", 0, np.dtype(spec.dtype).type, shape, address)
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", "-1")
        return _DeviceBinding(self._session, binding, options, self._failed, self._capturable)

    def check_loop(self, size, shapes):
        room = self._limits and self._limits[1]
        require(room is None or size <= room, "max_memory", f"be larger, or pictures fewer at once, so that the step loop's {-(-size // MIB)} MiB "
                "fit into its part of it", f"{(room or 0) // MIB} MiB for them")

    def _failed(self, verb, error):
        """Return the EngineError for what ONNX Runtime has raised."""
        text = _first_line(error)
        if self._limits and any(words in text for words in _OUT_OF_MEMORY):
            return EngineError(f"max_memory must be larger for {self._file}, got {self._limits[0] // MIB} MiB of it for this graph: {text}")
        return EngineError(f"{self._file} must {verb}, got: {text}")


class _DeviceBinding:
    """A session bound to device memory (protocol: engines.DeviceBinding). A run is queued on the stream that the session has."""

    def __init__(self, session, binding, options, failed, captures):
        self._session, self._binding, self._options, self._failed, self._captures = session, binding, options, failed, captures
        self._after_error = False

    def settle(self):
        return 0

    def capturable(self, stream):
        """Whether all nodes are on the GPU: copies from and to the processor would be captured with what they copied then. What the
        session allocates in a capture it keeps in its arena, as what the run before did."""
        return self._captures

    def queue(self, stream):
        for last in (not self._after_error, True):      # CUDA's error in a capture that failed is reported by the run behind it once more
            try:
                self._session.run_with_iobinding(self._binding, self._options)
            except Exception as e:
                if last:
                    self._after_error = True
                    raise self._failed("run in ONNX Runtime", e) from e
            else:
                break
        self._after_error = False


def run_for(path, data, inputs, names, threads=None, fused=False):
    """Run a graph once on the processor and return the named outputs; data: an .onnx file's bytes, whose weights lie where those
    of the file `path` do. As little as can be is made of it: nothing is fused or folded. Raises ONNX Runtime's own exceptions."""
    import onnxruntime as ort

    options = _options(ort, threads, fused, "full")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(path).parent.absolute()))
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(names, inputs)


def _options(ort, threads, fused, precision):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4          # what goes wrong is raised: one sentence, not two
    # Several sessions live in one process: idle pools must not spin while another graph runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if fused:
        options.add_session_config_entry("pidiff.precision", precision)  # read when the library is registered
        options.register_custom_ops_library(str(custom_op_library()))
    return options


def _providers(ort, device, precision, limits=None):
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if device != "cuda":
        raise EngineError(f"device must be cpu or cuda with onnxruntime, got {device!r}")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise EngineError("device must be cpu with this ONNX Runtime, got 'cuda': it needs onnxruntime-gpu in place of "
                          "onnxruntime (pip uninstall onnxruntime; pip install onnxruntime-gpu), and this one has only " + ", ".join(ort.get_available_providers()))
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA and cuDNN libraries of pip packages, which are on no search path
    # By itself it computes float32 layers in TF32, which has 10 bits, and takes memory in powers of two.
    how = {"use_tf32": str(int(precision == "auto")), "arena_extend_strategy": "kSameAsRequested"}
    if limits:
        how["gpu_mem_limit"] = str(limits[0])
    return [("CUDAExecutionProvider", how), "CPUExecutionProvider"]


def _first_line(error):
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
