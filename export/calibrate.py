"""Which layers of the UNet are computed in int8, and in which ranges: measured on pictures of our own prompts and people.

The bundle's pipeline draws pictures in ONNX Runtime, and what its UNet is given at several noise levels is kept. On that,
the largest number in and out of every layer sets its scales. Then each layer alone is switched to int8, and what this
changes in the UNet's result ranks the layers; the fewest are kept in float32, the worst first, with which all others
together change it by no more than `BOUND`. In a float16 bundle they are kept in float16, and its float32 islands are left as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from pidiff.data.factors import COLOURS, EXPRESSIONS, POSES, SCENES, STYLES, Factors, caption
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.identity import Identity
from pidiff.runtime.pipeline import Pipeline

from .errors import ExportError
from .picture import FEW_STEPS, LARGE
from .quantize import SWITCH, Layer, find_layers, quantize, store_weights, with_largest
from .verify import open_session

BOUND = 0.03                # of the UNet's result, root mean square
PICTURES, LEVELS = 6, 6     # pictures drawn, and noise levels kept of each
RANKING, RANKING_LARGE = 6, 2   # calls by which single layers are ranked, and of models of Stable Diffusion's size
SMALL_SIDE = 16             # latent pixels on which layers of UNets that take any size are compared, for time
_THREADS = 2

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Calibration:
    """ranges: layer -> largest |x| in and out of it, of the layers in int8. kept: layer -> why it stays in `wide`, float32 or float16. error:
    of the UNet's result, relative, root mean square over `calls` calls."""

    ranges: dict[str, tuple[float, float]]
    kept: dict[str, str]
    error: float
    calls: int
    wide: str = "float32"

    def to_dict(self) -> dict:
        return {"int8_layers": len(self.ranges), f"kept_in_{self.wide}": self.kept, "relative_error": self.error, "bound": BOUND,
                "calls": self.calls}


class _Recorder:
    """An engine that keeps copies of the inputs of chosen calls."""

    def __init__(self, engine):
        self.engine, self.calls, self.count, self.wanted = engine, [], 0, ()
        self.bound, self.constant = {}, set()
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def bind(self, tensors, constant=()):
        self.bound.update(tensors)
        self.constant.update(constant)
        self.engine.bind(tensors, constant)

    def run(self, stream=None):
        if self.count in self.wanted:
            self.calls.append({t.name: self.bound[t.name] if t.name in self.constant else self.bound[t.name].copy()
                               for t in self.inputs()})
        self.count += 1
        self.engine.run(stream)


class _RecordingPipeline(Pipeline):
    def _load(self, name):
        engine = super()._load(name)
        return _Recorder(engine) if name == "unet" else engine


def calibrate(bundle: Bundle, average: np.ndarray, weights: str, report: Callable[[str], None]) -> Calibration:
    """Draw, measure and choose, and store the int8 weights of the chosen layers in the bundle.

    bundle: a float32 or float16 one whose UNet's weights lie in the file `weights`. average: the W+ code [L, 512] that people are near.
    """
    report("int8 ranges")
    calls, path, root, half = record(bundle, average), bundle.path / bundle.graph("unet").file, bundle.path, bundle.manifest.precision == "fp16"
    layers = find_layers(model := ir.load(path), root, weights, half)
    ranges = _ranges(bundle, model, layers, calls)
    report("int8 layers")
    store_weights(root, layers.values())
    with _Switched(bundle, path, weights, half, ranges) as switched:
        kept, error = choose(switched.error, list(layers), _smaller(bundle, calls), RANKING_LARGE if _is_large(bundle) else RANKING)
    layers = {name: layer for name, layer in layers.items() if name not in kept}
    if not layers:
        raise ExportError(f"int8 must change the UNet's result by at most {BOUND:g}, got more with any of its layers")
    store_weights(root, layers.values())
    return Calibration({name: ranges[name] for name in layers}, kept, error, len(calls), "float16" if half else "float32")


def record(bundle: Bundle, average: np.ndarray) -> list[Inputs]:
    """Inputs of the UNet from the sampling loop, at LEVELS noise levels of each of PICTURES pictures; of models of Stable
    Diffusion's size, whose pictures take minutes, at FEW_STEPS steps of two."""
    pipeline, rng = _RecordingPipeline(bundle, "onnxruntime", threads=_THREADS), np.random.default_rng(0)
    large = _is_large(bundle)
    steps = FEW_STEPS if large else bundle.manifest.scheduler.get("num_inference_steps", 20)
    unet = pipeline._graph("unet")
    for seed in range(2 if large else PICTURES):
        unet.count, unet.wanted = 0, set(np.linspace(0, steps - 1, min(LEVELS, steps)).round())
        person = (average + 0.35 * rng.standard_normal(average.shape[-1])).astype(np.float32)
        pipeline.generate(Identity(person), _prompt(seed, rng), seed=seed, num_inference_steps=steps)
    return unet.calls


