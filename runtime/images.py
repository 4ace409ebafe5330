"""Reading photos safely and writing PNG files. Pictures are RGB uint8 arrays [H, W, 3]."""

import os
import struct
from pathlib import Path

import numpy as np

from .errors import FaceError, PidiffError
from .files import reason, write_atomic

MAX_SIDE = 8192  # pixels
MAX_PIXELS = 40_000_000
MAX_FILE_BYTES = 100 << 20


def opencv():
    """Import OpenCV where it is used, quiet: our own sentence says what is wrong with a picture."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    import cv2

    return cv2


def read_image(photo):
    """Return a photo as RGB uint8 [H, W, 3], turned upright by its EXIF orientation, transparency laid on white.

    photo: a path to a PNG, JPEG or WebP file, or an array that already has this form. The size is read from the file's
    header and checked before anything is decoded. Raises FaceError.
    """
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
            raise FaceError(f"photo must be a uint8 array [H, W, 3], got {photo.dtype} {list(photo.shape)}")
        check_size("photo", photo.shape[1], photo.shape[0])
        return photo
    return decode_image(str(photo), _read(photo))


def decode_image(name, data):
    """The same for the bytes of a file; `name` is for messages."""
    width, height, alpha = parse_header(name, data)
    check_size(name, width, height)
    return _decode(name, data, alpha)


def parse_header(name, data):
    """Return (width, height, has_alpha) from the bytes of a PNG, JPEG or WebP file, without decoding it.

    Raises FaceError for other content and for a file that was cut off.
    """
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height, _, colour = struct.unpack(">IIBB", data[16:26])
            return _whole(name, b"IEND" in data[-64:], width, height, colour in (4, 6))
        if data[:3] == b"\xff\xd8\xff":
            width, height, start = _jpeg_size(data)
            return _whole(name, data.rfind(b"\xff\xd9") > start, width, height, False)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            whole = len(data) >= struct.unpack("<I", data[4:8])[0] + 8
            return _whole(name, whole, *_webp_size(data))
    except (struct.error, IndexError):
        raise FaceError(f"photo must be a whole picture, got {name}, which was cut off or damaged") from None
    raise FaceError(f"photo must be a PNG, JPEG or WebP picture, got {name}, which is none")


def check_size(name, width, height):
    """Raise FaceError for a picture that is empty or larger than the limits."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise FaceError(f"photo must have at most {MAX_SIDE} pixels a side and {MAX_PIXELS // 10**6} million in all, "
                        f"got {width}x{height} in {name}")


def encode_png(image):
    """Return the bytes of a PNG of an RGB uint8 image [H, W, 3]."""
    cv2 = opencv()
    ok, data = cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR))
    if not ok:
        raise PidiffError(f"image must be encodable as PNG, got {image.dtype} {list(image.shape)}")
    return data.tobytes()


def write_png(path, image):
    """Write an RGB uint8 image [H, W, 3] as PNG, whole or not at all."""
    write_atomic(path, encode_png(image))


def heat_map(image, weights):
    """Return `image` [H,W,3] uint8 greyed, with `weights` [h,w] in [0,1] laid over it in colour (enlarged to fit)."""
    cv2 = opencv()
    weights = cv2.resize(np.clip(weights, 0, 1).astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    colour = cv2.applyColorMap((np.clip(weights, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    grey = image.mean(axis=2, keepdims=True)
    return (0.4 * grey + 0.6 * colour).round().astype(np.uint8)


def _read(photo):
    path = Path(photo)
    try:
        if not path.is_file():
            fault = "does not exist" if not path.exists() else "is a folder" if path.is_dir() else "is no regular file"
            raise FaceError(f"photo must be a picture file, got {path}, which {fault}")
        if path.stat().st_size > MAX_FILE_BYTES:
            size = path.stat().st_size >> 20
            raise FaceError(f"photo must be at most {MAX_FILE_BYTES >> 20} MiB, got {size} MiB in {path}")
        return path.read_bytes()
    except OSError as e:
        raise FaceError(f"photo must be readable, got {path}: {reason(e)}") from e


def _whole(name, whole, width, height, alpha):
    if not whole:
        raise FaceError(f"photo must be a whole picture, got {name}, which was cut off or damaged")
    return width, height, alpha


def _jpeg_size(data):
    """Walk the segments to the frame header (SOFn); return width, height and its position."""
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5:at + 9])
            return width, height, at
        at += 2 + struct.unpack(">H", data[at + 2:at + 4])[0]
    raise IndexError


def _webp_size(data):
    """Read the canvas of the three kinds of WebP: extended, lossless, lossy."""
    kind = data[12:16]
    if kind == b"VP8X":
        size = lambda at: int.from_bytes(data[at:at + 3], "little") + 1
        return size(24), size(27), bool(data[20] & 0x10)
    if kind == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF, False


def _decode(name, data, alpha):
    cv2 = opencv()
    buffer = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR)  # applies the EXIF orientation
        cut_out = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED) if alpha else None
    except cv2.error as e:
        raise FaceError(f"photo must be a picture that OpenCV can decode, got {name}: {e.err}") from e
    if image is None:
        raise FaceError(f"photo must be a whole picture, got {name}, which was cut off or damaged")
    if cut_out is not None and cut_out.shape[2:] == (4,) and cut_out.shape[:2] == image.shape[:2]:
        opaque = cut_out[..., 3:].astype(np.float32) / np.iinfo(cut_out.dtype).max
        image = (image * opaque + 255 * (1 - opaque)).round().astype(np.uint8)
    check_size(name, image.shape[1], image.shape[0])
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
