"""Compiled engines in the report of a bundle: what was built, and how far it is from ONNX Runtime where it can run here.

Engines are added after the rest was written, by a command that has no torch: the figures in report.json are kept as they
are, and of report.html only this section is exchanged.
"""

import json

import numpy as np

from pidiff.runtime.bundle import REPORTS, Bundle, GraphSpec
from pidiff.runtime.cuda import Device, Scratch
from pidiff.runtime.engine_specs import EngineFile
from pidiff.runtime.engine_store import EngineStore
from pidiff.runtime.engines import call, load_engine
from pidiff.runtime.errors import PidiffError
from pidiff.runtime.preflight import preflight

from .pages import number, table

VERSION = 2
NOT_RUN = "built, not run here"
_HEADING, _AFTER = "<h2>Compiled engines</h2>", "<p class=note>Made with"


def update_report(store: EngineStore, measure: bool = True) -> None:
    """List the engines that the bundle has now in its report, if it has one. measure: run those that can run here and have
    no figures yet, beside ONNX Runtime on the processor."""
    files = store.report()
    try:
        content = json.loads(files[REPORTS[0]])
        known = content["compiled_engines"] if content["version"] == VERSION else {}
    except (KeyError, ValueError, TypeError):       # none, or not of this program
        return
    content |= {"version": VERSION, "compiled_engines": _engines(Bundle(store.path, store.manifest), known, measure)}
    changed = {REPORTS[0]: json.dumps(content, indent=1, allow_nan=False) + "\n"}
    before, heading, rest = files.get(REPORTS[1], b"").decode("utf-8", "replace").partition(_HEADING)
    _, after, end = rest.partition(_AFTER)
    if after:
        changed[REPORTS[1]] = before + engines_section(content["compiled_engines"]) + after + end
    store.replace_report({name: written.encode() for name, written in changed.items()})


def engines_section(engines: dict[str, dict[str, dict]]) -> str:
    """The section of the page; engines: set -> graph -> what `update_report` found."""
    if not engines:
        return f"{_HEADING}<p>None. <code>pidiff-export --into</code> adds them, and lists them here.</p>"
    rows = [(name, graph, f"{f['bytes'] / 2**20:.1f}", *((f["state"], "", "", "") if "state" in f else
             ("run here", *(number(f[k]) for k in ("max_abs", "mean_abs", "max_rel")))))
            for name, graphs in engines.items() for graph, f in graphs.items()]
    head = ("engines", "graph", "MiB", "", "max error", "mean error", "max relative")
    return (f"{_HEADING}{table(head, rows, 4)}<p class=note>Errors are against ONNX Runtime on the processor, on random "
            f"inputs of the size that the engine is best at.</p>")


def _engines(bundle: Bundle, known: dict, measure: bool) -> dict[str, dict[str, dict]]:
    verdicts = {(f.engines, f.graph): f for f in preflight(bundle).findings}
    found = {}
    for name, engines in bundle.manifest.engines.items():
        found[name] = {}
        for graph, engine in engines.graphs.items():
            file, verdict = bundle.manifest.files[engine.file], verdicts[name, graph]
            entry = {"sha256": file.sha256, "bytes": file.size}
            old = known.get(name, {}).get(graph, {})
            if old.items() >= entry.items() and "state" not in old:
                entry = old
            elif verdict.verdict not in ("ok", "slower"):
                entry["state"] = f"{NOT_RUN}: {verdict.why}"
            else:
                entry |= _measure(bundle, name, graph, engine) if measure else {"state": NOT_RUN}
            found[name][graph] = entry
    return found


def _measure(bundle: Bundle, name: str, graph: str, engine: EngineFile) -> dict:
    """Figures of an engine, or why there are none."""
    spec, backend, fused = bundle.graph(graph), bundle.manifest.engines[name].backend, bundle.manifest.attention == "fused"
    try:
        reference = load_engine("onnxruntime")(bundle.file(spec.file), spec, fused=fused)
        compiled = load_engine(backend)(backend, bundle.engine(name, graph), spec, engine.profiles, Scratch(Device()), str, fused)
        inputs, axes = _inputs(spec, engine.profiles[0])
        return _difference(call(compiled, inputs, **axes), call(reference, inputs, **axes))
    except PidiffError as error:
        return {"state": f"built, does not run here: {error}"}


def _inputs(spec: GraphSpec, profile: dict) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Random inputs of a profile's best size, and the sizes of the axes with names."""
    rng, inputs, axes = np.random.default_rng(0), {}, {}
    for tensor in spec.inputs:
        shape = profile[tensor.name][1]
        axes |= {axis: size for axis, size in zip(tensor.shape, shape) if isinstance(axis, str)}
        # Token numbers are small in every vocabulary; scales and masks lie in [0, 1], which suits the rest too.
        drawn = rng.integers(0, 8, shape) if tensor.dtype == "int64" else rng.random(shape)
        inputs[tensor.name] = drawn.astype(tensor.dtype)
    return inputs, axes


def _difference(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Errors over all outputs as in export.verify."""
    worst = mean = relative = 0.0
    for name, reference in expected.items():
        error = np.abs(got[name].astype(np.float64) - reference)
        worst, mean = max(worst, float(error.max())), max(mean, float(error.mean()))
        relative = max(relative, float(error.max() / max(np.abs(reference).max(), 1e-6)))
    return {"max_abs": worst, "mean_abs": mean, "max_rel": relative}
