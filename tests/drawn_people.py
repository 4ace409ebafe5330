"""A tiny training folder in the layout of `pidiff-data synth`, with drawn people instead of generated ones."""

import csv
import io
import tarfile

import cv2
import numpy as np

SIZE, PEOPLE, VARIANTS = 64, 20, 3


def draw(rng):
    """A coloured ellipse left of the middle on a textured wall: image uint8 [S, S, 3], mask uint8 [S, S]."""
    image = cv2.resize(rng.integers(0, 255, (8, 8, 3), np.uint8), (SIZE, SIZE))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    cv2.ellipse(mask, (SIZE // 2 - 6, SIZE // 2), (14, 22), 0, 0, 360, 255, -1)
    image[mask > 0] = rng.integers(0, 255, 3)
    return image, mask


def write_people(folder):
    rng = np.random.default_rng(0)
    mean = rng.normal(0, 0.2, (1, 512))
    directions = {d: v / np.linalg.norm(v) for d, v in zip(("pose", "smile", "age"), rng.normal(0, 1, (3, 512)))}
    w = mean + rng.normal(0, 0.3, (PEOPLE, 512))
    np.savez(folder / "latents.npz", w=w, mean=mean, **{f"dir_{k}": v for k, v in directions.items()})
    rows = [{"file": f"{i:04d}_{v}.jpg", "identity": i, "variant": v, "psi": 0.7, "pose": [0.0, 3.0, -3.0][v],
             "smile": [0.0, 2.0, -2.0][v], "age": 0.0} for i in range(PEOPLE) for v in range(VARIANTS)]
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with tarfile.open(folder / "faces-00.tar", "w") as tar:
        for row in rows:
            image, mask = draw(rng)
            for name, picture, kind in ((row["file"], image, ".jpg"), (row["file"].replace(".jpg", ".mask.png"), mask, ".png")):
                data = cv2.imencode(kind, picture)[1].tobytes()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder
