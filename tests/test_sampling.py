"""Noise, schedules and solvers: each solver against diffusers, step by step."""

from __future__ import annotations

import numpy as np
import pytest

import pidiff._C as core
from pidiff.runtime.schedule import SOLVERS
from references import stable_diffusion_alphas as alphas

NOISY = {"euler_ancestral", "lcm", "tcd"}


# --- noise ----------------------------------------------------------------------------------------------------------


def philox(counter: list[int], key: int) -> list[int]:
    """Philox4x32-10 in Python integers."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answer():
    """This file's Philox against the authors' known answers (Random123, kat_vectors)."""
    assert philox([0] * 4, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([0xFFFFFFFF] * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed,stream", [(0, 0), (7, 3), (2**64 - 1, 2**40 + 1)])
def test_randn_is_philox_box_muller(seed, stream):
    expected = []
    for block in range(3):
        bits = philox([block, 0, stream & 0xFFFFFFFF, stream >> 32], seed)
        for radius_bits, angle_bits in (bits[:2], bits[2:]):
            radius, angle = np.sqrt(-2 * np.log((radius_bits + 1) / 2**32)), 2 * np.pi * angle_bits / 2**32
            expected += [radius * np.cos(angle), radius * np.sin(angle)]
    got = core.randn([seed], (1, 2, 5), stream)
    np.testing.assert_allclose(got.ravel(), np.float32(expected[:10]), rtol=1e-6)


def test_randn_does_not_depend_on_the_batch():
    together = core.randn([5, 6, 7], (4, 8, 8))
    assert together.shape == (3, 4, 8, 8) and together.dtype == np.float32
    np.testing.assert_array_equal(together[1], core.randn([6], (4, 8, 8))[0])
    np.testing.assert_array_equal(together[[2, 0]], core.randn(np.array([7, 5]), (4, 8, 8)))
    assert not np.array_equal(together[0], core.randn([5], (4, 8, 8), stream=1)[0])


def test_randn_statistics():
    """Moments, tails and independence of neighbours, seeds and streams on 2**20 values."""
    x = core.randn([11], (4, 512, 512)).ravel().astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 5 / np.sqrt(n) and abs(x.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * np.sqrt(15 / n) and abs((x**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert abs((np.abs(x) > 3).mean() - 0.0026998) < 5 * np.sqrt(0.0027 / n)
    others = [np.roll(x, 1), np.roll(x, 2), core.randn([12], (4, 512, 512)), core.randn([11], (4, 512, 512), 1)]
    for other in others:
        assert abs((x * other.ravel()).mean()) < 5 / np.sqrt(n)


@pytest.mark.parametrize("seeds", [[-1], [2**64]])
def test_randn_refuses_seeds_out_of_range(seeds):
    with pytest.raises(ValueError, match=rf"seeds must lie in \[0, 2\*\*64\), got {seeds[0]}"):
        core.randn(seeds, (1, 2, 2))


def test_randn_refuses_empty_shapes():
    with pytest.raises(ValueError, match=r"shape must hold positive sizes \(c, h, w\), got \(4, 0, 8\)"):
        core.randn([0], (4, 0, 8))


# --- solvers against diffusers --------------------------------------------------------------------------------------


def diffusers_scheduler(solver: str, steps: int, **config):
    """diffusers' own scheduler with its timesteps set; its sigmas (of tcd its alphas) widened so that its coefficients are exact.

    diffusers computes coefficients in float32, where 1 - alpha and differences of logs lose digits; ours are float64.
    The sigmas themselves keep their float32 values.
    """
    diffusers = pytest.importorskip("diffusers")
    name = {
        "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler", "lcm": "LCMScheduler",
        "tcd": "TCDScheduler",
    }[solver]  # fmt: skip
    if solver == "ddim":
        config["clip_sample"] = False
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    if solver == "tcd":
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def run_both(solver: str, steps: int, monkeypatch, eta: float | None = None, **config) -> None:
    """Feed both the same random model outputs; compare timesteps, scaled inputs, and latents after every step."""
    extra = {} if eta is None else {"eta": eta}
    torch = pytest.importorskip("torch")
    theirs = diffusers_scheduler(solver, steps, **config)
    own = {name: value for name, value in config.items() if not name.startswith("beta_")}
    schedule = core.Schedule(solver, theirs.alphas_cumprod.double().numpy(), steps, **own, **extra)
    np.testing.assert_allclose(schedule.timesteps, theirs.timesteps.numpy().astype(np.float32), rtol=2e-6, atol=1e-3)
    np.testing.assert_allclose(schedule.init_noise_sigma, float(theirs.init_noise_sigma), rtol=2e-6)
    if hasattr(theirs, "sigmas"):
        np.testing.assert_allclose(schedule.sigmas, theirs.sigmas.numpy(), rtol=2e-6)

    shape, generator = (2, 3, 4, 5), torch.Generator().manual_seed(steps)
    noises: list = []

    def noise_of(*_, **__):
        noises.append(torch.randn(shape, generator=generator))
        return noises[-1]

    module = __import__(type(theirs).__module__, fromlist=["randn_tensor"])
    if solver in NOISY:
        monkeypatch.setattr(module, "randn_tensor", noise_of)
    x = torch.randn(shape, generator=generator) * float(theirs.init_noise_sigma)
    latents, stepper = x.numpy().copy(), core.Solver(schedule)
    for i, t in enumerate(theirs.timesteps):
        scaled = theirs.scale_model_input(x, t)
        size = float(scaled.abs().max())
        np.testing.assert_allclose(stepper.scale_model_input(i, latents), scaled.numpy(), rtol=1e-5, atol=1e-5 * size)
        size = float(x.abs().max())  # diffusers' euler subtracts numbers of this size
        output = torch.randn(shape, generator=generator)
        noises.clear()
        x = theirs.step(output, t, x, **extra).prev_sample.float()
        noise = noises[0].numpy() if noises else np.full(shape, np.nan, np.float32)
        latents, denoised = stepper.step(i, output.numpy(), latents, noise)
        size = max(size, float(x.abs().max()))
        np.testing.assert_allclose(latents, x.numpy(), rtol=1e-5, atol=1e-5 * size, err_msg=f"step {i}")
        assert denoised.shape == shape and np.isfinite(denoised).all()
    np.testing.assert_array_equal(len(schedule), len(theirs.timesteps))


SD15 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
MINI = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", steps_offset=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("betas", [SD15, MINI], ids=["sd15", "mini"])
def test_solver_is_diffusers(monkeypatch, solver, prediction, spacing, steps, betas):
    config = dict(betas, prediction_type=prediction, timestep_spacing=spacing)
    if solver in ("lcm", "tcd") and spacing != "leading":
        pytest.skip("consistency models have timesteps of their own")
    run_both(solver, steps, monkeypatch, **config)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [2, 10, 25])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_karras_sigmas_are_diffusers(monkeypatch, solver, final, steps, prediction):
    if solver == "unipc" and final == "sigma_min":
        pytest.skip("diffusers divides by zero there: its last step has no length")
    config = dict(SD15, use_karras_sigmas=True, final_sigmas_type=final, prediction_type=prediction)
    run_both(solver, steps, monkeypatch, timestep_spacing="leading", **config)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "unipc"])
def test_final_sigma_min_is_diffusers(monkeypatch, solver):
    config = dict(SD15, final_sigmas_type="sigma_min", timestep_spacing="leading")
    run_both(solver, 12, monkeypatch, prediction_type="epsilon", **config)
    run_both(solver, 18, monkeypatch, prediction_type="epsilon", **config)


@pytest.mark.parametrize("steps", [5, 30])
def test_ddim_may_end_at_the_first_alpha(monkeypatch, steps):
    """Stable Diffusion 1's configuration: set_alpha_to_one = false."""
    run_both("ddim", steps, monkeypatch, prediction_type="epsilon", timestep_spacing="leading", set_alpha_to_one=False,
             **SD15)  # fmt: skip


