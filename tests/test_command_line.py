"""pidiff-generate and pidiff-enroll on a tiny bundle, and on the shipped one where it is present."""

import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import pytest
from drawn_face import drawn_face

from pidiff.runtime import Pipeline, files
from pidiff.runtime.__main__ import enroll as cli_enroll
from pidiff.runtime.__main__ import generate as cli_generate
from pidiff.runtime.bundle import shipped_bundle

PROMPT = "a photo of person"
needs_mini = pytest.mark.skipif(not (shipped_bundle() / "manifest.json").exists(), reason="models/mini is not there")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "in" / "photo.png"
    path.parent.mkdir()
    cv2.imwrite(str(path), drawn_face(256)[..., ::-1])
    return path


def arguments(tiny, photo, out, *more):
    return ["--bundle", str(tiny), "--face", str(photo), "--prompt", PROMPT, "--out", str(out), "--seed", "3", *map(str, more)]


def test_generate_command(tiny, photo, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert cli_generate(arguments(tiny, photo, out, "--json", "--edit", "smile=1.5", "--map", tmp_path / "map.png")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seed"] == 3 and report["engine"] == "onnxruntime" and report["out"][0] == str(out)
    assert report["seconds"]["total"] > 0 and {"open", "load", "enroll", "denoise", "decode"} <= set(report["seconds"])
    assert cv2.imread(str(out)).shape == cv2.imread(str(tmp_path / "map.png")).shape == (32, 32, 3)
    assert sorted(os.listdir(tmp_path)) == ["in", "map.png", "out.png"]
    assert out.stat().st_mode & 0o777 == 0o666 & ~files.umask()


def test_enrolled_file_gives_the_same_picture(tiny, photo, tmp_path):
    assert cli_enroll([str(photo), "--bundle", str(tiny), "--out", str(tmp_path / "me.safetensors"),
                       "--save-face", str(tmp_path / "face.png")]) == 0
    assert cli_generate(arguments(tiny, photo, tmp_path / "a.png")) == 0
    assert cli_generate(arguments(tiny, tmp_path / "me.safetensors", tmp_path / "b.png")) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert cv2.imread(str(tmp_path / "face.png")).shape == (64, 64, 3)


def test_several_pictures_and_people(tiny, photo, tmp_path):
    two = ["--face", photo, "--region", "0,0,.5,1", "--region", ".5,0,1,1", "--num-images", 2]
    assert cli_generate(arguments(tiny, photo, tmp_path / "a.png", *two)) == 0
    assert sorted(os.listdir(tmp_path)) == ["a-1.png", "a-2.png", "in"]


@pytest.mark.parametrize("more, sentence", [
    (["--face", "/nonexistent.png"], "photo must be a picture file"), (["--steps", "0"], "num_inference_steps must"),
    (["--engine", "tpu"], "engine must be one of"), (["--device", "quantum"], "device must be cpu"),
    (["--bundle", "/nonexistent"], "bundle must be a directory"), (["--out", "/nonexistent/o.png"], "in a folder that exists"),
    (["--out", "o.jpg"], "--out must end in .png"), (["--id-scale", "nan"], "id_scale must be a number"),
    (["--edit", "beard=1"], "edit must be one of smile"), (["--region", "0,0,1,1", "--region", "0,0,1,1"], "--region must be given once"),
    (["--seed", "-4"], "seed must be an integer"), (["--threads", "-1"], "threads must be an integer"),
    (["--face", __file__], "photo must be a PNG, JPEG or WebP picture"), (["--map", "out.png"], "output files must be different"),
])
def test_wrong_use_is_one_sentence(tiny, photo, tmp_path, capsys, monkeypatch, more, sentence):
    monkeypatch.chdir(tmp_path)
    base = arguments(tiny, photo, "out.png")
    if more[0] == "--face":
        base[base.index("--face") + 1] = more[1]
        more = []
    assert cli_generate(base + more) == 1
    out, err = capsys.readouterr()
    assert sentence in err and err.startswith("pidiff-generate: ") and err.count("\n") == 1 and not out
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("more", [["--level-scale", "1,2"], ["--edit", "smile"], ["--region", "a,b,c,d"], ["--what"]])
def test_usage_errors(tiny, photo, tmp_path, more):
    with pytest.raises(SystemExit) as caught:
        cli_generate(arguments(tiny, photo, tmp_path / "o.png", *more))
    assert caught.value.code == 2


@pytest.mark.parametrize("error, code, sentence", [
    (KeyboardInterrupt(), 130, "stopped"), (MemoryError(), 1, "memory must be enough"),
    (OSError(28, "No space left on device", "/x"), 1, "the disk is full"), (RuntimeError("a\nb"), 1, "unexpected RuntimeError: a b"),
])
def test_anything_else_is_one_sentence_too(tiny, photo, tmp_path, capsys, monkeypatch, error, code, sentence):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Pipeline, "generate", fail)
    assert cli_generate(arguments(tiny, photo, tmp_path / "out.png")) == code
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and os.listdir(tmp_path) == ["in"]


def test_an_interrupted_write_keeps_the_old_picture(tiny, photo, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.png").write_bytes(b"old")
    for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "full"), 1)):
        def fail(_, error=error):
            raise error

        monkeypatch.setattr(files.os, "fsync", fail)
        assert cli_generate(arguments(tiny, photo, tmp_path / "out.png")) == code
        assert (tmp_path / "out.png").read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["in", "out.png"]
    assert "out.png must be writable, got: the disk is full" in capsys.readouterr().err


