"""What is read off a picture: the face embedding, the person's mask, and the factors that a prompt can name.

Style, expression and pose are read by linear discriminants that are fitted on real pictures whose factors are known, so
that their own accuracy on real pictures of other people can stand beside every number (`*_ceiling` in the report).
"""

from pathlib import Path

import cv2
import numpy as np

from pidiff.runtime import Pipeline
from pidiff.runtime.faces import FaceReader, matte

from ..data.factors import COLOUR_STYLES, COLOURS, EXPRESSIONS, STYLES, apply_style, nearest_colour
from ..data.people import People
from .metrics import Discriminant

# Five points of ArcFace's 112 px crop (eyes, nose, mouth corners); Deng et al. 2019, arXiv 1801.07698.
TEMPLATE = np.float32([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
WORKING_SIZE = 256              # faces are looked for at this size: MTCNN was made for photos


class FaceTools:
    """Detector and matting of the shipped `mini`, for pictures of any model, and a face embedder from an ONNX file.

    The embedder takes [1, 3, 112, 112] in [-1, 1], aligned to ArcFace's template.
    """

    def __init__(self, embedder: Path):
        import onnxruntime
        self.session = onnxruntime.InferenceSession(str(embedder), providers=["CPUExecutionProvider"])
        shape = self.session.get_inputs()[0].shape
        if list(shape[-3:]) != [3, 112, 112]:
            raise ValueError(f"embedder must take [1, 3, 112, 112], got {shape} in {embedder}")
        self.pipeline = Pipeline.from_bundle()
        self.reader = FaceReader(self.pipeline._graph, self.pipeline.bundle.manifest.model.face_size)

    def landmarks(self, image: np.ndarray) -> np.ndarray | None:
        """Five points [5, 2] of the largest face, in pixels of a WORKING_SIZE picture; None without a face."""
        found = self.reader.detect(_working(image))
        return found.points[0].astype(np.float32) if len(found) else None

    def embed(self, image: np.ndarray) -> np.ndarray | None:
        """Unit embedding [D] of the largest face in an RGB uint8 picture; None without a face."""
        points = self.landmarks(image)
        if points is None:
            return None
        matrix = cv2.estimateAffinePartial2D(points, TEMPLATE, method=cv2.LMEDS)[0]
        if matrix is None:
            return None
        face = cv2.warpAffine(_working(image), matrix, (112, 112)).astype(np.float32)
        planes = ((face - 127.5) / 127.5).transpose(2, 0, 1)[None]
        vector = self.session.run(None, {self.session.get_inputs()[0].name: planes})[0][0]
        return vector / np.linalg.norm(vector)

    def mask(self, image: np.ndarray) -> np.ndarray:
        """Soft mask [H, W] of the person in a portrait, by the matting network."""
        return matte(self.reader._load("face_matting"), image, self.reader.size)


def _working(image: np.ndarray) -> np.ndarray:
    scale = WORKING_SIZE / len(image)
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)


def style_features(image: np.ndarray) -> np.ndarray:
    """Statistics of colour and texture [9] by which the styles differ."""
    small = cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    edges = np.abs(cv2.Laplacian(lab[..., 0], cv2.CV_32F))
    return np.array([lab[..., 0].mean(), lab[..., 0].std(), (lab[..., 0] > 95).mean(), chroma.mean(), chroma.std(),
                     lab[..., 1].mean(), lab[..., 2].mean(), np.log1p(edges.mean()), np.log1p(np.median(edges))])


def face_shape(points: np.ndarray) -> np.ndarray:
    """Landmarks [5, 2] in the frame of the eyes: what is left [6] is nose and mouth, by pose and expression."""
    left, right = points[0], points[1]
    axis = (right - left) / np.linalg.norm(right - left) ** 2
    rest = points[2:] - (left + right) / 2
    return np.concatenate([rest @ axis, rest @ np.array([-axis[1], axis[0]])])


class FactorReader:
    """Reads background, style, expression and pose. `people` are real pictures to fit on; without exact codes only
    background and style can be read."""

    def __init__(self, tools: FaceTools, people: People | None, pictures: list[np.ndarray]):
        self.tools = tools
        styled = [(style_features(apply_style(p, s)), s) for p in pictures for s in STYLES]
        self.style = Discriminant(np.stack([f for f, _ in styled]), [s for _, s in styled])
        self.shapes = {} if people is None else self._fit_shapes(people)

    def _fit_shapes(self, people: People) -> dict[str, Discriminant]:
        known = [(self.tools.landmarks(people.images[i]), people.factors(i)) for i in range(len(people))]
        fitted = {}
        for name in ("expression", "pose"):
            rows = [(face_shape(p), getattr(f, name)) for p, f in known if p is not None and getattr(f, name)]
            if len({label for _, label in rows}) > 1:
                fitted[name] = Discriminant(np.stack([x for x, _ in rows]), [label for _, label in rows])
        return fitted

    def correct(self, image: np.ndarray, mask: np.ndarray, wanted) -> dict[str, float]:
        """For each factor of `wanted` (Factors): 1 right, 0 wrong, NaN not named or not readable."""
        scores = dict.fromkeys(("background", "style", "expression", "pose"), float("nan"))
        scores["style"] = float(self.style(style_features(image)) == wanted.style)
        if wanted.background in COLOURS and wanted.style in COLOUR_STYLES:
            scores["background"] = float(nearest_colour(image, mask, wanted.style) == wanted.background)
        points = self.tools.landmarks(image) if wanted.expression in EXPRESSIONS or wanted.pose else None
        for name, reader in self.shapes.items():
            if getattr(wanted, name) is not None:
                scores[name] = float(points is not None and reader(face_shape(points)) == getattr(wanted, name))
        return scores
