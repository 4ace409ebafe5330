"""Quality of a bundle on people it was not trained on.

    python -m benchmarks.quality --data DATA --embedder FILE.onnx [--bundle DIR] [--people 50] --out DIR

For each test person a photo is enrolled as a user would (detection, alignment, background removal), pictures are made
for several prompts, and three numbers are taken, with 95 % bootstrap intervals over people:
  rank1        the generated face is nearest to its own reference among all people's (cosine of face embeddings)
  background   the background colour that the prompt names is the nearest named colour in CIELAB
  disruption   mean absolute change of background pixels (0-255) when only the person is switched
Anchors: the same with another real photo of the person (ceiling) and with id_scale = 0 (floor). The embedder is any
ONNX face-recognition network with a [1, 3, 112, 112] input in [-1, 1]; it must not have been used in training.
"""

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from pidiff.data.factors import COLOURS, nearest_colour
from pidiff.data.people import load_people
from pidiff.runtime import Pipeline
from pidiff.runtime.faces import FaceReader

TEMPLATE = np.float32([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
PROMPT = "a photo of a person, {} background"


class Embedder:
    """Face picture uint8 [H, W, 3] -> unit vector, or None where no face is found (ArcFace alignment)."""

    def __init__(self, path: Path, pipeline: Pipeline):
        import onnxruntime
        self.session = onnxruntime.InferenceSession(str(path))
        self.reader = FaceReader(pipeline._graph, pipeline.bundle.manifest.model.face_size)

    def __call__(self, image: np.ndarray) -> np.ndarray | None:
        large = cv2.resize(image, None, fx=256 / len(image), fy=256 / len(image), interpolation=cv2.INTER_CUBIC)
        faces = self.reader.detect(large)
        if not len(faces):
            return None
        matrix = cv2.estimateAffinePartial2D(faces.points[0].astype(np.float32), TEMPLATE, method=cv2.LMEDS)[0]
        face = cv2.warpAffine(large, matrix, (112, 112)).astype(np.float32)
        vector = self.session.run(None, {self.session.get_inputs()[0].name: (face.transpose(2, 0, 1)[None] - 127.5) / 127.5})[0][0]
        return vector / np.linalg.norm(vector)


def interval(values: np.ndarray, rng: np.random.Generator) -> dict:
    """Mean of one value per person with a 95 % bootstrap interval."""
    values = np.asarray(values, np.float64)
    means = rng.choice(values, (2000, len(values))).mean(1)
    return {"mean": round(float(values.mean()), 4), "low": round(float(np.quantile(means, 0.025)), 4),
            "high": round(float(np.quantile(means, 0.975)), 4)}


def identification(vectors: list, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per picture: is its own person the nearest reference, and the similarity to it (0 without a face)."""
    hits, own = [], []
    for i, vector in enumerate(vectors):
        scores = np.zeros(len(references)) if vector is None else references @ vector
        hits.append(float(vector is not None and scores.argmax() == i))
        own.append(float(scores[i]))
    return np.array(hits), np.array(own)


def evaluate(pipeline: Pipeline, embed: Embedder, people, count: int, args) -> tuple[dict, list]:
    rng = np.random.default_rng(0)
    names = [int(n) for n in dict.fromkeys(people.identity.tolist())][:count]
    index = {n: np.flatnonzero(people.identity == n) for n in names}
    photos = [people.images[index[n][0]] for n in names]
    others = [people.images[index[n][1]] for n in names]
    references = np.stack([embed(p) for p in photos])
    persons = [pipeline.enroll(p, select="largest") for p in tqdm(photos, desc="enroll", disable=None)]
    colours = [list(COLOURS)[i % len(COLOURS)] for i in range(count)]
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    rows = {"generated": [], "id_scale_0": [], "switched": []}
    start = time.perf_counter()
    for i, person in enumerate(tqdm(persons, desc="generate", disable=None)):
        prompt = PROMPT.format(colours[i])
        rows["generated"].append(pipeline.generate(person, prompt, seed=i, **options).images[0])
        rows["switched"].append(pipeline.generate(persons[(i + 1) % count], prompt, seed=i, **options).images[0])
        rows["id_scale_0"].append(pipeline.generate(person, prompt, seed=i, id_scale=0.0, **options).images[0])
    seconds = (time.perf_counter() - start) / (3 * count)
    reader = FaceReader(pipeline._graph, pipeline.bundle.manifest.model.face_size)
    masks = {k: [foreground(reader, x) for x in rows[k]] for k in ("generated", "switched")}
    correct = [nearest_colour(x, m) == c for x, m, c in zip(rows["generated"], masks["generated"], colours)]
    change = []
    for a, b, m, n in zip(rows["generated"], rows["switched"], masks["generated"], masks["switched"]):
        outside = cv2.dilate(np.maximum(m, n), np.ones((9, 9))) < 0.1
        if outside.any():                       # a picture without background says nothing about it
            change.append(np.abs(a.astype(float) - b)[outside].mean())
    summary = {"people": count, "steps": args.steps, "guidance_scale": args.guidance_scale,
               "seconds_per_picture": round(seconds, 3),
               "background": interval(np.array(correct, float), rng), "disruption": interval(change, rng), "disruption_people": len(change)}
    for name, pictures in (("rank1", rows["generated"]), ("rank1_ceiling_other_photo", others), ("rank1_floor_id_off", rows["id_scale_0"])):
        hits, own = identification([embed(p) for p in pictures], references)
        summary[name] = interval(hits, rng)
        summary[name.replace("rank1", "similarity")] = interval(own, rng)
    impostor = references @ references.T
    summary["similarity_impostor"] = round(float(impostor[~np.eye(count, dtype=bool)].mean()), 4)
    sheet = [np.concatenate([photos[i], rows["generated"][i], rows["switched"][i], rows["id_scale_0"][i]], 1) for i in range(count)]
    return summary, sheet


def foreground(reader: FaceReader, image: np.ndarray) -> np.ndarray:
    """Person mask float32 [H, W] of a generated picture, by the bundle's own matting."""
    from pidiff.runtime.engines import call
    from pidiff.runtime.faces import to_planes
    face = cv2.resize(image, (reader.size, reader.size), interpolation=cv2.INTER_AREA)
    alpha = call(reader._load("face_matting"), {"face": to_planes(face)})["alpha"][0, 0].astype(np.float32)
    return np.clip(cv2.resize(alpha, image.shape[1::-1]), 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--embedder", type=Path, required=True)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipeline = Pipeline.from_bundle(args.bundle)
    people = load_people(args.data, 128, "test")
    summary, sheet = evaluate(pipeline, Embedder(args.embedder, pipeline), people, args.people, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    rows = [np.concatenate(sheet[i:i + 2], 1) for i in range(0, len(sheet) - 1, 2)]
    cv2.imwrite(str(args.out / "people.png"), np.concatenate(rows)[..., ::-1])
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
