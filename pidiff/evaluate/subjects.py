"""Who is evaluated: test people of a `pidiff-data` folder, or a folder with one sub-folder of photos per person."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pidiff.runtime.images import read_image

from ..data.people import People, load_people

SIZE = 256
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True, eq=False)
class Subject:
    """One person: the photo that is enrolled, another photo to compare with; RGB uint8 [H, W, 3]."""

    name: str
    reference: np.ndarray
    other: np.ndarray
    w: np.ndarray | None = None             # exact code of the reference, where it is known


def load_subjects(data: Path, count: int) -> tuple[list[Subject], People | None]:
    """The first `count` subjects, and pictures of people who are not among them whose factors are known (else None)."""
    data = Path(data)
    if (data / "manifest.csv").is_file():
        people = load_people(data, SIZE, "test")
        groups = [(name, index) for name, index in people.variants().items() if len(index) > 1][:count]
        subjects = [Subject(str(n), people.images[i[0]], people.images[i[1]], people.w[i[0]]) for n, i in groups]
        known = load_people(data, SIZE, "validation", limit=300)
    else:
        if not data.is_dir():
            raise ValueError(f"data must be a folder, got {data}")
        subjects, known = _from_folders(data, count), None
    if len(subjects) < 2:
        raise ValueError(f"data must hold at least two people with two photos each, got {len(subjects)} in {data}")
    return subjects, known


def _from_folders(data: Path, count: int) -> list[Subject]:
    subjects = []
    for folder in sorted(f for f in data.iterdir() if f.is_dir()):
        photos = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
        if len(photos) > 1 and len(subjects) < count:
            subjects.append(Subject(folder.name, read_image(photos[0]), read_image(photos[1])))
    return subjects
