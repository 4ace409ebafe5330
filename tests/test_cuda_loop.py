"""The step loop on a GPU (-m cuda selects these): our kernels and a small UNet by PyTorch, captured together, against the loop on
the processor. Prints what a step costs (-s shows it)."""

import time

import numpy as np
import pytest

import pidiff._C as core
from pidiff.runtime import Cancelled, PidiffError, cuda
from pidiff.runtime.denoise import Denoiser
from pidiff.runtime.device_loop import DeviceDenoiser, make_denoiser
from pidiff.runtime.schedule import SOLVERS
from step_unet import CHANNELS, SIDE, WAYS, DeviceUnet, HostUnet, make_conditions, make_plan, run_unet, start

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not core.has_cuda(), reason="no CUDA kernels or no GPU")]


class Address:
    """Device memory as PyTorch takes it."""

    def __init__(self, address, shape, dtype):
        self.__cuda_array_interface__ = {"version": 3, "typestr": np.dtype(dtype).str, "shape": tuple(shape), "data": (address, False)}


@pytest.fixture(scope="module")
def stream():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch with CUDA")
    torch.zeros(1, device="cuda")       # its context is the one that ours retains
    return cuda.Stream(cuda.Device())


@pytest.fixture
def unets(stream):
    """Return a function -> [unet, unet_cached] on the GPU."""
    import torch

    outer = torch.cuda.ExternalStream(stream.handle)

    def make(dtype="float32", side=SIDE):
        views = {}      # made once: not while a step is captured

        def view(address, shape):
            if (address, shape) not in views:
                views[address, shape] = torch.as_tensor(Address(address, shape, dtype), device="cuda")
            return views[address, shape]

        def queue(tensors, _, cached):
            with torch.cuda.stream(outer):
                run_unet({n: view(*t) for n, t in tensors.items()}, cached)

        return [DeviceUnet(stream.device, stream, queue, dtype, cached, side) for cached in (False, True)]

    return make


