"""A face drawn with ellipses: enough for the detector, nobody's likeness, and its landmarks are known."""

import cv2
import numpy as np

# left eye, right eye, nose, mouth corners in a picture of 256 pixels
POINTS = np.array([[103, 122], [153, 122], [128, 156], [107, 180], [149, 180]], np.float32)
_HAIR, _SKIN, _BROW, _LIP = (60, 40, 30), (222, 178, 150), (70, 45, 35), (185, 95, 90)


def drawn_face(size=256, background=(150, 170, 190)):
    """Return RGB uint8 [size,size,3] with one face in the middle, its landmarks at POINTS * size / 256."""
    image = np.full((256, 256, 3), background, np.uint8)

    def oval(centre, axes, colour, start=0, end=360, width=-1, angle=0):
        cv2.ellipse(image, centre, axes, angle, start, end, colour, width, cv2.LINE_AA)

    oval((128, 110), (72, 88), _HAIR)
    oval((128, 240), (100, 50), (70, 80, 120))
    oval((128, 205), (28, 40), (190, 145, 120))
    oval((128, 132), (58, 76), _SKIN)
    image[:] = cv2.GaussianBlur(image, (0, 0), 3)
    oval((128, 82), (56, 26), _HAIR, 180, 360)
    for x in (103, 153):
        oval((x, 122), (13, 9), (200, 150, 125))
        oval((x, 122), (11, 6), (245, 245, 245))
        oval((x, 122), (5, 5), (70, 45, 30))
        oval((x, 121), (2, 2), (10, 10, 10))
        oval((x, 117), (12, 5), _BROW, 190, 350, 2)
        oval((x, 106), (15, 5), _BROW, 190, 350, 4)
    oval((128, 140), (7, 20), (232, 190, 162))
    oval((128, 158), (11, 5), (200, 150, 125))
    oval((122, 160), (3, 2), (110, 70, 60))
    oval((134, 160), (3, 2), (110, 70, 60))
    oval((128, 180), (22, 7), _LIP)
    oval((128, 179), (20, 2), (130, 60, 60))
    light = np.zeros((256, 256), np.float32)
    cv2.ellipse(light, (100, 120), (60, 80), 0, 0, 360, 1, -1)
    light = 0.85 + 0.22 * cv2.GaussianBlur(light, (0, 0), 25)[..., None]
    image = cv2.GaussianBlur(np.clip(image * light, 0, 255).astype(np.uint8), (0, 0), 1.2)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < 256 else cv2.INTER_CUBIC)
