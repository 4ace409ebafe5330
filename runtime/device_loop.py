"""The step loop on a CUDA device: latents, solver state and the UNet's tensors stay there from the first step to the last.

A step is one launch of a captured graph: our kernel that prepares the UNet's inputs, the UNet, our kernel that does guidance
and the solver step. Both kernels read what changes from step to step from tables on the device, by a counter there that they
advance, so that one graph serves every step. The arithmetic is that of the loop on the processor (denoise.py), bit for bit.
"""

import contextlib
import weakref

import numpy as np

from .cuda import DeviceMemory, Event, HostMemory, Layout, Region
from .denoise import CONSTANT, Denoiser, plan_calls, step_not_finite, tensor_shapes
from .errors import Cancelled, EngineError, NotFinite, require

AHEAD = 2           # steps that may be queued and not done: the GPU never waits for the processor, and a stop comes soon
NEVER = 2**31 - 1   # StepProgress.first_bad while all is well


def make_denoiser(engine, plan, conditions, latent_shape, cached=None):
    """Return what runs the loop over a UNet's engine (arguments of Denoiser): on the device of engines that have one and where
    the core was built for it, else on the processor."""
    from pidiff import _C

    resident = all(getattr(e, "device", None) is not None for e in (engine, cached) if e is not None) and _C.has_cuda()
    return (DeviceDenoiser if resident else Denoiser)(engine, plan, conditions, latent_shape, cached)


