"""Engines of a few bytes in a tiny bundle, for tests of everything around them."""

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
