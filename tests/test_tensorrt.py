"""The engine class for TensorRT and TensorRT-RTX, on a made-up driver and module (fake_tensorrt.py) that refuse misuse and
compute exactly. Nothing here says how fast a GPU is, or that a real engine loads: benchmarks/gpu_check.sh does."""

import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from fake_tensorrt import BACKENDS, SOURCE, engine_bytes, make_module, profiles
from tiny_bundle import write_tiny_bundle

from pidiff.runtime import EngineError, PidiffError, cuda
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engines import call, load_engine, new_array
from pidiff.runtime.engines.tensorrt import TensorRtEngine

CONSTANT = ("text_kv", "id_fold", "id_mask")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.open(write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle"))


def make(bundle, graph, *rows, backend="tensorrt-rtx", scratch=None, left_out=None, **more):
    spec, made = bundle.graph(graph), profiles(bundle.graph(graph), *(rows or ((1, 1, 1),)))
    frozen = tuple({n: tuple(map(tuple, shapes)) for n, shapes in p.items()} for p in made)
    return TensorRtEngine(backend, engine_bytes(bundle.file(spec.file), spec, made, **more), spec, frozen,
                          scratch or cuda.Scratch(cuda.Device()), lambda shapes: "the command", left_out=left_out)


def unet_arrays(engine, rng, rows, people=1, own=True):
    """Arrays for all tensors, random inputs; `own`: those that change lie in the engine's memory."""
    arrays = {}
    for spec in (*engine.inputs(), *engine.outputs()):
        shape = [{"B": rows, "P": people}.get(d, d) for d in spec.shape]
        array = np.zeros(shape, spec.dtype) if spec.name in CONSTANT or not own else new_array(engine, spec, shape)
        if spec in engine.inputs():
            array[...] = rng.standard_normal(shape)
        arrays[spec.name] = array
    return arrays


def check(engine, bundle, arrays):
    """The bound outputs are what ONNX Runtime makes of the bound inputs."""
    spec = bundle.graph("unet")
    other = load_engine("onnxruntime")(bundle.file(spec.file), spec, threads=1)
    for name, value in call(other, arrays).items():
        np.testing.assert_allclose(arrays[name], value, atol=1e-5)


def difference(driver, action):
    before = driver.counts()
    action()
    after = driver.counts()
    return {k: v - getattr(before, k) for k, v in vars(after).items() if v != getattr(before, k)}


# --- the fakes are like the real ones --------------------------------------------------------------------------------

def test_every_name_is_in_the_real_module(driver):
    real = pytest.importorskip("tensorrt_rtx")
    fake = make_module(driver)
    assert isinstance(real.get_plugin_registry(), real.IPluginRegistry)
    for kind in ("ILogger", "Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IPluginRegistry", "Refitter", "OnnxParserRefitter", "TensorIOMode", "TensorLocation",
                 "DataType", "ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy", "EngineValidity"):
        names = [n for n in vars(getattr(fake, kind)) if not n.startswith("_") and n not in ("ready",)]
        assert names and not [n for n in names if not hasattr(getattr(real, kind), n)], kind
    assert hasattr(real.ICudaEngine, "num_io_tensors") and hasattr(real.ICudaEngine, "num_optimization_profiles")
    assert {"severity", "msg"} <= set(real.ILogger.log.__doc__.replace(":", " ").split())


@pytest.mark.skipif(not Path("/usr/local/cuda/include/cuda.h").is_file(), reason="needs NVIDIA's cuda.h")
def test_the_driver_has_nvidias_prototypes():
    """A function of another type than cuda.h's is a compile error; the fake has every function that is called."""
    subprocess.run(["gcc", "-fsyntax-only", "-w", "-DCHECK", "-I/usr/local/cuda/include", str(SOURCE)], check=True)


# --- one engine ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_one_launch_and_copies_only_what_changes(bundle, driver, gpu, rng, backend):
    gpu(backend)
    engine = make(bundle, "unet", (2, 2, 2), (1, 1, 1), backend=backend)
    arrays = unet_arrays(engine, rng, 2)
    assert difference(driver, lambda: engine.bind(arrays, CONSTANT))["uploads"] == len(CONSTANT)
    moved = {"uploads": 3, "downloads": 2, "kernels": 1, "synchronizations": 1}
    first = difference(driver, engine.run)
    assert first == {**moved, "allocations": 1, "live": 1}, "scratch memory is allocated for the first run"
    check(engine, bundle, arrays)
    assert not engine.captured
    second = difference(driver, engine.run)
    assert second == {**moved, "captures": 1, "launches": 1, "live": 1} and engine.captured
    for _ in range(3):
        arrays["latents"][...] = rng.standard_normal(arrays["latents"].shape)
        arrays["time_row"] += 1
        assert difference(driver, engine.run) == {**moved, "launches": 1}
        check(engine, bundle, arrays)


def test_another_picture_replays_the_same_graph(bundle, driver, gpu, rng):
    """New constants of the same shapes go into the same memory, and the engine's arrays stay where they are."""
    gpu()
    engine = make(bundle, "unet", (2, 2, 2))
    arrays = unet_arrays(engine, rng, 2)
    engine.bind(arrays, CONSTANT)
    engine.run(), engine.run()
    again = unet_arrays(engine, rng, 2)
    assert again["latents"].ctypes.data == arrays["latents"].ctypes.data
    done = difference(driver, lambda: (engine.bind(again, CONSTANT), engine.run()))
    assert done == {"uploads": 6, "downloads": 2, "kernels": 1, "launches": 1, "synchronizations": 2}
    check(engine, bundle, again)


def test_any_arrays_can_be_bound(bundle, driver, gpu, rng):
    """Those that are not the engine's are copied through its page-locked memory."""
    gpu()
    engine = make(bundle, "unet", (1, 2, 4))
    arrays = unet_arrays(engine, rng, 2, own=False)
    engine.bind(arrays)
    for _ in range(3):
        arrays["latents"] += 1
        assert difference(driver, engine.run)["uploads"] == 6
        check(engine, bundle, arrays)
    more = unet_arrays(engine, rng, 3, own=False)
    engine.bind(more)
    for _ in range(3):
        engine.run()
        check(engine, bundle, more)
    engine.bind({"latents": more["latents"] * 2})
    before = more["model_output"].copy()
    engine.run()
    assert np.abs(more["model_output"] - before).max() > 1e-3


def test_shared_memory_is_not_copied(bundle, driver, gpu, rng):
    """On a GPU that shares the processor's memory: only constants are copied, once, to where the GPU caches them."""
    gpu(integrated=True)
    engine = make(bundle, "unet", (2, 2, 2))
    arrays = unet_arrays(engine, rng, 2)
    assert difference(driver, lambda: engine.bind(arrays, CONSTANT))["uploads"] == len(CONSTANT)
    for expected in ({"kernels": 1, "synchronizations": 1, "allocations": 1, "live": 1},
                     {"kernels": 1, "synchronizations": 1, "captures": 1, "launches": 1, "live": 1},
                     {"kernels": 1, "synchronizations": 1, "launches": 1}):
        arrays["latents"] += 1
        assert difference(driver, engine.run) == expected
        check(engine, bundle, arrays)


def test_rows_choose_the_profile(bundle, gpu, rng):
    gpu()
    engine = make(bundle, "unet", (2, 4, 8), (1, 2, 4))
    for rows, profile in ((4, 0), (2, 1), (8, 0), (1, 1), (3, 0), (4, 0)):
        arrays = unet_arrays(engine, rng, rows)
        engine.bind(arrays, CONSTANT)
        assert engine._context._profile == profile, rows
        for _ in range(3):
            engine.run()
            check(engine, bundle, arrays)


def test_shapes_that_no_profile_takes(bundle, gpu, rng):
    gpu()
    engine = make(bundle, "unet", (2, 2, 2), (1, 1, 1))
    arrays = unet_arrays(engine, rng, 2)
    engine.bind(arrays, CONSTANT)
    with pytest.raises(EngineError, match=r"^engine of unet must be built for the shapes that it is given, got latents \[4, 4, 4, 4\]"
                                          r", .*id_scale \[4\]; build it with: the command$"):
        engine.bind(unet_arrays(engine, rng, 4, own=False), CONSTANT)
    engine.run()
    check(engine, bundle, arrays)


def test_engines_that_cannot_be_captured_run_call_by_call(bundle, driver, gpu, rng):
    """TensorRT-RTX is asked; TensorRT finds out while capturing."""
    for backend in BACKENDS:
        gpu(backend, capturable=False)
        engine = make(bundle, "unet", (1, 1, 1), backend=backend)
        arrays = unet_arrays(engine, rng, 1)
        engine.bind(arrays, CONSTANT)
        for _ in range(4):
            arrays["latents"] += 1
            assert "launches" not in difference(driver, engine.run) and not engine.captured
            check(engine, bundle, arrays)


def test_numbers_that_are_not_finite_stop_the_step(bundle, gpu, rng):
    gpu()
    engine = make(bundle, "unet", nan="identity_map")
    engine.bind(unet_arrays(engine, rng, 1), CONSTANT)
    for _ in range(3):
        with pytest.raises(EngineError, match="graph unet must give finite numbers, got NaN or infinity in identity_map: "):
            engine.run()


def test_scratch_memory_is_shared_and_moves(bundle, driver, gpu, rng):
    """Two engines use one scratch memory, as large as the larger needs; the first notices that it has moved."""
    gpu()
    scratch = cuda.Scratch(cuda.Device())
    first, second = make(bundle, "unet", scratch=scratch), make(bundle, "unet", scratch=scratch, **{"nan": None})
    second_large = make(bundle, "unet", (3, 3, 3), scratch=scratch)
    arrays = [unet_arrays(e, rng, n) for e, n in ((first, 1), (second, 1), (second_large, 3))]
    for engine, mine in zip((first, second, second_large), arrays):
        engine.bind(mine, CONSTANT)
    first.run(), first.run(), second.run()
    assert scratch.memory.size == 1000 and first.captured
    old = scratch.memory.address
    blocker = cuda.DeviceMemory(scratch.device, 1000)         # takes the place that becomes free
    second_large.run()
    assert scratch.memory.size == 3000 and scratch.memory.address != old
    done = difference(driver, first.run)
    assert done["captures"] == 1 and "live" not in done, "the old graph is replaced by one"
    for engine, mine in zip((first, second, second_large), arrays):
        mine["latents"] += 1
        engine.run()
        check(engine, bundle, mine)
    del blocker


def test_everything_is_given_back_in_order(bundle, driver, gpu, rng):
    trt = gpu()
    engine = make(bundle, "unet")
    arrays = unet_arrays(engine, rng, 1)
    engine.bind(arrays, CONSTANT)
    engine.run(), engine.run()
    latents = arrays["latents"]
    engine.close()
    assert trt.events == ["context", "engine", "runtime"], "users go before what they use"
    latents[...] = 1                                          # memory that somebody still holds is still there
    assert driver.counts().live == len(arrays) - len(CONSTANT)
    with pytest.raises(EngineError, match="tensors must be bound before a run, got none"):
        engine.run()


def test_any_thread_can_run_it(bundle, gpu, rng):
    gpu()
    engine = make(bundle, "unet")
    arrays, errors = unet_arrays(engine, rng, 1), []

    def work():
        try:
            engine.bind(arrays, CONSTANT)
            engine.run(), engine.run()
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    check(engine, bundle, arrays)


def test_too_little_memory_is_one_sentence_and_can_be_tried_again(bundle, driver, gpu, rng):
    gpu(room=100)
    engine = make(bundle, "unet")
    with pytest.raises(EngineError, match="the GPU must have enough free memory, got none left in cuMemAlloc_v2"):
        engine.bind(unet_arrays(engine, rng, 1, own=False), CONSTANT)
    with pytest.raises(EngineError, match="tensors must be bound before a run"):
        engine.run()
    driver.library.fake_setup(0, 1 << 40)
    arrays = unet_arrays(engine, rng, 1)
    engine.bind(arrays, CONSTANT)
    engine.run()
    check(engine, bundle, arrays)


@pytest.mark.parametrize("change, sentence", [
    ({"location": "HOST"}, "engine of unet must take or give latents in float32, got FLOAT"),
    ({"scratch": 0}, None),
])
def test_engines_that_are_not_what_the_manifest_says(bundle, gpu, rng, change, sentence):
    gpu()
    if sentence is None:                                      # an engine without scratch memory is fine
        engine = make(bundle, "unet", **change)
        arrays = unet_arrays(engine, rng, 1)
        engine.bind(arrays, CONSTANT)
        engine.run()
        return check(engine, bundle, arrays)
    with pytest.raises(EngineError, match=sentence):
        make(bundle, "unet", **change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_were_left_out_come_from_the_graph(bundle, driver, gpu, rng, backend):
    trt = gpu(backend)
    unet, vae = (bundle.file(bundle.graph(g).file) for g in ("unet", "vae_decoder"))
    engine = make(bundle, "unet", backend=backend, stripped=True, left_out=(unet, 1000), scratch=cuda.Scratch(cuda.Device(1 << 20)))
    arrays = unet_arrays(engine, rng, 1)
    engine.bind(arrays, CONSTANT)
    engine.run()
    check(engine, bundle, arrays)
    with pytest.raises(EngineError, match="graph unet must read the weights that it lacks in .*, got: not the model of this engine"):
        make(bundle, "unet", backend=backend, stripped=True, left_out=(vae, 1000))
    trt.fail = "refit_cuda_engine"
    with pytest.raises(EngineError, match="graph unet must take the weights that it lacks in .*, got: weights are missing"):
        make(bundle, "unet", backend=backend, stripped=True, left_out=(unet, 1000))
    engine.close()


def test_weights_that_were_left_out_count(bundle, gpu):
    """They take the GPU's memory like those in an engine."""
    gpu()
    unet = bundle.file(bundle.graph("unet").file)
    with pytest.raises(PidiffError, match="the engine of unet"):
        make(bundle, "unet", stripped=True, left_out=(unet, 1 << 30), scratch=cuda.Scratch(cuda.Device(1 << 20)))


def test_wrong_engines_and_refusals(bundle, gpu, rng):
    trt = gpu()
    scratch, spec, other = cuda.Scratch(cuda.Device()), bundle.graph("unet"), bundle.graph("vae_decoder")
    data = engine_bytes(bundle.file("unet.onnx"), spec, profiles(spec, (1, 1, 1)))
    new = lambda data, spec, *rows: TensorRtEngine("tensorrt-rtx", data, spec, tuple(
        {n: tuple(map(tuple, s)) for n, s in p.items()} for p in profiles(spec, *rows)), scratch, str)
    for got, args in (("magic tag", (b"no engine", spec, (1, 1, 1))), ("in one of them only", (data, other, (1, 1, 1))),
                      ("have the profiles of its manifest", (data, spec, (2, 2, 2)))):
        with pytest.raises(EngineError, match=got) as caught:
            new(*args)
        assert "\n" not in str(caught.value)
    trt.fail = "create_execution_context"
    with pytest.raises(EngineError, match="graph unet must get an execution context in tensorrt-rtx 1.7.1.116, got: no reason given"):
        new(data, spec, (1, 1, 1))
    trt.fail = None
    engine = new(data, spec, (1, 1, 1))
    engine.bind(unet_arrays(engine, rng, 1), CONSTANT)
    trt.fail = "execute_async_v3"
    with pytest.raises(EngineError, match="graph unet must run in tensorrt-rtx 1.7.1.116, got: Error Code 9"):
        engine.run()
