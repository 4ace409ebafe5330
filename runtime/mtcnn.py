"""Face detection with MTCNN (arXiv 1604.02878): pyramid, boxes and suppression in numpy around three small graphs.

The numbers and the resampling follow facenet-pytorch 2.6.0, so that the same photo gives the same boxes; areas come
from one integral image instead of one resized picture per scale and per box.
"""

from dataclasses import dataclass

import numpy as np

from .images import opencv

THRESHOLDS = (0.6, 0.7, 0.7)  # PNet, RNet, ONet
FACTOR = 0.709  # from one scale to the next
CELL, STRIDE = 12, 2  # of PNet, in pixels


@dataclass(frozen=True)
class Detections:
    """Faces of one photo: boxes [N,4] (x0, y0, x1, y1), scores [N], points [N,5,2] (x, y), float32, in pixels.

    Points: left eye, right eye, nose, left and right mouth corner, as seen in the picture.
    """

    boxes: np.ndarray
    scores: np.ndarray
    points: np.ndarray

    def __len__(self):
        return len(self.scores)

    def __getitem__(self, index):
        return Detections(self.boxes[index], self.scores[index], self.points[index])


class Mtcnn:
    """Detector over three callables `net(image [B,3,H,W] float32) -> dict of outputs` (pnet, rnet, onet)."""

    def __init__(self, pnet, rnet, onet, min_face=32, max_side=800):
        self.pnet, self.rnet, self.onet = pnet, rnet, onet
        self.min_face, self.max_side = min_face, max_side

    def detect(self, image):
        """Find faces in an RGB uint8 image [H,W,3], best first.

        Photos with a side over `max_side` are searched at that size: a face then needs `min_face` pixels there.
        """
        height, width = image.shape[:2]
        shrink = max(1.0, max(height, width) / self.max_side)
        if shrink > 1:
            cv2 = opencv()
            size = max(1, round(width / shrink)), max(1, round(height / shrink))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        found = self._cascade(image)
        scale = np.array([width / image.shape[1], height / image.shape[0]], np.float32)
        return Detections(found.boxes * np.tile(scale, 2), found.scores, found.points * scale)

    def _cascade(self, image):
        area = _AreaSampler(image)
        boxes = self._propose(area)
        if len(boxes):
            boxes = self._refine(area, boxes)
        if not len(boxes):
            return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32))
        return self._output(area, boxes)

    def _propose(self, area):
        """Stage 1: PNet over the pyramid -> square boxes [N,5] (box, score)."""
        found, scale = [np.zeros((0, 9), np.float32)], CELL / self.min_face
        while min(area.height, area.width) * scale >= CELL:
            image = area.resize(int(area.height * scale + 1), int(area.width * scale + 1))
            out = self.pnet(image[None])
            score, offsets = out["probabilities"][0, 1], out["offsets"][0]
            y, x = np.nonzero(score >= THRESHOLDS[0])
            cells = np.stack([x, y], 1).astype(np.float32)
            corners = [np.floor((STRIDE * cells + 1) / scale), np.floor((STRIDE * cells + CELL) / scale)]
            boxes = np.concatenate([*corners, score[y, x][:, None], offsets[:, y, x].T], 1).astype(np.float32)
            found.append(boxes[_nms(boxes[:, :4], boxes[:, 4], 0.5)])
            scale *= FACTOR
        boxes = np.concatenate(found)
        boxes = boxes[_nms(boxes[:, :4], boxes[:, 4], 0.7)]
        size = np.tile(boxes[:, 2:4] - boxes[:, :2], 2)
        return np.concatenate([_square(boxes[:, :4] + boxes[:, 5:9] * size), boxes[:, 4:5]], 1)

    def _refine(self, area, boxes):
        """Stage 2: RNet keeps and moves boxes [N,5]."""
        crops, boxes = area.crops(boxes, 24)
        if not len(boxes):
            return boxes
        out = self.rnet(crops)
        score = out["probabilities"][:, 1]
        keep = np.nonzero(score > THRESHOLDS[1])[0]
        keep = keep[_nms(boxes[keep, :4], score[keep], 0.7)]
        moved = _square(_move(boxes[keep, :4], out["offsets"][keep]))
        return np.concatenate([moved, score[keep, None]], 1)

    def _output(self, area, boxes):
        """Stage 3: ONet gives final boxes and landmarks."""
        crops, boxes = area.crops(boxes, 48)
        if not len(boxes):
            return Detections(boxes[:, :4], boxes[:, 4], np.zeros((0, 5, 2), np.float32))
        out = self.onet(crops)
        score = out["probabilities"][:, 1]
        keep = np.nonzero(score > THRESHOLDS[2])[0]
        boxes, score = boxes[keep, :4], score[keep]
        points = out["landmarks"][keep].reshape(-1, 2, 5).transpose(0, 2, 1)
        size = (boxes[:, 2:4] - boxes[:, :2] + 1)[:, None]
        points = points * size + boxes[:, None, :2] - 1
        boxes = _move(boxes, out["offsets"][keep])
        best = _nms(boxes, score, 0.7, smaller=True)
        return Detections(boxes[best], score[best], points[best].astype(np.float32))


