"""Identity branch in torch: the base model untouched, folded equals unfolded, masks, scales, modes."""

import pytest

torch = pytest.importorskip("torch")

from pidiff.attention import attention, identity_mix
from pidiff.config import AdapterConfig
from pidiff.unet import attach, cross_attention_layers, detach

LEVELS, WIDTH = 8, 16


def small_unet():
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
                                block_out_channels=(32, 64), cross_attention_dim=24, attention_head_dim=4,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def config(mode="parallel", tokens_per_group=2):
    return AdapterConfig(mode=mode, groups=(2, 2, 2, 2), w_plus_dim=WIDTH, token_dim=24, tokens_per_group=tokens_per_group)


@pytest.fixture(params=["parallel", "residual"])
def adapted(request):
    unet = small_unet()
    adapter = attach(unet, config(request.param)).eval()
    torch.manual_seed(1)
    for layer in adapter.layers:
        if layer.k_null is not None:
            torch.nn.init.normal_(layer.k_null)
    return unet, adapter


def inputs(batch=2, height=8, width=8):
    g = torch.Generator().manual_seed(2)
    return (torch.randn(batch, 4, height, width, generator=g), torch.tensor([7] * batch),
            torch.randn(batch, 5, 24, generator=g), torch.randn(batch, LEVELS, WIDTH, generator=g))


@torch.no_grad()
def test_id_scale_zero_is_the_base_model_bit_for_bit(adapted):
    unet, adapter = adapted
    x, t, text, w_plus = inputs()
    base = small_unet()(x, t, text).sample
    assert torch.equal(unet(x, t, text).sample, base), "without a condition"
    with adapter.condition(adapter.mapper(w_plus), 0.0):
        assert torch.equal(unet(x, t, text).sample, base), "with id_scale = 0"
    with adapter.condition(adapter.mapper(w_plus), 1.0):
        assert (unet(x, t, text).sample - base).abs().max() > 1e-3, "with id_scale = 1"
    detach(unet)
    assert torch.equal(unet(x, t, text).sample, base), "detached"


@torch.no_grad()
@pytest.mark.parametrize("people", [1, 3])
def test_folded_equals_unfolded(adapted, people):
    _, adapter = adapted
    adapter = adapter.double()
    g = torch.Generator().manual_seed(3)
    w_plus = torch.randn(2 * people, LEVELS, WIDTH, generator=g, dtype=torch.float64)
    embeds = adapter.mapper(w_plus).unflatten(0, (2, people))
    level_scale = torch.rand(2, people, 4, generator=g, dtype=torch.float64)
    mask = torch.rand(2, people, 16, generator=g, dtype=torch.float64)
    scale = torch.tensor([0.7, 1.3], dtype=torch.float64)
    for layer in adapter.layers:
        channels = layer.to_q_id.in_features
        h, y = torch.randn(2, 2, 16, channels, generator=g, dtype=torch.float64)
        tokens = adapter.token_scale(level_scale)
        mix, mass = layer(y, embeds, tokens)
        want = h + scale[:, None, None] * (mask[..., None] * mix).sum(1)
        a, v = layer.fold(embeds, tokens)
        got, folded_mass = identity_mix(h, y, a, v, mask, scale, layer.num_heads, adapter.config.has_null)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        if adapter.config.has_null:
            torch.testing.assert_close(folded_mass, mass, rtol=1e-12, atol=1e-12)
            assert 0 < mass.min() and mass.max() < 1


@torch.no_grad()
def test_region_mask_confines_a_person(adapted):
    """The first layer sees identical inputs, so outside the mask its output cannot change."""
    _, adapter = adapted
    x, _, _, w_plus = inputs()
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    hidden = torch.randn(2, 64, 32)
    with adapter.condition(adapter.mapper(w_plus), 1.0, id_mask=mask):
        out = adapter.contribution(0, hidden, hidden, aspect=1.0).unflatten(1, (8, 8))
    assert out[:, :, 4:].abs().max() == 0 and out[:, :, :4].abs().min() > 0


@torch.no_grad()
def test_masks_follow_non_square_latents(adapted):
    unet, adapter = adapted
    x, t, text, w_plus = inputs(height=8, width=16)
    mask = torch.rand(2, 1, 8, 16)
    with adapter.condition(adapter.mapper(w_plus), 1.0, id_mask=mask, keep_maps=True) as condition:
        unet(x, t, text)
    assert [m.shape[-1] for m in condition.maps] == [128, 32, 128, 128]     # as they run: down, mid, up, up


@torch.no_grad()
def test_level_scale_zero_removes_a_level(adapted):
    _, adapter = adapted
    hidden = torch.randn(1, 16, 32)
    embeds = adapter.mapper(torch.randn(1, LEVELS, WIDTH))
    changed = embeds.clone()
    changed[:, :2] += 1
    scale = torch.tensor([[[0.0, 1, 1, 1]]])
    values = [adapter.layers[0].values(e[:, None], adapter.token_scale(scale)) for e in (embeds, changed)]
    assert torch.equal(*values)
    with adapter.condition(embeds, 1.0, level_scale=torch.zeros(1, 1, 4)):
        assert adapter.contribution(0, hidden, hidden, 1.0).abs().max() == 0


def test_gradients_reach_every_trained_parameter():
    unet = small_unet().requires_grad_(False)
    adapter = attach(unet, config())
    x, t, text, w_plus = inputs()
    with adapter.condition(adapter.mapper(w_plus), 1.0):
        unet(x, t, text).sample.square().mean().backward()
    dead = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead and all(p.grad is None for n, p in unet.named_parameters())


def test_layers_are_in_processor_order():
    unet = small_unet()
    names = [name for name, _, _ in cross_attention_layers(unet)]
    assert names == [n for n in unet.attn_processors if "attn2" in n]
    assert [n.split(".")[0] for n in names] == sorted((n.split(".")[0] for n in names), key=["down_blocks", "up_blocks", "mid_block"].index)


def test_attention_mask_is_refused():
    unet = small_unet()
    attach(unet, config())
    x, t, text, _ = inputs()
    with pytest.raises(ValueError, match="attention_mask must be None"):
        unet(x, t, text, encoder_attention_mask=torch.zeros(2, 5))


@pytest.mark.parametrize("heads, queries, keys", [(1, 1, 1), (4, 17, 5), (8, 129, 77)])
def test_reference_attention_is_torch_attention(heads, queries, keys):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 32, generator=g, dtype=torch.float64) for n in (queries, keys, keys))
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(q, k, v, heads), want, rtol=1e-12, atol=1e-12)


def test_native_operator_agrees_and_refuses_other_dtypes():
    pytest.importorskip("pidiff._C")
    q, k, v = torch.randn(2, 9, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    torch.testing.assert_close(attention(q, k, v, 4, "native"), attention(q, k, v, 4), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.pidiff.attention, (q, k, v, 4))
    with pytest.raises(ValueError, match="q must be a float32 CPU tensor"):
        attention(q.double(), k.double(), v.double(), 4, "native")


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="mode must be parallel or residual, got 'both'"):
        AdapterConfig(mode="both")
    with pytest.raises(ValueError, match="groups must be 4 positive sizes"):
        AdapterConfig(groups=(1, 2))
    with pytest.raises(ValueError, match="w_plus must have shape"):
        attach(small_unet(), config()).mapper(torch.zeros(1, 3, WIDTH))
