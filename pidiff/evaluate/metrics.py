"""Scores as pure functions of embeddings, pictures and masks. Unit of analysis: the person."""

import numpy as np


def interval(values, people, rng: np.random.Generator, draws: int = 2000) -> dict:
    """Mean of `values` [K] with a 95 % bootstrap interval over `people` [K]: people are drawn, with all their pictures.

    NaN marks a picture that says nothing about the score; people with none left are dropped. Returns mean, low, high
    (None without any value) and the number of people.
    """
    values, people = np.asarray(values, np.float64), np.asarray(people)
    known = ~np.isnan(values)
    names, index = np.unique(people[known], return_inverse=True)
    if not len(names):
        return {"mean": None, "low": None, "high": None, "people": 0}
    sums, counts = np.bincount(index, values[known]), np.bincount(index)
    drawn = rng.integers(len(names), size=(draws, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": round(float(sums.sum() / counts.sum()), 4), "low": round(float(low), 4), "high": round(float(high), 4),
            "people": len(names)}


def similarity(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """Cosine of two unit embeddings [D]; 0 where no face was found."""
    return 0.0 if a is None or b is None else float(a @ b)


def rank1(vector: np.ndarray | None, gallery: np.ndarray, own: int) -> float:
    """1 if the nearest of the gallery's unit embeddings [N, D] is entry `own`; 0 else, and without a face."""
    return float(vector is not None and int((gallery @ vector).argmax()) == own)


def threshold(impostor: np.ndarray, false_match_rate: float) -> float:
    """Smallest similarity that at most `false_match_rate` of the impostor pairs exceed."""
    return float(np.quantile(impostor, 1 - false_match_rate, method="higher"))


def copy_paste(generated, reference, other) -> float:
    """(theta(g, t) - theta(g, r)) / theta(t, r): angles to another photo t and to the reference r of the same person.

    0: as near to the other photo as to the reference, so it is the person; 1: a copy of the reference. NaN without a face.
    """
    if generated is None or reference is None or other is None:
        return float("nan")
    def angle(a, b):
        return float(np.arccos(np.clip(a @ b, -1, 1)))
    return (angle(generated, other) - angle(generated, reference)) / max(angle(other, reference), 1e-6)


def change_outside(a: np.ndarray, b: np.ndarray, outside: np.ndarray) -> float:
    """Mean absolute difference (0-255) of two uint8 pictures [H, W, 3] over a boolean mask [H, W]; NaN if it is empty."""
    return float(np.abs(a.astype(np.float32) - b)[outside].mean()) if outside.any() else float("nan")


def share_inside(amount: np.ndarray, mask: np.ndarray) -> float:
    """Share of a non-negative map [H, W] that lies inside a soft mask [H, W]; NaN for an empty map."""
    total = float(amount.sum())
    return float((amount * mask).sum()) / total if total > 1e-6 else float("nan")


def diversity(pictures: list[np.ndarray]) -> float:
    """Mean absolute difference (0-255) over all pairs of one prompt's pictures; NaN for fewer than two."""
    stack = np.stack(pictures).astype(np.float32)
    pairs = [np.abs(stack[i] - stack[j]).mean() for i in range(len(stack)) for j in range(i)]
    return float(np.mean(pairs)) if pairs else float("nan")


class Discriminant:
    """Linear discriminant analysis with shrinkage: features [K, D] and labels -> the most likely label."""

    def __init__(self, features: np.ndarray, labels: list[str], shrinkage: float = 0.05):
        features, labels = np.asarray(features, np.float64), np.asarray(labels)
        self.labels = sorted(set(labels.tolist()))
        self.mean, self.scale = features.mean(0), features.std(0) + 1e-6
        x = (features - self.mean) / self.scale
        centres = np.stack([x[labels == name].mean(0) for name in self.labels])
        within = x - centres[np.searchsorted(self.labels, labels)]
        covariance = within.T @ within / len(x) + shrinkage * np.eye(x.shape[1])
        self.weight = np.linalg.solve(covariance, centres.T)
        self.bias = -0.5 * (centres * self.weight.T).sum(1)

    def __call__(self, feature: np.ndarray) -> str:
        scores = (np.asarray(feature) - self.mean) / self.scale @ self.weight + self.bias
        return self.labels[int(scores.argmax())]
