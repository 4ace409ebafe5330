"""Photos of real people as training data: `pidiff-data photos` finds the faces once, training reads what it wrote.

Layout (WebDataset: tar shards whose members share a key): `photos-NNNN.tar` with `PERSON/NAME.jpg` (square picture),
`.mask.png` (1 = face), `.face.jpg` (aligned to FFHQ's template, background white: what the W+ encoder reads) and, where there
is a caption, `.txt`; `photos.json` says how they were made and how many shards there are. Pictures are decoded when they are
used, so a set may be larger than memory. Codes are the encoder's; split by person's number as in `people.py`.
"""

import json
import tarfile
from pathlib import Path

import cv2
import numpy as np

FACE_SIZE = 256


class Pictures:
    """Pictures in tar files, decoded when indexed: like an array uint8 [N, S, S, 3], or [N, S, S] of masks."""

    def __init__(self, places: list[tuple[Path, int, int]], size: int, grey: bool = False):
        self.places, self.grey = places, grey
        self.shape = (len(places), size, size) if grey else (len(places), size, size, 3)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        if np.ndim(index):
            return np.stack([self[i] for i in index])
        path, offset, length = self.places[index]
        with path.open("rb") as file:
            file.seek(offset)
            data = np.frombuffer(file.read(length), np.uint8)
        picture = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE if self.grey else cv2.IMREAD_COLOR)
        if picture is None:
            raise ValueError(f"data must hold whole pictures, got a damaged one in {path} at byte {offset}")
        if picture.shape[:2] != self.shape[1:3]:
            picture = cv2.resize(picture, self.shape[1:3], interpolation=cv2.INTER_AREA)
        return picture if self.grey else picture[..., ::-1]


def load_photos(folders: list[Path], size: int, people: range | tuple[int, ...] | None, limit: int | None = None) -> dict:
    """Fields of `People` for folders that `prepare` wrote; `people` are the last digits of the persons' numbers to take."""
    index: dict[str, dict[str, tuple[Path, int, int]]] = {}
    for folder in folders:
        shards = sorted(folder.glob("photos-*.tar"))
        expected = json.loads((folder / "photos.json").read_text())["shards"]
        if expected != len(shards):
            raise ValueError(f"data must be complete, got {len(shards)} of {expected or 'more'} shards in {folder}: "
                             "run pidiff-data photos again")
        for path in shards:
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, suffix = member.name.rpartition("/")[2].partition(".")
                    person = f"{folder}\0{member.name.rpartition('/')[0]}"
                    index.setdefault(f"{person}/{key}", {})[suffix] = (path, member.offset_data, member.size)
    names = {name: number for number, name in enumerate(sorted({k.rpartition("/")[0] for k in index}))}
    numbers = {k: names[k.rpartition("/")[0]] for k in index}
    keys = [k for k in sorted(index) if people is None or numbers[k] % 10 in people][:limit]
    captions = [_text(*index[k]["txt"]) if "txt" in index[k] else None for k in keys]
    return {"images": Pictures([index[k]["jpg"] for k in keys], size), "masks": Pictures([index[k]["mask.png"] for k in keys], size, True),
            "faces": Pictures([index[k]["face.jpg"] for k in keys], FACE_SIZE), "captions": captions,
            "identity": np.array([numbers[k] for k in keys], int), "files": [k.rpartition("\0")[2] for k in keys]}


def _text(path: Path, offset: int, length: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length).decode()
