"""Files that Stable Diffusion 1 comes in: checkpoints in one file, and LoRA of every naming, as tiny synthetic ones."""

import functools
import json
import re
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("diffusers")
first_release = pytest.importorskip("benchmarks.single_file").first_release

from safetensors.torch import load_file, save_file
from tiny_model import make_unet, shared
from torch.nn import functional as F

from pidiff.checkpoint import CheckpointError
from pidiff.export.__main__ import main
from pidiff.export.errors import ExportError
from pidiff.export.lora import Lora, fuse
from pidiff.export.single_file import SingleFile
from pidiff.export.source import Source

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
OUT, CONV, ONE = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"


# --- one file --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(checkpoint in one file, folder without these weights, the folder that it was made of)."""
    whole = shared("residual", tmp_path_factory)
    folder = tmp_path_factory.mktemp("one")
    state = {k: v.half() if k.startswith("model.") else v.clone() for k, v in first_release(whole, layers=1, blocks=2)}
    state |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(12)[None], "alphas_cumprod": torch.ones(1000)}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "tiny.safetensors")
    shutil.copytree(whole, folder / "layout")
    for part in ("unet", "vae", "text_encoder"):
        next((folder / "layout" / part).glob("*.safetensors")).unlink()
    return folder / "tiny.safetensors", folder / "layout", whole


def test_a_checkpoint_in_one_file_is_the_same_model(one):
    file, layout, whole = one
    source, reference = Source(layout, single_file=file), Source(whole)
    assert source.name == "tiny" and source.stored_dtype("unet") == torch.float16 and source.stored_dtype("vae") == torch.float32
    assert source.weight_files("unet") == [file] and source.size("unet") == 2 * sum(p.numel() for p in make_unet().parameters())
    for part, got, want in (("vae", source.vae(), reference.vae()), ("text", source.text_encoder(), reference.text_encoder()),
                            ("unet", source.unet()[0], reference.unet()[0])):
        got, want = got.state_dict(), want.state_dict()
        assert got.keys() == want.keys() and len(got) > 20
        for key, value in want.items():
            assert torch.equal(got[key], value.half().float() if part == "unet" else value), f"{part} {key}"


def test_a_file_that_is_not_the_folders_model(one, tmp_path):
    file, layout, _ = one
    state = load_file(file)
    key = next(k for k in state if k.endswith("middle_block.0.in_layers.2.weight"))
    save_file({k: v for k, v in state.items() if k != key}, tmp_path / "less.safetensors")
    with pytest.raises((ExportError, CheckpointError), match="mid_block.resnets.0.conv1.weight"):
        Source(layout, single_file=tmp_path / "less.safetensors").unet()
    save_file({k: v for k, v in state.items() if "first_stage" not in k}, tmp_path / "none.safetensors")
    with pytest.raises(ExportError, match=r"model must hold tensors first_stage_model.\*, .* without its vae"):
        SingleFile(tmp_path / "none.safetensors")
    save_file({**state, "v_pred": torch.zeros(1)}, tmp_path / "v.safetensors")
    assert Source(layout, single_file=tmp_path / "v.safetensors").config("scheduler")["prediction_type"] == "v_prediction"
    save_file({**state, "ztsnr": torch.zeros(1)}, tmp_path / "z.safetensors")
    with pytest.raises(ExportError, match="rescale_betas_zero_snr must be true .* got False"):
        Source(layout, single_file=tmp_path / "z.safetensors")
    schedule = layout / "scheduler" / "scheduler_config.json"
    before = schedule.read_text()
    schedule.write_text(json.dumps({**json.loads(before), "prediction_type": "epsilon"}))
    try:
        with pytest.raises(ExportError, match="prediction_type must be v_prediction .* got epsilon"):
            Source(layout, single_file=tmp_path / "v.safetensors")
    finally:
        schedule.write_text(before)


def test_the_command_says_what_one_file_needs(one, tmp_path, capsys):
    file, layout, _ = one
    for arguments, words in (([str(file), "out"], "must be given --layout FOLDER"), ([str(layout), "out", "--layout", "x"], "--layout must be given with"),
                             ([str(file), "out", "--layout", str(tmp_path / "x")], "got .*/x$")):
        assert main([*arguments, "--quiet"]) == 1
        assert re.search(words, capsys.readouterr().err.strip())


# --- LoRA ------------------------------------------------------------------------------------------------------------

def matrices(unet, name, rank=2):
    weight = unet.get_submodule(name).weight
    generator = torch.Generator().manual_seed(len(name))
    shape = weight.shape if weight.ndim == 2 else (weight.shape[0], *weight.shape[1:])
    down = torch.randn(rank, *shape[1:], generator=generator)
    return down, torch.randn(shape[0], rank, *([1, 1] if weight.ndim == 4 else []), generator=generator)


def kohya(name, down, up, alpha=None):
    flat = f"lora_unet_{name.replace('.', '_')}"
    return {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, **({} if alpha is None else {f"{flat}.alpha": torch.tensor(float(alpha))})}


def applied(layer, x, down, up, scale):
    """What a layer with a LoRA beside it computes, the LoRA as two layers."""
    if layer.weight.ndim == 2:
        return layer(x) + scale * F.linear(F.linear(x, down), up)
    return layer(x) + scale * F.conv2d(F.conv2d(x, down, padding=layer.padding, stride=layer.stride), up)


