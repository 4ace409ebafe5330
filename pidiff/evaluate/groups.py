"""Apparent groups of people, as far as pictures and codes tell them: skin tone and age.

Skin tone is the individual typology angle, ITA = atan((L* - 50) / b*), of the cheeks in the reference photo, in the classes of
Chardon et al. 1991 (doi 10.1111/j.1467-2494.1991.tb00561.x), joined to three. It depends on the light in the photo and says
nothing about a person's origin. Age is the exact code's score along the age direction, where codes are known.
"""

import cv2
import numpy as np

from .readers import WORKING_SIZE

LIGHT, INTERMEDIATE = 41.0, 28.0        # degrees; above: light, above: intermediate, else tan or darker


def typology_angle(image: np.ndarray, points: np.ndarray) -> float:
    """ITA in degrees of both cheeks of an RGB uint8 picture [H, W, 3]; points [5, 2] are eyes, nose and mouth corners in its pixels.

    A cheek is a disc half-way between an eye and its mouth corner, moved outwards; the median leaves out hair and glasses.
    """
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    eyes, mouth = points[:2], points[3:]
    centres = (eyes + mouth) / 2 + 0.15 * (eyes - eyes.mean(0))
    radius = 0.12 * np.linalg.norm(eyes[1] - eyes[0])
    y, x = np.mgrid[:image.shape[0], :image.shape[1]]
    cheeks = np.min([np.hypot(x - c[0], y - c[1]) for c in centres], 0) <= max(radius, 1)
    if not cheeks.any():
        return float("nan")
    lightness, _, yellow = np.median(lab[cheeks], 0)
    return float(np.degrees(np.arctan2(lightness - 50, yellow)))


def skin_group(angle: float) -> str:
    return "light skin" if angle > LIGHT else "intermediate skin" if angle > INTERMEDIATE else "tan or darker skin"


def apparent_groups(evaluation, known) -> dict[str, list[str]]:
    """Group -> names of its people. `known`: People with exact codes and an age direction, or None."""
    groups: dict[str, list[str]] = {}
    for subject, *_ in evaluation.people:
        points = evaluation.tools.landmarks(subject.reference)      # of the picture at WORKING_SIZE
        if points is not None:
            size = len(subject.reference) / WORKING_SIZE
            groups.setdefault(skin_group(typology_angle(subject.reference, points * size)), []).append(subject.name)
    if known is not None and "age" in known.directions:
        ages = {s.name: float((s.w - known.mean) @ known.directions["age"]) for s, *_ in evaluation.people}
        middle = float(np.median(list(ages.values())))
        groups["younger half"] = [name for name, age in ages.items() if age <= middle]
        groups["older half"] = [name for name, age in ages.items() if age > middle]
    return groups
