"""Feature caching: the cut is exact at every boundary, its graphs agree with PyTorch, and the whole UNet stays what it is."""

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("diffusers")

from tiny_bundle import edit
from tiny_model import make_adapter, make_unet, shared

from pidiff.caching import deep_channels, keep_deep_features, outer_forward
from pidiff.export.__main__ import main
from pidiff.export.attention import Form
from pidiff.export.parts import Sizes, example_of, unet_cases, unet_graphs, widths
from pidiff.export.step import step_unet
from pidiff.export.to_onnx import write_graph
from pidiff.export.verify import run_graph, verify_graph
from pidiff.export.weights import WeightIndex, write_safetensors
from pidiff.runtime.bundle import Bundle, BundleError
from pidiff.runtime.caching import whole_steps


def one_size():
    """The shape of mini's UNet: a single size, two layers a block."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=4, block_out_channels=(16,),
        cross_attention_dim=16, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",)).eval()


def plain():
    """No attention at latent size."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(16, 32),
        cross_attention_dim=16, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()


CUTS = [(one_size, 1), (one_size, 2), (one_size, 3), (make_unet, 1), (make_unet, 2), (plain, 1), (plain, 2)]
ids = [f"{make.__name__}-{outer}" for make, outer in CUTS]


@pytest.mark.parametrize("make, outer", CUTS, ids=ids)
def test_a_call_with_its_own_features_is_the_whole_call(make, outer):
    torch.manual_seed(0)
    unet = make()
    x, text, time = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 16), torch.tensor(321.0)
    with torch.no_grad():
        with keep_deep_features(unet, outer) as kept:
            whole = unet(x, time, text).sample
            unet(x + 1, time, text)
        assert kept[0].shape == (2, deep_channels(unet, outer), 8, 12)
        assert torch.equal(outer_forward(unet, x, time, text, kept[0], outer), whole)
        assert not torch.allclose(outer_forward(unet, x, time, text, kept[1], outer), whole, atol=1e-3)
        unet(x, time, text)
    assert len(kept) == 2, "nothing is collected after the block"
    for wrong in (0, outer + 9):
        with pytest.raises(ValueError, match=f"outer must be 1 to [23], the layers of the UNet's last up block, got {wrong}"):
            outer_forward(unet, x, time, text, kept[0], wrong)


def sized(unet):
    """Sizes to trace `unet` with, at a size that is not square."""
    fixed = type("Fixed", (Sizes,), {"latent_size": (4, 6)})
    return fixed(True, 8, 12, 16, 6, 512, levels=len(unet.config.block_out_channels),
                 samples={"prompt_embeds": torch.randn(3, 12, 16), "latent_avg": torch.zeros(6, 512)})


@pytest.mark.slow
@pytest.mark.parametrize("make, outer", CUTS, ids=ids)
def test_the_graph_agrees_with_pytorch(tmp_path, make, outer):
    torch.manual_seed(0)
    unet = make()
    sizes, adapter = sized(unet), make_adapter(unet, "parallel")
    write_safetensors(tmp_path / "unet.safetensors", unet.state_dict(), None, "unet")
    weights = WeightIndex(tmp_path)
    weights.add(unet, "unet.safetensors")
    with torch.no_grad():
        cases, width = unet_cases(unet, adapter, sizes, torch.float32, outer), widths(unet, adapter)
        with step_unet(unet, adapter.config, Form("standard"), outer) as step:
            whole, cached = unet_graphs(step, sizes, width, torch.float32)
            for got, want in zip(step(**cases["unet"].inputs), cases["unet"].expected, strict=True):
                torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
            spec = write_graph(cached, example_of(cached, sizes), 18, weights)
    assert verify_graph(tmp_path / "unet_cached.onnx", spec, cases["unet_cached"], "fp32", False).max_rel < 5e-5


@pytest.mark.slow
def test_the_whole_unet_keeps_its_bits(tmp_path):
    """With and without the output that caching needs."""
    results = []
    for outer in (0, 2):
        torch.manual_seed(0)
        (tmp_path / str(outer)).mkdir()
        unet, sizes, weights = make_unet(), sized(make_unet()), WeightIndex(tmp_path / str(outer))
        adapter = make_adapter(unet, "parallel")
        write_safetensors(weights.root / "unet.safetensors", unet.state_dict(), None, "unet")
        weights.add(unet, "unet.safetensors")
        width = widths(unet, adapter)
        with torch.no_grad():
            inputs = unet_cases(unet, adapter, sizes, torch.float32)["unet"].inputs
        with torch.no_grad(), step_unet(unet, adapter.config, Form(), outer) as step:
            graph = unet_graphs(step, sizes, width, torch.float32)[0]
            spec = write_graph(graph, example_of(graph, sizes), 18, weights)
        found = run_graph(weights.root / "unet.onnx", spec, inputs, True)
        results.append(dict(zip([t.name for t in spec.outputs], found, strict=True)))
    assert results[0].keys() == {"model_output", "identity_map"} and results[1].keys() - results[0].keys() == {"deep_features"}
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value)


def test_a_cut_that_is_not_there(tmp_path, tmp_path_factory, capsys):
    assert main([str(shared("parallel", tmp_path_factory)), str(tmp_path / "out"), "--cached-layers", "3", "--quiet"]) == 1
    assert "outer must be 1 to 2" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_manifest_whose_graphs_do_not_fit(tmp_path, tmp_path_factory):
    shutil.copytree(shared("fused", tmp_path_factory), tmp_path / "b")

    def change(data):
        next(t for t in data["graphs"]["unet"]["outputs"] if t["name"] == "deep_features")["shape"][1] = 5

    with pytest.raises(BundleError, match="graphs.unet_cached deep_features must be that of graphs.unet"):
        Bundle.open(edit(tmp_path / "b", change))


@pytest.mark.parametrize("arguments, whole", [
    ((6, 1), "111111"), ((6, 2), "101010"), ((7, 3), "1001001"), ((8, 3, (4, 6)), "10011001"), ((8, 3, (0, 8), 2), "10100100"),
    ((6, 10), "100000"), ((8, 4, (3, 8), 5), "10010100")])
def test_which_steps_are_whole(arguments, whole):
    assert "".join(str(int(w)) for w in whole_steps(*arguments)) == whole
