"""Edits coarse to fine: python -m benchmarks.edit_rows A.jpg B.jpg --out examples/edits.jpg

First row: both people, then A with one W+ level group of B at a time (coarse, middle, fine, finest), then with all. Below, one
row per direction: A moved by -2 .. 2 standard deviations. Same prompt and seed everywhere.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from pidiff.runtime import Pipeline
from pidiff.runtime.pipeline import LEVELS

STRENGTHS = (-2.0, -1.2, -0.6, 0.6, 1.2, 2.0)


def rows(pipeline: Pipeline, a: Path, b: Path, directions: list[str], prompt: str, seed: int) -> np.ndarray:
    """uint8 [H, W, 3]: six pictures per row."""
    first, second = pipeline.enroll(a), pipeline.enroll(b)

    def picture(person):
        return pipeline.generate(person, prompt, seed=seed).images[0]

    mixed = [pipeline.mix(first, second, level) for level in LEVELS]
    picture_rows = [[picture(p) for p in (first, *mixed, second)]]
    for name in directions:
        picture_rows.append([picture(pipeline.edit(first, **{name: s})) for s in STRENGTHS])
    return np.concatenate([np.concatenate(row, 1) for row in picture_rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs=2, type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--directions", nargs="*", default=["smile", "age", "pose"])
    parser.add_argument("--prompt", default="a photo of a person, blue background")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    picture = rows(Pipeline.from_bundle(args.bundle), *args.photos, args.directions, args.prompt, args.seed)
    cv2.imwrite(str(args.out), picture[..., ::-1])


if __name__ == "__main__":
    main()
