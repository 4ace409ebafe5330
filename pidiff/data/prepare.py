"""`pidiff-data photos`: from photos (a folder, WebDataset shards) to the layout of `photos.py`."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from pidiff.runtime import Pipeline
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.errors import FaceError, PidiffError
from pidiff.runtime.faces import FaceReader, align_face, ffhq_quad, matte
from pidiff.runtime.images import MAX_FILE_BYTES, decode_image

from .photos import FACE_SIZE
from .synth import add_file

PER_TAR = 1000
KINDS = {".jpg", ".jpeg", ".png", ".webp"}
DEFAULT_CAPTION = "a photo of a person"
MAX_ENLARGEMENT = 1.5          # of a picture; beyond, a model would learn blur


@dataclass(frozen=True)
class Photo:
    """One source picture: `key` is PERSON/NAME; bytes as they are stored."""

    key: str
    image: bytes
    caption: str | None
    mask: bytes | None


def source_photos(source: Path) -> Iterator[Photo]:
    """Pictures of a folder (a sub-folder is a person, else every picture is) and of the WebDataset shards (*.tar) in it.

    NAME.txt beside NAME.jpg is the caption, NAME.mask.png a mask of the person. Nothing is unpacked to disk.
    """
    files = {str(p.relative_to(source)): p for p in sorted(source.rglob("*")) if p.is_file()}
    yield from _photos({n: p.read_bytes for n, p in files.items() if p.suffix != ".tar" and p.stat().st_size <= MAX_FILE_BYTES})
    for name, path in files.items():
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                members = [m for m in tar if m.isfile() and m.size <= MAX_FILE_BYTES]
                yield from _photos({m.name: lambda m=m: tar.extractfile(m).read() for m in members}, Path(name).stem)


def _photos(readers: dict, prefix: str = "") -> Iterator[Photo]:
    for name in sorted(readers):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in KINDS and not stem.endswith(".mask"):
            caption, mask = readers.get(stem + ".txt"), readers.get(stem + ".mask.png")
            text = caption().decode("utf-8", "replace").strip() if caption else None
            folder, base = os.path.split(stem.replace(".", "_"))               # a shard's key ends at the first dot
            person = folder.replace("/", "_") or f"{prefix}{base}"
            yield Photo(f"{person}/{base}", readers[name](), text or None, mask() if mask else None)


class Preparer:
    """Finds the largest face of a photo and cuts what training needs; `aligned` gives the face's FFHQ crop as the picture."""

    def __init__(self, size: int, aligned: bool, bundle: Path | None = None, require_signature: Path | None = None):
        try:
            pipeline = Pipeline.from_bundle(bundle, require_signature=require_signature)
        except PidiffError as error:
            raise ValueError(str(error)) from error
        self.size, self.aligned, self._side = size, aligned, pipeline.bundle.manifest.model.face_size
        self._reader, self._graph = FaceReader(pipeline._graph, FACE_SIZE), pipeline._graph("face_matting")

    def __call__(self, photo: Photo) -> dict[str, np.ndarray]:
        """Suffix -> picture: jpg [S, S, 3], mask.png [S, S], face.jpg [256, 256, 3]. Raises FaceError."""
        image = decode_image(photo.key, photo.image)
        faces = self._reader.detect(image)
        if not len(faces):
            raise FaceError(f"photo must show a face, got none in {photo.key}")
        points = faces.points[0]
        face = align_face(image, points, FACE_SIZE)
        alpha = matte(self._graph, face, self._side)
        white = (face * alpha[..., None] + 255 * (1 - alpha[..., None])).round().astype(np.uint8)
        centre, x, y = ffhq_quad(points)
        if self.aligned:
            side = 2 * np.hypot(*x)
            picture, mask = align_face(image, points, self.size), cv2.resize(alpha, (self.size, self.size))
        else:
            side = min(image.shape[:2])
            low = np.clip(np.round(centre - side / 2), 0, np.array(image.shape[1::-1]) - side).astype(int)
            picture = image[low[1]:low[1] + side, low[0]:low[0] + side]
            mask = self._given_mask(photo, image)
            if mask is None:
                to_photo = np.stack([2 * x / FACE_SIZE, 2 * y / FACE_SIZE, centre - x - y + (x + y) / FACE_SIZE], 1)
                to_photo[:, 2] -= low
                mask = cv2.warpAffine(alpha, to_photo, (side, side), flags=cv2.INTER_LINEAR)
            else:
                mask = mask[low[1]:low[1] + side, low[0]:low[0] + side]
            picture, mask = (cv2.resize(a, (self.size, self.size), interpolation=cv2.INTER_AREA) for a in (picture, mask))
        if self.size > MAX_ENLARGEMENT * side:
            raise FaceError(f"photo must have at least {self.size / MAX_ENLARGEMENT:.0f} pixels a side, got {side:.0f} in {photo.key}")
        return {"jpg": picture, "mask.png": (np.clip(mask, 0, 1) * 255).round().astype(np.uint8), "face.jpg": white}

    @staticmethod
    def _given_mask(photo: Photo, image: np.ndarray) -> np.ndarray | None:
        if photo.mask is None:
            return None
        mask = decode_image(f"{photo.key}.mask.png", photo.mask)[..., 0].astype(np.float32) / 255
        return cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def check_signed(bundle: Path, key: Path) -> None:
    """Raise BundleError, a ValueError, unless the bundle is whole and signed by a public key."""
    Bundle.open(bundle, require_signature=key)


