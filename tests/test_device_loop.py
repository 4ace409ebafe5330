"""The step loop on a device against the loop on the processor, bit for bit: kernels by tests/cuda_emulation, driver made up.

tests/test_cuda_loop.py does the same on a GPU."""

import numpy as np
import pytest

from fake_tensorrt import KERNEL
from pidiff.runtime import Cancelled, PidiffError, cuda
from pidiff.runtime.denoise import Denoiser
from pidiff.runtime.device_loop import DeviceDenoiser, make_denoiser
from step_unet import CHANNELS, SIDE, SOLVERS, WAYS, DeviceUnet, HostUnet, make_conditions, make_plan, run_unet, start

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


def test_numbers_that_are_not_finite_name_the_first_step(device):
    """... and soon: few more steps are queued."""
    engines, plan, loop = resident_loop(device)
    plan.time_table[2] = np.nan
    loop._upload_constants()
    before = engines[0].queued
    with pytest.raises(PidiffError, match="^latents must stay finite, got NaN or infinity at step 2: the model's weights or"):
        denoise(loop, plan, 2, 3.0)
    assert engines[0].queued - before <= 5
    seen = []
    with pytest.raises(PidiffError, match="at step 2: "):
        denoise(loop, plan, 2, 3.0, lambda step, *_: seen.append(step) and None)
    assert seen == [0, 1]


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
