"""What a generation returns."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import write_all
from .images import encode_png, heat_map


@dataclass(frozen=True, eq=False)
class Result:
    """Pictures and how they were made.

    images: list of RGB uint8 [H,W,3]. identity_map: float32 [B,P,h,w] in [0,1], where each person's identity was read
    (mean over layers and steps), None without a person or in `residual` mode. seeds: one per image. seconds: stage ->
    wall time. engine, device, scheduler, num_inference_steps, guidance_scale: what was used.
    """

    images: list
    identity_map: np.ndarray | None
    seeds: list
    seconds: dict
    engine: str
    device: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float

    def save(self, path, map_path=None):
        """Write PNG files, all or none, and return their paths: PATH for one image, PATH-1, PATH-2, ... for several.

        map_path: also write the identity maps, all people together, as heat maps over the images, numbered alike.
        """
        files = dict(zip(numbered(path, len(self.images)), map(encode_png, self.images)))
        if map_path is not None and self.identity_map is not None:
            maps = [heat_map(image, weights.max(axis=0)) for image, weights in zip(self.images, self.identity_map)]
            files.update(zip(numbered(map_path, len(maps)), map(encode_png, maps)))
        write_all(files)
        return list(files)


def numbered(path, count):
    """Return the file names for `count` pictures: the path itself, or NAME-1.EXT, NAME-2.EXT, ..."""
    path = Path(path)
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]
