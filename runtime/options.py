"""What the caller of `Pipeline.generate` may ask for, checked once, before any work."""

import warnings
from dataclasses import dataclass

import numpy as np

from .errors import PidiffError, require
from .identity import Identity
from .schedule import SOLVERS

MAX_STEPS, MAX_IMAGES, MAX_PEOPLE, MAX_SEED = 1000, 1024, 8, 2**63


@dataclass(frozen=True)
class Options:
    """The numbers of one generation (see `Pipeline.generate`); every field has been checked."""

    steps: int
    guidance_scale: float
    guidance_interval: tuple
    cache_interval: int
    id_scale: float
    id_start: float
    level_scale: tuple
    scheduler: str
    eta: float | None
    batch_size: int

    def __post_init__(self):
        _integer("num_inference_steps", self.steps, 1, MAX_STEPS)
        _number("guidance_scale", self.guidance_scale, 0, 100)
        require(isinstance(self.guidance_interval, tuple) and len(self.guidance_interval) == 2, "guidance_interval",
                "be two numbers (start, end)", self.guidance_interval)
        for value in self.guidance_interval:
            _number("guidance_interval", value, 0, 1)
        require(self.guidance_interval[0] < self.guidance_interval[1], "guidance_interval", "end after it starts",
                self.guidance_interval)
        _integer("cache_interval", self.cache_interval, 1, MAX_STEPS)
        _number("id_scale", self.id_scale, 0, 10)
        _number("id_start", self.id_start, 0, 1)
        require(isinstance(self.level_scale, tuple) and len(self.level_scale) == 4, "level_scale",
                "be four numbers (coarse, middle, fine, finest)", self.level_scale)
        for value in self.level_scale:
            _number("level_scale", value, 0, 10)
        require(self.scheduler in SOLVERS, "scheduler", f"be one of {', '.join(SOLVERS)}", repr(self.scheduler))
        if self.eta is not None:
            _number("eta", self.eta, 0, 1)
            require(self.scheduler == "tcd", "eta", "be given with the scheduler tcd only", f"{self.eta} with {self.scheduler}")
        _integer("batch_size", self.batch_size, 1, 64)

    @property
    def guided(self):
        """Whether the unconditional half of the batch is needed."""
        return self.guided_steps[0] < self.guided_steps[1]

    @property
    def guided_steps(self):
        """The steps with guidance: (first, end); (0, 0) for none."""
        first, end = (round(x * self.steps) for x in self.guidance_interval)
        return (first, end) if self.guidance_scale not in (0, 1) and first < end else (0, 0)

    @property
    def first_identity_step(self):
        """The first step at which the identity is on."""
        return round(self.id_start * self.steps)


def resolve_seeds(seed, num_images):
    """Return one seed per image: a list is taken as it is, a number counts upwards, None is drawn at random."""
    if isinstance(seed, (list, tuple, np.ndarray)):
        seeds = [int(_integer("seed", s, 0, MAX_SEED - 1)) for s in seed]
        require(len(seeds) > 0, "seed", "hold at least one seed", "an empty list")
        require(num_images in (None, len(seeds)), "num_images", f"equal the number of seeds, {len(seeds)}", num_images)
        _integer("num_images", len(seeds), 1, MAX_IMAGES)
        return seeds
    count = 1 if num_images is None else int(_integer("num_images", num_images, 1, MAX_IMAGES))
    if seed is None:
        seed = int(np.random.default_rng().integers(2**31))
    first = int(_integer("seed", seed, 0, MAX_SEED - 1))
    require(first + count <= MAX_SEED, "seed", f"leave room for {count} images below 2**63", first)
    return list(range(first, first + count))


def check_levels(level_scale, groups):
    """Refuse level scales where the code of a person has no W+ levels."""
    require(groups == 4 or all(value == 1 for value in level_scale), "level_scale", "be all ones for this bundle, whose identities "
            "have no W+ levels (id_scale sets the strength)", tuple(level_scale))


def warn_foreign(people, bundle):
    """Warn of people whose code comes from another encoder than the bundle's, or whose tuning from other weights (for `generate`)."""
    if any(p.encoder and p.encoder != bundle.encoder_id() for p in people):
        warnings.warn("identity was enrolled with another encoder than this bundle's; enroll the photo again if the "
                      "likeness is poor", stacklevel=4)
    if any(p.tuning and p.tuning.model != bundle.adapter_id() for p in people):
        warnings.warn("identity was tuned for other weights than this bundle's; run pidiff-train personalize again if the "
                      "likeness is poor", stacklevel=4)


def resolve_people(identity, layers, width):
    """Return a list of Identity with `layers` W+ layers of `width` numbers each; None stands for nobody."""
    people = [] if identity is None else list(identity) if isinstance(identity, (list, tuple)) else [identity]
    require(len(people) <= MAX_PEOPLE, "identity", f"be at most {MAX_PEOPLE} people", len(people))
    for person in people:
        require(isinstance(person, Identity), "identity", "be an Identity or a list of them", type(person).__name__)
        require(person.w_plus.shape == (layers, width), "identity", f"have a code of {layers} x {width} numbers for this bundle",
                "{} x {}".format(*person.w_plus.shape))
    return people


def resolve_mask(id_mask, people, height, width):
    """Return region masks float32 [P, height, width] at latent size.

    id_mask: None (everywhere; needs one person), one array [P, H, W] with values in [0, 1], or per person one array
    [H, W] or one box (x0, y0, x1, y1) in fractions of the picture.
    """
    if id_mask is None:
        require(people <= 1, "id_mask", "be given for several people", None)
        return np.ones((max(people, 1), height, width), np.float32)
    try:
        items = [np.asarray(item, np.float32) for item in id_mask]
    except (TypeError, ValueError):
        raise PidiffError("id_mask must be arrays [P, H, W] or boxes (x0, y0, x1, y1), got "
                          f"{type(id_mask).__name__}") from None
    require(len(items) == max(people, 1), "id_mask", f"hold one region per person, {max(people, 1)}", len(items))
    return np.stack([_region(item, height, width) for item in items])


def _region(item, height, width):
    if item.shape == (4,):
        x0, y0, x1, y1 = item
        require(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, "id_mask", "be boxes with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1",
                item.tolist())
        return np.outer(_covered(y0, y1, height), _covered(x0, x1, width))
    require(item.ndim == 2 and 0 < min(item.shape) and max(item.shape) <= 8192, "id_mask", "be boxes (x0, y0, x1, y1) or "
            "arrays [H, W]", list(item.shape))
    require(np.isfinite(item).all() and item.min() >= 0 and item.max() <= 1, "id_mask", "hold values in [0, 1]", "others")
    from .images import opencv

    cv2 = opencv()
    larger = item.shape[0] >= height and item.shape[1] >= width
    return cv2.resize(item, (width, height), interpolation=cv2.INTER_AREA if larger else cv2.INTER_LINEAR)


def _covered(low, high, count):
    """Return which part of each of `count` equal cells of [0, 1] the interval [low, high] covers, float32."""
    edges = np.arange(count + 1) / count
    return (np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * count).astype(np.float32)


def _integer(argument, value, low, high):
    ok = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and low <= value <= high
    require(ok, argument, f"be an integer in [{low}, {high}]", repr(value))
    return value


def _number(argument, value, low, high):
    ok = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    require(ok and low <= value <= high, argument, f"be a number in [{low}, {high}]", repr(value))
    return value
