"""Does a graph fit float16: the largest value that each layer computes, measured in float32, and what must stay there.

An island is a module that computes, or is given, numbers that float16 cannot hold. It computes in float32 and gives float16
where its results fit; where they do not, they go on in float32, and so does what they are given to, an island too.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ExportError

HALF_MAX = 65504.0
LIMIT = HALF_MAX / 2             # what is measured is a few inputs; others go further
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Ranges:
    """worst: the layer with the largest value, and that value. islands: module of the graph ("" is all of it) -> why it computes
    in float32. open: those whose results stay in float32."""

    worst: str
    largest: float
    islands: dict[str, str] = field(default_factory=dict)
    open: frozenset[str] = frozenset()

    def to_dict(self) -> dict:
        return {"worst_layer": self.worst, "largest": self.largest, "part_of_float16": self.largest / HALF_MAX,
                "kept_in_float32": self.islands}


def largest_of(values) -> float:
    """Largest finite |x| in nested tuples, lists and dicts of tensors. -inf is a mask and counts as 0, NaN as the largest number."""
    if isinstance(values, Tensor):
        if not values.is_floating_point() or values.numel() == 0:
            return 0.0
        low, high = (float(end) for end in values.detach().aminmax())        # NaN, if there is one
        if math.isfinite(low) and math.isfinite(high):
            return max(-low, high)
        return float(values.detach().float().nan_to_num(_LARGEST, _LARGEST, 0.0).abs().max())
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else ()
    return max(map(largest_of, items), default=0.0)


@torch.no_grad()
def measure(graph: str, module: nn.Module, runs: Iterable[dict[str, Tensor]]) -> Ranges:
    """Run a graph's module (float32, attention as plain operators) on each of `runs`, name -> input, and find its islands.

    ExportError if what goes in or comes out of the graph itself does not fit float16.
    """
    watch = _Watch(module)
    with watch.hooks(), watch:
        for inputs in runs:
            module(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})
    largest = max(watch.inside.values(), default=0.0)
    # The layer that made it, rather than the sum that it went into.
    path = max((p for p, value in watch.inside.items() if value >= 0.9 * largest), key=len, default=())
    worst = path[-1] if path and path[-1] else "(graph)"
    if watch.ends("") > HALF_MAX:
        raise ExportError(f"graph {graph} must take and give numbers that float16 holds, got {watch.ends(''):.4g}, and {largest:.4g} in "
                          f"{worst}: export without --fp16")
    computed, reasons = {}, {}
    for names, value in watch.inside.items():
        computed[names[-1]] = max(value, computed.get(names[-1], 0.0))
    for name in watch.given:
        if computed.get(name, 0.0) > LIMIT:
            reasons[name] = f"it computes {computed[name]:.4g}, float16 ends at {HALF_MAX:.0f}"
        elif name and watch.given[name] > LIMIT:
            reasons[name] = f"it is given {watch.given[name]:.4g}, float16 ends at {HALF_MAX:.0f}"
    # One inside another is in float32 anyway.
    islands = {n: r for n, r in sorted(reasons.items()) if not any(n != o and (n.startswith(o + ".") or not o) for o in reasons)}
    return Ranges(worst, largest, islands, frozenset(n for n in islands if n and watch.given_back[n] > LIMIT))


class _Watch(TorchDispatchMode):
    """Largest value by nest of called modules (`inside`), and in each module's inputs and results (`given`, `given_back`)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.names = {id(m): n for n, m in module.named_modules()}
        self.modules = dict(module.named_modules())
        self.stack: list[str] = []
        self.busy = False                # with a look at a module's ends, which is no part of the model
        self.inside: dict[tuple[str, ...], float] = {}
        self.given: dict[str, float] = {}
        self.given_back: dict[str, float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        if self.stack and not self.busy and not any(a is not None and not a.is_write for a in aliases):  # views have been seen
            # Of norms and fused attention the first result; the others are statistics, in float32 everywhere.
            value = largest_of(result[0] if isinstance(result, (tuple, list)) and result else result)
            key = tuple(self.stack)
            self.inside[key] = max(value, self.inside.get(key, 0.0))
        return result

    @contextmanager
    def hooks(self) -> Iterator[None]:
        def enter(module, args, kwargs):
            self._end(self.given, module, (args, kwargs))
            self.stack.append(self.names[id(module)])

        def leave(module, args, output):
            self.stack.pop()
            self._end(self.given_back, module, output)

        handles = []
        for module in self.modules.values():
            handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def ends(self, name: str) -> float:
        return max(self.given.get(name, 0.0), self.given_back.get(name, 0.0))

    def _end(self, record: dict[str, float], module: nn.Module, values) -> None:
        name, self.busy = self.names[id(module)], True
        record[name] = max(largest_of(values), record.get(name, 0.0))
        self.busy = False


@contextmanager
def float32_islands(module: nn.Module, ranges: Ranges | None) -> Iterator[None]:
    """Make the islands of a float16 graph compute in float32, with casts around them, for the length of the block."""
    if ranges is None or not ranges.islands:
        yield
        return
    half, single = torch.float16, torch.float32
    islands = {n: module.get_submodule(n) for n in ranges.islands}
    inside = {id(m) for island in islands.values() for m in island.modules()}
    # Everything else takes and gives float16, also where a sum with an island's result has become float32.
    leaves = [m for m in module.modules() if not any(m.children()) and id(m) not in inside and m is not module]
    changed = [*islands.values(), *leaves, *([] if "" in islands else [module])]
    try:
        for name, island in islands.items():
            island.float()
            island.forward = _between_casts(island.forward, single, single if name in ranges.open else half)
        for leaf in leaves:
            leaf.forward = _between_casts(leaf.forward, half, None)
        if "" not in islands:
            module.forward = _between_casts(module.forward, None, half)
        yield
    finally:
        for part in changed:
            vars(part).pop("forward", None)
        for island in islands.values():
            island.half()


def _between_casts(forward, given: torch.dtype | None, gives: torch.dtype | None):
    """A forward whose arguments are cast to `given` and whose results to `gives` (None: as they are)."""
    @functools.wraps(forward)            # the tracer reads its signature
    def run(*args, **kwargs):
        args, kwargs = _cast((args, kwargs), given)
        return _cast(forward(*args, **kwargs), gives)

    return run


def _cast(values, dtype: torch.dtype | None):
    if dtype is None:
        return values
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, dict):
        return {k: _cast(v, dtype) for k, v in values.items()}
    return type(values)(_cast(v, dtype) for v in values) if type(values) in (tuple, list) else values
