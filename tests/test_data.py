"""Factors, captions and people: what the text says is what the picture shows."""

import numpy as np
import pytest

from pidiff.data.factors import COLOUR_STYLES, COLOURS, SCENES, STYLES, Factors, apply_style, caption, clean_mask, composite, nearest_colour, paint_background


def disc(size=128):
    y, x = np.mgrid[0:size, 0:size]
    return ((x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 4) ** 2).astype(np.float32)


@pytest.mark.parametrize("style", COLOUR_STYLES)
@pytest.mark.parametrize("name", COLOURS)
def test_a_named_colour_is_measured_as_itself(name, style):
    rng = np.random.default_rng(0)
    for _ in range(40):
        image = composite(np.full((128, 128, 3), 90, np.uint8), disc(), paint_background(name, 128, rng))
        assert nearest_colour(apply_style(image, style), disc(), style) == name


def test_what_a_watercolour_calls_blue_is_a_photos_purple():
    image = np.full((128, 128, 3), (0, 33, 233), np.uint8)
    assert [nearest_colour(image, disc(), style) for style in ("photo", "watercolour painting")] == ["purple", "blue"]


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


def test_a_composed_picture_keeps_the_pose_of_its_code(people):
    from pidiff.data.people import compose
    index = next(i for i in range(len(people)) if people.factors(i).pose == "left")
    for seed in range(20):
        _, mask, known = compose(people, index, np.random.default_rng(seed))
        assert known.pose == "left" and np.array_equal(mask, people.masks[index].astype(np.float32) / 255)


def test_split_is_by_person(people_folder):
    from pidiff.data.people import load_people
    train, test = load_people(people_folder, 32), load_people(people_folder, 32, "test")
    assert not set(train.identity) & set(test.identity) and all(test.identity % 10 == 9) and len(train) and len(test)


def test_several_folders_become_one_set_of_different_people(people_folder, tmp_path):
    from pidiff.data.people import load_people
    one, both = load_people(people_folder, 32), load_people([people_folder, people_folder], 32)
    assert len(both) == 2 * len(one) == len(both.files) and len(both.variants()) == 2 * len(one.variants())
    assert set(both.identity % 10) == set(one.identity % 10) and (both.images[len(one):] == one.images).all()
    for file in people_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    latents = dict(np.load(people_folder / "latents.npz"))
    np.savez(tmp_path / "latents.npz", **{**latents, "mean": latents["mean"] + 1})
    with pytest.raises(ValueError, match="same mean code"):
        load_people([people_folder, tmp_path], 32)


def test_missing_pictures_are_named(people_folder, tmp_path):
    import shutil
    from pidiff.data.people import load_people
    for name in ("manifest.csv", "latents.npz"):
        shutil.copy(people_folder / name, tmp_path)
    with pytest.raises(ValueError, match="must hold every picture of its manifest"):
        load_people(tmp_path, 32)
    with pytest.raises(ValueError, match="data must be a folder with manifest.csv or photos.json"):
        load_people(tmp_path / "nowhere", 32)


class HalfGenerator:
    """Stands in for the synthesis network: features that hold the code, spread over the grid."""

    batch = 1

    def w(self, z):
        return z.astype(np.float32) * 0.3

    def features(self, w):
        torch = pytest.importorskip("torch")
        grid = torch.linspace(0.5, 1.5, 64)[:, None]
        return (torch.from_numpy(w).float()[:, :, None, None] * grid).expand(-1, 512, 64, 64)


def test_drafted_people_load_as_training_data_and_a_second_run_makes_nothing_new(people_folder, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from pidiff.data import draft
    from pidiff.data.people import load_people
    fit = draft.fit
    monkeypatch.setattr(draft, "Generator", HalfGenerator)
    monkeypatch.setattr(draft, "fit", lambda generator, people: fit(generator, people, pictures=4, steps=2))
    draft.draft(tmp_path, people_folder, people=11, seed=0)
    train, test = load_people(tmp_path, 128), load_people(tmp_path, 128, "test")
    assert (len(train), len(test)) == (11, 0) and train.images.shape[1:] == (128, 128, 3)
    assert not np.allclose(train.w[0], train.w[1]) and np.allclose(train.mean, load_people(people_folder, 32).mean, atol=1e-6)
    files = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("faces-*.tar")}
    monkeypatch.setattr(draft, "fit", None)                      # the read-out is kept
    draft.draft(tmp_path, people_folder, people=11, seed=0)
    assert files == {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("faces-*.tar")}


def test_an_interrupted_draft_can_be_used_and_goes_on(people_folder, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from pidiff.data import draft
    from pidiff.data.people import load_people
    calls = []

    class Interrupted(HalfGenerator):
        def features(self, w):
            calls.append(1)
            if len(calls) == 10:
                raise KeyboardInterrupt
            return super().features(w)

    monkeypatch.setattr(draft, "Generator", Interrupted)
    monkeypatch.setattr(draft, "PER_TAR", 4)
    monkeypatch.setattr(draft, "fit", lambda generator, people: draft.Readout().eval())
    with pytest.raises(KeyboardInterrupt):
        draft.draft(tmp_path, people_folder, people=11, seed=0)
    some = load_people(tmp_path, 128)
    assert len(some) == 8 and not (tmp_path / "faces-02.tar").exists()
    draft.draft(tmp_path, people_folder, people=11, seed=0)
    draft.write_manifest(tmp_path, [])                               # killed between the last pictures and their manifest
    draft.draft(tmp_path, people_folder, people=11, seed=0)
    whole = load_people(tmp_path, 128)
    assert len(whole) == 11 and len(calls) == 10 + 3 and np.array_equal(whole.images[:8], some.images)


@pytest.mark.slow
def test_the_read_out_learns_pictures_and_masks(people_folder):
    pytest.importorskip("torch")
    from pidiff.data import draft
    from pidiff.data.people import load_people
    people = load_people(people_folder, draft.SIZE, limit=6)

    def error(steps):
        model = draft.fit(HalfGenerator(), people, pictures=6, steps=steps)
        drawn = draft.draw(model, HalfGenerator().features(people.w), people.w)[0]
        return np.abs(drawn.astype(np.float32) - people.images).mean()

    assert error(25) < 0.8 * error(1)
