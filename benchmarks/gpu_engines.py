"""Engines on the GPU that is here: does a bundle's picture come out as ONNX Runtime draws it on the processor, and where does
the time of a step go?

    python benchmarks/gpu_engines.py BUNDLE [--engine tensorrt-rtx|tensorrt|onnxruntime] [--steps 20] [--photo FILE]

Prints one JSON object: the difference of the pictures in grey levels, and medians per step in milliseconds: `step` from
one step's start to the next's, `wait` for the GPU, and `processor` the rest of it where the loop stays on the GPU; else `engine`
the engine class's own work (launching, copying, looking for NaN), `loop` guidance, solver and the rest. Exit status 1 if the picture is another one. Called by gpu_check.sh.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "person-1.jpg"
PROMPT = "a photo of a smiling person, blue background"
MOST = 2.0      # mean grey levels between two pictures of one seed; other people, prompts or seeds are further apart than 10


class Clock:
    """Times every step of a UNet's engine, and how long of it was spent waiting for the GPU.

    Where the step loop stays on the GPU (runtime/device_loop.py) it is the loop that waits, for the step before the last.
    """

    def __init__(self, engine):
        self.begins, self.runs, self.waits = [], [], []
        self._resident = getattr(engine, "loop", None) is not None
        if self._resident:
            for event in engine.loop.events:
                event.wait = partial(self._begin_after, event.wait)
            return
        engine.run = partial(self._begin, engine.run)
        if stream := getattr(engine, "_stream", None):
            stream.synchronize = partial(self._add, self.waits, stream.synchronize)

    def _begin(self, work):
        self.begins.append(1e3 * time.perf_counter())
        self._add(self.runs, work)

    def _begin_after(self, wait):
        self._add(self.waits, wait)
        self.begins.append(1e3 * time.perf_counter())

    def _add(self, times, work):
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin))

    def medians(self):
        """Of all steps but the first two and the last."""
        steps, waits = np.diff(self.begins)[2:], np.array(self.waits[-len(self.begins):])
        if self._resident:      # a step's wait comes before its begin
            known = {"wait": median(waits[3:]), "processor": median(steps - waits[3:])}
        else:
            run, wait = median(self.runs[2:-1]), median(waits[2:-1]) if self.waits else None
            known = {"run": run, **({} if wait is None else {"wait": wait, "engine": run - wait}), "loop": median(steps) - run}
        return {k: round(float(v), 4) for k, v in {"step": median(steps), **known}.items()}


def captured(engine):
    """Whether steps are launched as one CUDA graph."""
    loop = getattr(engine, "loop", None)
    return getattr(engine, "captured", False) or bool(loop and any(graph for _, graph in loop.graphs.values()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare and time the engines of a bundle on the GPU that is here.")
    parser.add_argument("bundle")
    parser.add_argument("--engine", default="tensorrt-rtx")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--photo", default=str(PHOTO))
    args = parser.parse_args(argv)
    from pidiff.runtime import PidiffError

    try:
        return compare(args)
    except PidiffError as e:
        print(e, file=sys.stderr)
        return 1


def compare(args: argparse.Namespace) -> int:
    """Draw with both engines, print what was seen; returns the exit status."""
    from pidiff.runtime import Pipeline

    host = Pipeline.from_bundle(args.bundle, engine="onnxruntime")
    device = "cuda" if args.engine == "onnxruntime" else "cpu"
    pipe = Pipeline.from_bundle(args.bundle, engine=args.engine, device=device)
    person = host.enroll(args.photo, "largest")
    options = {"seed": 7, "num_inference_steps": args.steps}
    expected = np.array(host.generate(person, PROMPT, **options).images, float)
    begin = time.perf_counter()
    got = np.array(pipe.generate(person, PROMPT, **options).images, float)
    first = time.perf_counter() - begin
    clock = Clock(pipe._graph("unet"))
    again = pipe.generate(person, PROMPT, **options)
    error = np.abs(got - expected)
    print(json.dumps({
        "engine": pipe.engine, "device": pipe.device, "bundle": pipe.bundle.manifest.name, "precision": pipe.bundle.manifest.precision,
        "captured": captured(pipe._graph("unet")), "mean_difference": round(error.mean(), 3),
        "max_difference": error.max(), "same_again": bool(np.array_equal(got, again.images)), "milliseconds": clock.medians(),
        "first_picture_seconds": round(first, 3), "next_picture_seconds": round(again.seconds["total"], 3)}))
    if not error.mean() <= MOST:
        print(f"the picture must be ONNX Runtime's within {MOST} grey levels, got {error.mean():.1f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
