"""Engines in the manifest: which graphs are compiled, for which GPUs and TensorRT version, and what they were built from.

    "engines": {"tensorrt-rtx-sm86+sm89-1.7.1.116": {
        "backend": "tensorrt-rtx", "version": "1.7.1.116", "targets": ["sm86", "sm89"],
        "graphs": {"unet": {"file": "engines/tensorrt-rtx-sm86+sm89-1.7.1.116/unet.engine",
                            "onnx_sha256": "...", "weights_sha256": "...", "left_out": 0, "driver": "12.6",
                            "profiles": [{"latents": [[2,4,64,64], [2,4,64,64], [2,4,64,64]], ...}]}}}}

A profile gives, for every input, the smallest, the best and the largest shape that the engine takes. `left_out` and `driver` came with version 4.
"""

import re
from dataclasses import dataclass, field

from .errors import BundleError
from .strict import Reader, short

ENGINE_FOLDER = "engines"
# backend -> GPU targets that it can build a bundle's graphs for, by number. TensorRT-RTX has sm75 (Turing) too, but no float32
# matrix product there, which the conditioners need. TensorRT builds for the GPU that it builds on.
TARGETS = {"tensorrt-rtx": ("sm80", "sm86", "sm89", "sm120", "sm121"),
           "tensorrt": ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121")}
BACKENDS = tuple(TARGETS)
_SINCE = {"left_out": 4, "driver": 4}       # versions of the manifest; an older one means the default
_TARGET = re.compile(r"sm[1-9][0-9]{1,2}")
_VERSION = re.compile(r"[0-9][0-9A-Za-z.]{0,31}")


@dataclass(frozen=True)
class EngineFile:
    """One compiled graph: its file, digests of the graph and of its weights, and its profiles in the engine's order.

    profiles: tuple of {input name: (smallest, best, largest shape)}. left_out: bytes of weights that are not in the engine, and
    are read from the graph's own files when it is loaded; 0: they are all in it. driver: newest CUDA version of the driver of the machine that
    built it, "" where there was none; another one makes it no other engine.
    """

    file: str
    onnx_sha256: str
    weights_sha256: str
    profiles: tuple
    left_out: int = 0
    driver: str = field(default="", compare=False)


@dataclass(frozen=True)
class EngineSet:
    """Engines of one build: `backend`, its `version`, GPU `targets` ("sm89", ...), and graph name -> EngineFile."""

    backend: str
    version: str
    targets: tuple
    graphs: dict

    @property
    def id(self):
        """Name of the set in the manifest and of its folder under engines/."""
        return engine_id(self.backend, self.targets, self.version)


def engine_id(backend, targets, version):
    """Return the name of a set of engines."""
    return f"{backend}-{'+'.join(targets)}-{version}"


def engine_path(name, graph):
    """Return where the engine of a graph lies in the bundle, for a set of this name."""
    return f"{ENGINE_FOLDER}/{name}/{graph}.engine"


def parse_engines(data, graphs, files, schema):
    """Check the `engines` object of a manifest of version `schema` against its graphs and files; returns set name -> EngineSet."""
    sets = {}
    for name, item in data.items():
        at = Reader(f"engines.{short(name)}", item)
        at.keys(EngineSet.__dataclass_fields__)
        version = at.get("version", lambda v: isinstance(v, str) and _VERSION.fullmatch(v), "a version number")
        backend, targets = at.one_of("backend", BACKENDS), at.get("targets", _are_targets, "different GPU targets in order")
        expected = engine_id(backend, targets, version)
        if name != expected:
            raise BundleError(f"engines must be named after backend, targets and version, {expected}, got {short(name)}")
        engines = {g: _engine(expected, g, e, graphs, files, schema) for g, e in at.mapping("graphs").items()}
        sets[name] = EngineSet(backend, version, tuple(targets), engines)
    listed = {e.file for s in sets.values() for e in s.graphs.values()}
    for path in files:
        if path.lower().startswith(f"{ENGINE_FOLDER}/") and path not in listed:
            raise BundleError(f"files must list engines only that the section engines describes, got {short(path)}")
    return sets


def _engine(name, graph, data, graphs, files, schema):
    at = Reader(f"engines.{name}.{short(graph)}", data)
    at.keys([k for k in EngineFile.__dataclass_fields__ if schema >= _SINCE.get(k, 1)])
    if graph not in graphs:
        raise BundleError(f"{at.where} must belong to a graph of the bundle, got none of that name")
    file = at.text("file")
    if file != engine_path(name, graph) or file not in files:
        raise BundleError(f"{at.where} file must be {engine_path(name, graph)} and listed in files, got {short(file)}")
    onnx = at.sha256("onnx_sha256")
    if onnx != files[graphs[graph].file].sha256:
        raise BundleError(f"{at.where} onnx_sha256 must be that of {graphs[graph].file}, got {onnx[:16]}...")
    newer = {} if schema < 4 else {
        "left_out": at.size("left_out"),
        "driver": at.get("driver", lambda v: isinstance(v, str) and (not v or _VERSION.fullmatch(v)), "a version number or empty")}
    profiles = at.get("profiles", lambda v: isinstance(v, list) and 0 < len(v) <= 16, "a list of profiles")
    return EngineFile(file, onnx, at.sha256("weights_sha256"),
                      tuple(_profile(f"{at.where} profiles", p, graphs[graph]) for p in profiles), **newer)


def _profile(where, data, graph):
    """Shapes of every input; a size that the graph fixes must be among those that the engine takes."""
    at = Reader(where, data)
    at.keys([t.name for t in graph.inputs])
    result = {}
    for tensor in graph.inputs:
        def fits(value):
            shapes = isinstance(value, list) and len(value) == 3 and all(
                isinstance(s, list) and len(s) == len(tensor.shape) and all(type(d) is int and 0 < d < 2**31 for d in s)
                for s in value)
            return shapes and all(a <= b <= c and (isinstance(want, str) or a <= want <= c)
                                  for a, b, c, want in zip(*value, tensor.shape))

        shapes = at.get(tensor.name, fits, f"smallest, best and largest shape around {list(tensor.shape)}")
        result[tensor.name] = tuple(map(tuple, shapes))
    return result


def _are_targets(value):
    """Whether a value is a list of GPU targets, ordered by number so that a set has one name only."""
    ok = isinstance(value, list) and value and all(isinstance(t, str) and _TARGET.fullmatch(t) for t in value)
    return ok and value == sorted(set(value), key=lambda t: int(t[2:]))
