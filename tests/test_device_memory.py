"""`max_memory` on a GPU: what engines, scratch memory and tensors take is counted, and refused before it is allocated."""

import gc
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("onnx")

from fake_tensorrt import COUNTS
from test_device_engines import cuda_ort
from test_device_loop import difference
from test_tensorrt import CONSTANT, make, unet_arrays
from test_tensorrt_pipeline import PROMPT, person, pictures, with_engines
from tiny_bundle import write_tiny_bundle

from pidiff.runtime import EngineError, PidiffError, Pipeline, cuda
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engines.onnxruntime import OnnxRuntimeEngine
from pidiff.runtime.memory import STAGES

assert cuda_ort, "a fixture"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def compiled(request, tmp_path_factory):
    """(bundle with engines for one and two pictures at once, backend)"""
    path = write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")
    return with_engines(path, backend=request.param, rows=(1, 1, 2)), request.param


@pytest.fixture
def peak(monkeypatch):
    """The most bytes that were counted at once: [bytes]."""
    most, take = [0], cuda.Device.take

    def count(self, size, what):
        take(self, size, what)
        assert self.limit is None or self.used <= self.limit
        most[0] = max(most[0], self.used)

    monkeypatch.setattr(cuda.Device, "take", count)
    return most


@pytest.mark.parametrize("resident", [True, False])
def test_what_is_used_is_enough_and_less_is_refused(compiled, driver, gpu, request, peak, resident):
    """... with the step loop on the GPU and on the processor."""
    path, backend = compiled
    gpu(backend, integrated=not resident)
    if resident:
        request.getfixturevalue("steps")
    expected = pictures(Pipeline.from_bundle(path, engine=backend, threads=1, keep=False, max_memory=1 << 30))
    most, peak[0] = peak[0], 0
    assert 10_000 < most < 1 << 20
    for limit in (most, 2 * most):
        pipe = Pipeline.from_bundle(path, engine=backend, threads=1, max_memory=limit)
        assert np.array_equal(pictures(pipe), expected) and peak[0] == most
        assert len(pipe._engines) == 1, "graphs of one stage at a time"
    for limit in (most - 1, most // 2, 100):
        pipe = Pipeline.from_bundle(path, engine=backend, threads=1, max_memory=limit)
        with pytest.raises(PidiffError, match=r"^max_memory must be at least 1 MiB of the GPU's memory \(1 for .*, [01] that are in use\), "
                                              r"got 0 MiB$"):
            pictures(pipe)
        assert pipe._compiled._scratch.device.used <= limit


@pytest.mark.parametrize("keep", [True, False])
def test_a_pipeline_gives_everything_back_with_its_last_reference(compiled, driver, gpu, steps, keep):
    """Without Python's collector, which knows nothing of the GPU's memory and comes late."""
    path, backend = compiled
    gpu(backend)
    gc.disable()
    try:
        pipe = Pipeline.from_bundle(path, engine=backend, threads=1, keep=keep)
        pictures(pipe)
        assert driver.counts().live > 0
        del pipe
        assert driver.counts().live == 0
    finally:
        gc.enable()


def test_more_pictures_and_kept_engines_need_more(compiled, gpu, steps, peak):
    path, backend = compiled
    gpu(backend)
    needs = []
    for options, keep in (({}, False), ({"num_images": 2}, False), ({}, True)):
        peak[0] = 0
        pipe = Pipeline.from_bundle(path, engine=backend, threads=1, keep=keep, max_memory=1 << 30)
        pictures(pipe, **options)
        needs.append(peak[0])
    assert needs[0] < needs[1] and needs[0] < needs[2]


def test_an_engine_that_is_too_large_is_not_even_read(compiled, gpu, monkeypatch):
    path, backend = compiled
    trt = gpu(backend)
    size = next(path.rglob("unet.engine")).stat().st_size
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda *_: pytest.fail("deserialised"))
    pipe = Pipeline.from_bundle(path, engine=backend, threads=1, max_memory=size - 1)
    monkeypatch.setattr(Bundle, "engine", lambda *_: pytest.fail("read"))
    with pytest.raises(PidiffError, match=r"max_memory must be at least 1 MiB .* for the engine of unet, 0 that"):
        pipe._graph("unet")


def test_scratch_memory_and_tensors_are_summed_before_one_of_them_is_made(plain, driver, gpu, rng):
    gpu()
    bundle, device = Bundle.open(plain), cuda.Device()
    shared = cuda.Scratch(device)
    engine = make(bundle, "unet", (2, 2, 2), (1, 1, 1), scratch=shared)
    arrays, loaded = unet_arrays(engine, rng, 2, own=False), device.used
    shapes = {n: a.shape for n, a in arrays.items()}
    tensors, scratch = sum(a.nbytes for a in arrays.values()), 2000
    for work, size in ((lambda: engine.check_loop(5000, shapes), 5000), (lambda: engine.bind(arrays, CONSTANT), tensors)):
        device.limit = loaded + scratch + size - 1

        def refused():
            with pytest.raises(PidiffError, match=r"for scratch memory and tensors of unet"):
                work()

        assert difference(driver, refused) == {} and device.used == loaded
        device.limit += 1
        work()
    engine.run()
    assert device.used == loaded + scratch + tensors
    arrays = None
    engine.close()
    assert device.used == shared.memory.size == 2000, "the scratch memory is for others"


