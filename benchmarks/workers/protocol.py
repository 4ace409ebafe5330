"""What the workers share. Each measures one way to draw pictures, in a process and an environment of its own.

    PYTHON WORKER.py JOB.json

A worker knows the standard library, NumPy and its own rival, nothing of PIDiff (but PIDiff's own worker). It makes
`generate(pictures)` once and then draws the pictures of the job; the result goes to JOB's `out` as JSON, and the first picture
as an array beside it where the job names a file for it.

    job: model, size (pixels), solver (ddim, dpmpp_2m), steps (of each picture to draw, in order), batch, threads, guidance_scale, prompt, noise (.npy,
    [1, 4, h, w]), identity (bool), precision, begun (time.time() of the start of the process), out, keep, and what the rival needs
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np


class Clock:
    """Times of one picture: `tick()` after every step."""

    def __init__(self):
        self.started, self.ticks = time.perf_counter(), []

    def tick(self, *_):
        self.ticks.append(time.perf_counter())

    def row(self, steps):
        """Seconds of the whole picture, and of each step but the first, which includes what comes before it."""
        whole, each = time.perf_counter() - self.started, np.diff(self.ticks)
        return {"steps": steps, "seconds": whole, "step_s": each.tolist(),
                "rest_s": whole - (self.ticks[-1] - self.ticks[0] + float(np.median(each))) if len(each) else None}


def peak_bytes():
    """Peak resident memory of this process (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))


def work(load):
    """Run a worker: load(job) -> generate(steps, clock) -> uint8 pictures [B, H, W, 3]; load may return more facts too."""
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])
    os.environ["HF_HUB_OFFLINE"] = "1"
    result = {"rows": []}
    try:
        generate, facts = load(job)
        result.update(facts, load_s=time.time() - job["begun"])
        for number, steps in enumerate(job["steps"]):
            clock = Clock()
            pictures = np.asarray(generate(steps, clock))
            result["rows"].append(clock.row(steps))
            if number == 0:
                result["first_s"] = time.time() - job["begun"]
                if job.get("keep"):
                    np.save(job["keep"], pictures)
            result["shape"] = list(pictures.shape)
    except BaseException as error:                      # the parent tells, and goes on with others
        result["error"] = f"{type(error).__name__}: {error}"[:400]
        traceback.print_exc()
    result["peak_bytes"] = peak_bytes()
    Path(job["out"]).write_text(json.dumps(result))
    os._exit(1 if "error" in result else 0)             # some rivals crash while they are taken down
