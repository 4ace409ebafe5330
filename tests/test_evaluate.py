"""Scores of an evaluation against cases whose answer is known, and the command from end to end."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pidiff.data.factors import STYLES, apply_style, caption
from pidiff.evaluate import metrics
from pidiff.evaluate.__main__ import main
from pidiff.evaluate.generators import BundleGenerator, CheckpointGenerator
from pidiff.evaluate.protocol import PATTERNS, prompt_factors
from pidiff.evaluate.readers import face_shape, style_features

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MINI = Path(__file__).resolve().parent.parent / "models" / "mini"


def unit(*values):
    return np.array(values, np.float64) / np.linalg.norm(values)


def test_interval_draws_people_not_pictures(rng):
    people = np.repeat(np.arange(20), 50)
    values = np.repeat(rng.random(20), 50)                  # pictures of one person agree: 20 observations, not 1,000
    got = metrics.interval(values, people, rng)
    by_picture = metrics.interval(values, np.arange(1000), rng)
    assert got["mean"] == pytest.approx(values.mean(), abs=1e-4) and got["people"] == 20
    assert got["low"] < got["mean"] < got["high"]
    assert got["high"] - got["low"] > 4 * (by_picture["high"] - by_picture["low"])


def test_interval_leaves_out_what_says_nothing(rng):
    got = metrics.interval([1.0, np.nan, 0.0, np.nan], ["a", "a", "b", "c"], rng)
    assert got["mean"] == 0.5 and got["people"] == 2
    assert metrics.interval([np.nan], ["a"], rng) == {"mean": None, "low": None, "high": None, "people": 0}


def test_rank1_and_similarity():
    gallery = np.stack([unit(1, 0, 0), unit(0, 1, 0)])
    assert metrics.rank1(unit(0.9, 0.3, 0), gallery, 0) == 1 and metrics.rank1(unit(0.3, 0.9, 0), gallery, 0) == 0
    assert metrics.rank1(None, gallery, 0) == 0 and metrics.similarity(None, gallery[0]) == 0
    assert metrics.similarity(gallery[0], gallery[0]) == 1


def test_threshold_keeps_the_false_match_rate(rng):
    impostor = rng.normal(size=10_000)
    for rate in (1e-2, 1e-3):
        share = (impostor > metrics.threshold(impostor, rate)).mean()
        assert 0.5 * rate < share <= rate


def test_copy_paste_is_one_for_a_copy_and_zero_in_the_middle():
    reference, other = unit(1, 0), unit(0, 1)
    assert metrics.copy_paste(reference, reference, other) == pytest.approx(1)
    assert metrics.copy_paste(unit(1, 1), reference, other) == pytest.approx(0)
    assert metrics.copy_paste(other, reference, other) == pytest.approx(-1)
    assert np.isnan(metrics.copy_paste(None, reference, other))


def test_changes_and_shares():
    a, b = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    b[:2] = 10
    b[2:] = 200
    outside = np.zeros((4, 4), bool)
    outside[:2] = True
    assert metrics.change_outside(a, b, outside) == 10
    assert np.isnan(metrics.change_outside(a, b, np.zeros((4, 4), bool)))
    amount = np.float32([[3, 1], [0, 0]])
    assert metrics.share_inside(amount, np.float32([[1, 0], [1, 1]])) == 0.75
    assert np.isnan(metrics.share_inside(amount * 0, amount))
    assert metrics.diversity([a, b]) == pytest.approx(105) and np.isnan(metrics.diversity([a]))


def test_discriminant_finds_classes(rng):
    centres = {"a": (0, 0), "b": (4, 0), "c": (0, 4)}
    labels = [name for name in centres for _ in range(50)]
    features = np.stack([rng.normal(centres[name], 1) for name in labels])
    reader = metrics.Discriminant(features, labels)
    fresh = [(reader(rng.normal(centres[name], 1)), name) for name in centres for _ in range(50)]
    assert np.mean([a == b for a, b in fresh]) > 0.9


def test_styles_are_told_apart_on_photos():
    photos = [cv2.imread(str(p))[..., ::-1] for p in sorted(EXAMPLES.glob("person-*.jpg"))]
    rows = [(style_features(apply_style(p, s)), s) for p in photos[:3] for s in STYLES]
    reader = metrics.Discriminant(np.stack([f for f, _ in rows]), [s for _, s in rows])
    right = [reader(style_features(apply_style(p, s))) == s for p in photos[3:] for s in STYLES]
    assert np.mean(right) >= 0.8


def test_face_shape_does_not_depend_on_position_size_and_rotation(rng):
    points = np.float32([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]]) + rng.normal(0, 1, (5, 2))
    turn = 3 * np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    np.testing.assert_allclose(face_shape(points @ turn.T + 17), face_shape(points), atol=1e-6)
    smile = points.copy()
    smile[3:, 0] += (-6, 6)
    assert np.abs(face_shape(smile) - face_shape(points)).max() > 0.1


def test_prompts_name_their_factors_and_rotate_colours():
    texts = [caption(prompt_factors(p, 0)) for p in range(len(PATTERNS))]
    assert len(set(texts)) == len(PATTERNS)
    assert "smiling" in texts[1] and "looking left" in texts[8] and "pencil sketch" in texts[7] and "beach" in texts[6]
    assert len({prompt_factors(0, i).background for i in range(10)}) == 10


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A stand-in for a face-recognition network: the aligned face at 8 x 8."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    nodes = [helper.make_node("AveragePool", ["x"], ["small"], kernel_shape=[14, 14], strides=[14, 14]),
             helper.make_node("Flatten", ["small"], ["y"])]
    graph = helper.make_graph(nodes, "embedder", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 112, 112])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 192])])
    path = tmp_path_factory.mktemp("embedder") / "embedder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def two_people(tmp_path_factory):
    """Two people with two photos each: the second is darker."""
    folder = tmp_path_factory.mktemp("two")
    for i in (2, 4):
        photo = cv2.imread(str(EXAMPLES / f"person-{i}.jpg"))
        (folder / f"p{i}").mkdir()
        cv2.imwrite(str(folder / f"p{i}" / "a.png"), photo)
        cv2.imwrite(str(folder / f"p{i}" / "b.png"), (photo * 0.8).astype(np.uint8))
    return folder


@pytest.mark.parametrize("source", ["bundle", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_the_command_writes_its_report(source, embedder, two_people, tmp_path):
    pytest.importorskip("matplotlib")
    if source == "checkpoint":
        pytest.importorskip("diffusers")
    arguments = ["--data", str(two_people), "--embedder", str(embedder), "--people", "2", "--prompts", "2", "--seeds", "2",
                 "--steps", "2", "--curve-people", "1", "--curve-starts", "0.4", "--pairs", "1", f"--{source}", str(MINI), "--out", str(tmp_path)]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    for key in ("rank1", "verification_rate", "background_accuracy", "disruption", "copy_paste", "identity_map_inside"):
        assert {"mean", "low", "high"} <= summary[key].keys()
    assert summary["settings"]["num_inference_steps"] == 2 and summary["settings"]["guidance_scale"] == 2.5
    assert 0 <= summary["leakage"]["mean"] < 1, "what is changed on the right stays there"
    assert summary["anchors"]["genuine_rank1"]["mean"] == 1 and summary["settings"]["pictures"] == 8
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == 8 and {r["person"] for r in rows} == {"p2", "p4"}
    assert summary["style_accuracy"]["mean"] == pytest.approx(np.mean([float(r["style_accuracy"]) for r in rows]), abs=1e-3)
    for name in ("people.png", "similarity.png", "curves.png"):
        assert cv2.imread(str(tmp_path / name)) is not None
    assert {c["id_start"] for c in json.loads((tmp_path / "curves.json").read_text())} == {0.4}
    assert (tmp_path / "report.md").read_text().startswith("# Evaluation")


def test_a_bundle_is_evaluated_without_torch(embedder, two_people, tmp_path):
    """What docs/training.md's `pip install '.[evaluate]'` brings has none."""
    pytest.importorskip("matplotlib")
    blocked = "import sys; sys.modules['torch'] = None; from pidiff.evaluate.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", blocked, "--data", two_people, "--embedder", embedder, "--people", "2", "--prompts", "1", "--seeds", "1",
                           "--steps", "1", "--curve-people", "0", "--bundle", MINI, "--out", tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "summary.json").read_text())["settings"]["pictures"] == 2


