"""Synthetic people from the PyPI package `random-face` (MobileStyleGAN distilled from StyleGAN2-FFHQ).

The package's OpenVINO IR files are read directly; its own code, made for an older OpenVINO, is not imported. Licence:
package Apache-2.0, weights descend from FFHQ and NVIDIA's StyleGAN2, so pictures and what is trained on them are for
non-commercial research.
"""

import csv
import importlib.metadata
import io
import os
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from ..matting import FaceMatting
from .ir import IrNetwork
from .people import DIRECTIONS

COLUMNS = ("file", "identity", "variant", "psi", "pose", "smile", "age")
PER_TAR = 1000
MIDDLE = "LeakyRelu_442"                # last layer at 64 x 64 of the synthesis network


def network_files() -> dict[str, Path]:
    """name -> path of the IR files of `random-face`."""
    try:
        files = importlib.metadata.files("random-face")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError("random-face must be installed for synthetic people, got none; run `pip install --no-deps random-face`") from error
    return {Path(str(f)).name: f.locate() for f in files if Path(str(f)).suffix in (".xml", ".bin")}


class Generator:
    """z [512] -> w [512] -> image uint8 [1024, 1024, 3] RGB. One at a time, on the CPU, by OpenVINO."""

    batch = 1

    def __init__(self):
        data = network_files()
        try:
            sys.modules.setdefault("openvino_telemetry", None)      # importing openvino would report that to a web service
            import openvino
        except ImportError as error:
            raise ValueError("openvino must be installed for synthetic people, got none; run `pip install 'pidiff-edge[openvino]'`") from error
        core = openvino.Core()
        config = {"INFERENCE_PRECISION_HINT": "f32"}
        mapping = core.read_model(data["MappingNetwork.xml"])
        mapping.reshape([-1, 512])
        self._mapping = core.compile_model(mapping, "CPU", config)
        network = core.read_model(data["SynthesisNetwork.xml"])
        self._synthesis = core.compile_model(network, "CPU", config)
        middle = [op for op in network.get_ordered_ops() if op.get_friendly_name() == MIDDLE]
        if not middle:
            raise ValueError(f"random-face's synthesis network must have a layer {MIDDLE}, got a version without it")
        half = openvino.Model([middle[0].output(0)], network.get_parameters(), "half")
        self._features = core.compile_model(half, "CPU", config)

    def w(self, z: np.ndarray) -> np.ndarray:
        """[N, 512] standard normal -> [N, 512]."""
        return next(iter(self._mapping(z.astype(np.float32)).values())).reshape(-1, 512)

    def image(self, w: np.ndarray) -> np.ndarray:
        rgb = next(iter(self._synthesis(w.reshape(1, 512).astype(np.float32)).values()))[0]
        return (np.clip(rgb.transpose(1, 2, 0) * 0.5 + 0.5, 0, 1) * 255 + 0.5).astype(np.uint8)

    def features(self, w: np.ndarray) -> torch.Tensor:
        """[N, 512] -> what the network has computed at 64 x 64, float32 [N, 512, 64, 64]; a seventh of the work of `image`."""
        return torch.from_numpy(np.concatenate([next(iter(self._features(row[None].astype(np.float32)).values())) for row in w]))


class BatchGenerator:
    """The mapping network and the first part of the synthesis network of `Generator`, in batches on a GPU."""

    batch = 64

    def __init__(self, device: str):
        data, self.device = network_files(), device
        self._mapping = IrNetwork(data["MappingNetwork.xml"]).to(device)
        self._features = IrNetwork(data["SynthesisNetwork.xml"], MIDDLE).to(device)

    @torch.no_grad()
    def w(self, z: np.ndarray) -> np.ndarray:
        """[N, 512] standard normal -> [N, 512]."""
        return self._mapping(torch.from_numpy(z.astype(np.float32)).to(self.device)).cpu().numpy()

    @torch.no_grad()
    def features(self, w: np.ndarray) -> torch.Tensor:
        """As `Generator.features`, on the device."""
        return self._features(torch.from_numpy(w.astype(np.float32)).to(self.device))


def rows_for(people: int, variants: int, rng: np.random.Generator) -> list[dict]:
    """Manifest: variant 0 is the person as drawn, the others change pose, smile and age by known amounts."""
    rows = []
    for identity in range(people):
        psi = round(float(rng.uniform(0.55, 0.85)), 4)
        for variant in range(variants):
            moves = rng.normal(0, (2.0, 1.2, 0.7)) if variant else np.zeros(3)
            rows.append({"file": f"{identity:04d}_{variant}.jpg", "identity": identity, "variant": variant, "psi": psi,
                         **{d: round(float(m), 3) for d, m in zip(DIRECTIONS, moves)}})
    return rows


@torch.no_grad()
def mask_of(matting: FaceMatting, image: np.ndarray) -> np.ndarray:
    """Foreground mask uint8 [128, 128] of an aligned face."""
    face = cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA)
    alpha = matting(torch.from_numpy(face).permute(2, 0, 1)[None].float() / 127.5 - 1)[0, 0]
    return (alpha.numpy() * 255 + 0.5).astype(np.uint8)


def synthesise(out: Path, people: int, variants: int, size: int, seed: int, matting: FaceMatting,
               directions: dict[str, np.ndarray]) -> None:
    """Write people in the layout of `people.py`. Goes on where an earlier run with the same arguments stopped."""
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    generator = Generator()
    w = generator.w(rng.standard_normal((people, 512)))
    mean = generator.w(rng.standard_normal((10_000, 512))).mean(0, keepdims=True)
    rows = rows_for(people, variants, rng)
    units = {d: directions[d] / np.linalg.norm(directions[d]) for d in DIRECTIONS}
    bar = tqdm(total=len(rows), unit="picture", disable=None)
    for number, start in enumerate(range(0, len(rows), PER_TAR)):
        path, part = out / f"faces-{number:02d}.tar", rows[start:start + PER_TAR]
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            with tarfile.open(temporary, "w") as tar:
                for row in part:
                    code = mean[0] + row["psi"] * (w[row["identity"]] - mean[0]) + sum(row[d] * units[d] for d in DIRECTIONS)
                    image = cv2.resize(generator.image(code), (size, size), interpolation=cv2.INTER_AREA)
                    add_file(tar, row["file"], cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1])
                    add_file(tar, row["file"].replace(".jpg", ".mask.png"), cv2.imencode(".png", mask_of(matting, image))[1])
                    bar.update()
            os.replace(temporary, path)
        else:
            bar.update(len(part))
    write_latents(out, w, mean, units)
    write_manifest(out, rows)


def write_latents(out: Path, w: np.ndarray, mean: np.ndarray, units: dict[str, np.ndarray]) -> None:
    np.savez(out / "latents.npz", w=w, mean=mean, **{f"dir_{d}": v for d, v in units.items()})


def write_manifest(out: Path, rows: list[dict]) -> None:
    """manifest.csv, last: every picture that it names is there."""
    temporary = out / "manifest.tmp"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, out / "manifest.csv")


def add_file(tar: tarfile.TarFile, name: str, data: np.ndarray) -> None:
    info = tarfile.TarInfo(name)
    info.size = data.nbytes
    tar.addfile(info, io.BytesIO(data.tobytes()))
