"""Presets: one name for a trade-off between time and fidelity. An option that the caller gives comes before its preset's.

    exact     every step whole and guided
    balanced  two fifths of the steps; guidance from a fifth of them on, to seven tenths
    fast      a fifth of the steps; guidance from their half on, to three quarters

They are what benchmarks/presets.py found best on `mini`, where fewer steps change a picture less than cached features that
save as much time (benchmarks/RESULTS.md): none of them caches.
"""

from .errors import require

DEFAULTS = {"guidance_interval": (0.0, 1.0), "cache_interval": 1, "id_start": 0.0}
PRESETS = {  # steps: share of the default number
    "exact": {},
    "balanced": {"steps": 0.4, "guidance_interval": (0.2, 0.7)},
    "fast": {"steps": 0.2, "guidance_interval": (0.5, 0.75)},
}


def resolve_preset(preset, given, steps):
    """Return a preset's options with those that are `given` (not None) in their place; steps: the default number of them."""
    require(preset in PRESETS, "preset", f"be one of {', '.join(PRESETS)}", repr(preset))
    named = dict(PRESETS[preset])
    named["num_inference_steps"] = max(1, round(steps * named.pop("steps", 1)))
    return {**DEFAULTS, **named, **{k: v for k, v in given.items() if v is not None}}
