"""Noise schedules: from the bundle's schedule.json (a diffusers scheduler_config.json) to the core's Schedule."""

import numpy as np

from .errors import BundleError, PidiffError, require

SOLVERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc", "lcm", "tcd")
_WITH_KARRAS_SIGMAS = ("euler", "dpmpp_2m", "unipc")
_LEADING = ("ddim", "lcm", "tcd")      # where nobody says how timesteps are spaced; linspace for the others, as in diffusers
# What schedule.json may say about sampling, handed to the core as it is.
_PASSED = {"prediction_type": str, "timestep_spacing": str, "steps_offset": int, "use_karras_sigmas": bool,
           "final_sigmas_type": str, "set_alpha_to_one": bool, "original_inference_steps": int, "timestep_scaling": float}
SAMPLING = ("use_karras_sigmas", "timestep_spacing", "eta")     # what a manifest may say beside schedule.json


def alphas_cumprod(config):
    """Return the cumulative product of 1 - beta, float64 [num_train_timesteps], for a scheduler configuration."""
    steps, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    numbers = type(steps) is int and 1 < steps <= 100_000 and all(type(b) is float and 0 < b < 1 for b in (start, end))
    zero_snr = config.get("rescale_betas_zero_snr") or False
    if not numbers or config.get("trained_betas") is not None or type(zero_snr) is not bool:
        raise BundleError("schedule.json must describe betas by beta_schedule, beta_start, beta_end, num_train_timesteps and "
                          "rescale_betas_zero_snr only, got other or unusable values")
    if kind == "linear":
        betas = np.linspace(start, end, steps)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    elif kind == "squaredcos_cap_v2":
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise BundleError(f"schedule.json beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got {kind!r}")
    return _end_in_noise(np.cumprod(1 - betas)) if zero_snr else np.cumprod(1 - betas)


def _end_in_noise(alphas):
    """Shift and scale sqrt(alphas) so that the last step is pure noise (Lin et al. 2023, arXiv 2305.08891).

    The last value is diffusers' 2^-24, because a signal of zero has no finite sigma; its DDIM and LCM take zero, and their first step
    then differs from ours by 2e-4 of the latents.
    """
    root = np.sqrt(alphas)
    alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alphas[-1] = min(2.0**-24, alphas[-2])
    return alphas


def make_schedule(config, solver, num_inference_steps, sampling={}):
    """Return the core's Schedule for a scheduler configuration, a solver name and a number of steps.

    sampling: a manifest's `scheduler`, whose SAMPLING comes before the configuration's. A configuration serves all solvers, as diffusers'
    do: what a solver does not know is passed over.
    """
    from pidiff import _C

    require(solver in SOLVERS, "scheduler", f"be one of {', '.join(SOLVERS)}", repr(solver))
    require(isinstance(num_inference_steps, (int, np.integer)), "num_inference_steps", "be an integer", num_inference_steps)
    options = {k: config[k] for k, kind in _PASSED.items() if config.get(k) is not None}
    for key, value in options.items():
        if type(value) is not _PASSED[key] and not (_PASSED[key] is float and type(value) is int):
            raise BundleError(f"schedule.json {key} must be {_PASSED[key].__name__}, got {value!r}")
    options.update({k: sampling[k] for k in SAMPLING if k in sampling})
    if solver not in _WITH_KARRAS_SIGMAS:
        options.pop("use_karras_sigmas", None)
    options.setdefault("timestep_spacing", "leading" if solver in _LEADING else "linspace")
    alphas = alphas_cumprod(config)
    try:
        return _C.Schedule(solver, alphas, num_inference_steps, **options)
    except ValueError as e:
        raise PidiffError(str(e)) from e
