"""People across, prompts down: python -m benchmarks.contact_sheet examples/person-*.jpg --out examples/sheet.jpg"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from pidiff.runtime import Pipeline

PROMPTS = (
    "a photo of a person, blue background",
    "a photo of a smiling person, red background",
    "a photo of a serious person, in front of a beach",
    "a photo of a person, looking left, green background",
    "a watercolour painting of a person, yellow background",
    "a pencil sketch of a smiling person",
)


def sheet(pipeline: Pipeline, photos: list[Path], prompts: tuple[str, ...], seed: int, **options) -> np.ndarray:
    """uint8 [H, W, 3]: a row of reference photos, then one row per prompt, all with the same seed."""
    size = pipeline.bundle.manifest.model.image_size
    people = [pipeline.enroll(p) for p in photos]
    row = [cv2.resize(cv2.imread(str(p)), (size, size), interpolation=cv2.INTER_AREA)[..., ::-1] for p in photos]
    rows = [np.concatenate(row, 1), np.full((6, size * len(photos), 3), 255, np.uint8)]
    for prompt in prompts:
        rows.append(np.concatenate([pipeline.generate(p, prompt, seed=seed, **options).images[0] for p in people], 1))
    return np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    picture = sheet(Pipeline.from_bundle(args.bundle), args.photos, PROMPTS, args.seed, num_inference_steps=args.steps)
    cv2.imwrite(str(args.out), picture[..., ::-1])


if __name__ == "__main__":
    main()
