"""Presets: one name for a trade-off between time and fidelity. An option that the caller gives comes before its preset's.

    exact     every step whole and guided
    balanced  half the steps; guidance from a tenth of them on, to four fifths
    fast      a quarter of the steps; guidance from a fifth of them on, to four fifths

They are what benchmarks/presets.py found best on `mini`, where fewer steps change a picture less than cached features that
save as much time (benchmarks/RESULTS.md): none of them caches.
"""

from .errors import require

DEFAULTS = {"guidance_interval": (0.0, 1.0), "cache_interval": 1, "id_start": 0.0}
PRESETS = {  # steps: share of the default number
    "exact": {},
    "balanced": {"steps": 0.5, "guidance_interval": (0.1, 0.8)},
    "fast": {"steps": 0.25, "guidance_interval": (0.2, 0.8)},
}


def resolve_preset(preset, given, steps):
    """Return a preset's options with those that are `given` (not None) in their place; steps: the default number of them."""
    require(preset in PRESETS, "preset", f"be one of {', '.join(PRESETS)}", repr(preset))
    named = dict(PRESETS[preset])
    named["num_inference_steps"] = max(1, round(steps * named.pop("steps", 1)))
    return {**DEFAULTS, **named, **{k: v for k, v in given.items() if v is not None}}
