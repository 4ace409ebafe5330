"""stable-diffusion.cpp by its Python package, in float16 with its flash attention, without a person."""

import numpy as np
from protocol import work


def load(job):
    import stable_diffusion_cpp
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(model_path=job["model"], n_threads=job["threads"], diffusion_flash_attn=True, vae_decode_only=True, verbose=False)

    def generate(steps, clock):
        tick = lambda step, total, seconds: clock.tick() if total == steps and step > 0 else None
        pictures = model.generate_image(job["prompt"], width=job["size"], height=job["size"], cfg_scale=job["guidance_scale"], sample_method="dpm++2m",
                                        sample_steps=steps, seed=7, batch_count=job["batch"], progress_callback=tick)
        return np.stack([np.asarray(p.convert("RGB")) for p in pictures])

    return generate, {"version": f"stable-diffusion-cpp-python {stable_diffusion_cpp.__version__}"}


work(load)
