"""Readers of edit strength, on numbers that are known, and the loop over strengths with a generator that obeys."""

from types import SimpleNamespace

import numpy as np
import pytest

from pidiff.evaluate.edits import STRENGTHS, DirectionReader, Ridge, follow, spearman


def test_ridge_finds_a_linear_rule_and_a_penalty_shrinks_it(rng):
    x, weight = rng.normal(size=(200, 5)), np.array([1.0, -2.0, 0.0, 0.5, 3.0])
    y = x @ weight + 4
    exact, shrunk = Ridge(x, y, 1e-9), Ridge(x, y, 10.0)
    assert exact(x[7]) == pytest.approx(y[7], abs=1e-6)
    assert np.abs(shrunk.weight).sum() < 0.2 * np.abs(exact.weight).sum() and shrunk(x.mean(0)) == pytest.approx(y.mean(), abs=1e-6)


def test_spearman_sees_order_alone():
    assert spearman([1, 2, 3, 4], [0.1, 0.2, 10, 11]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(spearman([1, 2], [1, 2]))


class Tools:
    """Pictures are [[nose, age]]: landmarks with the nose there, an embedding that says the age."""

    def landmarks(self, picture):
        return None if np.isnan(picture).any() else np.array([[0, 0], [1, 0], [0.5 + picture[0, 0], 0.5], [0.3, 1], [0.7, 1]], float)

    def embed(self, picture):
        return None if np.isnan(picture).any() else np.array([np.cos(picture[0, 1]), np.sin(picture[0, 1])])


class Obedient:
    def edit(self, person, name, strength):
        return person + strength * {"pose": np.array([0.1, 0]), "age": np.array([0, -0.1])}[name]

    def generate(self, person, text, seed):
        return np.array([person]), None


@pytest.fixture
def reader(rng):
    scores = rng.normal(size=(60, 2))
    people = SimpleNamespace(images=[np.array([[0.1 * p, 0.1 * a]]) for p, a in scores], w=scores, mean=np.zeros(2),
                             directions={"pose": np.array([1.0, 0]), "age": np.array([0, 1.0])})
    people.images[3] = np.full((1, 2), np.nan)                          # no face there: left out
    return DirectionReader(Tools(), people), people


def test_readers_follow_the_exact_score(reader):
    read, people = reader
    assert read(people.images[0])["pose"] == pytest.approx(people.w[0, 0], abs=0.1) and read(people.images[3]) is None
    assert min(read.correlations(people).values()) > 0.97


def test_an_edit_that_obeys_scores_one_and_one_that_goes_backwards_minus_one(reader):
    scores = follow(Obedient(), np.zeros(2), np.array([1.0, 0.0]), "a face", reader[0])
    assert scores["pose"] == (pytest.approx(1), pytest.approx(1)) and scores["age"][0] == pytest.approx(-1)
    assert scores["age"][1] == pytest.approx(np.mean(np.cos(0.1 * np.array(STRENGTHS))))