def test_a_preset_is_evaluated_as_it_is_drawn():
    exact, fast = (BundleGenerator(None, "onnxruntime", None, None, preset=name) for name in ("exact", "fast"))
    person = fast.enroll(cv2.imread(str(EXAMPLES / "person-2.jpg"))[..., ::-1])
    drawn = fast.pipeline.generate(person, "a photo of a person", seed=3, preset="fast").images[0]
    assert np.array_equal(fast.generate(person, "a photo of a person", 3)[0], drawn)
    assert not np.array_equal(exact.generate(person, "a photo of a person", 3)[0], drawn)
    assert fast.name == f"{exact.name}, fast"


def test_a_bundle_and_its_checkpoint_draw_the_same():
    pytest.importorskip("diffusers")
    from pidiff.runtime.faces import FaceReader
    bundle = BundleGenerator(None, "onnxruntime", None, None)
    checkpoint = CheckpointGenerator(MINI, None, None, lambda size: FaceReader(bundle.pipeline._graph, size))
    photo = cv2.imread(str(EXAMPLES / "person-2.jpg"))[..., ::-1]
    (drawn, where), (expected, there) = (g.generate(g.enroll(photo), "a photo of a person, red background", 3) for g in (bundle, checkpoint))
    assert bundle.settings == checkpoint.settings == {"solver": "ddim", "num_inference_steps": 20, "guidance_scale": 2.5}
    assert np.abs(drawn.astype(float) - expected).mean() < 1 and np.abs(where - there).max() < 0.01


@pytest.mark.parametrize("change, sentence", [
    ({"--checkpoint": "model", "--preset": "fast"}, "--preset must be exact for a checkpoint, got fast"),
    ({"--people": "1"}, "--people must be at least 2, got 1"),
    ({"--embedder": "none.onnx"}, "embedder must be an ONNX file, got none.onnx"),
    ({"--data": "nowhere"}, "data must be a folder, got nowhere"),
    ({"--edits": "3"}, "--edits must be 0 for data without exact codes, got 3"),
])
def test_bad_arguments_give_one_sentence(change, sentence, embedder, two_people, tmp_path, capsys):
    arguments = {"--data": str(two_people), "--embedder": str(embedder), "--out": str(tmp_path / "out"), **change}
    assert main([x for pair in arguments.items() for x in pair]) == 1
    assert capsys.readouterr().err.strip() == f"pidiff-evaluate: {sentence}"
    assert not (tmp_path / "out").exists()
