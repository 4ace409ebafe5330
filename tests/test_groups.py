"""Apparent groups: the typology angle of painted cheeks, the classes, and the scores of a group's people alone."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from pidiff.evaluate.groups import apparent_groups, skin_group, typology_angle
from pidiff.evaluate.report import group_scores

POINTS = np.float32([[90, 110], [166, 110], [128, 150], [100, 190], [156, 190]])


def painted(lightness, yellow, size=256):
    lab = np.full((size, size, 3), (lightness, 12, yellow), np.float32)
    return np.rint(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB) * 255).astype(np.uint8)


@pytest.mark.parametrize("lightness, yellow, group", [(75, 14, "light skin"), (62, 17, "intermediate skin"), (52, 20, "tan or darker skin"), (35, 15, "tan or darker skin")])
def test_typology_angle_of_a_painted_face(lightness, yellow, group):
    image = painted(lightness, yellow)
    image[:100] = image[200:] = 255                 # what is not the cheeks does not matter
    angle = typology_angle(image, POINTS)
    assert angle == pytest.approx(np.degrees(np.arctan2(lightness - 50, yellow)), abs=2.5)
    assert skin_group(angle) == group


def test_groups_split_people_by_skin_and_by_the_codes_age():
    def subject(name, lightness, age):
        return SimpleNamespace(name=name, reference=painted(lightness, 15, 128), w=np.array([age, 0.5]))
    people = [(subject(*row),) for row in (("a", 75, 1.0), ("b", 76, -1.0), ("c", 40, 2.0), ("d", 41, -2.0))]
    evaluation = SimpleNamespace(people=people, tools=SimpleNamespace(landmarks=lambda image: POINTS))
    known = SimpleNamespace(mean=np.zeros(2), directions={"age": np.array([1.0, 0.0])})
    assert apparent_groups(evaluation, known) == {"light skin": ["a", "b"], "tan or darker skin": ["c", "d"],
                                                 "younger half": ["b", "d"], "older half": ["a", "c"]}
    assert list(apparent_groups(evaluation, None)) == ["light skin", "tan or darker skin"]


def test_a_groups_scores_are_of_its_people(rng):
    rows = [{"person": p, "rank1": r, "similarity_reference": s} for p, r, s in (("a", 1.0, 0.6), ("b", 0.0, 0.2), ("c", 1.0, 0.9))]
    scores = group_scores(rows, {"a", "b"}, 0.5, rng)
    assert scores["rank1"]["mean"] == 0.5 and scores["similarity_reference"]["mean"] == pytest.approx(0.4)
    assert scores["verification_rate"]["mean"] == 0.5 and scores["verification_rate"]["people"] == 2