def prepare(out: Path, source: Path, size: int, aligned: bool, bundle: Path | None = None,
            require_signature: Path | None = None) -> tuple[int, Counter]:
    """Write the layout above from `source`; goes on with the next shard after a stop. Returns (pictures, reasons of those left out)."""
    if not source.is_dir():
        raise ValueError(f"photos must be a folder, got {source}")
    settings = {"size": size, "aligned": aligned, "source": source.name}
    if (started := out / "photos.json").is_file():
        before = json.loads(started.read_text())
        if before["settings"] != settings:
            raise ValueError(f"out must be empty or begun with the same settings, got {out} of {before['settings']}")
    preparer, left_out, total, shards = Preparer(size, aligned, bundle, require_signature), Counter(), 0, 0
    out.mkdir(parents=True, exist_ok=True)
    started.write_text(json.dumps({"settings": settings, "shards": None}) + "\n")
    bar = tqdm(source_photos(source), unit="picture", disable=None)
    for number, part in enumerate(_parts(bar)):
        shards = number + 1
        path = out / f"photos-{number:04d}.tar"
        if not path.is_file():
            left_out += _write_shard(path, part, preparer, aligned)
        with tarfile.open(path) as tar:
            total += sum(n.endswith(".face.jpg") for n in tar.getnames())
    if not total:
        raise ValueError(f"photos must hold a picture with a face, got none in {source}" + "".join(f"; {r}" for r in list(left_out)[:1]))
    started.write_text(json.dumps({"settings": settings, "shards": shards}) + "\n")
    return total, left_out


def _parts(photos: Iterator[Photo]) -> Iterator[list[Photo]]:
    part = []
    for photo in photos:
        part.append(photo)
        if len(part) == PER_TAR:
            yield part
            part = []
    if part:
        yield part


def _write_shard(path: Path, part: list[Photo], preparer: Preparer, aligned: bool) -> Counter:
    left_out, temporary = Counter(), path.with_suffix(".tmp")
    with tarfile.open(temporary, "w") as tar:
        for photo in part:
            try:
                pictures = preparer(photo)
            except FaceError as error:
                left_out[str(error)] += 1
                continue
            caption = photo.caption or (None if aligned else DEFAULT_CAPTION)
            for suffix, picture in pictures.items():
                if suffix.endswith("png"):
                    data = cv2.imencode(".png", picture)[1]
                else:
                    data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
                add_file(tar, f"{photo.key}.{suffix}", data)
            if caption:
                add_file(tar, f"{photo.key}.txt", np.frombuffer(caption.encode(), np.uint8))
    os.replace(temporary, path)
    return left_out