@torch.no_grad()
def test_fused_layers_compute_what_lora_layers_beside_them_do(tmp_path):
    unet, state, wanted = make_unet(), {}, {}
    for name, alpha in ((LINEAR, 8), (CONV, None), (ONE, 1)):
        down, up = matrices(unet, name)
        state |= kohya(name, down, up, alpha)
        layer = unet.get_submodule(name)
        x = torch.randn(2, layer.weight.shape[1], *([5, 6] if layer.weight.ndim == 4 else []))
        wanted[name] = x, applied(layer, x, down, up, 0.5 * (2 if alpha is None else alpha) / 2)
    save_file(state, tmp_path / "lora.safetensors")
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    fuse(unet, [Lora.parse(f"{tmp_path / 'lora.safetensors'}:0.5")], "unet")
    for name, (x, expected) in wanted.items():
        torch.testing.assert_close(unet.get_submodule(name)(x), expected, atol=1e-4, rtol=1e-4)
    changed = {k for k, v in unet.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{n}.weight" for n in wanted}


@pytest.mark.parametrize("ends", [(".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"),
                                  (".lora_A.default.weight", ".lora_B.default.weight"), "processor"])
def test_every_naming_means_the_same(ends, tmp_path):
    unet, names = make_unet(), (LINEAR, OUT)
    file, reference = tmp_path / "other.safetensors", tmp_path / "kohya.safetensors"
    pairs = {n: matrices(unet, n) for n in names}
    save_file(functools.reduce(dict.__or__, (kohya(n, *p) for n, p in pairs.items())), reference)
    state = {}
    for name, (down, up) in pairs.items():
        if ends == "processor":
            block, layer = name.removesuffix(".0").rsplit(".", 1)
            state |= {f"unet.{block}.processor.{layer}_lora.down.weight": down, f"unet.{block}.processor.{layer}_lora.up.weight": up}
        else:
            state |= {f"unet.{name}{ends[0]}": down, f"unet.{name}{ends[1]}": up}
    save_file(state, file)
    other = make_unet()
    other.load_state_dict(unet.state_dict())
    fuse(unet, [Lora(reference)], "unet")
    fuse(other, [Lora(file)], "unet")
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in other.state_dict().items())


def test_alpha_may_stand_in_the_metadata(tmp_path):
    unet = make_unet()
    down, up = matrices(unet, LINEAR)
    before = unet.get_submodule(LINEAR).weight.clone()
    settings = {"unet.r": 2, "unet.lora_alpha": 6, "unet.rank_pattern": {}}
    save_file({f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}, tmp_path / "l.safetensors",
              {"lora_adapter_metadata": json.dumps(settings)})
    fuse(unet, [Lora(tmp_path / "l.safetensors")], "unet")
    torch.testing.assert_close(unet.get_submodule(LINEAR).weight - before, 3 * up @ down, atol=1e-5, rtol=1e-4)
    save_file({f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}, tmp_path / "l.safetensors",
              {"lora_adapter_metadata": json.dumps({**settings, "unet.use_dora": True})})
    with pytest.raises(ExportError, match="plain LoRA, got use_dora"):
        fuse(unet, [Lora(tmp_path / "l.safetensors")], "unet")


def test_a_source_fuses_into_unet_and_text_encoder(one, tmp_path):
    folder = one[2]
    plain = Source(folder)
    clip, layer = plain.text_encoder(), "encoder.layers.1.self_attn.q_proj"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    unet_down, unet_up = matrices(make_unet(), LINEAR)
    for number, keys in enumerate((f"lora_te_text_model_{layer.replace('.', '_')}.lora_down.weight", f"text_encoder.text_model.{layer}.lora_A.weight")):
        ends = keys, keys.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
        save_file({ends[0]: down, ends[1]: up, **kohya(LINEAR, unet_down, unet_up)}, tmp_path / f"{number}.safetensors")
        source = Source(folder, loras=(Lora(tmp_path / f"{number}.safetensors", 2.0),))
        fused, name = source.text_encoder(), next(n for n, _ in clip.named_modules() if n.endswith(layer))
        torch.testing.assert_close(fused.get_submodule(name).weight - clip.get_submodule(name).weight, 2 * up @ down, atol=1e-4, rtol=1e-4)
    difference = source.unet()[0].get_submodule(LINEAR).weight - plain.unet()[0].get_submodule(LINEAR).weight
    torch.testing.assert_close(difference, 2 * unet_up @ unet_down, atol=1e-4, rtol=1e-4)


def test_lora_that_cannot_be_fused_whole(one, tmp_path, capsys):
    unet, file = make_unet(), tmp_path / "bad.safetensors"
    down, up = matrices(unet, LINEAR)
    good = kohya(LINEAR, down, up)
    wrong = next(iter(good)).replace("lora_down", "lora_mid")
    for state, words in (({**good, wrong: down}, "names for Stable Diffusion 1, got lora_unet_down.*lora_mid"),
                         ({k: v for k, v in good.items() if "up" not in k.split(".")[1]}, "both matrices of a layer, got down of unet"),
                         (kohya("down_blocks.7.conv", down, up), "for this model, got .* with the layer down_blocks_7_conv"),
                         (kohya(LINEAR, down[:, :3], up), "must fit the weight"), (kohya(LINEAR, down * float("nan"), up), "finite numbers"),
                         ({"lora_te2_x.lora_down.weight": down}, "names for Stable Diffusion 1, got lora_te2_x")):
        save_file({k: v.clone().contiguous() for k, v in state.items()}, file)
        with pytest.raises(ExportError, match=words):
            fuse(unet, [Lora(file)], "unet")
    for text, words in ((f"{file}:11", "a scale from -10 to 10"), (f"{file}:nan", "a scale from"), (f"{file}x", "an existing file")):
        assert main([str(one[2]), str(tmp_path / "out"), "--quiet", "--lora", text]) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert Lora.parse(f"{file}:-0.5") == Lora(file, -0.5) and Lora.parse(str(file)) == Lora(file)
