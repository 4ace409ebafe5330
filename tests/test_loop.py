"""The denoising loop: callbacks, guidance, batching, cancellation, errors."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest

import pidiff._C as core
from pidiff.runtime.schedule import SOLVERS
from references import stable_diffusion_alphas as alphas


class Loop:
    """A toy engine around core.sample: the model is `weight * input` for the conditional rows, 0 for the others."""

    def __init__(self, batch=2, guidance=1.0, dtype=np.float32, solver="ddim", steps=6, seeds=None, **schedule):
        self.schedule = core.Schedule(solver, alphas(), steps, **schedule)
        self.seeds = list(range(batch)) if seeds is None else seeds
        self.latents = core.randn(self.seeds, (4, 8, 8)) * np.float32(self.schedule.init_noise_sigma)
        rows = batch * (2 if guidance != 1 else 1)
        self.input, self.output = (np.zeros((rows, 4, 8, 8), dtype) for _ in range(2))
        self.guidance, self.batch, self.calls = guidance, batch, []

    def engine(self, step: int) -> None:
        self.calls.append((step, self.input.copy()))
        self.output[: -self.batch or None] = 0
        self.output[-self.batch :] = self.input[-self.batch :] * 0.5

    def run(self, engine=None, on_step=None):
        core.sample(self.schedule, self.latents, self.seeds, self.guidance, self.input, self.output,
                    engine or self.engine, on_step)  # fmt: skip
        return self.latents


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_sample_is_the_solver_stepped_by_hand(solver, guidance, dtype):
    loop = Loop(2, guidance, dtype, solver)
    latents, stepper = loop.latents.copy(), core.Solver(loop.schedule)
    seen = []
    got = loop.run(on_step=lambda step, x, clean: seen.append((step, x.copy(), clean.copy())))
    assert [step for step, *_ in seen] == list(range(6)) == [step for step, _ in loop.calls]
    for i, fed in loop.calls:
        scaled = stepper.scale_model_input(i, latents).astype(dtype)
        np.testing.assert_array_equal(fed, np.concatenate([scaled] * (2 if guidance != 1 else 1)))
        conditional = (scaled * dtype(0.5)).astype(np.float32)
        output = conditional if guidance == 1 else np.float32(guidance) * conditional
        noise = core.randn(loop.seeds, (4, 8, 8), i + 1)
        latents, clean = stepper.step(i, output, latents, noise)
        np.testing.assert_allclose(seen[i][1], latents, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(seen[i][2], clean, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got, seen[-1][1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_is_the_same_in_any_batch(solver):
    together = Loop(3, 4.0, solver=solver, seeds=[5, 6, 7]).run()
    alone = Loop(1, 4.0, solver=solver, seeds=[6]).run()
    np.testing.assert_array_equal(together[1], alone[0])


@pytest.mark.parametrize("steps", [(0, 6), (2, 4), (0, 3), (3, 9), (4, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_guided_steps(steps, dtype):
    """Inside as with guidance, outside as without, on the last rows of both buffers; nothing else is touched there."""
    loop, (first, end) = Loop(2, 3.0, dtype, "dpmpp_2m"), steps
    rows = 4 if first < end else 2
    loop.input, loop.output = (np.zeros((rows, 4, 8, 8), dtype) for _ in range(2))
    latents, stepper = loop.latents.copy(), core.Solver(loop.schedule)

    def engine(step):
        guided = first <= step < end
        loop.calls.append((step, loop.input.copy()))
        loop.output[:-2] = 0.25 if guided else np.nan
        loop.output[-2:] = loop.input[-2:] * 0.5
        loop.input[:-2] = 7

    core.sample(loop.schedule, loop.latents, loop.seeds, 3.0, loop.input, loop.output, engine, None, steps)
    for i, fed in loop.calls:
        scaled, guided = stepper.scale_model_input(i, latents).astype(dtype), first <= i < end
        np.testing.assert_array_equal(fed[-2:], scaled)
        assert np.array_equal(fed[:-2], scaled if guided else np.full_like(fed[:-2], 7 if i else 0))
        output = (scaled * dtype(0.5)).astype(np.float32)
        latents, _ = stepper.step(i, 0.25 + 3 * (output - np.float32(0.25)) if guided else output, latents)
    np.testing.assert_allclose(loop.latents, latents, rtol=1e-4, atol=1e-4)


def test_all_steps_guided_is_the_default():
    loop = Loop(2, 3.0)
    core.sample(loop.schedule, loop.latents, loop.seeds, 3.0, loop.input, loop.output, loop.engine, None, (0, 6))
    np.testing.assert_array_equal(loop.latents, Loop(2, 3.0).run())


def test_guidance_formula():
    """m = u + g (c - u), from what one step did."""
    loop = Loop(1, 3.0, steps=1)

    def engine(step):
        loop.output[0], loop.output[1] = 0.25, 1.0

    start = loop.latents.copy()
    expected, _ = core.Solver(loop.schedule).step(0, np.full_like(start, 0.25 + 3 * 0.75), start)
    np.testing.assert_allclose(loop.run(engine), expected, rtol=1e-6)


def test_on_step_cancels():
    loop = Loop()
    with pytest.raises(core.Cancelled, match="cancelled after step 2"):
        loop.run(on_step=lambda step, *_: step == 2)
    assert len(loop.calls) == 3 and not issubclass(core.Cancelled, (RuntimeError, ValueError))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_non_finite_latents_stop_with_the_step(bad, guidance):
    loop = Loop(guidance=guidance)

    def engine(step):
        loop.engine(step)
        if step == 3:
            loop.output[-1, 1, 2, 3] = bad

    with pytest.raises(RuntimeError, match="latents must stay finite, got NaN or infinity at step 3"):
        loop.run(engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
@pytest.mark.parametrize("where", ["engine", "on_step"])
def test_exceptions_in_callbacks_pass_through(error, where):
    loop = Loop()

    def fail(step, *_):
        if where == "on_step" and step != 1:
            return
        raise error("from inside")

    with pytest.raises(error, match="from inside"):
        loop.run(**{where: fail} if where == "on_step" else {"engine": fail})
    np.testing.assert_array_equal(Loop().run(), Loop().run())  # the module still works


def test_ctrl_c_arrives_at_the_next_callback():
    loop = Loop(steps=50)

    def engine(step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop.run(engine)


def test_the_gil_is_free_during_steps():
    """Another Python thread makes progress while C++ does a long solver step."""
    counter, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counter[0] += 1
            time.sleep(0)

    schedule = core.Schedule("ddim", alphas(), 10)
    latents = np.zeros((1, 4, 1024, 1024), np.float32)
    buffers = np.zeros_like(latents), np.zeros_like(latents)
    worker = threading.Thread(target=count, daemon=True)
    marks = []
    worker.start()
    try:
        core.sample(schedule, latents, [0], 1.0, *buffers, lambda step: marks.append(counter[0]), None)
    finally:
        stop.set()
        worker.join()
    assert marks[-1] > marks[0]


def test_sample_errors():
    loop = Loop()
    x = loop.latents
    base = dict(schedule=loop.schedule, latents=x, seeds=[0, 1], guidance_scale=1.0, model_input=loop.input,
                model_output=loop.output, call_engine=loop.engine)  # fmt: skip
    read_only = x.copy()
    read_only.setflags(write=False)
    cases = [
        ({"latents": x[0]}, r"latents must have shape \[B, c, h, w\]"),
        ({"latents": x.astype(np.float16)}, "latents must be float32, got float16"),
        ({"latents": x[:, :, ::2]}, "latents must be C-contiguous"),
        ({"latents": read_only}, "latents must be writeable, got a read-only array"),
        ({"seeds": [1]}, "seeds must hold one seed per image, 2, got 1"),
        ({"guidance_scale": 2.0}, r"model_input must have shape \[M, c, h, w\] = \(4, 4, 8, 8\), got \(2, 4, 8, 8\)"),
        ({"guidance_scale": np.nan}, "guidance_scale must be finite, got nan"),
        ({"model_output": loop.output[:1]}, r"model_output must have shape \[M, c, h, w\] = \(2, 4, 8, 8\)"),
        ({"model_input": loop.input.astype(np.float64)}, "model_input must be float32 or float16, got float64"),
        ({"call_engine": 3}, "call_engine must be callable, got 3"),
        ({"on_step": 3}, "on_step must be callable or None, got 3"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            core.sample(**(base | change))
