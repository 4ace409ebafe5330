"""Presets: one name for a trade-off between time and fidelity. An option that the caller gives comes before its preset's.

    exact     every step whole and guided
    balanced  features cached in every second step; guidance from a tenth of the steps on, to four fifths
    fast      the same, features kept for two steps, with half the steps

benchmarks/presets.py measures what they cost; the figures are in benchmarks/RESULTS.md.
"""

import warnings

from .errors import require

DEFAULTS = {"guidance_interval": (0.0, 1.0), "cache_interval": 1, "id_start": 0.0}
PRESETS = {
    "exact": {},
    "balanced": {"guidance_interval": (0.1, 0.8), "cache_interval": 2},
    "fast": {"guidance_interval": (0.1, 0.8), "cache_interval": 3, "steps": 0.5},  # steps: share of the default number
}


def resolve_preset(preset, given, steps, cached):
    """Return a preset's options with those that are `given` (not None) in their place.

    steps: the default number of steps. cached: whether the bundle has the graph for cached features; a preset does without
    where it has none, and a warning says so.
    """
    require(preset in PRESETS, "preset", f"be one of {', '.join(PRESETS)}", repr(preset))
    named = dict(PRESETS[preset])
    options = {**DEFAULTS, **named, "num_inference_steps": max(1, round(steps * named.pop("steps", 1)))}
    options.pop("steps", None)
    given = {k: v for k, v in given.items() if v is not None}
    if options["cache_interval"] > 1 and "cache_interval" not in given and not cached:
        warnings.warn(f"preset {preset} does without cached features: the bundle has no graph unet_cached; export it again",
                      stacklevel=3)
        options["cache_interval"] = 1
    return {**options, **given}
