"""The step loop on a device against the loop on the processor, bit for bit: kernels by tests/cuda_emulation, driver made up.

tests/test_cuda_loop.py does the same on a GPU."""

import numpy as np
import pytest

import pidiff._C as core
from fake_tensorrt import KERNEL
from pidiff.runtime import Cancelled, PidiffError, cuda
from pidiff.runtime.denoise import Denoiser
from pidiff.runtime.device_loop import DeviceDenoiser, make_denoiser
from pidiff.runtime.errors import NotFinite
from pidiff.runtime.schedule import SOLVERS
from step_unet import CHANNELS, SIDE, WAYS, DeviceUnet, HostUnet, make_conditions, make_plan, run_unet, start

class FakeQueue:
    """Queues `run_unet` on the made-up driver's streams."""

    def __init__(self, driver):
        self._driver, self._work = driver, []
        self._callback = KERNEL(self._run)

    def __call__(self, tensors, stream, cached, dtype):
        self._work.append((dict(tensors), cached, dtype))
        assert self._driver.library.fake_kernel(stream.handle, self._callback, len(self._work) - 1) == 0

    def _run(self, number):
        tensors, cached, dtype = self._work[number]
        size = lambda shape: int(np.prod(shape)) * np.dtype(dtype).itemsize
        views = {n: np.frombuffer(self._driver.memory(a, size(shape)), dtype).reshape(shape) for n, (a, shape) in tensors.items()}
        run_unet(views, cached)
        return 0


@pytest.fixture
def device(gpu, driver, steps):
    """Return a function dtype -> (unet, unet_cached) on the made-up GPU, our kernels emulated there."""
    gpu()
    queue = FakeQueue(driver)
    streams = [cuda.Stream(cuda.Device())]

    def make(dtype="float32"):
        run = lambda tensors, stream, cached: queue(tensors, stream, cached, dtype)
        return [DeviceUnet(streams[0].device, streams[0], run, dtype, cached) for cached in (False, True)]

    yield make
    streams.clear()         # pytest keeps the function


def denoise(denoiser, plan, batch, guidance, on_step=None):
    """(latents, identity map) of a run."""
    latents, seeds = start(plan, batch)
    return latents, denoiser.run(latents, seeds, guidance, on_step)


def both(device, solver, way, dtype="float32", batch=2, watch=False, **options):
    """Run both loops; returns ((latents, map), ...) and what on_step saw in each."""
    plan, (how, guidance) = make_plan(solver, **options), WAYS[way]
    conditions, seen = make_conditions(batch, **how), ([], [])
    shape = (CHANNELS, SIDE, SIDE)
    host, resident = [HostUnet(dtype, cached) for cached in (False, True)], device(dtype)
    denoisers = [Denoiser(host[0], plan, conditions, shape, host[1]), make_denoiser(resident[0], plan, conditions, shape, resident[1])]
    assert isinstance(denoisers[1], DeviceDenoiser)
    note = lambda to: (lambda step, x, clean: to.append((step, x.copy(), clean.copy()))) if watch else None
    results = [denoise(d, plan, batch, guidance, note(to)) for d, to in zip(denoisers, seen)]
    return *results, seen


