"""Engines whose tensors stay on the made-up GPU through the whole step loop: TensorRT's, and ONNX Runtime's on CUDA."""

import ctypes
import importlib.util
import json
import sys
import types

import numpy as np
import pytest

pytest.importorskip("onnx")

from fake_tensorrt import KERNEL
from test_device_loop import difference
from test_tensorrt import make, unet_arrays
from test_tensorrt import check as check_run
from test_tensorrt_pipeline import BENCHMARK, PROMPT, person, pictures, with_engines
from tiny_bundle import write_tiny_bundle

from pidiff.runtime import Cancelled, EngineError, PidiffError, Pipeline, cuda
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.device_loop import DeviceDenoiser
from pidiff.runtime.memory import STAGES


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def compiled(request, tmp_path_factory):
    """(bundle with engines for one and two pictures at once, backend)"""
    path = write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle", solver="euler_ancestral")
    return with_engines(path, backend=request.param, rows=(1, 1, 2)), request.param


OPTIONS = [{}, {"guidance_scale": 1.0}, {"num_images": 3}, {"guidance_interval": (0.25, 0.75)}, {"id_start": 0.5}, {"id_scale": 0.0},
           {"scheduler": "unipc"}, {"scheduler": "lcm", "num_images": 2}]


def test_pictures_are_onnx_runtimes(compiled, gpu, steps):
    path, backend = compiled
    gpu(backend)
    plain, pipe = (Pipeline.from_bundle(path, engine=e, threads=1) for e in ("onnxruntime", backend))
    for options in OPTIONS:
        options = {"seed": 1, "num_inference_steps": 6, **options}
        a, b = (p.generate(person(), PROMPT, **options) for p in (plain, pipe))
        assert np.abs(np.array(a.images, int) - np.array(b.images, int)).max() <= 1, options
        assert (a.identity_map is None) == (b.identity_map is None)
        if a.identity_map is not None:
            np.testing.assert_allclose(b.identity_map, a.identity_map, atol=1e-5)
    assert pipe._graph("unet").captured


def test_a_picture_of_the_same_sizes_replays_the_graph(compiled, driver, gpu, steps):
    path, backend = compiled
    gpu(backend)
    pipe = Pipeline.from_bundle(path, engine=backend, threads=1)
    denoise = lambda seed: pipe.generate(person(), PROMPT, seed=seed, num_inference_steps=6, scheduler="ddim")
    denoise(1), denoise(2)
    done = difference(driver, lambda: denoise(3))
    assert done["launches"] == 6 + 1 and "captures" not in done and "allocations" not in done, "six steps and the decoder"
    # Up: three constants and two tables, then latents, progress and table; for the decoder its latents. Down: progress by step,
    # latents, identity map; the picture.
    assert (done["uploads"], done["downloads"]) == (5 + 3 + 1, 6 + 2 + 1)


@pytest.mark.parametrize("options", [{}, {"num_images": 2}, {"preset": "balanced", "num_inference_steps": 10}])
def test_the_first_picture_after_warming_up_replays_graphs(compiled, driver, gpu, steps, options):
    path, backend = compiled
    gpu(backend)
    pipe = Pipeline.from_bundle(path, engine=backend, threads=1)
    pipe.warm_up(scheduler="ddim", **options)
    done = difference(driver, lambda: pipe.generate(person(), PROMPT, seed=3, scheduler="ddim", **options))
    assert done["launches"] > 2 and "captures" not in done and "allocations" not in done


def test_a_preview_may_move_the_scratch_memory(compiled, gpu, steps):
    """The decoder's run between two steps makes it larger: the step is captured again."""
    path, backend = compiled
    gpu(backend)
    pipe = Pipeline.from_bundle(path, engine=backend, threads=1)
    options = {"seed": 5, "num_inference_steps": 6, "guidance_scale": 1.0}
    pipe._compiled._scratch.reserve(1000)
    seen = []

    def watch(step, total, preview):
        if step == 3:
            pipe._compiled._scratch.reserve(50_000)
        seen.append(preview())

    got = pipe.generate(person(), PROMPT, **options, callback=watch)
    plain = Pipeline.from_bundle(path, engine="onnxruntime", threads=1)
    assert np.abs(pictures(plain, **options) - np.array(got.images, int)).max() <= 1
    assert len(seen) == 6 and np.abs(np.array(seen[-1], int) - np.array(got.images, int)).max() <= 1


