"""TensorRT-RTX without a loaded engine: which version is installed, and what it says about an engine file's header."""

import importlib

# backend in the manifest -> (Python module, what installs it)
MODULES = {"tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13")}


def installed_version(backend):
    """Return (version, "") of the backend's Python module, or (None, why it cannot be used). Never raises."""
    name, package = MODULES[backend]
    try:
        return importlib.import_module(name).__version__, ""
    except ImportError as e:        # also a library of its own that is missing
        missing = getattr(e, "name", None) == name
        return None, f"{name} is not installed (pip install {package})" if missing else f"{name} cannot be imported: {e}"


def header_size(backend):
    """Return how many bytes of an engine `validity` reads, or None where the backend has no such question."""
    trt = importlib.import_module(MODULES[backend][0])
    if not hasattr(trt.Runtime, "get_engine_validity"):
        return None
    return trt.Runtime(_silent(trt)).engine_header_size


def validity(backend, header):
    """Ask the backend about an engine's first bytes, without deserialising it.

    Returns ("valid" | "suboptimal" | "invalid", tuple of diagnostics in lower case, such as "old_cuda_driver").
    """
    trt = importlib.import_module(MODULES[backend][0])
    verdict, bits = trt.Runtime(_silent(trt)).get_engine_validity(header)
    flags = getattr(trt, "EngineInvalidityDiagnostics", None)
    found = [name for name, flag in flags.__members__.items() if int(bits) & int(flag)] if flags else []
    return verdict.name.lower(), tuple(name.lower() for name in found)


def _silent(trt):
    """A logger that says nothing: what these questions find is in their answers."""
    class Silent(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, message):
            pass

    return Silent()
