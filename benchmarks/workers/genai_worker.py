"""OpenVINO GenAI: a Stable Diffusion pipeline without a person, which it has no way to take; with DDIM, as it has no DPM++."""

import numpy as np
from protocol import work


def load(job):
    import openvino
    import openvino_genai as genai

    class Noise(genai.Generator):
        """Gives the job's noise instead of random numbers."""

        def __init__(self):
            super().__init__()

        def randn_tensor(self, shape):
            return openvino.Tensor(np.load(job["noise"]).reshape(shape).astype(np.float32))

        def next(self):
            return 0.0

    pipe = genai.Text2ImagePipeline(job["model"])
    pipe.set_scheduler(genai.Scheduler.from_config(job["model"] + "/scheduler/scheduler_config.json", genai.Scheduler.Type.DDIM))
    pipe.reshape(job["batch"], job["size"], job["size"], job["guidance_scale"])
    pipe.compile("CPU", INFERENCE_NUM_THREADS=job["threads"], PERFORMANCE_HINT="LATENCY", CACHE_DIR=job["model"] + "/cache")

    def generate(steps, clock):
        tick = lambda step, total, latent: (clock.tick(), False)[1]
        return pipe.generate(job["prompt"], num_inference_steps=steps, guidance_scale=job["guidance_scale"], height=job["size"], width=job["size"],
                             num_images_per_prompt=job["batch"], generator=Noise(), callback=tick).data

    return generate, {"version": f"openvino_genai {genai.__version__}"}


work(load)
