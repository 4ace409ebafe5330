"""diffusers with an IP-Adapter, its UNet and VAE decoder converted to OpenVINO by hand: what a determined user glues together.

    PYTHON glued_worker.py JOB.json            with "prepare": true in the job: convert, and stop
"""

from pathlib import Path

import numpy as np
from diffusers_worker import EMBED, caller, make_pipeline
from protocol import work


def convert(pipe, folder, job):
    """Write unet.xml and vae_decoder.xml with OpenVINO's converter, weights in float16 as it does by default."""
    import openvino
    import torch

    class Unet(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, text, person):
            return self.unet(sample, timestep, text, added_cond_kwargs={"image_embeds": [person]}, return_dict=False)[0]

    class Decoder(torch.nn.Module):
        def __init__(self, vae):
            super().__init__()
            self.vae = vae

        def forward(self, latents):
            return self.vae.decode(latents, return_dict=False)[0]

    side, text = job["size"] // 8, pipe.unet.config.cross_attention_dim
    example = (torch.randn(2, 4, side, side), torch.tensor(1.0), torch.randn(2, 77, text), torch.randn(2, 1, EMBED))
    with torch.no_grad():
        openvino.save_model(openvino.convert_model(Unet(pipe.unet).eval(), example_input=example, input=[tuple(e.shape) for e in example]), folder / "unet.xml")
        latents = torch.randn(1, 4, side, side)
        openvino.save_model(openvino.convert_model(Decoder(pipe.vae).eval(), example_input=latents, input=[tuple(latents.shape)]), folder / "vae_decoder.xml")


def load(job):
    import openvino
    import torch

    pipe, extra = make_pipeline(job, torch.float32)
    folder = Path(job["converted"])
    if job.get("prepare"):
        folder.mkdir(parents=True, exist_ok=True)
        convert(pipe, folder, job)
        return None, {}
    core = openvino.Core()
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job["threads"], "CACHE_DIR": str(folder / "cache")}
    unet, decoder = (core.compile_model(folder / f"{name}.xml", "CPU", config) for name in ("unet", "vae_decoder"))
    # Zeros make tokens, hence values, of zeros: nobody.
    person = extra["ip_adapter_image_embeds"][0].numpy() if job["identity"] else np.zeros((2, 1, EMBED), np.float32)
    run = lambda model, *inputs: torch.from_numpy(model(inputs)[0])
    pipe.unet.forward = lambda sample, timestep, encoder_hidden_states, **_: (
        run(unet, sample.numpy(), timestep.float().numpy(), encoder_hidden_states.numpy(), person),)
    pipe.vae.decode = lambda latents, **_: (run(decoder, latents.numpy()),)
    return caller(pipe, extra, job, torch.float32), {"version": f"openvino {openvino.__version__}, torch {torch.__version__}"}


work(load)
