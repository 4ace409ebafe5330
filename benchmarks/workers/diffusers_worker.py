"""diffusers, eager or compiled, with an IP-Adapter: the usual way in Python."""

import numpy as np
from protocol import work

TOKENS, EMBED = 4, 1024                                 # of IP-Adapter for Stable Diffusion 1.5


def ip_adapter(unet):
    """Random weights in the layout of ip-adapter_sd15.safetensors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
    text = unet.config.cross_attention_dim
    layers, number = {}, 1
    for name, processor in unet.attn_processors.items():
        if not name.endswith("attn1.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            layers |= {f"{number}.to_k_ip.weight": draw(width, text), f"{number}.to_v_ip.weight": draw(width, text)}
            number += 2
    projection = {"proj.weight": draw(TOKENS * text, EMBED), "proj.bias": torch.zeros(TOKENS * text),
                  "norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
    return {"image_proj": projection, "ip_adapter": layers}


def make_scheduler(config, solver):
    """diffusers' scheduler for a solver as PIDiff names it; what the model's file does not say is the class's own default."""
    import diffusers

    name, extra = {"ddim": ("DDIMScheduler", {}), "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2})}[solver]
    return getattr(diffusers, name).from_config(config, **extra)


def make_pipeline(job, dtype):
    """StableDiffusionPipeline, and the arguments of a call that give it a person."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    pipe = StableDiffusionPipeline.from_pretrained(job["model"], torch_dtype=dtype, local_files_only=True, safety_checker=None,
                                                   requires_safety_checker=False)
    pipe.scheduler = make_scheduler(pipe.scheduler.config, job["solver"])
    pipe.set_progress_bar_config(disable=True)
    extra = {}
    if job["identity"]:
        pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(1.0)
        person = torch.randn(1, 1, EMBED, generator=torch.Generator().manual_seed(1)).to(dtype)
        extra["ip_adapter_image_embeds"] = [torch.cat([torch.zeros_like(person), person])]
    return pipe, extra


def caller(pipe, extra, job, dtype):
    import torch

    def generate(steps, clock):
        noise = torch.from_numpy(np.load(job["noise"])).to(dtype).expand(job["batch"], -1, -1, -1)
        tick = lambda pipe, step, timestep, values: (clock.tick(), values)[1]
        with torch.inference_mode():
            pictures = pipe(job["prompt"], height=job["size"], width=job["size"], num_inference_steps=steps, latents=noise,
                            num_images_per_prompt=job["batch"], guidance_scale=job["guidance_scale"], callback_on_step_end=tick,
                            output_type="np", **extra).images
        return (pictures * 255).round().astype(np.uint8)

    return generate


def load(job):
    import diffusers
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    pipe, extra = make_pipeline(job, dtype)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    if job["compiled"]:
        pipe.unet, pipe.vae.decode = torch.compile(pipe.unet), torch.compile(pipe.vae.decode)
    return caller(pipe, extra, job, dtype), {"version": f"diffusers {diffusers.__version__}, torch {torch.__version__}"}


if __name__ == "__main__":
    work(load)