def assert_same(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_the_processors_loop_bit_for_bit(device, solver, way, dtype):
    expected, got, _ = both(device, solver, way, dtype)
    assert np.isfinite(expected[0]).all() and np.ptp(expected[0]) > 0.1
    for a, b in zip(expected, got):
        assert_same(a, b)


@pytest.mark.parametrize("options", [{"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}])
def test_other_schedules(device, options):
    expected, got, _ = both(device, "unipc", "guided", **options)
    assert_same(expected[0], got[0])


@pytest.mark.parametrize("solver", ["lcm", "unipc"])
def test_on_step_sees_what_the_processors_sees(device, solver):
    expected, got, seen = both(device, solver, "guided", watch=True)
    assert_same(expected[0], got[0])
    assert [s[0] for s in seen[0]] == [s[0] for s in seen[1]] == list(range(7))
    for a, b in zip(*seen):
        assert_same(a[1], b[1])
        assert_same(a[2], b[2])


def resident_loop(device, solver="dpmpp_2m", batch=2, engines=None, guidance=3.0, **how):
    """(engines, plan, a DeviceDenoiser)"""
    plan, engines = make_plan(solver), engines or device()
    return engines, plan, make_denoiser(engines[0], plan, make_conditions(batch, guidance != 1, **how), (CHANNELS, SIDE, SIDE), engines[1])


def test_cancelling_between_steps(device):
    _, plan, loop = resident_loop(device)
    seen = []
    with pytest.raises(Cancelled, match="the callback asked to stop"):
        denoise(loop, plan, 2, 3.0, lambda step, x, clean: seen.append(x.copy()) or step == 2)
    assert len(seen) == 3
    whole = []
    denoise(loop, plan, 2, 3.0, lambda step, x, clean: whole.append(x.copy()) and None)
    assert len(whole) == 7 and np.array_equal(whole[2], seen[2]), "and it can be run again"


def test_numbers_that_are_not_finite_name_the_first_step(device, driver):
    """... and soon: few more steps are queued."""
    engines, plan, loop = resident_loop(device)
    plan.time_table[2] = np.nan
    loop._upload_constants()
    before = engines[0].queued
    with pytest.raises(PidiffError, match="^latents must stay finite, got NaN or infinity at step 3 of 7: the model's weights or"):
        denoise(loop, plan, 2, 3.0)
    assert engines[0].queued - before <= 5
    assert "kernels" not in difference(driver, engines[0].stream.synchronize), "nothing is left in the stream"
    seen = []
    with pytest.raises(PidiffError, match="at step 3 of 7: "):
        denoise(loop, plan, 2, 3.0, lambda step, *_: seen.append(step) and None)
    assert seen == [0, 1]


@pytest.mark.parametrize("way, step", [("guided", 4), ("plain", 0), ("cached", 5), ("guided in the middle", 6)])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_ancestral"])
def test_the_inputs_of_a_bad_step_are_known(device, solver, way, step):
    """... as they are on the processor, though later steps have run on the device; so that the layer can be found."""
    plan, (how, guidance) = make_plan(solver), WAYS[way]
    plan.time_table[step, 1] = np.inf       # reaches the deep features
    conditions, shape, found = make_conditions(2, **how), (CHANNELS, SIDE, SIDE), []
    resident, host = device(), [HostUnet(), HostUnet(cached=True)]
    for engines in (host, resident):
        loop = make_denoiser(engines[0], plan, conditions, shape, engines[1])
        with pytest.raises(NotFinite) as caught, np.errstate(invalid="ignore"):
            denoise(loop, plan, 2, guidance)
        found.append(caught.value)
    assert str(found[0]) == str(found[1]) and found[0].graph == found[1].graph
    rows = len(found[0].inputs["latents"])
    for name, expected in found[0].inputs.items():
        # The device has the conditional rows first.
        expected = expected if name == "time_row" or rows == 2 else np.concatenate([expected[2:], expected[:2]])
        np.testing.assert_array_equal(found[1].inputs[name], expected, name)


def difference(driver, action):
    before = driver.counts()
    action()
    return {k: v - getattr(before, k) for k, v in vars(driver.counts()).items() if v != getattr(before, k)}


def test_what_a_picture_moves(device, driver):
    """Nothing but the progress comes back between steps; a second picture replays one graph in every step."""
    engines, plan, loop = resident_loop(device)
    first = difference(driver, lambda: denoise(loop, plan, 2, 3.0))
    assert first["captures"] == 1 and first["launches"] == 6 and engines[0].queued == 2
    again = make_denoiser(engines[0], plan, make_conditions(2, True), (CHANNELS, SIDE, SIDE), engines[1])
    done = difference(driver, lambda: denoise(again, plan, 2, 3.0))
    # up: latents, progress, table; down: the progress of each step, latents and the identity map at the end
    assert done == {"uploads": 3, "downloads": 7 + 2, "kernels": 3 * 7, "launches": 7, "synchronizations": 3}


def test_noise_is_the_hosts_and_goes_up_step_by_step(device, driver):
    _, plan, loop = resident_loop(device, "euler_ancestral")
    assert difference(driver, lambda: denoise(loop, plan, 2, 3.0))["uploads"] == 3 + 7


def test_engines_that_cannot_be_captured_are_queued(device):
    expected = denoise(resident_loop(device)[2], make_plan("dpmpp_2m"), 2, 3.0)
    engines = device()
    for engine in engines:
        engine.captures = False
    _, plan, loop = resident_loop(device, engines=engines)
    got = denoise(loop, plan, 2, 3.0)
    assert_same(expected[0], got[0])
    assert engines[0].queued == 7 and not loop._memory.graphs["unet", 4][1]


def test_memory_serves_again_for_the_same_sizes(device, driver):
    engines, plan, loop = resident_loop(device)
    memory, size = engines[0].loop, engines[0].loop.layout.size
    assert all(offset % 256 == 0 for offset in memory.layout.offsets.values()) and size % 256 == 0
    assert resident_loop(device, engines=engines)[2]._memory is memory
    loop = memory = None
    driver.library.fake_setup(0, size)         # no room for a second one: the first must go first
    small = resident_loop(device, engines=engines, batch=1)[2]
    assert small._memory.layout.size < size
    with pytest.raises(PidiffError, match="the GPU must have enough free memory"):
        small = engines[0].loop = None
        resident_loop(device, engines=engines, batch=3)


# --- the kernels alone --------------------------------------------------------------------------------------------------

def kernel_arrays(count, dtype, plan, guidance, times=700, rows=3, maps=900):
    """Arrays for StepParams by name, more time and map elements than latents."""
    steps, rng = len(plan.schedule), np.random.default_rng(1)
    zeros = lambda n, t=np.float32: np.zeros(n, t)
    return {
        "table": core.step_table(plan.schedule, guidance, None, [i % 2 == 1 for i in range(steps)]),
        "progress": np.array([0, 0, 2**31 - 1, 0], np.int32), "latents": rng.standard_normal(count).astype(np.float32),
        **{n: zeros(count) for n in ("previous", "previous2", "last")}, "noise": rng.standard_normal(count).astype(np.float32),
        "model_input": zeros(2 * count, dtype), "model_output": zeros(2 * count, dtype),
        "time_table": rng.standard_normal((steps, times)).astype(dtype), "time_row": zeros(times, dtype),
        "id_scales": rng.standard_normal(steps).astype(dtype), "id_scale": zeros(rows, dtype),
        "identity_map": rng.standard_normal(maps).astype(dtype), "identity_sum": zeros(maps)}


def kernel_params(arrays, steps):
    size = np.dtype(arrays["model_input"].dtype).itemsize
    sizes = {"steps": steps, "elements": arrays["latents"].size, "time_elements": arrays["time_row"].size,
             "rows": arrays["id_scale"].size, "map_elements": arrays["identity_sum"].size,
             **{f"{n}_bytes": size for n in ("input", "output", "time", "scale", "map")}}
    return np.array([sizes[n] if n in sizes else arrays[n].ctypes.data for n in core.STEP_PARAMS], np.int64)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_kernels_with_awkward_numbers(emulate, solver, guidance, dtype):
    """Model outputs that are denormal, infinite or NaN come out as on the processor; the first bad step stays the first."""
    plan, count, steps = make_plan(solver, 4), 300, 4
    arrays, rng = kernel_arrays(count, dtype, plan, guidance), np.random.default_rng(2)
    arrays["noise"][:] = 0.5
    params, outputs, seen = kernel_params(arrays, steps), [], []
    for step in range(steps):
        emulate(False, params)
        factor = np.frombuffer(arrays["table"][step], np.float32)[0]
        np.testing.assert_array_equal(arrays["model_input"][:count], (arrays["latents"] * factor).astype(dtype))
        assert (arrays["model_input"][count:] != 0).any() == (guidance != 1)
        np.testing.assert_array_equal(arrays["time_row"], arrays["time_table"][step])
        assert (arrays["id_scale"] == arrays["id_scales"][step]).all()
        output = (rng.standard_normal(2 * count) * 2.0 ** rng.integers(-26, 3, 2 * count)).astype(dtype)
        if step >= 2:
            output[:3] = np.inf, -np.inf, np.nan
        arrays["model_output"][:] = output
        outputs.append(output)
        emulate(True, params)
        seen.append(arrays["latents"].copy())
    assert arrays["progress"].tolist() == [steps, steps - 1, 2, 0]
    np.testing.assert_allclose(arrays["identity_sum"], 2 * arrays["identity_map"].astype(np.float32))
    before = {n: a.copy() for n, a in arrays.items()}
    emulate(False, params), emulate(True, params)
    assert all(np.array_equal(a, before[n], equal_nan=True) for n, a in arrays.items() if n != "progress"), "nothing after the last step"

    latents, stepper = kernel_arrays(count, dtype, plan, guidance)["latents"], core.Solver(plan.schedule)
    for step, output in enumerate(outputs):
        output = output.astype(np.float32)
        with np.errstate(invalid="ignore"):
            model = output[:count] if guidance == 1 else output[count:] + np.float32(guidance) * (output[:count] - output[count:])
            latents, _ = stepper.step(step, model, latents, np.full(count, 0.5, np.float32))
        np.testing.assert_array_equal(seen[step], latents)


def test_step_table_errors():
    plan = make_plan("ddim")
    for change, message in (({"guidance_scale": np.inf}, "guidance_scale must be finite, got inf"),
                            ({"mapped_steps": [True]}, "mapped_steps must hold one value per step, 7, got 1")):
        with pytest.raises(ValueError, match=message):
            core.step_table(plan.schedule, **{"guidance_scale": 1.0, **change})
    for params in (np.zeros(3, np.int64), np.zeros((25, 2), np.int64)):
        with pytest.raises(ValueError, match=r"params must have shape \[len\(STEP_PARAMS\)\] = \(25\), got"):
            core.queue_step_input(params, 0)
    if not core.has_cuda():
        with pytest.raises(RuntimeError, match="CUDA"):
            core.queue_step_output(np.zeros(25, np.int64), 0)
