"""The picture of the verification report: one seed, prompt and person, drawn by PyTorch in float32 and by each engine.

The person is a W+ code, a little off the average one, so no photo is needed. The engines run through `Pipeline`, as users
run them; PyTorch draws from the bundle's own weights with diffusers' scheduler and the unfolded identity branch.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from pidiff.model import Model, load_model
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engines import call
from pidiff.runtime.errors import FaceError, PidiffError
from pidiff.runtime.faces import to_planes
from pidiff.runtime.identity import Identity
from pidiff.runtime.images import opencv
from pidiff.runtime.pipeline import Pipeline
from pidiff.runtime.schedule import SAMPLING
from pidiff.sampling import sample_latents

from .errors import ExportError

PROMPT, SEED = "a photo of a person", 7
FEW_STEPS = 4                        # of models that are too slow for their usual number on a CPU
LARGE = 100_000_000                  # parameters of such a model's UNet
_SOLVERS = {"euler_ancestral": "ddim", "lcm": "ddim", "tcd": "ddim"}      # these draw noise on the way, each library its own
_THREADS = 2


@dataclass(frozen=True)
class Picture:
    """settings: what was drawn. images: "pytorch" and engines -> RGB uint8 [H,W,3]. figures: engine -> its figures, or the
    reason why there is no picture of it (`problem`)."""

    settings: dict
    images: dict[str, np.ndarray]
    figures: dict[str, dict]


@torch.no_grad()
def draw(bundle: Bundle, engines: list[str]) -> Picture:
    """Draw the picture. ExportError if ONNX Runtime, which must run every bundle, gives NaN or a flat picture."""
    model = load_model(bundle.path)
    person, average = _person(model), model.w_plus_encoder.latent_avg.numpy().copy()
    defaults = bundle.manifest.scheduler
    few = sum(p.numel() for p in model.unet.parameters()) > LARGE
    solver = defaults.get("solver", "dpmpp_2m")
    settings = {"prompt": PROMPT, "seed": SEED, "scheduler": _SOLVERS.get(solver, solver), "guidance_scale": defaults.get("guidance_scale", 3.0),
                "num_inference_steps": FEW_STEPS if few else defaults.get("num_inference_steps", 20)}
    images, figures = {"pytorch": _reference(model, bundle, person, settings)}, {}
    del model
    for engine in engines:
        try:
            images[engine] = _drawn_by(engine, bundle, person, settings)
        except PidiffError as error:
            if engine == "onnxruntime":
                raise ExportError(f"the bundle must draw a picture in {engine}, got: {error}") from error
            figures[engine] = {"problem": str(error)}
            continue
        figures[engine] = compare(images["pytorch"], images[engine])
    if np.ptp(images["onnxruntime"]) == 0 != np.ptp(images["pytorch"]):
        raise ExportError("the bundle must draw the picture that PyTorch draws, got one of a single colour from onnxruntime")
    read, codes = _codes(bundle, images)
    like = lambda a, b: _cosine(a - average, b - average)
    for engine in images:
        own = figures.setdefault(engine, {})
        own["code_similarity_to_person"] = like(codes[engine], person)
        if engine != "pytorch":
            own["code_similarity_to_pytorch"] = like(codes[engine], codes["pytorch"])
    return Picture({**settings, "codes_read_from": read}, images, figures)


def compare(reference: np.ndarray, image: np.ndarray) -> dict:
    """PSNR in dB (None: equal) and largest difference in grey levels of two RGB uint8 pictures."""
    difference = image.astype(np.float64) - reference
    square = float((difference**2).mean())
    return {"psnr_db": 10 * float(np.log10(255**2 / square)) if square else None,
            "max_levels": int(np.abs(difference).max())}


def _person(model: Model) -> np.ndarray:
    """The average W+ code, moved the same way on all levels."""
    average = model.w_plus_encoder.latent_avg.numpy()
    return (average + 0.35 * np.random.default_rng(SEED).standard_normal(average.shape[-1])).astype(np.float32)


def _reference(model: Model, bundle: Bundle, person: np.ndarray, settings: dict) -> np.ndarray:
    from pidiff import _C

    options = {k: settings[k] for k in ("num_inference_steps", "guidance_scale")}
    latents, _ = sample_latents(
        model, torch.from_numpy(person)[None], settings["prompt"], solver=settings["scheduler"],
        **{k: v for k, v in bundle.manifest.scheduler.items() if k in SAMPLING},
        latents=torch.from_numpy(_C.randn([settings["seed"]], bundle.manifest.model.latent_shape)), **options)
    planes = model.decode_latents(latents)[0].clamp(-1, 1)
    return ((planes + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().copy()


def _drawn_by(engine: str, bundle: Bundle, person: np.ndarray, settings: dict) -> np.ndarray:
    pipeline = Pipeline(bundle, engine, threads=_THREADS)
    return pipeline.generate(Identity(person), **settings).images[0]


def _codes(bundle: Bundle, images: dict[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """W+ codes that the bundle's encoder reads from pictures: from the face in each, or, where it finds none in one of them,
    from the whole pictures."""
    pipeline = Pipeline(bundle, "onnxruntime", threads=_THREADS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "the faces", {n: pipeline.enroll(image, "largest").w_plus for n, image in images.items()}
    except FaceError:
        side, cv2 = bundle.manifest.model.face_size, opencv()
        graph = pipeline._graph("w_plus_encoder")
        small = {n: cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for n, image in images.items()}
        return "the whole pictures", {n: call(graph, {"face": to_planes(i)})["w_plus"][0].astype(np.float32) for n, i in small.items()}


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))
