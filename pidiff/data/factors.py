"""Picture factors that a prompt can name and a program can make exactly: background, style, expression, pose.

A caption is made from the factors of its picture, never from the identity, so that identity can only come from the
reference photo. Images are uint8 RGB [H, W, 3]; masks are float32 [H, W] in [0, 1], 1 = person.
"""

from dataclasses import dataclass

import cv2
import numpy as np

COLOURS = {
    "red": (200, 40, 40), "orange": (235, 140, 40), "yellow": (240, 215, 70), "green": (50, 150, 70),
    "blue": (45, 85, 190), "purple": (125, 60, 165), "pink": (240, 150, 185), "white": (245, 245, 245),
    "grey": (128, 128, 128), "black": (15, 15, 15),
}
SCENES = ("sunset", "beach", "night sky", "forest")
STYLES = ("photo", "black and white photo", "sepia photo", "pencil sketch", "watercolour painting")
COLOUR_STYLES = ("photo", "watercolour painting")      # styles in which a background colour can be seen
EXPRESSIONS = ("smiling", "serious")
POSES = ("left", "right", "straight ahead")
NOUNS = ("person", "face", "head")


@dataclass(frozen=True)
class Factors:
    """What is true of one picture; None = not known or not visible. `text` is a whole caption that came with it."""

    style: str = "photo"
    background: str | None = None      # a key of COLOURS or a member of SCENES
    expression: str | None = None
    pose: str | None = None
    text: str | None = None


def caption(factors: Factors, rng: np.random.Generator | None = None) -> str:
    """Prompt that states the factors. With `rng`, parts are dropped and reordered as users would."""
    if factors.text is not None:
        return factors.text

    def keep(value, probability):
        return value is not None and (rng is None or rng.random() < probability)

    noun = "person" if rng is None else rng.choice(NOUNS)
    expression = f"{factors.expression} " if keep(factors.expression, 0.75) else ""
    parts = [f"a {factors.style} of a {expression}{noun}"]
    if rng is not None and factors.style == "photo" and rng.random() < 0.3:
        parts = [rng.choice([f"{expression}{noun}", f"portrait of a {expression}{noun}", f"a {expression}{noun}"])]
    if keep(factors.pose, 0.7):
        parts.append(f"looking {factors.pose}")
    if keep(factors.background, 0.9):
        if factors.background in COLOURS:
            text = f"{factors.background} background"
            parts.append(text if rng is None or rng.random() < 0.6 else f"in front of {_article(factors.background)} {factors.background} wall")
        else:
            parts.append(f"{factors.background} background" if rng is not None and rng.random() < 0.4 else f"in front of a {factors.background}")
    if rng is not None and rng.random() < 0.3:
        parts[1:] = list(rng.permutation(parts[1:]))
    return ", ".join(parts)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def paint_background(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Backdrop for a named colour (with slight shading, as a wall has) or scene."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1)
    if name in COLOURS:
        base = np.array(COLOURS[name], np.float32) + rng.normal(0, 5, 3)
        angle = rng.uniform(0, 2 * np.pi)
        shade = ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)) * rng.uniform(0, 24)
        return np.clip(base + shade[..., None], 0, 255).astype(np.uint8)
    painter = {"sunset": _sunset, "beach": _beach, "night sky": _night_sky, "forest": _forest}
    if name not in painter:
        raise ValueError(f"background must be one of {', '.join([*COLOURS, *SCENES])}, got {name!r}")
    return np.clip(painter[name](x, y, rng), 0, 255).astype(np.uint8)


def _blend(a, b, weight):
    return np.array(a, np.float32) * (1 - weight[..., None]) + np.array(b, np.float32) * weight[..., None]


def _sunset(x, y, rng):
    horizon = rng.uniform(0.6, 0.8)
    sky = _blend((90, 50, 120), (255, 150, 60), np.clip(y / horizon, 0, 1) ** 1.5)
    sun = np.exp(-((x - rng.uniform(0.1, 0.9)) ** 2 + (y - horizon + 0.1) ** 2) / 0.02)
    return np.where((y > horizon)[..., None], np.array((60, 30, 50), np.float32), _blend(0, 0, sun) + sky + 90 * sun[..., None])