class _AreaSampler:
    """Means over pixel rectangles of one image, normalised to about [-1, 1] for the nets (adaptive average pooling)."""

    def __init__(self, image):
        self.height, self.width = image.shape[:2]
        self._sums = opencv().integral(image)  # [H+1, W+1, 3] int32: exact up to 8 million pixels

    def resize(self, height, width):
        """Return the whole image at another size, float32 [3, height, width]."""
        zero = np.zeros(1, int)
        (y0, y1), (x0, x1) = _bins(zero, zero + self.height, height), _bins(zero, zero + self.width, width)
        rows = self._sums[y1[0]] - self._sums[y0[0]]
        return _normalise(rows[:, x1[0]] - rows[:, x0[0]], np.outer(y1 - y0, x1 - x0))

    def crops(self, boxes, size):
        """Cut square boxes [N,5] out at `size` pixels: ([M,3,size,size] float32, the M boxes with any pixels)."""
        corner = np.trunc(boxes[:, :4]).astype(int)
        x0, y0 = np.maximum(corner[:, 0], 1) - 1, np.maximum(corner[:, 1], 1) - 1
        x1, y1 = np.minimum(corner[:, 2], self.width), np.minimum(corner[:, 3], self.height)
        ok = (x1 > x0) & (y1 > y0)
        (y0, y1), (x0, x1) = (_bins(a[ok], (b - a)[ok], size) for a, b in ((y0, y1), (x0, x1)))
        y0, y1, x0, x1 = y0[:, :, None], y1[:, :, None], x0[:, None], x1[:, None]
        total = self._sums[y1, x1] - self._sums[y0, x1] - self._sums[y1, x0] + self._sums[y0, x0]
        return _normalise(total, (y1 - y0) * (x1 - x0)), boxes[ok]


def _normalise(sums, counts):
    """Sums [...,h,w,3] over counts [...,h,w] of pixels -> planes [...,3,h,w] float32 in about [-1, 1]."""
    mean = np.moveaxis(sums / counts[..., None].astype(np.float32), -1, -3)
    return np.ascontiguousarray((mean - 127.5) * 0.0078125, dtype=np.float32)


def _bins(start, length, count):
    """Return first and end indices [N,count] of `count` bins over [start, start + length), as adaptive pooling has them."""
    i = np.arange(count)
    return start[:, None] + i * length[:, None] // count, start[:, None] + -(-(i + 1) * length[:, None] // count)


def _square(boxes):
    """Make boxes [N,4] square around their centres, with the longer side."""
    size = boxes[:, 2:4] - boxes[:, :2]
    side = size.max(1, keepdims=True)
    corner = boxes[:, :2] + size * 0.5 - side * 0.5
    return np.concatenate([corner, corner + side], 1).astype(np.float32)


def _move(boxes, offsets):
    """Shift box edges [N,4] by offsets [N,4] in units of the box size."""
    return (boxes + offsets * np.tile(boxes[:, 2:4] - boxes[:, :2] + 1, 2)).astype(np.float32)


def _nms(boxes, scores, threshold, smaller=False):
    """Greedy non-maximum suppression: indices of kept boxes, best first.

    Overlap = intersection over union, or with `smaller` over the smaller box, counted in whole pixels as MTCNN does.
    """
    pixel = 1.0 if smaller else 0.0
    x0, y0, x1, y1 = boxes.T.astype(np.float64)
    areas = (x1 - x0 + pixel) * (y1 - y0 + pixel)
    order, keep = np.argsort(-scores, kind="stable"), []
    while order.size:
        best, rest = order[0], order[1:]
        keep.append(best)
        width = np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest]) + pixel
        height = np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest]) + pixel
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        whole = np.minimum(areas[best], areas[rest]) if smaller else areas[best] + areas[rest] - shared
        order = rest[shared <= threshold * whole]
    return np.array(keep, dtype=np.int64)