def test_cancel_and_numbers_that_overflow(compiled, gpu, steps, tmp_path):
    path, backend = compiled
    gpu(backend)
    pipe, seen = Pipeline.from_bundle(path, engine=backend, threads=1), []
    with pytest.raises(Cancelled):
        pipe.generate(person(), PROMPT, seed=1, num_inference_steps=6, callback=lambda step, *_: seen.append(step) or step == 3)
    assert seen == [1, 2, 3]
    assert len(pipe.generate(person(), PROMPT, seed=1, num_inference_steps=6).images) == 1
    bad = with_engines(write_tiny_bundle(tmp_path / "bad", poison="unet"), backend=backend)
    with pytest.raises(PidiffError, match="latents must stay finite, got NaN or infinity at step 1 of 5: NaN comes first in time: the model's weights"):
        Pipeline.from_bundle(bad, engine=backend, threads=1).generate(person(), PROMPT, seed=1)


def test_engines_that_cannot_be_captured(compiled, driver, gpu, steps):
    path, backend = compiled
    gpu(backend, capturable=False)
    pipe, plain = (Pipeline.from_bundle(path, engine=e, threads=1) for e in (backend, "onnxruntime"))
    for _ in range(2):
        done = difference(driver, lambda: pictures(pipe))
    assert "launches" not in done and not pipe._graph("unet").captured
    assert np.abs(pictures(pipe) - pictures(plain)).max() <= 1


