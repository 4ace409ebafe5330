"""Edits along named directions: does the picture follow the strength step by step, and does it stay the same person?

How far a picture has moved is read by ridge regressions that are fitted on real pictures with exact codes: pose and smile from
the five landmarks, age from the face embedding. Neither has anything to do with the model; their correlation on real pictures
of other people is reported beside the scores, as what they can tell at all.
"""

import numpy as np

from ..data.people import People
from .metrics import similarity
from .readers import FaceTools, face_shape

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
PENALTY = {"pose": 0.01, "smile": 0.01, "age": 1.0}
FROM_LANDMARKS = ("pose", "smile")


class Ridge:
    """Linear regression with an L2 penalty on standardised features [K, D]."""

    def __init__(self, features: np.ndarray, values: np.ndarray, penalty: float):
        self.mean, self.scale, self.offset = features.mean(0), features.std(0) + 1e-6, values.mean()
        x = (features - self.mean) / self.scale
        self.weight = np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(x.shape[1]), x.T @ (values - self.offset))

    def __call__(self, feature: np.ndarray) -> float:
        return float((feature - self.mean) / self.scale @ self.weight + self.offset)


def spearman(a, b) -> float:
    """Rank correlation of two sequences of different numbers; NaN where either has fewer than three."""
    if len(a) < 3:
        return float("nan")
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


class DirectionReader:
    """Reads, off a picture, how far it lies along each named direction. `people` have exact codes."""

    def __init__(self, tools: FaceTools, people: People):
        self.tools = tools
        seen = [(i, self._features(image)) for i, image in enumerate(people.images)]
        rows = [(i, f) for i, f in seen if f is not None]
        index = [i for i, _ in rows]
        self.readers = {name: Ridge(np.stack([f[name in FROM_LANDMARKS] for _, f in rows]), (people.w[index] - people.mean) @ unit, PENALTY[name])
                        for name, unit in people.directions.items()}

    def _features(self, image: np.ndarray):
        """(embedding, landmarks in the eyes' frame), or None without a face."""
        points, vector = self.tools.landmarks(image), self.tools.embed(image)
        return None if points is None or vector is None else (vector, face_shape(points))

    def __call__(self, image: np.ndarray) -> dict[str, float] | None:
        features = self._features(image)
        return None if features is None else {n: read(features[n in FROM_LANDMARKS]) for n, read in self.readers.items()}

    def correlations(self, people: People) -> dict[str, float]:
        """Correlation with the exact score on other real pictures, per direction."""
        read = [(self(image), code) for image, code in zip(people.images, people.w)]
        return {f"{name}_reader_correlation": round(float(np.corrcoef([r[name] for r, _ in read if r], [(c - people.mean) @ unit for r, c in read if r])[0, 1]), 4)
                for name, unit in people.directions.items()}


def follow(generator, person, reference: np.ndarray, text: str, reader: DirectionReader) -> dict[str, tuple[float, float]]:
    """Per direction: (Spearman correlation of strength and reading, mean similarity to the reference) over STRENGTHS."""
    scores, middle = {}, generator.generate(person, text, 0)[0]
    for name in reader.readers:
        pictures = [middle if s == 0 else generator.generate(generator.edit(person, name, s), text, 0)[0] for s in STRENGTHS]
        readings = [(s, r[name]) for s, r in zip(STRENGTHS, map(reader, pictures)) if r is not None]
        likeness = float(np.mean([similarity(reader.tools.embed(p), reference) for p in pictures]))
        scores[name] = (spearman([s for s, _ in readings], [r for _, r in readings]), likeness)
    return scores
