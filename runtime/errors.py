"""Errors of the runtime. Each message is one sentence that says what was wrong and with which value."""


class PidiffError(ValueError):
    """Base of the errors that a user can cause; the command line prints the message and exits with 1."""


class BundleError(PidiffError):
    """A bundle is missing, damaged, hostile, or from another version; or one cannot be written."""


class EngineError(PidiffError):
    """An engine is not installed, does not know the device, or was given tensors that do not fit the graph."""


class NotFinite(EngineError):
    """A graph has given NaN or infinity. inputs: name -> array that it was given then, None where they are lost. diagnosis.py finds
    the layer that they come from."""

    def __init__(self, what, graph, inputs=None, reason="the model's weights or the inputs are damaged, or overflow in half precision"):
        super().__init__(f"{what}: {reason}")
        self.what, self.graph = what, graph
        self.inputs = None if inputs is None else {name: array.copy() for name, array in inputs.items()}


class FaceError(PidiffError):
    """A photo cannot be read, or does not show one usable face."""


class IdentityError(PidiffError):
    """An enrolled identity is damaged or does not fit the bundle."""


class Cancelled(Exception):
    """The callback asked to stop."""


def require(condition, argument, must, got, error=PidiffError):
    """Raise `error` with "<argument> must <must>, got <got>" unless `condition` holds."""
    if not condition:
        raise error(f"{argument} must {must}, got {got}")