@pytest.mark.skipif(not BENCHMARK.is_file(), reason="benchmarks/ is not part of the installed package")
def test_the_gpu_check_times_it(compiled, gpu, steps, capsys):
    """The numbers mean nothing here."""
    path, backend = compiled
    gpu(backend)
    spec = importlib.util.spec_from_file_location("gpu_engines", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.main([str(path), "--engine", backend, "--steps", "6"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["captured"] and said["same_again"] and said["mean_difference"] < 0.1
    assert set(said["milliseconds"]) == {"step", "wait", "processor"} and min(said["milliseconds"].values()) > 0


def test_each_binding_is_a_context_of_its_own(plain, driver, gpu, steps, rng):
    """One for host arrays, one for each number of rows on the device: none disturbs another."""
    trt = gpu()
    bundle = Bundle.open(plain)
    engine = make(bundle, "unet", (2, 2, 2), (1, 1, 1))
    memory = cuda.DeviceMemory(engine.device, 1 << 16)
    specs = (*engine.inputs(), *engine.outputs())
    tensors = lambda rows: {t.name: (memory.address + 4096 * i, tuple({"B": rows, "P": 1}.get(n, n) for n in t.shape))
                            for i, t in enumerate(specs)}
    arrays = unet_arrays(engine, rng, 2)
    engine.bind(arrays, ("text_kv", "id_fold", "id_mask"))
    engine.run(), engine.run()
    bindings = [engine.bind_device(tensors(rows)) for rows in (2, 1)]
    engine.stream.clear(memory)
    versions = [b.settle() for b in bindings]
    for binding in bindings:
        binding.queue(engine.stream)
    arrays["latents"] += 1
    assert difference(driver, engine.run)["launches"] == 1
    check_run(engine, bundle, arrays)
    assert versions == [b.settle() for b in bindings] and not trt.events
    with pytest.raises(EngineError, match="engine of unet must be built for the shapes that it is given, got latents"):
        engine.bind_device(tensors(3))


def test_steps_with_and_without_guidance_have_a_graph_each(compiled, driver, gpu, steps):
    """Going from one to the other captures nothing once both are."""
    path, backend = compiled
    gpu(backend)
    pipe = Pipeline.from_bundle(path, engine=backend, threads=1)
    draw = lambda seed: pipe.generate(person(), PROMPT, seed=seed, num_inference_steps=9, guidance_interval=(0.3, 0.7), scheduler="ddim")
    draw(1)
    graphs = pipe._graph("unet").loop.graphs
    assert set(graphs) == {("unet", 1), ("unet", 2)} and all(graph for _, graph in graphs.values())
    draw(2)
    done = difference(driver, lambda: draw(3))
    assert done["launches"] == 9 + 1 and "captures" not in done
    graphs = None


# --- ONNX Runtime on CUDA ---------------------------------------------------------------------------------------------

class FakeCudaOrt:
    """ONNX Runtime with a CUDA provider on the made-up GPU: a run is queued on the stream of its session and computed by the real
    one on the processor. refused: options that it has no session with. in_captures: what a run does when it is captured: "allocate",
    or "fail", which the next run reports once more."""

    def __init__(self, driver, real):
        self._driver, self._real, self._work, self.refused, self.tried = driver, real, [], (), []
        self.in_captures, self.arena, self._error = "", [], False
        self._callback = KERNEL(self._run)
        for name in ("SessionOptions", "ExecutionMode", "RunOptions", "disable_telemetry_events", "__version__", "__spec__"):
            setattr(self, name, getattr(real, name))

    def get_available_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, path, options, providers):
        (name, how), fallback = providers
        assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        self.tried.append(set(how) & {"prefer_nhwc", "enable_cuda_graph"})
        if self.tried[-1] & set(self.refused):
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        session, stream = self._real.InferenceSession(path, options, providers=["CPUExecutionProvider"]), int(how["user_compute_stream"])

        def run(binding, options=None):
            entry = options.get_run_config_entry
            assert (entry("disable_synchronize_execution_providers"), entry("gpu_graph_id")) == ("1", "-1")
            captured = self._driver.library.fake_is_capturing(ctypes.c_void_p(stream))
            if captured and self.in_captures == "allocate":
                self.arena.append(ctypes.c_uint64())
                assert self._driver.library.cuMemAlloc_v2(ctypes.byref(self.arena[-1]), ctypes.c_size_t(1 << 20)) == 0
            if self._error or captured and self.in_captures == "fail":
                self._error = bool(captured)
                raise RuntimeError("operation not permitted when stream is capturing")
            self._work.append((session, dict(binding.inputs), dict(binding.outputs)))
            assert self._driver.library.fake_kernel(stream, self._callback, len(self._work) - 1) == 0

        return types.SimpleNamespace(get_inputs=session.get_inputs, get_outputs=session.get_outputs, io_binding=FakeBinding,
                                     run_with_iobinding=run, get_providers=self.get_available_providers)

    def _run(self, number):
        session, inputs, outputs = self._work[number]
        view = lambda dtype, shape, address: np.frombuffer(self._driver.memory(
            address, int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
        names = list(outputs)
        for name, value in zip(names, session.run(names, {n: view(*t).copy() for n, t in inputs.items()})):
            view(*outputs[name])[...] = value
        return 0


class FakeBinding:
    """A binding by address. By arrays of the processor it does nothing here."""

    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = element_type, shape, buffer_ptr

    def bind_output(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = element_type, shape, buffer_ptr


@pytest.fixture
def cuda_ort(driver, gpu, steps, monkeypatch):
    """Puts ONNX Runtime with CUDA in place; the stream that its sessions share ends with the test."""
    import onnxruntime

    gpu()
    cuda.shared_stream.cache_clear()
    fake = FakeCudaOrt(driver, onnxruntime)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    yield
    for address in fake.arena:
        assert driver.library.cuMemFree_v2(address) == 0
    cuda.shared_stream.cache_clear()


@pytest.fixture
def half_on_cuda(plain, cuda_ort, monkeypatch):
    """Function (static) -> (pipeline, its UNet's engine): the UNet alone runs on the made-up GPU; what else a picture needs is the
    processor's."""
    from pidiff.runtime.engines.onnxruntime import OnnxRuntimeEngine

    def make(static):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "onnxruntime", sys.modules["onnxruntime"]._real)
            pipe = Pipeline.from_bundle(plain, engine="onnxruntime", threads=1, keep=True)
            for graph in pipe.bundle.manifest.graphs:
                pipe._graph(graph)
        spec = pipe.bundle.graph("unet")
        pipe._engines["unet"] = unet = OnnxRuntimeEngine(pipe.bundle.file(spec.file), spec, device="cuda", threads=1, static=static)
        return pipe, unet

    return make


@pytest.mark.parametrize("integrated, kept", [(False, set(STAGES) - {"enroll"}), (True, {"denoise", "decode"})])
def test_onnx_runtime_on_cuda_keeps_what_has_a_place(plain, gpu, monkeypatch, integrated, kept):
    """A graphics card's memory is for pictures, of photos no more than their codes; a Jetson's is the processor's, too."""
    gpu(integrated=integrated)
    pipe = Pipeline.from_bundle(plain, engine="onnxruntime", threads=1)
    monkeypatch.setattr(pipe, "device", "cuda")
    assert set(pipe._stages_to_keep(None, None)) == kept


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_onnx_runtime_on_cuda_keeps_its_tensors_there(plain, driver, half_on_cuda, monkeypatch, options, static):
    options = {"seed": 1, "num_inference_steps": 6, **options}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", sys.modules["onnxruntime"]._real)
        expected = Pipeline.from_bundle(plain, engine="onnxruntime", threads=1).generate(person(), PROMPT, **options)
    pipe, unet = half_on_cuda(static)
    seen, run = [], DeviceDenoiser.run
    monkeypatch.setattr(DeviceDenoiser, "run", lambda self, *a: seen.append(1) or run(self, *a))
    got = pipe.generate(person(), PROMPT, **options)
    assert np.abs(np.array(expected.images, int) - np.array(got.images, int)).max() <= 1
    assert seen and unet.stream is cuda.shared_stream() and unet.device is unet.stream.device
    if got.identity_map is not None:
        np.testing.assert_allclose(got.identity_map, expected.identity_map, atol=1e-5)
    batches = len(seen)
    pipe.generate(person(), PROMPT, **options)
    done = difference(driver, lambda: pipe.generate(person(), PROMPT, **options))
    assert done["kernels"] == 3 * 6 * batches and done.get("launches", 0) == (6 * batches if static else 0)
    assert "captures" not in done


@pytest.mark.parametrize("refused, captured", [(("enable_cuda_graph",), False), (("prefer_nhwc",), True), (("prefer_nhwc", "enable_cuda_graph"), False), ((), True)])
def test_onnx_runtime_on_cuda_without_what_it_refuses(driver, half_on_cuda, refused, captured):
    ort = sys.modules["onnxruntime"]
    ort.refused = refused
    pipe, unet = half_on_cuda(True)
    assert ort.tried[-1] == {"prefer_nhwc", "enable_cuda_graph"} - set(refused)
    for _ in range(2):
        pipe.generate(person(), PROMPT, seed=1, num_inference_steps=6)
    done = difference(driver, lambda: pipe.generate(person(), PROMPT, seed=1, num_inference_steps=6))
    assert ("launches" in done) == captured


@pytest.mark.parametrize("in_captures", ["allocate", "fail"])
def test_onnx_runtime_that_needs_more_memory_in_a_capture(driver, half_on_cuda, in_captures):
    """... gets it; and where it cannot be captured after all, the steps are queued call by call."""
    pipe, unet = half_on_cuda(True)
    options = {"seed": 1, "num_inference_steps": 6}
    expected = np.array(pipe.generate(person(), PROMPT, **options).images)
    unet.loop = None
    sys.modules["onnxruntime"].in_captures = in_captures
    assert np.array_equal(pipe.generate(person(), PROMPT, **options).images, expected)
    done = difference(driver, lambda: pipe.generate(person(), PROMPT, **options))
    assert done.get("launches", 0) == (6 if in_captures == "allocate" else 0)


def test_a_session_that_no_options_help_says_why(half_on_cuda, monkeypatch):
    monkeypatch.setattr(sys.modules["onnxruntime"], "InferenceSession", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no such file")))
    with pytest.raises(EngineError, match="unet.onnx must load in ONNX Runtime .*, got: no such file"):
        half_on_cuda(True)
