"""The step loop on a device against the loop on the processor, bit for bit: kernels by tests/cuda_emulation, driver made up.

tests/test_cuda_loop.py does the same on a GPU."""

import shutil

import numpy as np
import pytest

import pidiff._C as core
from fake_steps import CSRC, FakeSteps, compile_steps
from fake_tensorrt import KERNEL
from pidiff.runtime import Cancelled, PidiffError, cuda
from pidiff.runtime.denoise import Denoiser
from pidiff.runtime.device_loop import DeviceDenoiser, make_denoiser
from step_unet import CHANNELS, SIDE, SOLVERS, WAYS, DeviceUnet, HostUnet, make_conditions, make_plan, run_unet, start

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("gcc") is None or not CSRC.is_dir(), reason="needs gcc and the repository's sources")


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    return compile_steps(tmp_path_factory.mktemp("steps"))


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
def device(gpu, driver, emulate, monkeypatch):
    """Return a function dtype -> (unet, unet_cached) on the made-up GPU, our kernels emulated there."""
    gpu()
    steps, queue = FakeSteps(driver, emulate), FakeQueue(driver)
    monkeypatch.setattr(core, "queue_step_input", steps.input)
    monkeypatch.setattr(core, "queue_step_output", steps.output)
    monkeypatch.setattr(core, "has_cuda", lambda: True)
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
