"""Optimisation profiles: the shapes that an engine takes, from the axes of its graph and what the user wants to make.

Static by default, because a compiled engine is fastest at the shapes it was built for. The UNet gets two: one for a
guided step, whose batch is [unconditional..., conditional...], and one for an unguided step.
"""

from dataclasses import dataclass

from pidiff.runtime.bundle import Bundle

from .errors import ExportError

MAX_BATCH, MAX_PEOPLE, MAX_STEPS = 64, 8, 1000       # the limits of `Pipeline.generate`


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest size of an axis."""

    low: int
    best: int
    high: int

    @classmethod
    def parse(cls, argument: str, text: str, largest: int) -> "Range":
        """Read N or MIN:OPT:MAX; ExportError names `argument`."""
        parts = text.split(":")
        numbers = [int(p) for p in parts if p.isascii() and p.isdigit()]
        if len(parts) == len(numbers) == 1:
            numbers *= 3
        if len(numbers) != 3 or len(parts) == 2 or not 1 <= numbers[0] <= numbers[1] <= numbers[2] <= largest:
            raise ExportError(f"{argument} must be N or MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= {largest}, got {text}")
        return cls(*numbers)

    def times(self, number: int) -> "Range":
        return Range(self.low * number, self.best * number, self.high * number)


@dataclass(frozen=True)
class Shapes:
    """batch: pictures made at once. people: in one picture. size: of pictures, in pixels (None: the model's own)."""

    batch: Range = Range(1, 1, 1)
    people: Range = Range(1, 1, 1)
    size: Range | None = None


def profiles_of(bundle: Bundle, graph: str, axes: dict[str, tuple[int | str, ...]], shapes: Shapes) -> list[dict]:
    """The profiles of a graph, [{input: [smallest, best, largest shape]}]; `axes` gives the graph's inputs in order.

    Raises ExportError if the graph has an axis that is not in the I/O table, or a fixed size that is not the wanted one.
    """
    size = _size(bundle, graph, shapes, any(a in ("h", "w", "H", "W") for s in axes.values() for a in s))
    scale = bundle.manifest.model.vae_scale_factor
    latent = Range(size.low // scale, size.best // scale, size.high // scale)
    steps = bundle.manifest.scheduler.get("num_inference_steps", 20)
    result = []
    for batch in _batches(graph, shapes):
        ranges = {"B": batch, "P": shapes.people, "N": Range(1, steps, MAX_STEPS), "h": latent, "w": latent, "H": size, "W": size}
        profile = {name: [_shape(graph, name, axis_names, ranges, pick) for pick in ("low", "best", "high")]
                   for name, axis_names in axes.items()}
        if profile not in result:
            result.append(profile)
    return result


def _batches(graph: str, shapes: Shapes) -> tuple[Range, ...]:
    """Sizes of axis B: prompts, photos and people are prepared one at a time (`Pipeline.prepare`, `enroll`, `fold`)."""
    if graph == "unet":
        return shapes.batch.times(2), shapes.batch
    return (shapes.batch if graph == "vae_decoder" else Range(1, 1, 1),)


def _size(bundle: Bundle, graph: str, shapes: Shapes, free: bool) -> Range:
    """The range of picture sizes, checked where the graph has one."""
    own = bundle.manifest.model.image_size
    size = shapes.size or Range(own, own, own)
    text = f"{size.low}:{size.best}:{size.high}"
    if not free:
        if graph in ("unet", "vae_decoder") and (size.low, size.high) != (own, own):
            raise ExportError(f"size must be {own} for this model, whose graphs have a fixed size, got {text}")
        return size
    if not size.low <= own <= size.high:
        raise ExportError(f"size must include {own}, the size of this model's pictures, got {text}")
    unit = bundle.manifest.model.vae_scale_factor * 2 ** (len(bundle.json("unet/config.json")["block_out_channels"]) - 1)
    if any(n % unit for n in (size.low, size.best, size.high)):
        raise ExportError(f"size must be multiples of {unit}, got {text}")
    return size


def _shape(graph: str, name: str, axes: tuple[int | str, ...], ranges: dict[str, Range], pick: str) -> list[int]:
    for axis in axes:
        if isinstance(axis, str) and axis not in ranges:
            raise ExportError(f"graph {graph} {name} must have axes among {', '.join(ranges)}, got {axis!r}")
    return [getattr(ranges[a], pick) if isinstance(a, str) else a for a in axes]