def subprocess_run(code, *args, **options):
    """Run code away from the repository's root, where the folder pidiff/ would hide the installed package."""
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parent, **options)


def test_full_disk_for_real(tiny, photo, tmp_path):
    """A limit on file sizes stands for a disk that fills up while the picture is written."""
    code = "import sys; from pidiff.runtime.__main__ import generate; sys.exit(generate(sys.argv[1:]))"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    done = subprocess_run(code, *arguments(tiny, photo, tmp_path / "out.png"), preexec_fn=limit)
    assert done.returncode == 1 and "out.png must be writable, got: the file would be larger than the limit" in done.stderr
    assert os.listdir(tmp_path) == ["in"]


def test_ctrl_c_for_real(tiny, photo, tmp_path):
    code = ("import sys, os, signal; from pidiff.runtime import pipeline; from pidiff.runtime.__main__ import generate\n"
            "old = pipeline.Pipeline._decode\n"
            "pipeline.Pipeline._decode = lambda *a, **b: (os.kill(os.getpid(), signal.SIGINT), old(*a, **b))[1]\n"
            "sys.exit(generate(sys.argv[1:]))")
    done = subprocess_run(code, *arguments(tiny, photo, tmp_path / "out.png"))
    assert done.returncode == 130 and done.stderr.strip() == "pidiff-generate: stopped" and os.listdir(tmp_path) == ["in"]


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "diffusers", "transformers", "onnx", "PIL", "scipy"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
from pidiff.runtime.__main__ import enroll, generate
bundle, photo, out = sys.argv[1:]
args = ["--bundle", bundle] if bundle else []
assert enroll([photo, "--out", out + ".safetensors", *args]) == 0
assert generate(["--face", out + ".safetensors", "--prompt", "a photo", "--out", out, "--steps", "2", *args]) == 0
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("bundle", ["tiny", pytest.param("mini", marks=needs_mini)])
def test_runs_without_torch(tiny, photo, tmp_path, bundle):
    done = subprocess_run(BLOCKED, tiny if bundle == "tiny" else "", photo, tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(tmp_path / "out.png")).std() > 1


def test_importing_is_light():
    code = "import sys, pidiff.runtime.__main__, pidiff.runtime; print([m for m in ('cv2', 'onnxruntime', 'torch', 'numpy') if m in sys.modules])"
    assert subprocess_run(code).stdout.strip() == "[]"


def test_warnings_are_plain_on_the_command_line(tiny, photo, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        args = arguments(tiny, photo, tmp_path / "o.png")
        args[args.index(PROMPT)] = "a photo of person red blue blue red"
        assert cli_generate(args) == 0
    assert "pidiff-generate: warning: prompt must fit 6 tokens, got 8: ignored 'blue red'\n" == capsys.readouterr().err
