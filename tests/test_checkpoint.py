"""Published checkpoints by exact keys and shapes, and what happens to files that are not right."""

import pickle

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file

from pidiff.checkpoint import CheckpointError, load_e4e, load_strict, load_wplus_adapter, read_tensors, save_weights
from pidiff.config import E4E_FFHQ, AdapterConfig, WPlusEncoderConfig, from_dict
from pidiff.identity import IdentityAdapter
from pidiff.w_plus_encoder import WPlusEncoder

# channels of attn2 in SD1.5, in the UNet's processor order (down, up, mid)
SD15_CHANNELS = [320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280]
SD15_LAYERS = [(f"layer{i}.attn2.processor", c, 8) for i, c in enumerate(SD15_CHANNELS)]
SMALL = WPlusEncoderConfig(input_size=32, num_styles=4, style_dim=8, stem_channels=8, stage_channels=(8, 8, 8, 16),
                           stage_blocks=(1, 1, 1, 1), head_channels=8, coarse_styles=1, middle_styles=2)


def published_adapter(channels=SD15_CHANNELS):
    """A synthetic wplus_adapter.bin with the published keys and shapes."""
    proj = {f"proj_{i}.weight": torch.randn(768, 3072 if i == 3 else 2048) for i in range(4)}
    layers = {}
    for n, c in enumerate(channels):
        layers[f"{2 * n + 1}.to_q_wplus.weight"] = torch.randn(c, c)
        layers[f"{2 * n + 1}.to_k_wplus.weight"] = torch.randn(c, 768)
        layers[f"{2 * n + 1}.to_v_wplus.weight"] = torch.randn(c, 768)
    return {"w_proj": {**proj, "norm.weight": torch.randn(768), "norm.bias": torch.randn(768)}, "wplus_adapter": layers}


def test_e4e_architecture_has_the_published_size():
    with torch.device("meta"):
        encoder = WPlusEncoder(E4E_FFHQ)
    state = {k: v for k, v in encoder.state_dict().items() if k != "latent_avg"}
    assert len(state) == 621 and sum(p.numel() for p in encoder.parameters()) == 267_136_704
    assert state["body.3.shortcut_layer.0.weight"].shape == (128, 64, 1, 1)
    assert state["styles.17.convs.10.weight"].shape == (512, 512, 3, 3) and "styles.2.convs.8.weight" not in state
    assert state["latlayer2.weight"].shape == (512, 128, 1, 1)


def e4e_file(tmp_path, **changes):
    encoder = WPlusEncoder(SMALL)
    state = {f"encoder.{k}": torch.randn_like(v).abs() / 10 if v.is_floating_point() else v
             for k, v in encoder.state_dict().items() if k != "latent_avg"}
    state["decoder.unused"] = torch.zeros(1)
    state.update(changes)
    path = tmp_path / "e4e.pt"
    torch.save({"state_dict": state, "opts": {"stylegan_size": 1024}, "latent_avg": torch.full((4, 8), 2.0)}, path)
    return path, state


def test_e4e_loads_strictly_and_adds_the_average(tmp_path):
    path, state = e4e_file(tmp_path)
    encoder = load_e4e(path, SMALL)
    assert torch.equal(encoder.input_layer[0].weight, state["encoder.input_layer.0.weight"])
    face = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        w_plus = encoder(face)
        encoder.latent_avg.zero_()
        torch.testing.assert_close(w_plus - encoder(face), torch.full((1, 4, 8), 2.0), rtol=1e-3, atol=1e-3)


