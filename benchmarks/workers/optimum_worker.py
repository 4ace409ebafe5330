"""optimum with ONNX Runtime: a Stable Diffusion pipeline without a person, which it has no way to take."""

import numpy as np
from diffusers_worker import make_scheduler
from protocol import work


def load(job):
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    pipe = ORTStableDiffusionPipeline.from_pretrained(job["model"], session_options=options, provider="CPUExecutionProvider", local_files_only=True)
    pipe.scheduler = make_scheduler(pipe.scheduler.config, job["solver"])
    pipe.set_progress_bar_config(disable=True)

    def generate(steps, clock):
        noise = np.load(job["noise"]).repeat(job["batch"], 0)
        tick = lambda pipe, step, timestep, values: (clock.tick(), values)[1]
        pictures = pipe(job["prompt"], height=job["size"], width=job["size"], num_inference_steps=steps, latents=torch.from_numpy(noise),
                        num_images_per_prompt=job["batch"], guidance_scale=job["guidance_scale"], callback_on_step_end=tick, output_type="np").images
        return (pictures * 255).round().astype(np.uint8)

    return generate, {"version": f"onnxruntime {onnxruntime.__version__}"}


work(load)