def test_lcm_original_steps(monkeypatch):
    run_both("lcm", 3, monkeypatch, prediction_type="epsilon", timestep_spacing="leading", original_inference_steps=25,
             timestep_scaling=8.0, **SD15)  # fmt: skip


@pytest.mark.parametrize("eta", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps, original", [(1, 50), (3, 25), (8, 50), (50, 50), (10, 1000)])
def test_tcd_is_diffusers_with_any_eta(monkeypatch, eta, prediction, steps, original):
    run_both("tcd", steps, monkeypatch, eta=eta, prediction_type=prediction, original_inference_steps=original, timestep_spacing="leading", **SD15)
    made = core.Schedule("tcd", alphas(), steps, prediction, original_inference_steps=original, eta=eta)
    assert made.needs_noise == (eta > 0 and steps > 1)


def test_diffusers_in_its_own_precision():
    """Without widened sigmas the difference is diffusers' float32 rounding only."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(**MINI, use_karras_sigmas=True)
    theirs.set_timesteps(20)
    schedule = core.Schedule("dpmpp_2m", theirs.alphas_cumprod.double().numpy(), 20, use_karras_sigmas=True)
    stepper, x = core.Solver(schedule), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = x.numpy().copy()
    for i, t in enumerate(theirs.timesteps):
        output = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        x = theirs.step(output, t, x).prev_sample
        latents, _ = stepper.step(i, output.numpy(), latents)
    np.testing.assert_allclose(latents, x.numpy(), rtol=2e-4, atol=2e-4 * float(x.abs().max()))


def test_zero_terminal_snr():
    """alphas_cumprod that ends at exactly 0 (v-prediction): every solver's coefficients stay finite."""
    schedule = alphas()
    schedule[-1] = 0
    for solver in SOLVERS:
        made = core.Schedule(solver, schedule, 4, "v_prediction", timestep_spacing="trailing")
        stepper, latents = core.Solver(made), np.ones((1, 1, 2, 2), np.float32)
        for i in range(4):
            latents, denoised = stepper.step(i, np.ones_like(latents), latents, np.zeros_like(latents))
            assert np.isfinite(latents).all() and np.isfinite(denoised).all(), (solver, i)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s not in NOISY])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_exact_model_recovers_the_image(solver, prediction):
    """With a model that knows x0, every deterministic solver ends at x0."""
    made = core.Schedule(solver, alphas(), 15, prediction)
    x0, eps = core.randn([1, 2], (4, 4, 4)), core.randn([1, 2], (4, 4, 4), 9)
    a = 1 / (made.sigmas[0] ** 2 + 1)
    latents = x0 + made.sigmas[0] * eps if solver == "euler" else np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
    stepper = core.Solver(made)
    for i in range(15):
        sigma = made.sigmas[i]
        signal_part, noise_part = 1 / np.sqrt(sigma**2 + 1), sigma / np.sqrt(sigma**2 + 1)
        scaled = stepper.scale_model_input(i, latents)
        noise = (scaled - signal_part * x0) / noise_part
        output = noise if prediction == "epsilon" else signal_part * noise - noise_part * x0
        latents, denoised = stepper.step(i, output.astype(np.float32), latents.astype(np.float32))
        np.testing.assert_allclose(denoised, x0, atol=2e-3)
    np.testing.assert_allclose(latents, x0, atol=2e-3)


