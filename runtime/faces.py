"""From a photo to the face that the encoder reads: detect, align to the FFHQ template, remove the background."""

from functools import partial

import numpy as np

from .engines import call
from .errors import FaceError
from .images import opencv, read_image
from .mtcnn import Mtcnn

GRAPHS = ("face_pnet", "face_rnet", "face_onet", "face_matting")
MIN_SCORE = 0.9  # of a detection; weaker ones are mostly hands and folds of cloth
MIN_RELATIVE_WIDTH = 0.25  # of the largest face; smaller ones are passers-by and do not count as "several faces"
MAX_ENLARGEMENT = 2.0  # of the aligned crop; beyond, the encoder would see mostly interpolation
# MTCNN's eyes and mouth corners lie a little further apart than those of dlib, which FFHQ was cut with: the crop of 100
# FFHQ-aligned pictures comes out at 262.3 px instead of 256.
LANDMARK_SCALE = 256 / 262.3


class FaceReader:
    """Photo -> aligned face of `size` pixels.

    load(name) returns the Engine of a graph; `matting` says whether the background is removed (painted white).
    """

    def __init__(self, load, size, matting=True):
        self.size, self.matting, self._load = size, matting, load

    def detect(self, image):
        """Return the Detections that count in an RGB uint8 image [H,W,3], largest first."""
        found = Mtcnn(self._pnet, partial(self._net, "face_rnet"), partial(self._net, "face_onet")).detect(image)
        widths = found.boxes[:, 2] - found.boxes[:, 0]
        sure = found.scores >= MIN_SCORE
        sure &= widths >= MIN_RELATIVE_WIDTH * max(widths[sure], default=0)
        order = np.argsort(-widths, kind="stable")
        return found[order[sure[order]]]

    def read(self, photo, select="only"):
        """Return the face in a photo (path or uint8 array [H,W,3]) as RGB uint8 [size,size,3].

        select: "only" refuses a photo with several faces, "largest" takes the largest. Raises FaceError for a file that
        is no picture, for no face, several faces, and a face so small that it would be enlarged more than twice.
        """
        if select not in ("only", "largest"):
            raise FaceError(f"select must be 'only' or 'largest', got {select!r}")
        image = read_image(photo)
        name = "an array" if isinstance(photo, np.ndarray) else str(photo)
        faces = self.detect(image)
        if not len(faces):
            raise FaceError(f"photo must show a face, got none in {name}")
        if len(faces) > 1 and select == "only":
            raise FaceError(f"photo must show one face, got {len(faces)} in {name} (the largest can be chosen)")
        sharp = ffhq_quad(faces.points[0])[1]
        need, got = self.size / MAX_ENLARGEMENT, 2 * np.hypot(*sharp)
        if got < need:
            raise FaceError(f"photo must show a face large enough for a crop of {need:.0f} pixels "
                            f"(about {need / 4:.0f} between the eyes), got {got:.0f} in {name}")
        face = align_face(image, faces.points[0], self.size)
        return self.remove_background(face) if self.matting else face

    def remove_background(self, face):
        """Paint white what the matting graph calls background in an aligned face [E,E,3] uint8."""
        alpha = matte(self._load("face_matting"), face, len(face))[..., None]
        return (face * alpha + 255 * (1 - alpha)).round().astype(np.uint8)

    def _pnet(self, image):
        rows, columns = (-(-(n - 2) // 2) - 4 for n in image.shape[2:])
        return self._net("face_pnet", image, rows=rows, columns=columns)

    def _net(self, graph, image, **sizes):
        return call(self._load(graph), {"image": image}, **sizes)


def matte(graph, face, side):
    """Return the person's alpha float32 [E,E] in [0,1] of an aligned face [E,E,3] uint8; `graph` reads `side` pixels."""
    size = face.shape[1::-1]
    if size != (side, side):
        face = opencv().resize(face, (side, side), interpolation=opencv().INTER_AREA)
    alpha = call(graph, {"face": to_planes(face)})["alpha"][0, 0].astype(np.float32)
    return np.clip(alpha if size == (side, side) else opencv().resize(alpha, size), 0, 1)


def to_planes(image):
    """Turn an RGB uint8 image [H,W,3] into float32 planes [1,3,H,W] in [-1,1]."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None], dtype=np.float32) / 127.5 - 1


def to_image(planes):
    """Turn planes [B,3,H,W] in about [-1,1] into RGB uint8 images [B,H,W,3]."""
    planes = np.clip(np.asarray(planes, np.float32) * 127.5 + 127.5, 0, 255)
    return np.ascontiguousarray(planes.round().astype(np.uint8).transpose(0, 2, 3, 1))


def ffhq_quad(points):
    """Return (centre, x, y) of the FFHQ crop from five points [5,2]: x and y are half its sides, as vectors in pixels.

    Formula: the data set script of T. Karras et al., "A Style-Based Generator Architecture for GANs" (2019), with the
    eyes' centres and the mouth corners in place of the means of dlib's points.
    """
    left_eye, right_eye, _, left_mouth, right_mouth = points.astype(np.float64)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    eye_to_eye, eye_to_mouth = right_eye - left_eye, mouth - eyes
    x = eye_to_eye - eye_to_mouth[::-1] * [-1, 1]
    size = max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8) * LANDMARK_SCALE
    x *= size / max(np.hypot(*x), 1e-6)
    return eyes + eye_to_mouth * 0.1, x, x[::-1] * [-1, 1]


def align_face(image, points, size):
    """Cut the FFHQ crop for five points [5,2] out of an RGB uint8 image [H,W,3] -> uint8 [size,size,3].

    Where the crop leaves the picture, the picture is mirrored and fades into blur and its median colour, as in FFHQ.
    """
    cv2 = opencv()
    centre, x, y = ffhq_quad(points)
    shrink = int(np.hypot(*x) / size)  # half of the crop's side over the output's: leaves at least two samples a pixel
    if shrink > 1:
        small = tuple(max(1, round(n / shrink)) for n in image.shape[1::-1])
        ratio = np.array(small) / image.shape[1::-1]
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        centre, x, y = (centre + 0.5) * ratio - 0.5, x * ratio, y * ratio
    image, offset = _crop_and_pad(image, centre, x, y)
    scale = min(4, max(1, int(np.ceil(2 * np.hypot(*x) / size))))
    steps = size * scale
    corner = centre - offset - x - y + (x + y) / steps  # centre of the first output pixel
    matrix = np.stack([2 * x / steps, 2 * y / steps, corner], 1)
    flags = cv2.WARP_INVERSE_MAP | (cv2.INTER_LINEAR if scale > 1 else cv2.INTER_CUBIC)
    face = cv2.warpAffine(image, matrix, (steps, steps), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.resize(face, (size, size), interpolation=cv2.INTER_AREA) if scale > 1 else face


def _crop_and_pad(image, centre, x, y):
    """Cut the quad's bounding box with a border, mirrored where it leaves the image: (image, offset of its origin)."""
    cv2 = opencv()
    side = 2 * np.hypot(*x)
    border = max(int(round(side * 0.1)), 3)
    reach = np.abs(x) + np.abs(y)
    low, high = np.floor(centre - reach).astype(int) - border, np.ceil(centre + reach).astype(int) + border
    size = np.array(image.shape[1::-1])
    before, after = np.maximum(-low, 0), np.maximum(high - size, 0)
    low, high = np.maximum(low, 0), np.minimum(high, size)
    image = image[low[1]:high[1], low[0]:high[0]]
    if max(*before, *after) <= border - 4 or not image.size:
        return image, low
    before, after = (np.maximum(n, int(round(side * 0.3))) for n in (before, after))
    image = cv2.copyMakeBorder(image, before[1], after[1], before[0], after[0], cv2.BORDER_REFLECT_101).astype(np.float32)
    rows, columns = (np.arange(n, dtype=np.float32) for n in image.shape[:2])
    inside_x = np.minimum(columns / before[0], columns[::-1] / after[0])
    inside_y = np.minimum(rows / before[1], rows[::-1] / after[1])
    outside = np.maximum(1 - inside_x, (1 - inside_y)[:, None])[..., None]  # over 0: towards the mirrored part
    image += (cv2.GaussianBlur(image, (0, 0), side * 0.02) - image) * np.clip(outside * 3 + 1, 0, 1)
    image += (np.median(image, axis=(0, 1)) - image) * np.clip(outside, 0, 1)
    return np.clip(image.round(), 0, 255).astype(np.uint8), low - before
