"""People on disk: pictures, masks, exact W codes.

Layout (what `pidiff-data synth` writes): `faces-*.tar` with `IIII_V.jpg` (person IIII, variant V) and
`IIII_V.mask.png`; `manifest.csv` (file, identity, variant, psi, pose, smile, age); `latents.npz` with `w` [N, 512],
`mean` [1, 512] and unit vectors `dir_pose`, `dir_smile`, `dir_age`. The code of a picture is
`mean + psi (w - mean) + pose dir_pose + smile dir_smile + age dir_age`, shared by all W+ levels.
Split by person: identity % 10 == 9 is test, == 8 is validation.
"""

import csv
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from .factors import Factors, apply_style, clean_mask, composite, paint_background, COLOUR_STYLES, COLOURS, SCENES, STYLES

DIRECTIONS = ("pose", "smile", "age")
SMILING, SERIOUS = 0.35, -0.6          # thresholds on the smile score (w - mean) . dir_smile
TURNED, STRAIGHT = 1.2, 0.7            # thresholds on |pose score|; positive looks to the picture's left
SPLITS = {"train": range(8), "validation": (8,), "test": (9,)}


@dataclass(frozen=True)
class People:
    """Pictures of known people: images uint8 [N, S, S, 3] RGB, masks uint8 [N, S, S], w [N, 512], identity [N].

    Photos of real people have no exact codes (w, mean, directions: None, None, {}), but captions (or None) and faces
    [N, 256, 256, 3] as the encoder reads them.
    """

    images: np.ndarray
    masks: np.ndarray
    identity: np.ndarray
    files: list[str]
    w: np.ndarray | None = None
    mean: np.ndarray | None = None
    directions: dict[str, np.ndarray] = field(default_factory=dict)
    captions: list[str | None] | None = None
    faces: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def variants(self) -> dict[int, np.ndarray]:
        """identity -> indices of its pictures."""
        order = np.argsort(self.identity, kind="stable")
        names, starts = np.unique(self.identity[order], return_index=True)
        return dict(zip(names.tolist(), np.split(order, starts[1:])))

    def factors(self, index: int) -> Factors:
        """Expression and pose of a picture, read off its exact code; nothing without one."""
        if self.w is None:
            return Factors(text=self.captions[index])
        smile, pose = ((self.w[index] - self.mean) @ self.directions[d] for d in ("smile", "pose"))
        expression = "smiling" if smile > SMILING else "serious" if smile < SERIOUS else None
        direction = "straight ahead" if abs(pose) < STRAIGHT else None
        if abs(pose) > TURNED:
            direction = "left" if pose > 0 else "right"
        return Factors(expression=expression, pose=direction)


def load_people(folders: Path | list[Path], size: int, split: str | None = "train", limit: int | None = None) -> People:
    """Read one split at `size` pixels, of one folder or of several with different people and the same generator;
    `limit` keeps the first so many pictures of each."""
    photos = [(f / "photos.json").is_file() for f in map(Path, folders if isinstance(folders, list) else [folders])]
    if any(photos):
        if not all(photos):
            raise ValueError("data must be synthetic people or photos, got folders of both kinds")
        from .photos import load_photos
        return People(**load_photos([Path(f) for f in np.atleast_1d(folders)], size, split and SPLITS[split], limit))
    if not isinstance(folders, list):
        return _load_folder(Path(folders), size, split, limit)
    parts, first = [], 0
    for folder in folders:
        part = _load_folder(Path(folder), size, split, limit)
        if parts and not np.allclose(part.mean, parts[0].mean, atol=1e-3):
            raise ValueError(f"data must be folders with the same mean code, got another one in {folder}")
        parts.append(replace(part, identity=part.identity + first))
        first = 10 * (parts[-1].identity.max(initial=first) // 10 + 1)         # the last digit says the split
    joined = {f: np.concatenate([getattr(p, f) for p in parts]) for f in ("images", "masks", "w", "identity")}
    return replace(parts[0], **joined, files=[f for p in parts for f in p.files])


def _load_folder(folder: Path, size: int, split: str | None, limit: int | None) -> People:
    if not (folder / "manifest.csv").is_file():
        raise ValueError(f"data must be a folder with manifest.csv or photos.json (see pidiff-data), got {folder}")
    rows = list(csv.DictReader((folder / "manifest.csv").open()))
    if split is not None:
        rows = [r for r in rows if int(r["identity"]) % 10 in SPLITS[split]]
    rows = rows[:limit]
    latents = dict(np.load(folder / "latents.npz"))             # read once: an NpzFile reads an array at each access
    directions = {d: latents[f"dir_{d}"].astype(np.float32) for d in DIRECTIONS}
    mean = latents["mean"].reshape(-1).astype(np.float32)
    w = np.array([_code(row, latents["w"], mean, directions) for row in rows], np.float32).reshape(-1, mean.size)
    images = np.zeros((len(rows), size, size, 3), np.uint8)
    masks = np.zeros((len(rows), size, size), np.uint8)
    _read_tars(folder, {r["file"]: i for i, r in enumerate(rows)}, images, masks)
    return People(images, masks, np.array([int(r["identity"]) for r in rows]), [r["file"] for r in rows], w, mean, directions)


def _code(row: dict, w: np.ndarray, mean: np.ndarray, directions: dict) -> np.ndarray:
    code = mean + float(row["psi"]) * (w[int(row["identity"])] - mean)
    return (code + sum(float(row[d]) * v for d, v in directions.items())).astype(np.float32)


def _read_tars(folder: Path, index: dict[str, int], images: np.ndarray, masks: np.ndarray) -> None:
    size, missing = images.shape[1], set(index)
    for path in sorted(folder.glob("faces-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.replace(".mask.png", ".jpg")
                if name not in index:
                    continue
                data = np.frombuffer(tar.extractfile(member).read(), np.uint8)
                if member.name.endswith(".mask.png"):
                    mask = cv2.resize(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE), (size, size), interpolation=cv2.INTER_AREA)
                    masks[index[name]] = clean_mask(mask.astype(np.float32) / 255) * 255
                else:
                    image = cv2.resize(cv2.imdecode(data, cv2.IMREAD_COLOR), (size, size), interpolation=cv2.INTER_AREA)
                    images[index[name]] = image[..., ::-1]
                    missing.discard(name)
    if missing:
        raise ValueError(f"{folder} must hold every picture of its manifest, got none of {len(missing)}, such as {min(missing)}")


STYLE_WEIGHTS = (0.68, 0.08, 0.08, 0.08, 0.08)


def compose(people: People, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Factors]:
    """A training picture with known factors: image uint8 [S, S, 3], mask float32 [S, S], factors. One that has a caption is
    left as it is.

    One in eight keeps its own, unnamed background; sketches stand on white, since colour is not visible in them.
    """
    image, mask = people.images[index], people.masks[index].astype(np.float32) / 255
    known = people.factors(index)
    if known.text is not None:
        return image, mask, known
    style = str(rng.choice(STYLES, p=STYLE_WEIGHTS))
    background = None
    if style == "pencil sketch":
        image = composite(image, mask, np.full_like(image, 255))
    elif rng.random() < 7 / 8:
        background = str(rng.choice([*COLOURS, *SCENES] if rng.random() < 0.5 else list(COLOURS)))
        image = composite(image, mask, paint_background(background, len(image), rng))
    named = background if style in COLOUR_STYLES or background in SCENES else None
    return apply_style(image, style), mask, Factors(style, named, known.expression, known.pose)
