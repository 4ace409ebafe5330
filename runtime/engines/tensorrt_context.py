"""One execution context of a TensorRT engine (tensorrt.py), without the vendor's module."""


class Context:
    """A context's profile, shapes, addresses and scratch memory (protocol: engines.DeviceBinding).

    context: IExecutionContext whose scratch memory is ours to give, from `scratch` (cuda.Scratch). done(answer, verb): returns
    TensorRT's answer, or raises EngineError. Attributes: `shapes` of the inputs by name; `warm`, whether these shapes have been
    run: only then can a run be captured; `scratch_size`, bytes of scratch memory for these shapes.
    """

    def __init__(self, context, scratch, done):
        self._context, self._scratch, self._done = context, scratch, done
        self.shapes, self.warm, self._profile, self._version = None, False, 0, 0
        self.scratch_size, self._scratch_at = 0, None

    def set_shapes(self, profile, shapes, stream):
        """Set all input shapes, which a profile takes. Compiles for them where the backend does that."""
        if shapes == self.shapes:
            return
        self.shapes, self._version = None, self._version + 1
        if profile != self._profile:
            self._done(self._context.set_optimization_profile_async(profile, stream.handle), "change its profile")
            stream.synchronize()
            self._profile = profile
        for name, shape in shapes.items():
            self._done(self._context.set_input_shape(name, shape), f"take {name} {list(shape)}")
        self.scratch_size, self._scratch_at = self._context.update_device_memory_size_for_shapes(), None
        self.warm, self.shapes = False, shapes

    def set_address(self, name, address):
        """Set where a tensor lies on the GPU."""
        self._version += 1
        self._done(self._context.set_tensor_address(name, address), f"take the address of {name}")

    def settle(self):
        """Take the scratch memory where it is now, another engine may have made it larger; see engines.DeviceBinding."""
        self._scratch.reserve(self.scratch_size)
        if self.scratch_size and self._scratch.memory.address != self._scratch_at:
            self._scratch_at, self._version = self._scratch.memory.address, self._version + 1
            self._context.set_device_memory(self._scratch_at, self._scratch.memory.size)
        return self._version

    def capturable(self, stream):
        """Whether `queue` can be captured: TensorRT-RTX can be asked, TensorRT finds out while capturing."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or ask(stream.handle)

    def queue(self, stream):
        """Queue a run."""
        self._done(self._context.execute_async_v3(stream.handle), "run")