class DeviceDenoiser:
    """A Denoiser whose loop runs on the device of its engines (engines.DeviceEngine); same arguments, results and errors.

    Rows are [conditional..., unconditional...] on the device: steps without guidance use the beginning of every buffer.
    """

    def __init__(self, engine, plan, conditions, latent_shape, cached=None):
        engine.device.use()
        self._engine, self._plan, self._conditions = engine, plan, conditions
        self._calls = plan_calls(engine, cached, plan, conditions)
        self._specs = {spec.name: spec for spec in (*engine.inputs(), *engine.outputs())}
        shapes = tensor_shapes(engine, plan, conditions, latent_shape)
        layout, clear = self._layout(shapes)
        memory, kept = engine.loop, engine.loop is not None and engine.loop.serves(layout, cached)
        if not kept:
            engine.loop = memory = None     # freed first: both at once may be too much
            engine.check_loop(layout.size, shapes)
            engine.loop = memory = LoopMemory(engine.device, engine.stream, layout, clear, cached)
        self._memory, self._stream, self._params = memory, engine.stream, self._step_params(memory)
        for call in dict.fromkeys(self._calls):     # compiles for all of them
            self._bind(*call)
        self._upload_constants()

    def run(self, latents, seeds, guidance_scale, on_step=None):
        """See Denoiser.run. Only `on_step` makes the latents come to the processor, and the device wait, after every step."""
        from pidiff import _C

        mapped = [self._conditions.active(i) and engine is self._engine for i, (engine, _) in enumerate(self._calls)]
        table, noise = _C.step_table(self._plan.schedule, guidance_scale, self._conditions.guided_steps, mapped), latents.copy()
        self._begin(latents, table)
        maps = sum(mapped) if "identity_map" in self._specs else 0
        try:
            self._steps(latents, seeds, on_step)
            self._download("loop.latents", *(["loop.identity_sum"] if maps else []))
            self._check()
        except BaseException as e:
            if isinstance(e, NotFinite) and self._bad_step() != NEVER:
                self._recover_inputs(e, noise, seeds, table)
            with contextlib.suppress(EngineError):
                self._stream.synchronize()      # steps still queued use scratch memory that others share
            raise
        latents[...] = self._memory.host["loop.latents"]
        if not maps:
            return None
        average = self._memory.host["loop.identity_sum"] / maps
        require(np.isfinite(average).all(), "identity_map", "be finite", "NaN or infinity")
        return average

    def _steps(self, latents, seeds, on_step, end=None):
        """Queue all steps, or those before `end`, each as soon as the one before the last is done."""
        from pidiff import _C

        for step, call in enumerate(self._calls[:end]):
            event = self._memory.events[step % AHEAD]
            event.wait()
            self._check()
            if self._plan.schedule.needs_noise:
                self._upload_noise(_C.randn(seeds, latents.shape[1:], step + 1), step % AHEAD)
            self._queue_step(self._key(*call))
            event.record(self._stream)
            if on_step is not None:
                self._show(latents, step, on_step)

    def _recover_inputs(self, error, latents, seeds, table):
        """Give the NotFinite of a step the UNet's inputs: by now later steps have overwritten them, so the steps before it run again."""
        from pidiff import _C

        bad = self._bad_step()
        with contextlib.suppress(Exception):    # the error is what matters
            self._begin(latents, table)
            self._steps(latents, seeds, None, bad)
            _C.queue_step_input(self._params, self._stream.handle)
            error.inputs = self._download_inputs(*self._calls[bad])

    def _download_inputs(self, engine, rows):
        """Return what is in an engine's inputs, name -> array."""
        tensors, shape = self._memory.layout.tensors, self._shape
        layout = Layout({spec.name: (shape(spec.name, rows), tensors[spec.name][1]) for spec in engine.inputs()})
        host = HostMemory(self._engine.device, layout.size)
        inputs = {n: host.array(*layout.tensors[n], offset) for n, offset in layout.offsets.items()}
        for name, array in inputs.items():
            self._stream.download(array, self._memory.region(name))
        self._stream.synchronize()
        return {name: array.copy() for name, array in inputs.items()}

    def _layout(self, shapes):
        """Return the Layout of all buffers, and how many bytes at its start begin as zeros."""
        batch, steps, f32 = self._conditions.batch, len(self._calls), np.dtype(np.float32)
        rows, *latent = shapes["latents"]
        state = ((batch, *latent), f32)
        tensors = {f"loop.{n}": state for n in ("previous", "previous2", "last")}
        if "identity_map" in shapes:
            tensors["loop.identity_sum"] = ((batch, *shapes["identity_map"][1:]), f32)
        clear = Layout(dict(tensors)).size
        tensors |= {"loop.latents": state, "loop.progress": ((4,), np.dtype(np.int32)), "loop.table": ((steps, 64), np.dtype(np.uint8))}
        if self._plan.schedule.needs_noise:
            tensors["loop.noise"] = state
        dtype = lambda name: np.dtype(self._specs[name].dtype)
        tensors |= {"loop.time_table": ((steps, *shapes["time_row"][1:]), dtype("time_row")),
                    "loop.id_scales": ((steps,), dtype("id_scale"))}
        return Layout(tensors | {n: (shape, dtype(n)) for n, shape in shapes.items()}), clear

    def _step_params(self, memory):
        """Return the parameters of our kernels, int64 [len(_C.STEP_PARAMS)]."""
        from pidiff import _C

        tensors, count = memory.layout.tensors, lambda name: int(np.prod(tensors[name][0])) if name in tensors else 0
        names = {"model_input": "latents", "model_output": "model_output", "time_row": "time_row", "id_scale": "id_scale",
                 "identity_map": "identity_map"}
        values = {n: memory.address(names.get(n, f"loop.{n}")) for n in _C.STEP_PARAMS[:15]}
        values |= {
            "steps": len(self._calls), "elements": count("loop.latents"), "time_elements": count("time_row"),
            "rows": count("id_scale"), "map_elements": count("loop.identity_sum")}
        values |= {f"{short}_bytes": tensors[n][1].itemsize if n in tensors else 4 for short, n in (
            ("input", "latents"), ("output", "model_output"), ("time", "time_row"), ("scale", "id_scale"), ("map", "identity_map"))}
        return np.array([values[n] for n in _C.STEP_PARAMS], np.int64)

    def _upload_constants(self):
        """Copy what is the same in every step to the device: conditions, and the tables of what changes."""
        plan, conditions, memory = self._plan, self._conditions, self._memory
        active = [conditions.id_scale if conditions.active(i) else 0.0 for i in range(len(self._calls))]
        arrays = {"loop.time_table": plan.time_table, "loop.id_scales": active}
        for name in CONSTANT:
            given = getattr(conditions, name)
            arrays[name] = np.concatenate([given[-conditions.batch:], given[:-conditions.batch]])
        for name, array in arrays.items():
            self._stream.upload(memory.region(name), np.ascontiguousarray(array, memory.layout.tensors[name][1]))
        self._stream.synchronize()

    def _begin(self, latents, table):
        """Put the loop on the device to its start; waits for what an earlier one may have left in the stream."""
        memory, stream = self._memory, self._stream
        stream.device.use()     # in this thread
        stream.synchronize()
        memory.host["loop.latents"][...] = latents
        memory.host["loop.progress"][...] = 0, 0, NEVER, 0
        stream.clear(Region(memory.device.address, memory.clear))
        for name, array in (("loop.latents", memory.host["loop.latents"]), ("loop.progress", memory.host["loop.progress"]),
                            ("loop.table", table)):
            stream.upload(memory.region(name), array)
        stream.synchronize()    # `progress` comes back into the same host memory

    def _key(self, engine, rows):
        return "unet" if engine is self._engine else "unet_cached", rows

    def _bind(self, engine, rows):
        """Bind an engine to the first `rows` rows, unless it is."""
        memory, key = self._memory, self._key(engine, rows)
        if key not in memory.bindings:
            names = [spec.name for spec in (*engine.inputs(), *engine.outputs())]
            memory.bindings[key] = engine.bind_device({n: (memory.address(n), self._shape(n, rows)) for n in names})

    def _shape(self, name, rows):
        """Return the shape of a UNet's tensor for the first `rows` rows."""
        whole = self._memory.layout.tensors[name][0]
        return whole if name == "time_row" else (rows, *whole[1:])

    def _queue_step(self, key):
        """Queue a step: call by call the first time, then captured, then by one launch until something moves."""
        memory, stream, binding = self._memory, self._stream, self._memory.bindings[key]
        work = lambda: self._queue_calls(binding)
        version, (known, graph) = binding.settle(), memory.graphs.get(key, (None, None))
        if known != version:
            work()
            memory.graphs[key] = version, None
            return
        if graph is None and binding.capturable(stream):
            stream.synchronize()    # the run that the capture repeats must be done with what it set up
            try:
                graph = stream.capture(work)
            except EngineError:
                graph = False       # from now on call by call
            memory.graphs[key] = version, graph
        if graph:
            graph.launch()
        else:
            work()

    def _queue_calls(self, binding):
        from pidiff import _C

        try:
            _C.queue_step_input(self._params, self._stream.handle)
            binding.queue(self._stream)
            _C.queue_step_output(self._params, self._stream.handle)
        except RuntimeError as e:
            raise EngineError(f"the step's kernels must run on this GPU, got: {e}") from e
        self._stream.download(self._memory.host["loop.progress"], self._memory.region("loop.progress"))

    def _upload_noise(self, noise, slot):
        """Queue a step's noise: made by the processor's generator while the device is at the step before."""
        host = self._memory.host[f"noise {slot}"]
        host[...] = noise
        self._stream.upload(self._memory.region("loop.noise"), host)

    def _show(self, latents, step, on_step):
        """Wait for the step, and give its latents and clean prediction to the caller's function."""
        host = self._memory.host
        self._download("loop.latents", "loop.previous")
        self._check()
        latents[...] = host["loop.latents"]
        if on_step(step, latents, host["loop.previous"]):
            raise Cancelled("the callback asked to stop")

    def _download(self, *names):
        for name in names:
            self._stream.download(self._memory.host[name], self._memory.region(name))
        self._stream.synchronize()

    def _bad_step(self):
        """Return the first step known to have left latents that are not finite, or NEVER."""
        return int(self._memory.host["loop.progress"][2])

    def _check(self):
        """Raise NotFinite if there is such a step."""
        if (bad := self._bad_step()) != NEVER:
            raise step_not_finite(bad, self._calls, self._engine)