def test_schedule_errors():
    good = alphas()
    rising = good.copy()
    rising[500] = 0.999
    cases = [
        (("magic", good, 5), {}, "solver must be one of ddim, euler, .*, got magic"),
        (("ddim", good, 0), {}, r"num_inference_steps must lie in \[1, 1000\], got 0"),
        (("ddim", good, 1001), {}, r"num_inference_steps must lie in \[1, 1000\], got 1001"),
        (("ddim", [], 5), {}, "alphas_cumprod must have at least 2 values, got 0"),
        (("ddim", good * 2, 5), {}, r"alphas_cumprod must lie in \[0, 1\], got 1.9"),
        (("ddim", np.full(1000, np.nan), 5), {}, r"alphas_cumprod must lie in \[0, 1\], got nan"),
        (("ddim", rising, 5), {}, "alphas_cumprod must not increase, got a larger value at index 500"),
        (("ddim", good, 5), {"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction, got"),
        (("ddim", good, 5), {"timestep_spacing": "x"}, "timestep_spacing must be one of leading, trailing, linspace"),
        (("ddim", good, 5), {"use_karras_sigmas": True}, "use_karras_sigmas must be false for ddim, got true"),
        (("ddim", good, 5), {"steps_offset": -1}, "steps_offset must not be negative, got -1"),
        (("ddim", good, 5), {"steps_offset": 500}, "steps_offset must leave every timestep below 1000, got timestep 1300"),
        (("lcm", good, 60), {}, "num_inference_steps must not exceed original_inference_steps 50, got 60"),
        (("lcm", good, 5), {"original_inference_steps": 0}, "original_inference_steps must lie in"),
        (("tcd", good, 60), {}, "num_inference_steps must not exceed original_inference_steps 50, got 60"),
        (("tcd", good, 5), {"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        (("tcd", good, 5), {"eta": np.nan}, r"eta must lie in \[0, 1\], got -?nan"),
    ]
    for arguments, keywords, message in cases:
        with pytest.raises(ValueError, match=message):
            core.Schedule(*arguments, **keywords)


@pytest.mark.parametrize("steps", range(1, 1001, 37))
@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2m"])
def test_trailing_schedules_have_their_length(solver, steps):
    """numpy's arange, which others use here, rounds some lengths up and ends at timestep -1."""
    schedule = core.Schedule(solver, alphas(), steps, timestep_spacing="trailing")
    assert len(schedule) == len(schedule.timesteps) == steps and len(schedule.sigmas) == steps + 1
    assert schedule.timesteps[0] == 999 and (np.diff(schedule.timesteps) < 0).all() and schedule.timesteps[-1] >= 0


def test_solver_errors():
    stepper = core.Solver(core.Schedule("euler_ancestral", alphas(), 4))
    x = np.zeros((1, 4, 2, 2), np.float32)
    with pytest.raises(ValueError, match=r"step must lie in \[0, 4\), got 4"):
        stepper.step(4, x, x, x)
    with pytest.raises(ValueError, match="noise must be given for euler_ancestral, got None"):
        stepper.step(0, x, x)
    with pytest.raises(ValueError, match=r"model_output must have the shape of latents, \(1, 4, 2, 2\), got \(1, 4, 2, 1\)"):
        stepper.step(0, x[..., :1].copy(), x, x)
    stepper.step(0, x, x, x)
    with pytest.raises(ValueError, match="step must follow 0, got 2"):
        stepper.step(2, x, x, x)
