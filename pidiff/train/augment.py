"""Photo augmentation for the encoder and the matting network: what cameras, crops and files do to a face."""

import cv2
import numpy as np


def photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random exposure, colour cast, blur, noise and JPEG damage; uint8 [H, W, 3] -> uint8 [H, W, 3]."""
    x = image.astype(np.float32)
    x = (x - 128) * rng.uniform(0.8, 1.2) + 128 + rng.uniform(-25, 25) + rng.normal(0, 6, 3)
    if rng.random() < 0.3:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.3, 1.0))
    if rng.random() < 0.3:
        x = x + rng.normal(0, rng.uniform(1, 6), x.shape)
    x = np.clip(x, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        x = cv2.imdecode(cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 95))])[1], 1)
    return x


def misalign(images: list[np.ndarray], rng: np.random.Generator, amount: float = 1.0) -> list[np.ndarray]:
    """The same small rotation, zoom and shift for every array: alignment is never exact."""
    size = images[0].shape[0]
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), rng.normal(0, 2.5 * amount), 1 + rng.normal(0, 0.03 * amount))
    matrix[:, 2] += rng.normal(0, 0.012 * size * amount, 2)
    return [cv2.warpAffine(x, matrix, (size, size), borderMode=cv2.BORDER_REFLECT) for x in images]
