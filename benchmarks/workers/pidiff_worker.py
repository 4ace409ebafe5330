"""PIDiff itself: a bundle through `pidiff.runtime`."""

import re
import time

from protocol import work


def least_memory(open_with, job):
    """About the smallest `max_memory` that is not refused for the job's picture: what the refusal of too little names, and room for a person."""
    from pidiff.runtime import PidiffError

    try:
        open_with(1 << 20).generate(None, job["prompt"], num_inference_steps=1, height=job["size"], width=job["size"])
    except PidiffError as e:
        return int(re.search(r"at least (\d+) MiB", str(e))[1]) + 16 << 20


def load(job):
    from importlib.metadata import version

    from pidiff.runtime import Pipeline

    def open_with(max_memory):
        return Pipeline.from_bundle(job["model"], engine=job["engine"], threads=job["threads"], precision=job["precision"],
                                    keep=job.get("keep_graphs"), max_memory=max_memory)

    pipeline = open_with(least_memory(open_with, job) if job.get("least_memory") else None)
    facts = {"version": f"pidiff {version('pidiff-edge')}", "engine": job["engine"]}
    people = []
    if job["identity"]:
        begun = time.perf_counter()
        people = [pipeline.enroll(job["photo"])] * job.get("people", 1)
        facts["enroll_cold_s"] = time.perf_counter() - begun
        begun = time.perf_counter()
        pipeline.enroll(job["photo"])
        facts["enroll_warm_s"] = time.perf_counter() - begun
    regions = None if len(people) < 2 else [(i / len(people), 0, (i + 1) / len(people), 1) for i in range(len(people))]
    options = {} if job.get("native") else {"height": job["size"], "width": job["size"], "scheduler": job["solver"]}

    def generate(steps, clock):
        chosen = {"preset": job["preset"]} if job.get("preset", "exact") != "exact" else {"num_inference_steps": steps}
        result = pipeline.generate(people or None, job["prompt"], seed=job["seed"], num_images=job["batch"], batch_size=job["batch"],
                                   guidance_scale=job["guidance_scale"], id_mask=regions, callback=clock.tick, **options, **chosen)
        facts["engine"], facts["stages"] = result.engine, dict(result.seconds)
        return result.images

    return generate, facts


work(load)
