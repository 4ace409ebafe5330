"""Factors, captions and people: what the text says is what the picture shows."""

import numpy as np
import pytest

from pidiff.data import factors
from pidiff.data.factors import COLOURS, SCENES, STYLES, Factors, apply_style, caption, clean_mask, composite, nearest_colour, paint_background


def disc(size=128):
    y, x = np.mgrid[0:size, 0:size]
    return ((x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 4) ** 2).astype(np.float32)


@pytest.mark.parametrize("name", COLOURS)
def test_a_named_colour_is_measured_as_itself(name):
    rng = np.random.default_rng(0)
    image = composite(np.full((128, 128, 3), 90, np.uint8), disc(), paint_background(name, 128, rng))
    assert nearest_colour(image, disc()) == name


@pytest.mark.parametrize("name", SCENES)
def test_scenes_differ_from_each_other_and_from_draw_to_draw(name):
    rng = np.random.default_rng(0)
    first, second = paint_background(name, 64, rng), paint_background(name, 64, rng)
    assert first.shape == (64, 64, 3) and (first != second).any()
    other = paint_background(SCENES[SCENES.index(name) - 1], 64, rng)
    assert np.abs(first.astype(int) - other).mean() > np.abs(first.astype(int) - second).mean()


@pytest.mark.parametrize("style", STYLES)
def test_styles(style):
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    out = apply_style(image, style)
    assert out.shape == image.shape and out.dtype == np.uint8
    grey = np.ptp(out.astype(int), axis=-1).max() == 0
    assert grey == (style in ("black and white photo", "pencil sketch"))
    assert (out == image).all() == (style == "photo")


def test_caption_states_every_factor_and_nothing_about_identity():
    text = caption(Factors("sepia photo", "beach", "smiling", "left"))
    assert text == "a sepia photo of a smiling person, looking left, in front of a beach"
    assert caption(Factors(background="orange")) == "a photo of a person, orange background"


def test_random_captions_never_contradict_the_factors():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = caption(Factors("photo", "blue", "serious", "right"), rng)
        words = set(text.replace(",", "").split())
        assert not words & (set(COLOURS) - {"blue"}) and not words & {"smiling", "left", "sketch", "sepia"}
        assert not any(scene in text for scene in SCENES)


def test_clean_mask_drops_bystanders():
    mask = disc()
    mask[:20, :20] = 1
    assert clean_mask(mask)[:20, :20].max() == 0 and np.array_equal(clean_mask(mask)[32:96, 32:96], mask[32:96, 32:96])


def test_composite_keeps_the_person_and_paints_the_rest():
    image, background = np.full((128, 128, 3), 10, np.uint8), np.full((128, 128, 3), 200, np.uint8)
    out = composite(image, disc(), background)
    assert (out[64, 64] == 10).all() and (out[0, 0] == 200).all()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="background must be one of red, .* got 'mauve'"):
        paint_background("mauve", 16, np.random.default_rng(0))
    with pytest.raises(ValueError, match="style must be one of"):
        apply_style(np.zeros((4, 4, 3), np.uint8), "oil")
    with pytest.raises(ValueError, match="mask must leave at least 16 background pixels, got 0"):
        nearest_colour(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8)))


def test_flipped_pictures_have_flipped_poses(people):
    """compose mirrors three in ten: the pose that it reports must then be mirrored too."""
    from pidiff.data.people import compose
    seen = set()
    for seed in range(60):
        index = next(i for i in range(len(people)) if people.factors(i).pose == "left")
        image, mask, known = compose(people, index, np.random.default_rng(seed))
        mirrored = mask[:, :mask.shape[1] // 2].sum() < mask[:, mask.shape[1] // 2:].sum()
        assert known.pose == ("right" if mirrored else "left")
        seen.add(known.pose)
    assert seen == {"left", "right"}


def test_split_is_by_person(people_folder):
    from pidiff.data.people import load_people
    train, test = load_people(people_folder, 32), load_people(people_folder, 32, "test")
    assert not set(train.identity) & set(test.identity) and all(test.identity % 10 == 9) and len(train) and len(test)


def test_missing_pictures_are_named(people_folder, tmp_path):
    import shutil
    from pidiff.data.people import load_people
    for name in ("manifest.csv", "latents.npz"):
        shutil.copy(people_folder / name, tmp_path)
    with pytest.raises(ValueError, match="must hold every picture of its manifest"):
        load_people(tmp_path, 32)
    with pytest.raises(ValueError, match="data must be a folder with manifest.csv"):
        load_people(tmp_path / "nowhere", 32)
