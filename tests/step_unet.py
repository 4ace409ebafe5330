"""A UNet that is simple enough to compute the same numbers everywhere: for tests that hold one step loop to another."""

import weakref

import numpy as np

import pidiff._C as core
from pidiff.runtime.denoise import Conditions, Plan
from pidiff.runtime.manifest import GraphSpec, TensorSpec
from references import stable_diffusion_alphas

CHANNELS, SIDE, PEOPLE, TIMES, DEEP = 4, 6, 2, 5, 3
# What a loop must do beside its solver: arguments of make_conditions, and the guidance scale.
WAYS = {
    "plain": ({"guided": False}, 1.0), "guided": ({"guided": True}, 3.0),
    "identity late": ({"guided": True, "first_identity_step": 3}, 2.5), "nobody": ({"guided": False, "id_scale": 0.0}, 1.0),
    "guided in the middle": ({"guided": True, "guided_steps": (2, 5)}, 3.0),
    "cached": ({"guided": True, "guided_steps": (1, 5), "cache_interval": 3, "first_identity_step": 2}, 3.0),
}


def unet_spec(dtype="float32", cached=False, side=SIDE):
    """A GraphSpec like that of a bundle's `unet` (`cached`: `unet_cached`)."""
    tensor = lambda name, *shape: TensorSpec(name, dtype, shape)
    inputs = [tensor("latents", "B", CHANNELS, side, side), tensor("time_row", 1, TIMES), tensor("text_kv", "B", 2, 3),
              tensor("id_fold", "B", "P", 7), tensor("id_mask", "B", "P", side, side), tensor("id_scale", "B")]
    deep = tensor("deep_features", "B", DEEP, side, side)
    outputs = [tensor("model_output", "B", CHANNELS, side, side)]
    if cached:
        return GraphSpec("unet_cached.onnx", (*inputs[:3], deep), tuple(outputs))
    return GraphSpec("unet.onnx", tuple(inputs), (*outputs, tensor("identity_map", "B", "P", side, side), deep))


def run_unet(t, cached=False):
    """Compute the outputs from the inputs, in place: on numpy arrays and torch tensors by the same operations, each rounded by
    itself and without memory of its own.

    t: name -> array. Rows do not depend on one another.
    """
    out, deep, per_row = t["model_output"], t["deep_features"], lambda values: values.reshape(-1, 1, 1, 1)
    if not cached:
        deep[...] = t["latents"][:, :DEEP]
        deep *= t["time_row"][0, 1:2]
        t["identity_map"][...] = t["id_mask"]
        t["identity_map"] *= per_row(t["id_scale"])
    out[...] = t["latents"]
    out *= per_row(t["text_kv"][:, 0, 0])
    out[:, :DEEP] += deep
    if not cached:
        out += per_row(t["id_scale"])
        out *= per_row(t["id_fold"][:, 0, 0])


def make_conditions(batch, guided, id_scale=0.7, first_identity_step=0, guided_steps=(0, 99), cache_interval=1, side=SIDE):
    """Conditions for the UNet above, different in every row."""
    rng = np.random.default_rng(5)
    rows = batch * (1 + guided)
    draw = lambda *shape: rng.uniform(0.1, 0.9, shape).astype(np.float32)
    return Conditions(draw(rows, 2, 3), draw(rows, PEOPLE, 7), draw(rows, PEOPLE, side, side), id_scale, first_identity_step,
                      batch, guided_steps, cache_interval)


def make_plan(solver, steps=7, **options):
    """A Plan of a solver."""
    schedule = core.Schedule(solver, stable_diffusion_alphas(), steps, **options)
    return Plan(schedule, np.random.default_rng(6).uniform(0.1, 0.5, (steps, TIMES)).astype(np.float32))


def start(plan, batch, side=SIDE):
    """(latents, seeds) of a run."""
    seeds = [3 + i for i in range(batch)]
    return core.randn(seeds, (CHANNELS, side, side)) * np.float32(plan.schedule.init_noise_sigma), seeds


class HostUnet:
    """The UNet on the processor (protocol: engines.Engine)."""

    def __init__(self, dtype="float32", cached=False, side=SIDE):
        self._spec, self._cached, self.runs = unet_spec(dtype, cached, side), cached, 0

    def inputs(self):
        return self._spec.inputs

    def outputs(self):
        return self._spec.outputs

    def bind(self, tensors, constant=()):
        self._tensors = dict(tensors)

    def run(self, stream=None):
        self.runs += 1
        run_unet(self._tensors, self._cached)


class DeviceUnet(HostUnet):
    """The UNet on a device (protocol: engines.DeviceEngine). queue_run(tensors: name -> (address, shape), stream, cached): queues
    `run_unet` there."""

    loop = None

    def __init__(self, device, stream, queue_run, dtype="float32", cached=False, side=SIDE):
        super().__init__(dtype, cached, side)
        self.device, self.stream, self._queue_run, self.captures, self.queued = device, stream, queue_run, True, 0

    def check_loop(self, size, shapes):
        pass

    def bind_device(self, tensors):
        return DeviceUnetBinding(self, tensors)


class DeviceUnetBinding:
    """A DeviceUnet bound to memory (protocol: engines.DeviceBinding)."""

    def __init__(self, engine, tensors):
        self._engine, self._tensors = weakref.proxy(engine), tensors

    def settle(self):
        return 0

    def capturable(self, stream):
        return self._engine.captures

    def queue(self, stream):
        self._engine.queued += 1
        self._engine._queue_run(self._tensors, stream, self._engine._cached)
