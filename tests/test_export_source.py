"""What may be exported: checkpoints in shards, older files and published formats, and the optional matting network."""

import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file
from tiny_model import make_unet, shared

from pidiff.export import bundle as exporter
from pidiff.export.bundle import ExportOptions
from pidiff.export.source import Source
from pidiff.export.step import check_unet
from pidiff.export.weights import source_dtype
from pidiff.matting import FaceMatting
from pidiff.model import load_model

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path_factory, tmp_path):
    return shutil.copytree(shared("parallel", tmp_path_factory), tmp_path / "model")


def test_a_sharded_checkpoint_is_read_whole(folder):
    state = load_file(folder / UNET)
    (folder / UNET).unlink()
    unet = make_unet()
    unet.load_state_dict({k: v.float() for k, v in state.items()})
    unet.half().save_pretrained(folder / "unet", max_shard_size="40KB")
    source = Source(folder)
    assert len(source.weight_files("unet")) > 1 and source.stored_dtype("unet") == torch.float16
    loaded, adapter = source.unet()
    assert all(torch.equal(loaded.state_dict()[k], v.float()) for k, v in state.items())
    assert len(adapter.layers) == 4


def test_older_bin_files_are_read(folder):
    for part, name in (("text_encoder", "pytorch_model.bin"), ("w_plus_encoder", "model.bin")):
        file = folder / part / "model.safetensors"
        torch.save({k: v.clone() for k, v in load_file(file).items()}, folder / part / name)
        expected = load_file(file)
        file.unlink()
        source = Source(folder)
        assert source.weight_files(part) == [folder / part / name] and source.stored_dtype(part) == torch.float16
        loaded = getattr(source, part)().state_dict()
        for key, value in expected.items():
            name = key if key in loaded else key.removeprefix("text_model.")
            assert torch.equal(loaded[name], value.float() if value.is_floating_point() else value), key


def test_weights_in_half_precision_only_are_read(folder):
    """What a download of the variant fp16 leaves in a folder; beside full precision they are passed over."""
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    expected = {}
    for part, name in names.items():
        file = folder / part / f"{name}.safetensors"
        state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file({k: torch.zeros_like(v) for k, v in state.items()}, folder / part / f"{name}.fp16.safetensors", {"format": "pt"})
        assert Source(folder).weight_files(part) == [file], "there is full precision"
        save_file(state, folder / part / f"{name}.fp16.safetensors", {"format": "pt"})
        file.unlink()
        expected[part] = state
    source, model = Source(folder), load_model(folder)
    assert source.stored_dtype("unet") == torch.float16
    for part, state in expected.items():
        read = source.unet()[0] if part == "unet" else getattr(source, part)()
        for loaded in (read.state_dict(), getattr(model, part).state_dict()):
            for key, value in state.items():
                name = key if key in loaded else key.removeprefix("text_model.")
                assert torch.equal(loaded[name], value.to(loaded[name].dtype)), (part, key)


def test_the_first_names_of_a_vaes_attention_are_read(tmp_path_factory, tmp_path):
    """Stable Diffusion 1.5's own VAE has them."""
    folder = shutil.copytree(shared("residual", tmp_path_factory), tmp_path / "residual")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state, older = load_file(file), {}
    for key, value in state.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
        older[key] = value
    assert older.keys() != state.keys()
    save_file(older, file, {"format": "pt"})
    for vae in (Source(folder).vae(), load_model(folder).vae):
        assert all(torch.equal(vae.state_dict()[k], v) for k, v in state.items())


def test_mixed_and_wide_checkpoints_are_stored_in_float32(tmp_path):
    for name, dtypes in (("mixed", (torch.float16, torch.float32)), ("brain", (torch.bfloat16,)), ("wide", (torch.float64,))):
        save_file({str(i): torch.ones(2, dtype=d) for i, d in enumerate(dtypes)}, tmp_path / f"{name}.safetensors")
        assert source_dtype([tmp_path / f"{name}.safetensors"]) == torch.float32
    save_file({"a": torch.ones(2).half(), "count": torch.ones(1, dtype=torch.int64)}, tmp_path / "half.safetensors")
    assert source_dtype([tmp_path / "half.safetensors"]) == torch.float16


def test_a_published_adapter_file_takes_the_place_of_the_folder(folder, tmp_path):
    """W+ Adapter's keys, at this UNet's widths: layer n is processor 2 n + 1; 18 levels in 4 groups, one token each."""
    shutil.rmtree(folder / "adapter")
    groups, channels = (4, 4, 4, 6), (16, 16, 16, 32)
    w_proj = {f"proj_{i}.weight": torch.randn(16, 512 * n) for i, n in enumerate(groups)}
    w_proj |= {"norm.weight": torch.randn(16), "norm.bias": torch.randn(16)}
    layers = {f"{2 * n + 1}.to_{p}_wplus.weight": torch.randn(c, c if p == "q" else 16) for n, c in enumerate(channels) for p in "qkv"}
    torch.save({"w_proj": w_proj, "wplus_adapter": layers}, tmp_path / "wplus_adapter.bin")
    source = Source(folder, adapter_file=tmp_path / "wplus_adapter.bin")
    _, adapter = source.unet()
    assert adapter.config.mode == "residual" and adapter.config.groups == groups
    assert torch.equal(adapter.layers[3].to_v_id.weight, layers["7.to_v_wplus.weight"])
    assert torch.equal(adapter.mapper.proj_3.weight, w_proj["proj_3.weight"])
    assert source.stored_dtype("adapter") == torch.float32 and source.weight_files("adapter") == [tmp_path / "wplus_adapter.bin"]


def test_the_tokenizer_gets_the_file_that_the_runtime_reads(folder, tmp_path):
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    text = "a pencil sketch of a person, smiling"
    expected = CLIPTokenizer.from_pretrained(folder / "tokenizer")(text, add_special_tokens=False).input_ids
    (folder / "tokenizer" / "tokenizer.json").unlink()
    Source(folder).copy_tokenizer(tmp_path / "tokenizer")
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    fast.no_padding()
    assert fast.encode(text, add_special_tokens=False).ids == expected


def test_the_matting_network_is_exported_in_float32(folder, tmp_path):
    torch.manual_seed(0)
    (folder / "face_matting").mkdir()
    save_file(FaceMatting().state_dict(), folder / "face_matting" / "model.safetensors")
    root = tmp_path / "out"
    root.mkdir()
    with torch.no_grad():
        export = exporter._Export(Source(folder), root, ExportOptions(fp16=True), lambda name: None)
        export.sizes.face_size = 64
        export._matting()
    spec = export.graphs["face_matting"]
    assert spec.inputs[0].shape == ("B", 3, 64, 64) and spec.outputs[0].name == "alpha" and spec.inputs[0].dtype == "float32"
    assert export.parity["face_matting"].max_rel < 1e-5
    assert {v.dtype for v in load_file(root / "face_matting" / "model.safetensors").values()} == {torch.float16, torch.int64}


@pytest.mark.parametrize("change, message", [({"class_embed_type": "timestep"}, "class_embed_type must be off"),
                                             ({"only_cross_attention": (True, False)}, "only_cross_attention must be off")])
def test_unets_of_other_kinds_are_refused(change, message):
    unet = make_unet()
    check_unet(unet)
    unet.register_to_config(**change)
    with pytest.raises(ValueError, match=message):
        check_unet(unet)
