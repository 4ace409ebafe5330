"""PIDiff at run time: a photo and a prompt in, pictures out. Needs numpy, OpenCV and one engine; never imports torch.

    from pidiff.runtime import Pipeline
    pipeline = Pipeline.from_bundle()
    person = pipeline.enroll("photo.jpg")
    result = pipeline.generate(person, "a photo of a person, red background", seed=1)
    result.save("out.png")

Names load when they are first used, so that importing one part (`pidiff.runtime.bundle`) does not import the rest.
"""

import importlib

_HOME = {
    "Bundle": "bundle",
    "BundleError": "errors",
    "BundleWriter": "bundle",
    "Cancelled": "errors",
    "EngineError": "errors",
    "FaceError": "errors",
    "Identity": "identity",
    "IdentityError": "errors",
    "Pipeline": "pipeline",
    "PidiffError": "errors",
    "Result": "result",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__