def denoisers(unets, solver, way, dtype="float32", batch=2, side=SIDE, steps=7):
    """(plan, guidance scale, the processor's loop, the GPU's)."""
    plan, (how, guidance) = make_plan(solver, steps), WAYS[way]
    conditions, shape = make_conditions(batch, **how, side=side), (CHANNELS, side, side)
    host, device = [HostUnet(dtype, cached, side) for cached in (False, True)], unets(dtype, side)
    return (plan, guidance, Denoiser(host[0], plan, conditions, shape, host[1]),
            make_denoiser(device[0], plan, conditions, shape, device[1]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_the_processors_loop_bit_for_bit(unets, monkeypatch, solver, way, dtype):
    captured, capture = [], cuda.Stream.capture
    monkeypatch.setattr(cuda.Stream, "capture", lambda self, work: captured.append(capture(self, work)) or captured[-1])
    plan, guidance, host, device = denoisers(unets, solver, way, dtype)
    assert isinstance(device, DeviceDenoiser)
    latents, seeds = start(plan, 2)
    expected = latents.copy()
    expected_map = host.run(expected, seeds, guidance)
    for _ in range(2):      # the second picture replays from its first step
        got = latents.copy()
        got_map = device.run(got, seeds, guidance)
        np.testing.assert_array_equal(got, expected)
        assert (got_map is None) == (expected_map is None)
        if got_map is not None:
            np.testing.assert_array_equal(got_map, expected_map)
    assert captured, "no step was captured"


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_large_batch(unets, solver):
    plan, guidance, host, device = denoisers(unets, solver, "guided", "float16", batch=4, side=96, steps=12)
    latents, seeds = start(plan, 4, 96)
    expected = latents.copy()
    host.run(expected, seeds, guidance)
    device.run(latents, seeds, guidance)
    np.testing.assert_array_equal(latents, expected)


def test_what_on_step_sees_and_cancelling(unets):
    plan, guidance, host, device = denoisers(unets, "unipc", "guided")
    seen = [], []
    for denoiser, to in zip((host, device), seen):
        latents, seeds = start(plan, 2)
        with pytest.raises(Cancelled):
            denoiser.run(latents, seeds, guidance, lambda i, x, clean: to.append((i, x.copy(), clean.copy())) or i == 4)
        np.testing.assert_array_equal(latents, to[-1][1])
    assert [i for i, *_ in seen[0]] == [i for i, *_ in seen[1]] == [0, 1, 2, 3, 4]
    for a, b in zip(*seen):
        np.testing.assert_array_equal(a[1], b[1])
        np.testing.assert_array_equal(a[2], b[2])


def test_numbers_that_are_not_finite_name_their_step(unets):
    plan, guidance, _, device = denoisers(unets, "euler", "guided")
    plan.time_table[3] = np.inf
    device._upload_constants()
    latents, seeds = start(plan, 2)
    with pytest.raises(PidiffError, match="latents must stay finite, got NaN or infinity at step 4 of 7: "):
        device.run(latents, seeds, guidance)


def test_pictures_can_follow_one_another_in_other_sizes(unets):
    """The memory is made anew for another size, and serves again for the same."""
    engines = unets()
    for steps, batch in ((7, 2), (7, 2), (5, 2), (5, 1)):
        plan, conditions = make_plan("dpmpp_2m", steps), make_conditions(batch, True)
        shape, before = (CHANNELS, SIDE, SIDE), engines[0].loop
        device = DeviceDenoiser(engines[0], plan, conditions, shape)
        host = Denoiser(HostUnet(), plan, conditions, shape)
        latents, seeds = start(plan, batch)
        expected = latents.copy()
        host.run(expected, seeds, 3.0)
        device.run(latents, seeds, 3.0)
        np.testing.assert_array_equal(latents, expected)
        assert (engines[0].loop is before) == (steps == 7 and before is not None)


@pytest.mark.parametrize("batch, side", [(1, 64), (4, 64), (1, 128)])
def test_what_a_step_costs(unets, stream, batch, side, monkeypatch, capsys):
    """Printed, not judged: `step` the whole loop's time per step with this small UNet; `processor` of it, without waiting for the
    GPU; `kernels` our two launches alone, back to back on the GPU; `copying` the loop on the processor over the same UNet on
    the GPU, its tensors copied in every step."""
    import torch

    steps, shape, said = 50, (CHANNELS, side, side), {}
    plan, conditions = make_plan("dpmpp_2m", steps), make_conditions(batch, True, side=side)
    device = DeviceDenoiser(unets("float16", side)[0], plan, conditions, shape)

    def timed(denoiser):
        best = []
        for _ in range(5):
            latents, seeds = start(plan, batch, side)
            begin = time.perf_counter()
            denoiser.run(latents, seeds, 3.0)
            best.append((time.perf_counter() - begin) / steps * 1e6)
        return min(best)

    said["step"] = timed(device)
    waited, wait, synchronize = [0.0], cuda.Event.wait, cuda.Stream.synchronize

    def clocked(work):
        def run(self):
            begin = time.perf_counter()
            work(self)
            waited[0] += time.perf_counter() - begin
        return run

    with monkeypatch.context() as patch:
        patch.setattr(cuda.Event, "wait", clocked(wait))
        patch.setattr(cuda.Stream, "synchronize", clocked(synchronize))
        latents, seeds = start(plan, batch, side)
        begin = time.perf_counter()
        device.run(latents, seeds, 3.0)
        said["processor"] = (time.perf_counter() - begin - waited[0]) / steps * 1e6

    outer, (first, last) = torch.cuda.ExternalStream(stream.handle), (torch.cuda.Event(enable_timing=True) for _ in range(2))
    device._begin(start(plan, batch, side)[0], core.step_table(plan.schedule, 3.0))
    def launches():
        core.queue_step_input(device._params, stream.handle)
        core.queue_step_output(device._params, stream.handle)
    graph = stream.capture(launches)
    for mark in (first, last):
        mark.record(outer)
        for _ in range(0 if mark is last else steps):
            graph.launch()
    stream.synchronize()
    said["kernels"] = first.elapsed_time(last) / steps * 1e3

    class Copying(HostUnet):
        def run(self, stream=None):
            on_gpu = {n: torch.from_numpy(a).cuda() for n, a in self._tensors.items()}
            run_unet(on_gpu)
            for spec in self.outputs():
                self._tensors[spec.name][...] = on_gpu[spec.name].cpu().numpy()

    said["copying"] = timed(Denoiser(Copying("float16", False, side), plan, conditions, shape))
    with capsys.disabled():
        print(f"\nmicroseconds per step, {batch} x {side} x {side}:", {k: round(v, 1) for k, v in said.items()})


@pytest.fixture(scope="module")
def tiny_unet(tmp_path_factory):
    """(file, GraphSpec) of the tiny bundle's UNet."""
    for module in ("onnx", "tokenizers", "safetensors"):
        pytest.importorskip(module)
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    from pidiff.runtime.bundle import Bundle
    from tiny_bundle import write_tiny_bundle

    bundle = Bundle.open(write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle"))
    return bundle.file("unet.onnx"), bundle.graph("unet")


@pytest.mark.parametrize("way", ["plain", "guided", "identity late", "guided in the middle"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_ancestral"])
def test_onnx_runtime_keeps_its_tensors_on_the_gpu(tiny_unet, solver, way, capsys):
    """Both loops over its CUDA provider, and the processor's over its CPU provider, draw the same."""
    from pidiff.runtime.denoise import Conditions, Plan
    from pidiff.runtime.engines.onnxruntime import OnnxRuntimeEngine
    from tiny_bundle import CHANNELS, FOLD, LENGTH, SIDE, SUM_C, SUM_CT

    (how, guidance), steps, batch, rng = WAYS[way], 12, 2, np.random.default_rng(3)
    rows, draw = batch * (1 + how["guided"]), lambda *shape: rng.uniform(-1, 1, shape).astype(np.float32)
    conditions = Conditions(draw(rows, LENGTH, 2 * SUM_C), draw(rows, 1, FOLD), np.abs(draw(rows, 1, SIDE, SIDE)), 0.8,
                            how.get("first_identity_step", 0), batch, how.get("guided_steps", (0, 99)), 1)
    plan, shape, results, times = Plan(make_plan(solver, steps).schedule, draw(steps, SUM_CT)), (CHANNELS, SIDE, SIDE), [], []
    for device, make, static in (("cpu", Denoiser, False), ("cuda", Denoiser, False), ("cuda", make_denoiser, False), ("cuda", make_denoiser, True)):
        engine = OnnxRuntimeEngine(*tiny_unet, device=device, threads=1, static=static)
        denoiser = make(engine, plan, conditions, shape)
        assert isinstance(denoiser, DeviceDenoiser) == (make is make_denoiser)
        for _ in range(3):
            latents, seeds = start(plan, batch, SIDE)
            begin = time.perf_counter()
            identity_map = denoiser.run(latents, seeds, guidance)
            took = (time.perf_counter() - begin) / steps * 1e6
        results.append((latents, identity_map))
        times.append(round(took, 1))
        assert not static or all(graph for _, graph in engine.loop.graphs.values()), "captured"
    for latents, identity_map in results[1:]:       # `precision` is "full": no TF32
        np.testing.assert_allclose(latents, results[0][0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(identity_map, results[0][1], rtol=1e-3, atol=1e-4)
    with capsys.disabled():
        print(f"\nmicroseconds per step, a tiny UNet in ONNX Runtime: CPU {times[0]}, CUDA copying {times[1]}, staying {times[2]}, "
              f"captured {times[3]}")
