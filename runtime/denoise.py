"""The UNet's side of the step loop: buffers bound once, and what changes from step to step written into them."""

from dataclasses import dataclass

import numpy as np

from .caching import whole_steps
from .engines import new_array
from .errors import Cancelled, NotFinite

CONSTANT = ("text_kv", "id_fold", "id_mask")  # inputs that stay the same from step to step


@dataclass(frozen=True, eq=False)
class Plan:
    """A schedule and what the model makes of its timesteps: `schedule` (core), `time_table` [steps, sum(Ct)]."""

    schedule: object
    time_table: np.ndarray


@dataclass(frozen=True, eq=False)
class Conditions:
    """All inputs of the UNet that do not depend on the step, for M rows ([unconditional..., conditional...]).

    text_kv [M,T,2 sum(C)], id_fold [M,P,F], id_mask [M,P,h,w]; id_scale and the first step at which it applies.
    batch: conditional rows. guided_steps (first, end): the steps that run all rows; the others run the conditional ones.
    cache_interval: every so many steps the whole UNet runs (caching.py). at_once: rows of one run of an engine, None for all of
    a step; with fewer, activations take less memory (loops on the processor only).
    """

    text_kv: np.ndarray
    id_fold: np.ndarray
    id_mask: np.ndarray
    id_scale: float
    first_identity_step: int
    batch: int
    guided_steps: tuple
    cache_interval: int
    at_once: int | None = None

    def active(self, step):
        """Whether the identity takes part in a step."""
        return step >= self.first_identity_step and self.id_scale > 0


def plan_calls(engine, cached, plan, conditions):
    """Return for each step which engine runs on how many rows. engine, cached: those of `unet` and `unet_cached`."""
    total, (first, end) = len(plan.schedule), conditions.guided_steps
    whole = whole_steps(total, conditions.cache_interval, (first, end), conditions.first_identity_step)
    rows = len(conditions.id_fold)
    return [(engine if whole[i] else cached, rows if first <= i < end else conditions.batch) for i in range(total)]


def step_not_finite(step, calls, engine, inputs=None):
    """Return the NotFinite of a step of `plan_calls`; engine: that of `unet`; inputs: what the step's engine was given."""
    return NotFinite(f"latents must stay finite, got NaN or infinity at step {step + 1} of {len(calls)}",
                     "unet" if calls[step][0] is engine else "unet_cached", inputs)


def tensor_shapes(engine, plan, conditions, latent_shape):
    """Return name -> shape of the UNet's inputs and outputs for all rows, latents [c,h,w]."""
    rows, people = conditions.id_fold.shape[:2]
    shapes = {
        "latents": (rows, *latent_shape), "model_output": (rows, *latent_shape), "id_scale": (rows,),
        "time_row": (1, plan.time_table.shape[1]), "identity_map": (rows, people, *latent_shape[1:]),
    }
    specs = {spec.name: spec for spec in (*engine.inputs(), *engine.outputs())}
    if "deep_features" in specs:
        shapes["deep_features"] = (rows, specs["deep_features"].shape[1], *latent_shape[1:])
    return {n: shapes[n] if n in shapes else getattr(conditions, n).shape for n in specs}


class Denoiser:
    """Runs the core's loop over one UNet engine, bound for a Plan, Conditions and latents [c,h,w].

    cached: the engine of `unet_cached`, None where every step runs the whole UNet.
    """

    def __init__(self, engine, plan, conditions, latent_shape, cached=None):
        self._engine, self._plan, self._conditions = engine, plan, conditions
        self._buffers = self._allocate(latent_shape)
        self._calls = plan_calls(engine, cached, plan, conditions)
        self._bound = {}  # engine -> its rows
        for called, rows in reversed(dict.fromkeys(self._calls)):  # compiles for all of them; the first of an engine is bound last
            for part in reversed(self._parts(rows)):
                self._bind(called, part)

    def run(self, latents, seeds, guidance_scale, on_step=None):
        """Denoise latents [B,c,h,w] (noise times init_noise_sigma) in place.

        on_step(step, latents, denoised) -> True to stop. Returns the identity map [B,P,h,w] float32 averaged over the
        whole steps with identity, or None. Raises Cancelled, and NotFinite where the numbers overflow.
        """
        from pidiff import _C

        plan, conditions, buffers = self._plan, self._conditions, self._buffers
        batch, total, count, current = len(latents), None, 0, 0

        def call_engine(step):
            nonlocal total, count, current
            current = step
            active = conditions.active(step)
            buffers["time_row"][0] = plan.time_table[step]
            buffers["id_scale"][:] = conditions.id_scale if active else 0.0
            engine, rows = self._calls[step]
            try:
                for part in self._parts(rows):
                    self._bind(engine, part)
                    engine.run()
            except NotFinite as e:      # it has looked itself
                raise self._not_finite(step) from e
            if active and engine is self._engine and "identity_map" in buffers:
                now = buffers["identity_map"][-batch:].astype(np.float32)
                total, count = now if total is None else total + now, count + 1

        try:
            _C.sample(plan.schedule, latents, seeds, guidance_scale, buffers["latents"], buffers["model_output"],
                      call_engine, on_step, conditions.guided_steps)
        except _C.Cancelled as e:
            raise Cancelled("the callback asked to stop") from e
        except RuntimeError as e:
            if "latents must stay finite" not in str(e):
                raise                   # the caller's own, out of on_step
            raise self._not_finite(current) from e
        return None if total is None else total / count

    def _not_finite(self, step):
        """Return the NotFinite of a step whose inputs are still in the buffers."""
        engine, rows = self._calls[step]
        inputs = {spec.name: self._buffers[spec.name] for spec in engine.inputs()}
        return step_not_finite(step, self._calls, self._engine,
                               {n: a if n == "time_row" else a[-rows:] for n, a in inputs.items()})

    def _allocate(self, latent_shape):
        """Return one array per tensor of the UNet, filled with what stays the same."""
        buffers, shapes = {}, tensor_shapes(self._engine, self._plan, self._conditions, latent_shape)
        for spec in (*self._engine.inputs(), *self._engine.outputs()):
            if spec.name in CONSTANT:
                buffers[spec.name] = np.ascontiguousarray(getattr(self._conditions, spec.name), spec.dtype)
            else:
                buffers[spec.name] = new_array(self._engine, spec, shapes[spec.name])
        return buffers

    def _parts(self, rows):
        """Return (first, end) of each run of a step that is for the last `rows` rows."""
        total, size = len(self._conditions.id_fold), self._conditions.at_once or rows
        return [(i, min(i + size, total)) for i in range(total - rows, total, size)]

    def _bind(self, engine, part):
        """Let an engine work on some rows (first, end): in the same memory, so that nothing is copied for a switch."""
        if self._bound.get(engine) == part:
            return
        names = [spec.name for spec in (*engine.inputs(), *engine.outputs())]
        if hasattr(engine, "copies"):
            engine.copies = (part[1] - part[0]) // self._conditions.batch or 1
        engine.bind({n: self._buffers[n] if n == "time_row" else self._buffers[n][slice(*part)] for n in names}, CONSTANT)
        self._bound[engine] = part
