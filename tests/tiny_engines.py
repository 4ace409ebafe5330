"""Engines of a few bytes in a tiny bundle, for tests of everything around them."""

import sys

from pidiff.export import engines as builders
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engine_specs import EngineFile, EngineSet, engine_path
from pidiff.runtime.engine_store import EngineStore

TARGETS, VERSION = ("sm86", "sm89"), "1.7.1.116"


def engine_of(path, engines, graph, weights="0" * 64):
    """An entry whose profile takes the smallest free axes of the graph's inputs."""
    manifest = Bundle.open(path, verify=False).manifest
    spec = manifest.graphs[graph]
    profile = {t.name: (tuple(1 if isinstance(d, str) else d for d in t.shape),) * 3 for t in spec.inputs}
    return EngineFile(engine_path(engines.id, graph), manifest.files[spec.file].sha256, weights, (profile,))


def add(path, targets=TARGETS, version=VERSION, **contents):
    engines = EngineSet("tensorrt-rtx", version, targets, {})
    with EngineStore(path) as store:
        for graph, content in contents.items():
            store.part(engines, graph).write_bytes(content)
            store.add(engines, graph, engine_of(path, engines, graph))
    return path


# A builder: reads the job, notes graph and job, writes a file.
BUILDER = """
import json, sys, os, signal, time
job = json.load(sys.stdin)
graph = os.path.basename(job["onnx"])[:-5]
open({log!r}, "a").write(graph + "\\n")
json.dump(job, open({log!r} + ".job", "w"))
open(job["out"], "wb").write(b"half")
if graph == {victim!r}:
    {misfortune}
open(job["out"], "wb").write(json.dumps(job["profiles"]).encode())
print(1, 2); print(json.dumps({{"peak_rss": 1 << 20}}))
"""


def use_builder(monkeypatch, log, victim="", misfortune="pass", version="9.9"):
    """Put the small builder in the place of TensorRT-RTX's, of which a version is installed; returns a function: the graphs built since then."""
    log.write_text("")
    monkeypatch.setattr(builders, "installed_version", lambda backend: (version, ""))
    monkeypatch.setattr(builders, "_BUILDER", [sys.executable, "-c", BUILDER.format(log=str(log), victim=victim, misfortune=misfortune)])
    return lambda: log.read_text().split()
