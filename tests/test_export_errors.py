"""`pidiff-export` with bad input: one sentence, nonzero status, nothing left behind."""

import json
import shutil
import types

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file
from tiny_model import write_model

from pidiff.export import __main__ as command_line
from pidiff.export import bundle as exporter
from pidiff.export.__main__ import main

VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def no_graphs(monkeypatch):
    """Skip tracing and verification: for errors that are found in the weights."""
    monkeypatch.setattr(exporter._Export, "_write", lambda self, graph, case: None)
    monkeypatch.setattr(exporter._Export, "_verify", lambda self, written: None)


def refused(capsys, model, out, *options, status=1):
    """Run the command, expect it to fail, and return what it said."""
    assert main([str(model), str(out), "--quiet", *options]) == status
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert said.out == "" and len(lines) == 1 and lines[0].startswith("pidiff-export: "), said.err
    assert "Traceback" not in said.err
    assert not out.exists() and not list(out.parent.glob(".*.part")), "something was left behind"
    return lines[0]


def damage(file, key, change):
    state = load_file(file)
    save_file({**state, key: change(state[key])}, file)


def with_nan(value):
    value = value.clone()
    value.view(-1)[3] = float("nan")
    return value


@pytest.mark.parametrize("change, words", [({"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction, got"),
                                           ({"trained_betas": [0.1]}, "schedule.json must describe betas by")])
def test_a_schedule_that_the_runtime_cannot_sample(capsys, model, tmp_path, change, words):
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert words in refused(capsys, model, tmp_path / "out")


@pytest.mark.parametrize("options, words", [
    (["--eta", "0.3"], "--eta must be given with --solver tcd, got no --solver"),
    (["--solver", "ddim", "--eta", "0.3"], "--eta must be given with --solver tcd, got --solver ddim"),
    (["--solver", "tcd", "--eta", "1.5"], "eta must lie in [0, 1], got 1.5"),
    (["--solver", "lcm", "--steps", "60"], "num_inference_steps must not exceed original_inference_steps 50, got 60")])
def test_defaults_that_the_runtime_cannot_sample(capsys, model, tmp_path, options, words):
    assert words in refused(capsys, model, tmp_path / "out", *options)


def test_defaults_are_those_given_before_the_sources(model, tmp_path, monkeypatch):
    """A model whose scheduler has Karras sigmas is no exception."""
    file, seen = model / "scheduler" / "scheduler_config.json", []
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_karras_sigmas": True}))
    old = {"solver": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
    monkeypatch.setattr(exporter, "_manifest_of", lambda folder: types.SimpleNamespace(scheduler=old, precision="fp32", name="old"))

    def stop(self):
        seen.append(self._sampling())
        raise ValueError("enough")

    monkeypatch.setattr(exporter._Export, "_texts", stop)
    for options in ([], ["--solver", "tcd", "--eta", "0.2", "--steps", "8"], ["--solver", "ddim", "--timestep-spacing", "trailing"]):
        assert main([str(model), str(tmp_path / "out"), "--quiet", *options]) == 1
    assert seen == [old, {**old, "solver": "tcd", "eta": 0.2, "num_inference_steps": 8}, {**old, "solver": "ddim", "timestep_spacing": "trailing"}]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_that_runs_graphs_as_they_are_must_be_here(capsys, engine, monkeypatch):
    """Nothing is built for it, and it cannot be added to a bundle."""
    done = []
    monkeypatch.setattr(command_line, "_run", lambda args: done.append(args.engine) or 0)
    monkeypatch.setattr(command_line, "load_engine", lambda name: done.append(f"is {name} here?"))
    assert main(["mini", "out", "--fp16", "--engine", engine]) == 0 and done == [f"is {engine} here?", engine]
    with pytest.raises(SystemExit) as stopped:
        main(["--into", "b", "--engine", engine])
    assert stopped.value.code == 2 and f"{engine} runs the graphs of any bundle as they are" in capsys.readouterr().err


def test_missing_model(capsys, tmp_path):
    assert "MODEL must be mini, an existing folder or a .safetensors file, got" in refused(capsys, tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "a folder with unet/, vae/" in refused(capsys, tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("part, option", [("adapter", "--adapter FILE"), ("w_plus_encoder", "--encoder FILE")])
def test_missing_part(capsys, model, tmp_path, part, option):
    shutil.rmtree(model / part)
    assert f"model must have {part}/ or be given {option}" in refused(capsys, model, tmp_path / "out")


def test_missing_weights(capsys, model, tmp_path):
    (model / VAE).unlink()
    assert "a weights file in vae/" in refused(capsys, model, tmp_path / "out")


def test_damaged_configuration(capsys, model, tmp_path):
    (model / "unet" / "config.json").write_text("{ not json")
    assert "readable unet/config.json" in refused(capsys, model, tmp_path / "out")


@pytest.mark.parametrize("option", ["--adapter", "--encoder"])
def test_published_files_that_are_none(capsys, model, tmp_path, option, no_graphs):
    notes = tmp_path / "notes.bin"
    notes.write_text("this is no checkpoint")
    assert f"checkpoint must hold tensors only, got {notes}" in refused(capsys, model, tmp_path / "out", option, str(notes))
    torch.save({"something": torch.zeros(2)}, notes)
    assert "checkpoint must have" in refused(capsys, model, tmp_path / "out", option, str(notes))
    notes.unlink()
    assert f"{option} must be an existing file" in refused(capsys, model, tmp_path / "out", option, str(notes))


def test_existing_out_is_left_alone(capsys, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert main([str(model), str(out), "--quiet"]) == 1
    assert "must be a new or empty directory" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "keep" and len(list(out.iterdir())) == 1


def test_damaged_weights(capsys, model, tmp_path):
    (model / VAE).write_text("a text file")
    assert "must be a safetensors file" in refused(capsys, model, tmp_path / "out")
    (model / VAE).write_bytes(b"\xff" * 64)
    assert "must be a safetensors file" in refused(capsys, model, tmp_path / "out")


@pytest.mark.parametrize("part, key", [("vae", "patch_out.bias"), ("unet", "conv_in.bias"),
                                       ("text_encoder", "final_layer_norm.bias"), ("w_plus_encoder", "latlayer1.bias")])
def test_missing_and_extra_keys(capsys, model, tmp_path, part, key, no_graphs):
    file = next((model / part).glob("*.safetensors"))
    state = load_file(file)
    key = next(k for k in state if k.endswith(key))
    save_file({k: v for k, v in state.items() if k != key}, file)
    said = refused(capsys, model, tmp_path / "out")
    assert f"{part} must have exactly the expected keys and shapes, got missing" in said and key in said
    save_file({**state, "surplus.weight": torch.zeros(3)}, file)
    assert "got unexpected surplus.weight" in refused(capsys, model, tmp_path / "out")
    save_file({**state, key: torch.zeros(3)}, file)
    said = refused(capsys, model, tmp_path / "out")
    assert key in said and "shape" in said


@pytest.mark.parametrize("part, key", [("vae", "patch_out.weight"), ("unet", "conv_in.weight"), ("adapter", "mapper.proj_0.weight")])
def test_nan_weights_are_refused_by_name(capsys, model, tmp_path, part, key, no_graphs):
    damage(next((model / part).glob("*.safetensors")), key, with_nan)
    said = refused(capsys, model, tmp_path / "out")
    assert key in said and "NaN or infinity" in said


def test_overflow_in_half_precision_names_graph_and_layer(capsys, model, tmp_path):
    damage(model / VAE, "patch_out.weight", lambda v: v.sign() * 60000)
    said = refused(capsys, model, tmp_path / "out", "--fp16")
    assert "graph vae_decoder must take and give numbers that float16 holds, got " in said and " in vae.patch_out: export" in said


def test_adapter_of_another_model(capsys, model, tmp_path, no_graphs):
    config = json.loads((model / "adapter" / "config.json").read_text())
    (model / "adapter" / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    assert "AdapterConfig keys must be among" in refused(capsys, model, tmp_path / "out")
    (model / "adapter" / "config.json").write_text(json.dumps({**config, "tokens_per_group": 3}))
    assert "adapter must have exactly the expected keys and shapes" in refused(capsys, model, tmp_path / "out")


def test_unsupported_unet(capsys, model, tmp_path):
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": [8, 8]}))
    assert "unet sample_size must be a number" in refused(capsys, model, tmp_path / "out")
    (model / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    assert "unet in_channels must be the VAE's 4 latent channels (a UNet for inpainting takes more), got 9" in refused(capsys, model, tmp_path / "out")


def test_full_disk(capsys, model, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(100 << 30, 100 << 30, 1 << 20)
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda path: usage)
    assert "out must be on a disk with 0.0 GiB free, got 0.0 GiB" in refused(capsys, model, tmp_path / "out")
    monkeypatch.undo()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "write_safetensors", no_space)
    assert "enough room, got a full disk" in refused(capsys, model, tmp_path / "out")


def test_interrupt_leaves_nothing(capsys, model, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "write_graph", interrupt)
    assert "interrupted; nothing was written" in refused(capsys, model, tmp_path / "out", status=130)


@pytest.mark.parametrize("options", [["--opset", "17"], ["--attention", "flash"], ["--steps", "many"]])
def test_impossible_options(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["mini", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2 and options[0] in capsys.readouterr().err


def test_help_names_everything(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("MODEL", "OUT", "--fp16", "--attention", "--opset", "--adapter", "--encoder", "manifest.json"))
