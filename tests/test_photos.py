"""Photos of real people as training data: found, cut, written as shards, read back, trained on."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pidiff.data.__main__ import main as data_main
from pidiff.data.people import compose, load_people
from pidiff.data.photos import Pictures
from pidiff.data.prepare import prepare, source_photos
from pidiff.train.__main__ import main as train_main

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("person-*.jpg"))
pytestmark = pytest.mark.skipif(len(EXAMPLES) < 3, reason="examples/ is not part of the installed package")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """anna with two photos (one with caption and mask), ben alone, carl in a tar shard, and a wall."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "anna").mkdir()
    shutil.copy(EXAMPLES[0], folder / "anna" / "at.home.jpg")
    image = cv2.imread(str(EXAMPLES[0]))[:, ::-1]
    wide = cv2.copyMakeBorder(image, 0, 0, 40, 200, cv2.BORDER_REPLICATE)
    cv2.imwrite(str(folder / "anna" / "wide.png"), wide)
    (folder / "anna" / "wide.txt").write_text("a photo of a person beside a wall\n")
    mask = np.zeros(wide.shape[:2], np.uint8)
    mask[:, :100] = 255
    cv2.imwrite(str(folder / "anna" / "wide.mask.png"), mask)
    shutil.copy(EXAMPLES[1], folder / "ben.jpg")
    cv2.imwrite(str(folder / "wall.png"), np.full((200, 200, 3), 127, np.uint8))
    (folder / "text.jpg").write_text("no picture")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name, data in (("carl/0001.jpg", EXAMPLES[2].read_bytes()), ("carl/0001.txt", b"carl")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    total, left_out = prepare(out, source, 128, aligned=False)
    assert (total, left_out.total()) == (4, 2)
    return out


def test_source_names_people_captions_and_masks(source):
    photos = {p.key: p for p in source_photos(source)}
    assert set(photos) == {"anna/at_home", "anna/wide", "ben/ben", "wall/wall", "text/text", "carl/0001"}
    assert photos["anna/wide"].caption == "a photo of a person beside a wall" and photos["anna/wide"].mask
    assert photos["carl/0001"].caption == "carl" and photos["ben/ben"].mask is None


def test_pictures_come_back_with_faces_masks_and_captions(prepared):
    people = load_people(prepared, 128, split=None)
    assert people.files == ["anna/at_home", "anna/wide", "ben/ben", "carl/0001"] and people.identity.tolist() == [0, 0, 1, 2]
    assert people.captions == ["a photo of a person", "a photo of a person beside a wall", "a photo of a person", "carl"]
    assert people.images.shape == (4, 128, 128, 3) and people.images[1:3].shape == (2, 128, 128, 3) and people.faces[0].shape == (256, 256, 3)
    photo = cv2.imread(str(EXAMPLES[0]))[..., ::-1].astype(np.float32)
    assert np.abs(people.images[0] - cv2.resize(photo, (128, 128), interpolation=cv2.INTER_AREA)).mean() < 6
    assert np.abs(people.images[1].astype(np.float32) - people.images[0][:, ::-1]).mean() < 6     # the square is around the face
    image, mask, factors = compose(people, 3, np.random.default_rng(0))
    assert factors.text == "carl" and np.array_equal(image, people.images[3]) and mask.max() <= 1
    assert (people.faces[2][:8, :8] > 230).mean() > 0.5  # background painted white


def test_masks_lie_on_the_face(prepared):
    """Where none was given, the mask of the aligned face is laid back over the photo: the middle is the person."""
    people = load_people(prepared, 128, split=None)
    for i in (0, 2, 3):
        assert people.masks[i][50:80, 50:80].mean() > 240 and people.masks[i][:10, :10].mean() < 60
    given = people.masks[1]                             # its left 60 of 256 pixels
    assert given[:, :25].min() == 255 and given[:, 40:].max() == 0


def test_a_stopped_run_goes_on_and_a_finished_one_is_left(source, prepared, tmp_path, monkeypatch):
    from pidiff.data import prepare as photos
    monkeypatch.setattr(photos, "PER_TAR", 2)
    written = []
    real = photos._write_shard

    def stop_after_one(path, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        return real(path, *rest)

    monkeypatch.setattr(photos, "_write_shard", stop_after_one)
    assert data_main(["photos", str(source), "--out", str(tmp_path), "--size", "128"]) == 130
    with pytest.raises(ValueError, match="data must be complete"):
        load_people(tmp_path, 128, split=None)
    first = written[0].stat().st_mtime_ns
    monkeypatch.setattr(photos, "_write_shard", real)
    assert data_main(["photos", str(source), "--out", str(tmp_path), "--size", "128"]) == 0
    assert written[0].stat().st_mtime_ns == first
    assert load_people(tmp_path, 128, split=None).files == load_people(prepared, 128, split=None).files


def test_bad_sources_give_one_sentence(source, prepared, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cases = [([str(tmp_path / "missing")], "photos must be a folder"), ([str(tmp_path / "empty")], "photos must hold a picture with a face"),
             ([str(source), "--out", str(prepared), "--size", "64"], "out must be empty or begun with the same settings")]
    for arguments, sentence in cases:
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out" / sentence[:5])]
        assert data_main(["photos", *arguments, *out]) == 1
        assert sentence in capsys.readouterr().err


def test_a_damaged_picture_is_named(prepared, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"\0" * 2048)
    with pytest.raises(ValueError, match="data must hold whole pictures"):
        Pictures([(path, 512, 100)], 16)[0]
    state = json.loads((prepared / "photos.json").read_text())
    assert state["shards"] == 1 and state["settings"]["size"] == 128


@pytest.mark.parametrize("aligned", [False, True])
def test_stages_train_on_photos(aligned, source, prepared, tmp_path, capsys):
    """Base and adapter go on from the shipped model; stages that need exact codes say so."""
    data = prepared
    if aligned:
        data = tmp_path / "aligned"
        prepare(data, source, 128, aligned=True)
        people = load_people(data, 128, split=None)
        assert people.captions[0] is None and people.captions[3] == "carl"
        assert any(compose(people, 0, np.random.default_rng(i))[2].background for i in range(4))
    model = tmp_path / "model"
    shutil.copytree(ROOT / "models" / "mini", model, ignore=shutil.ignore_patterns("manifest.json"))
    for stage in ("adapter",) if aligned else ("adapter", "base"):
        arguments = ["--data", str(data), "--model", str(model), "--steps", "1", "--batch-size", "2"]
        assert train_main([stage, *arguments]) == 0, capsys.readouterr().err
    assert train_main(["encoder", "--data", str(data), "--model", str(model)]) == 1
    assert "data must have exact codes for the encoder stage" in capsys.readouterr().err