def _is_large(bundle: Bundle) -> bool:
    return sum(f.size for name, f in bundle.manifest.files.items() if name.startswith("unet/")) > 2 * LARGE


def _prompt(index: int, rng: np.random.Generator) -> str:
    """A caption as in training; every style comes in turn."""
    backgrounds = [*COLOURS, *SCENES]
    return caption(Factors(STYLES[index % len(STYLES)], *(str(rng.choice(c)) for c in (backgrounds, EXPRESSIONS, POSES))), rng)


def _ranges(bundle: Bundle, model: ir.Model, layers: dict[str, Layer], calls: list[Inputs]) -> dict[str, tuple[float, float]]:
    names = with_largest(model, layers)
    with _Session(bundle, model) as session:
        wanted = sorted({name for pair in names.values() for name in pair})
        found = np.max([session.run(wanted, call) for call in calls], axis=0)
    largest = dict(zip(wanted, map(float, found), strict=True))
    return {layer: (largest[x], largest[y]) for layer, (x, y) in names.items()}


def choose(error: Callable[[np.ndarray, list[Inputs]], float], names: list[str], calls: list[Inputs],
           ranking: int = RANKING) -> tuple[dict[str, str], float]:
    """Layers to keep -> why, and the error of all others together. `error` is that of the layers that are switched on; ranking: calls
    by which single layers are compared."""
    few = calls[::max(1, len(calls) // ranking)][:ranking]
    bar = tqdm(names, "int8 layers", leave=False, disable=None)
    alone = {name: error(np.arange(len(names)) == i, few) for i, name in enumerate(bar)}
    order = sorted(names, key=lambda name: -alone[name])
    together = lambda kept: error(np.array([n not in order[:kept] for n in names]), calls)
    low, high = 0, len(order)               # the fewest that do lie in (low - 1, high]: the error falls with every layer kept
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if together(middle) <= BOUND else (middle + 1, high)
    return {name: f"alone in int8 it changes the UNet's result by {100 * alone[name]:.2f} %" for name in order[:low]}, together(low)


def _smaller(bundle: Bundle, calls: list[Inputs]) -> list[Inputs]:
    """The calls on a corner of their latents, where the graph takes any size and they are large."""
    if isinstance(bundle.graph("unet").tensor("latents").shape[-1], int):
        return calls
    cut = lambda x: np.ascontiguousarray(x[..., :SMALL_SIDE, :SMALL_SIDE])
    return [{**call, **{name: cut(call[name]) for name in ("latents", "id_mask")}} for call in calls]


class _Session:
    """A changed graph in ONNX Runtime, for the length of the block; its file lies beside the weights that it points to."""

    def __init__(self, bundle: Bundle, model: ir.Model):
        self.bundle, self.model = bundle, model

    def __enter__(self):
        path = self.bundle.path / ".calibration.onnx"
        try:
            ir.save(self.model, path)
            self.session = open_session(path, self.bundle.manifest.attention == "fused")
        finally:
            path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_):
        self.session = None

    def run(self, names: list[str], inputs: Inputs) -> list[np.ndarray]:
        return self.session.run(names, inputs)


class _Switched(_Session):
    """The UNet with every layer in both forms."""

    def __init__(self, bundle: Bundle, path: Path, weights: str, half: bool, ranges: dict[str, tuple[float, float]]):
        model = ir.load(path)
        layers: dict[str, Layer] = find_layers(model, bundle.path, weights, half)
        quantize(model, bundle.path, layers, ranges, switches=True)
        super().__init__(bundle, model)
        self.off, self.expected = np.zeros(len(layers), bool), {}

    def error(self, on: np.ndarray, calls: list[Inputs]) -> float:
        """Relative error of model_output with the layers `on` in int8, root mean square over all of it."""
        wrong = right = 0.0
        for call in calls:
            if id(call) not in self.expected:
                self.expected[id(call)] = self._output(self.off, call)
            expected = self.expected[id(call)]
            wrong += float(((self._output(on, call) - expected) ** 2).sum())
            right += float((expected**2).sum())
        return (wrong / max(right, 1e-30)) ** 0.5

    def _output(self, on: np.ndarray, call: Inputs) -> np.ndarray:
        return self.run(["model_output"], {**call, SWITCH: on})[0].astype(np.float32)