class LoopMemory:
    """What a loop has on the device and page-locked on the host, one allocation each, and the graphs captured on it.

    An engine keeps it (`loop`) from picture to picture while the sizes stay, so that bindings and graphs stay too: one of each for
    every engine ("unet", "unet_cached") and number of rows.
    host: name -> array in page-locked memory, for what goes up or comes down while steps run.
    """

    def __init__(self, device, stream, layout, clear, cached):
        self.layout, self.clear, self.graphs, self.bindings = layout, clear, {}, {}
        self._cached = weakref.ref(cached) if cached is not None else None
        self.device = DeviceMemory(device, layout.size)
        moved = {n: layout.tensors[n] for n in ("loop.latents", "loop.previous", "loop.progress", "loop.identity_sum")
                 if n in layout.tensors}
        moved |= {f"noise {i}": layout.tensors["loop.noise"] for i in range(AHEAD) if "loop.noise" in layout.tensors}
        staged = Layout(moved)
        memory = HostMemory(device, staged.size)
        self.host = {n: memory.array(*staged.tensors[n], staged.offsets[n]) for n in moved}
        self.events = [Event(device) for _ in range(AHEAD)]

    def serves(self, layout, cached):
        """Whether a loop of this Layout over the same second engine can use this memory."""
        return self.layout == layout and (self._cached() if self._cached else None) is cached

    def address(self, name):
        """Return a tensor's address on the device, 0 where there is no such tensor."""
        return self.device.address + self.layout.offsets[name] if name in self.layout.offsets else 0

    def region(self, name):
        """Return a tensor's Region."""
        return Region(self.address(name), self.layout.nbytes(name))
