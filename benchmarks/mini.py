"""What benchmarks/run.py measures of the shipped `mini`: enrolment, a cold start to the first picture, and the loop's own time."""

import os
import statistics
import tempfile
from unittest import mock

import numpy as np

from . import rivals as table

REPEATS = 5


def host_overhead() -> float:
    """Seconds of a step of `mini` that are not the engine's (bindings, guidance, solver): of a picture whose UNet does nothing."""
    from pidiff.runtime import Pipeline

    pipeline = Pipeline.from_bundle()
    person = pipeline.enroll(table.ROOT / "examples" / "person-1.jpg")
    pipeline.generate(person, "a photo of a person", seed=7)
    pipeline._graph("unet").run = lambda: None
    results = [pipeline.generate(person, "a photo of a person", seed=7) for _ in range(REPEATS)]
    return statistics.median(r.seconds["denoise"] / r.num_inference_steps for r in results)


def measure_mini(bench) -> dict:
    """Medians in seconds; cold starts are whole processes, with hashing of the bundle. One of them has nothing in its cache, which it fills."""
    from pidiff.model import shipped_mini

    way = table.Way("pidiff mini", "pidiff_worker", job={"model": str(shipped_mini()), "engine": "auto", "precision": "auto", "native": True,
                                                           "photo": str(table.ROOT / "examples" / "person-1.jpg"), "seed": 7, "preset": "exact"})
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, PIDIFF_CACHE=empty):
        first_ever = bench.draw(way, [20], guidance_scale=3.0)["first_s"]
    runs = [bench.draw(way, [20], guidance_scale=3.0) for _ in range(REPEATS)]
    median = lambda key: statistics.median(r[key] for r in runs)
    return {"cold_start_to_first_picture_s": median("first_s"), "cold_start_empty_cache_s": first_ever, "enroll_cold_s": median("enroll_cold_s"), "enroll_warm_s": median("enroll_warm_s"),
            "picture_s": statistics.median(r["rows"][0]["seconds"] for r in runs), "peak_bytes": int(np.median([r["peak_bytes"] for r in runs])),
            "host_overhead_s": host_overhead()}