def test_e4e_errors_name_the_key(tmp_path):
    with pytest.raises(CheckpointError, match="unexpected more"):
        load_e4e(e4e_file(tmp_path, **{"encoder.more": torch.zeros(1)})[0], SMALL)
    with pytest.raises(CheckpointError, match=r"latlayer1.bias of shape \(3,\) instead of \(16,\)"):
        load_e4e(e4e_file(tmp_path, **{"encoder.latlayer1.bias": torch.zeros(3)})[0], SMALL)
    with pytest.raises(CheckpointError, match="NaN or infinity in latlayer1.bias"):
        load_e4e(e4e_file(tmp_path, **{"encoder.latlayer1.bias": torch.full((16,), float("nan"))})[0], SMALL)
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="must have state_dict and latent_avg, got weights"):
        load_e4e(tmp_path / "other.pt", SMALL)


def test_wplus_adapter_of_sd15_loads_into_the_right_layers(tmp_path):
    raw = published_adapter()
    assert sum(t.numel() for part in raw.values() for t in part.values()) == 38_639_104 and len(raw["wplus_adapter"]) == 48
    torch.save(raw, tmp_path / "wplus_adapter.bin")
    adapter = load_wplus_adapter(tmp_path / "wplus_adapter.bin", IdentityAdapter(AdapterConfig(mode="residual"), SD15_LAYERS))
    assert torch.equal(adapter.layers[15].to_q_id.weight, raw["wplus_adapter"]["31.to_q_wplus.weight"])
    assert torch.equal(adapter.layers[2].to_k_id.weight, raw["wplus_adapter"]["5.to_k_wplus.weight"])
    w_plus = torch.randn(2, 18, 512)
    third = w_plus[:, 8:12].flatten(1) @ raw["w_proj"]["proj_2.weight"].T
    want = torch.nn.functional.layer_norm(third, (768,), raw["w_proj"]["norm.weight"], raw["w_proj"]["norm.bias"])
    torch.testing.assert_close(adapter.mapper(w_plus)[:, 2], want, rtol=1e-4, atol=1e-4)


def test_wplus_adapter_errors_name_the_key(tmp_path):
    layers, path = SD15_LAYERS[:1], tmp_path / "a.bin"
    adapter = IdentityAdapter(AdapterConfig(mode="residual"), layers)
    torch.save(published_adapter([320, 320]), path)
    with pytest.raises(CheckpointError, match=r"unexpected 3.to_q_wplus.weight \(of the file\)"):
        load_wplus_adapter(path, adapter)
    torch.save(published_adapter([]), path)
    with pytest.raises(CheckpointError, match="missing 0.to_q_id.weight"):
        load_wplus_adapter(path, adapter)
    with pytest.raises(CheckpointError, match="mode must be residual"):
        load_wplus_adapter(path, IdentityAdapter(AdapterConfig(), layers))


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"a": print}))
    save_file({"a": torch.zeros(1000)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:500])
    for name in ("text.safetensors", "text.pt", "empty.pt", "code.pt", "cut.safetensors", "absent.pt"):
        with pytest.raises(CheckpointError) as error:
            read_tensors(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)


def test_weights_round_trip_in_half_precision(tmp_path):
    encoder = WPlusEncoder(SMALL)
    save_weights(encoder, tmp_path / "w.safetensors", torch.float16)
    again = load_strict(WPlusEncoder(SMALL), read_tensors(tmp_path / "w.safetensors"), "encoder")
    for a, b in zip(encoder.state_dict().values(), again.state_dict().values()):
        torch.testing.assert_close(a.half() if a.is_floating_point() else a, b.half() if b.is_floating_point() else b, rtol=0, atol=0)


def test_configurations_refuse_unknown_keys():
    with pytest.raises(ValueError, match="got sise"):
        from_dict(WPlusEncoderConfig, {"sise": 3})


def test_a_saved_model_does_not_say_where_it_came_from(tmp_path):
    pytest.importorskip("diffusers")
    from pidiff.model import load_model, save_model, shipped_mini

    model = load_model(shipped_mini())
    save_model(model, tmp_path / "copy", torch.float16)
    for file in (tmp_path / "copy").rglob("*.json"):
        assert str(shipped_mini()) not in file.read_text(), file
    assert load_model(tmp_path / "copy").unet.config.sample_size == model.unet.config.sample_size
