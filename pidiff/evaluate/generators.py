"""One face for what makes pictures: a bundle on any engine, or a checkpoint in PyTorch. Same seeds, same noise, same sampling.

`settings` of either: solver, num_inference_steps and guidance_scale of the pictures; of a bundle once there is one.
"""

from pathlib import Path

import numpy as np

from pidiff.runtime import Pipeline
from pidiff.runtime.manifest import Manifest

HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))          # boxes x0, y0, x1, y1
LEVELS = ("coarse", "middle", "fine", "finest")


class BundleGenerator:
    def __init__(self, folder: Path | None, engine: str, steps: int | None, guidance_scale: float | None,
                 require_signature: Path | None = None, preset: str = "exact"):
        self.pipeline = Pipeline.from_bundle(folder, engine=engine, require_signature=require_signature)
        self.name = f"bundle {self.pipeline.bundle.manifest.precision} on {self.pipeline.engine}" + (f", {preset}" if preset != "exact" else "")
        self.levels = LEVELS if self.pipeline.bundle.manifest.model.identity.num_groups == len(LEVELS) else ()
        self._options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "preset": preset}
        self.settings = {}

    def enroll(self, photo: np.ndarray):
        return self.pipeline.enroll(photo, select="largest")

    def edit(self, person, name: str, strength: float):
        return self.pipeline.edit(person, **{name: strength})

    def mix(self, person, other, level: str):
        """`person` with one level group of `other`."""
        return self.pipeline.mix(person, other, level)

    def generate(self, person, prompt: str, seed: int, id_scale: float = 1.0, id_start: float = 0.0):
        """(RGB uint8 [H, W, 3], identity map [h, w] or None)."""
        result = self.pipeline.generate(person, prompt, seed=seed, id_scale=id_scale, id_start=id_start, **self._options)
        self.settings = {"solver": result.scheduler, "num_inference_steps": result.num_inference_steps, "guidance_scale": result.guidance_scale}
        return result.images[0], None if result.identity_map is None else result.identity_map[0, 0]

    def generate_two(self, left, right, prompt: str, seed: int) -> np.ndarray:
        """RGB uint8 [H, W, 3] with one person for each half of the picture."""
        return self.pipeline.generate([left, right], prompt, seed=seed, id_mask=[HALVES[0], HALVES[1]], **self._options).images[0]


class CheckpointGenerator:
    """PyTorch, float32. Faces are found, aligned and freed of background as the runtime does it. What is None of the sampling is what the
    folder's manifest names, where it is a bundle too, else the runtime's."""

    def __init__(self, folder: Path, steps: int | None, guidance_scale: float | None, reader_of):
        from ..model import load_model
        self.model = load_model(folder)
        self.name = "checkpoint fp32 on PyTorch"
        self.levels = LEVELS if len(self.model.adapter.config.groups) == len(LEVELS) else ()
        manifest = Path(folder) / "manifest.json"
        named = Manifest.from_json(manifest.read_bytes()).scheduler if manifest.is_file() else {}
        given = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        self.settings = {"solver": "dpmpp_2m", "num_inference_steps": 20, "guidance_scale": 3.0} | named | {k: v for k, v in given.items() if v is not None}
        self._reader = reader_of(self.model.w_plus_encoder.config.input_size)

    def enroll(self, photo: np.ndarray):
        import torch

        from ..train.common import to_tensor
        with torch.no_grad():
            return self.model.w_plus_encoder(to_tensor(self._reader.read(photo, "largest")[None]))[0]

    def edit(self, person, name: str, strength: float):
        return person + strength * self.model.directions[name]

    def mix(self, person, other, level: str):
        groups, i = self.model.adapter.config.groups, LEVELS.index(level)
        rows, mixed = slice(sum(groups[:i]), sum(groups[:i + 1])), person.clone()
        mixed[rows] = other[rows]
        return mixed

    def generate(self, person, prompt: str, seed: int, id_scale: float = 1.0, id_start: float = 0.0):
        w_plus = None if person is None else person[None]
        return self._sample(w_plus, prompt, seed, id_scale=id_scale, id_start=id_start)

    def generate_two(self, left, right, prompt: str, seed: int) -> np.ndarray:
        import torch
        size = self.model.unet.config.sample_size
        masks = torch.zeros(2, size, size)
        masks[0, :, :size // 2] = masks[1, :, size // 2:] = 1
        return self._sample(torch.stack([left, right])[None], prompt, seed, id_mask=masks)[0]

    def _sample(self, w_plus, prompt: str, seed: int, **options):
        import torch

        from pidiff import _C

        from ..sampling import sample_latents
        from ..train.common import to_images
        size = self.model.unet.config.sample_size
        noise = torch.from_numpy(_C.randn([seed], (self.model.unet.config.in_channels, size, size)))
        latents, identity_map = sample_latents(self.model, w_plus, prompt, latents=noise, **self.settings, **options)
        with torch.no_grad():
            image = to_images(self.model.decode_latents(latents))[0]
        return image, None if identity_map is None else identity_map[0, 0].numpy()