def test_everything_is_counted_back(plain, gpu, rng):
    gpu()
    scratch = cuda.Scratch(cuda.Device())
    for _ in range(2):
        engine = make(Bundle.open(plain), "unet", scratch=scratch)
        engine.bind(unet_arrays(engine, rng, 1, own=False), CONSTANT)
        engine.run()
        engine.close()
        engine.close()
        assert scratch.device.used == scratch.memory.size == 1000


def test_auto_takes_the_engines_and_does_not_leave_them(compiled, gpu, steps):
    path, backend = compiled
    trt = gpu(backend)
    pipe = Pipeline.from_bundle(path, threads=1, max_memory=1 << 30)
    assert pipe.engine == backend and pictures(pipe).std() > 1
    trt.fail = "create_execution_context"
    with pytest.raises(EngineError, match="must get an execution context"):
        pictures(Pipeline.from_bundle(path, threads=1, max_memory=1 << 30))


# --- ONNX Runtime on CUDA ---------------------------------------------------------------------------------------------

@pytest.fixture
def sessions(cuda_ort, monkeypatch):
    """Options of the CUDA provider by graph, of sessions made from now on; a graph named in `fail` has no memory."""
    ort, made = sys.modules["onnxruntime"], {}
    make_session = ort.InferenceSession

    def note(path, options, providers):
        made[path.rpartition("/")[2][:-5]] = dict(providers[0][1])
        if "fail" in made:
            raise RuntimeError("BFCArena::AllocateRawInternal Available memory of 12 is smaller than requested bytes of 4096")
        return make_session(path, options, providers)

    monkeypatch.setattr(ort, "InferenceSession", note)
    return made


@pytest.mark.parametrize("keep", [False, True])
def test_sessions_share_the_limit(plain, sessions, keep):
    limit = 800 << 20
    pipe = Pipeline.from_bundle(plain, engine="onnxruntime", device="cuda", threads=1, keep=keep, max_memory=limit)
    for graph in pipe.bundle.manifest.graphs:
        pipe._load(graph)
    arenas = {graph: int(how["gpu_mem_limit"]) for graph, how in sessions.items()}
    for group in [list(arenas)] if keep else STAGES.values():
        total = sum(arenas[g] for g in group if g in arenas)
        assert 699 << 20 < total <= 700 << 20, "an eighth is for the step loop"
    loop = pipe._graph("unet")
    loop.check_loop(100 << 20, {})
    with pytest.raises(PidiffError, match=r"max_memory must be larger, or pictures fewer at once, so that the step loop's 101 MiB fit into its "
                                          r"part of it, got 100 MiB for them"):
        loop.check_loop((100 << 20) + 1, {})


def test_without_a_limit_nothing_is_limited(plain, sessions):
    pipe = Pipeline.from_bundle(plain, engine="onnxruntime", device="cuda", threads=1)
    pipe._load("unet").check_loop(1 << 50, {})
    assert "gpu_mem_limit" not in sessions["unet"] and sessions["unet"]["arena_extend_strategy"] == "kSameAsRequested"


def test_weights_that_do_not_fit_are_refused_before_a_session(plain, sessions):
    pipe = Pipeline.from_bundle(plain, engine="onnxruntime", device="cuda", threads=1, max_memory=2048)
    with pytest.raises(PidiffError, match=r"max_memory must be at least 1 MiB of the GPU's memory for the weights of vae_decoder, which get 88% of it, "
                                          "got 0 MiB"):
        pipe._load("vae_decoder")
    assert not sessions


def test_an_arena_that_is_full_is_told_with_the_limit(plain, sessions):
    pipe = Pipeline.from_bundle(plain, engine="onnxruntime", device="cuda", threads=1, max_memory=80 << 20)
    sessions["fail"] = True
    with pytest.raises(EngineError) as caught:
        pipe._load("unet")
    assert re.fullmatch(r"max_memory must be larger for unet.onnx, got 70 MiB of it for this graph: .*Available memory of 12.*", str(caught.value))


def test_the_step_loop_asks_before_it_allocates(plain, driver, cuda_ort, monkeypatch):
    """Only the UNet runs on the made-up GPU."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", sys.modules["onnxruntime"]._real)
        host = Pipeline.from_bundle(plain, engine="onnxruntime", threads=1)
        host.generate(person(), PROMPT, seed=1)
    spec = host.bundle.graph("unet")
    host._engines["unet"] = OnnxRuntimeEngine(host.bundle.file(spec.file), spec, device="cuda", threads=1, limits=(1 << 20, 1))

    def refused():
        with pytest.raises(PidiffError, match="so that the step loop's 1 MiB fit into its part of it, got 0 MiB"):
            host.generate(person(), PROMPT, seed=1)

    assert "allocations" not in difference(driver, refused)


def test_a_process_that_ends_takes_nothing_away_from_others(driver, tmp_path):
    """... on the GPU: ONNX Runtime's sessions outlive our finalizers, and abort if their stream is gone."""
    code = f"""
import atexit, ctypes, sys
library = ctypes.CDLL({driver.path!r})
library.fake_counts.restype = ctypes.POINTER(ctypes.c_long)
live = lambda: library.fake_counts()[{COUNTS.index("live")}:{COUNTS.index("retained") + 1}]
atexit.register(lambda: print(*live()))     # runs after what is registered behind it
from pidiff.runtime import cuda
cuda.LIBRARY = {driver.path!r}
stream = cuda.shared_stream()
memory = cuda.DeviceMemory(stream.device, 1000), cuda.HostMemory(stream.device, 1000), cuda.Event(stream.device)
print(*live())
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (said.returncode, said.stdout.split()) == (0, ["4", "1"] * 2), said.stderr