def _beach(x, y, rng):
    sea, sand = rng.uniform(0.35, 0.5), rng.uniform(0.65, 0.8)
    sky = _blend((120, 180, 240), (205, 230, 250), np.clip(y / sea, 0, 1))
    picture = np.where((y > sea)[..., None], np.array((40, 130, 170), np.float32), sky)
    return np.where((y > sand + 0.02 * np.sin(x * 9))[..., None], np.array((230, 205, 150), np.float32), picture)


def _night_sky(x, y, rng):
    picture = _blend((8, 8, 30), (30, 35, 80), y)
    for row, column in rng.integers(0, len(x), (40, 2)):
        picture[row, column] = rng.uniform(150, 255)
    return cv2.GaussianBlur(picture, (3, 3), 0.5)


def _forest(x, y, rng):
    size = len(x)
    noise = cv2.resize(rng.random((size // 8, size // 8)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    picture = _blend((20, 50, 20), (90, 150, 60), np.clip(noise, 0, 1))
    for centre in rng.uniform(0, 1, 6):
        trunk = np.abs(x - centre) < rng.uniform(0.01, 0.03)
        picture[trunk] = (60, 42, 28)
    return picture


def clean_mask(mask: np.ndarray) -> np.ndarray:
    """Mask without what is not connected to the picture's middle (bystanders, fog), float32 [H, W] in [0, 1]."""
    _, labels = cv2.connectedComponents((mask > 0.4).astype(np.uint8))
    size = len(mask)
    middle = labels[size // 4:3 * size // 4, size // 4:3 * size // 4]
    main = np.bincount(middle[middle > 0].ravel(), minlength=2).argmax()
    return mask * cv2.dilate((labels == main).astype(np.float32), np.ones((5, 5)))


def composite(image: np.ndarray, mask: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Person of `image` over `background`; the mask's soft edge is kept, its stray fog is cut off."""
    alpha = np.clip((mask - 0.3) / 0.6, 0, 1)[..., None]
    return (image * alpha + background * (1 - alpha) + 0.5).astype(np.uint8)


def apply_style(image: np.ndarray, style: str) -> np.ndarray:
    """Render a picture in one of STYLES with OpenCV filters; `photo` returns it unchanged."""
    if style == "photo":
        return image
    if style == "pencil sketch":
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        blurred = cv2.GaussianBlur(255 - grey, (0, 0), max(1.0, len(grey) / 40))
        sketch = cv2.divide(grey, 255 - blurred, scale=256)
        return cv2.cvtColor(sketch, cv2.COLOR_GRAY2RGB)
    if style == "watercolour painting":
        smooth = cv2.edgePreservingFilter(image, flags=1, sigma_s=len(image) / 12, sigma_r=0.45)
        hsv = cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV).astype(np.float32)
        hsv[..., 1] = np.clip(hsv[..., 1] * 1.35, 0, 255)
        hsv[..., 2] = np.clip(hsv[..., 2] * 0.9 + 36, 0, 255)
        return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
    if style == "black and white photo":
        return np.repeat(grey, 3, -1).astype(np.uint8)
    if style == "sepia photo":
        return np.clip(grey * np.array([1.07, 0.9, 0.68], np.float32) + 6, 0, 255).astype(np.uint8)
    raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")


def nearest_colour(image: np.ndarray, mask: np.ndarray, style: str = "photo") -> str:
    """Name of the background's colour: the entry of COLOURS, rendered in `style`, nearest to its median in CIELAB. (A watercolour's
    colours are stronger than a photo's: its blue can be nearer to a photo's purple.)"""
    def lab(rgb):
        return cv2.cvtColor(np.asarray(rgb, np.float32).reshape(1, -1, 3) / 255, cv2.COLOR_RGB2LAB)[0]

    outside = image[mask < 0.1]
    if len(outside) < 16:
        raise ValueError(f"mask must leave at least 16 background pixels, got {len(outside)}")
    flat = [apply_style(np.full((32, 32, 3), colour, np.uint8), style)[16, 16] for colour in COLOURS.values()]
    distance = np.linalg.norm(lab(flat) - lab(np.median(outside, 0)), axis=1)
    return list(COLOURS)[int(distance.argmin())]
