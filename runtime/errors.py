"""Errors of the runtime. Each message is one sentence that says what was wrong and with which value."""


class PidiffError(ValueError):
    """Base of the errors that a user can cause; the command line prints the message and exits with 1."""


class BundleError(PidiffError):
    """A bundle is missing, damaged, hostile, or from another version; or one cannot be written."""


class EngineError(PidiffError):
    """An engine is not installed, does not know the device, or was given tensors that do not fit the graph."""


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
