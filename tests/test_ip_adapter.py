"""IP-Adapter files as the identity branch, against what diffusers makes of the same files."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("diffusers")

import ip_adapter_files as files
from test_checkpoint import SD15_CHANNELS, SD15_LAYERS
from test_parity import Pair, compare
from tiny_model import make_unet, shared

from pidiff import _C
from pidiff.checkpoint import CheckpointError
from pidiff.config import ImageEncoderConfig
from pidiff.evaluate.generators import BundleGenerator
from pidiff.export.__main__ import main
from pidiff.export.bundle import ExportOptions, export_bundle
from pidiff.export.source import Source
from pidiff.identity import IdentityAdapter
from pidiff.image_encoder import ImageEncoder
from pidiff.ip_adapter import IPAdapterFile, load_image_encoder, load_ip_adapter
from pidiff.model import load_model, with_w_plus
from pidiff.runtime import Identity, Pipeline
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.faces import to_planes
from pidiff.sampling import make_scheduler
from pidiff.unet import attach, detach

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "person-1.jpg"
CHANNELS = (16, 16, 16, 32)              # of tiny_model's attn2 layers
KINDS = {"plain": files.plain, "plus": files.plus}


class Published:
    """A file of a kind, its image encoder in transformers, and diffusers' own UNet with it."""

    def __init__(self, kind, folder):
        torch.manual_seed(1)
        self.kind, self.state = kind, KINDS[kind](CHANNELS)
        self.file = files.write(folder / f"{kind}.safetensors", self.state)
        self.folder = folder / "image_encoder"
        self.clip = files.write_image_encoder(self.folder)
        self.reference, self.unet = make_unet(), make_unet()
        self.unet.load_state_dict(self.reference.state_dict())
        self.reference._load_ip_adapter_weights([self.state], low_cpu_mem_usage=False)

    def features(self, pixels):
        """What diffusers feeds for pictures, and for the unconditional half."""
        if self.kind == "plain":
            embeds = self.clip(pixels).image_embeds
            return embeds, torch.zeros_like(embeds)
        states = [self.clip(x, output_hidden_states=True).hidden_states[-2] for x in (pixels, torch.zeros_like(pixels))]
        return tuple(states)

    def loaded(self):
        file = IPAdapterFile.read(self.file)
        encoder = load_image_encoder(self.folder, file)
        return encoder, load_ip_adapter(file, attach(self.unet, file.adapter_config(16)), encoder.nobody)


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory):
    return Published(request.param, tmp_path_factory.mktemp(request.param))


def normalised(faces):
    """What CLIPImageProcessor makes of pictures that have its size already, for faces in [-1, 1]."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size=64, crop_size=64)
    return (faces / 2 + 0.5 - torch.tensor(processor.image_mean)[:, None, None]) / torch.tensor(processor.image_std)[:, None, None]


@torch.no_grad()
def test_the_unet_is_that_of_diffusers(published):
    """Person and nobody, at several strengths; without a condition it is the base model."""
    encoder, adapter = published.loaded()
    faces = torch.rand(2, 3, 64, 64) * 2 - 1
    latents, text, now = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 16), torch.tensor(500)
    codes = encoder(faces)
    assert codes.shape == ((2, 1, 10) if published.kind == "plain" else (2, 5, 16))
    for features, code in zip(published.features(normalised(faces)), (codes, torch.zeros_like(codes))):
        for scale in (1.0, 0.3):
            for processor in published.reference.attn_processors.values():
                if hasattr(processor, "to_k_ip"):
                    processor.scale = [scale]
            expected = published.reference(latents, now, text, added_cond_kwargs={"image_embeds": [features[:, None]]}).sample
            with adapter.condition(adapter.mapper(code), scale):
                output = published.unet(latents, now, text).sample
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)
            assert (output - published.unet(latents, now, text).sample).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"hidden_act": "quick_gelu", "image_size": 96, "num_hidden_layers": 1}])
def test_the_image_encoder_is_that_of_transformers(tmp_path, changes):
    clip = files.write_image_encoder(tmp_path, **changes)
    encoder = load_image_encoder(tmp_path, IPAdapterFile.read(files.write(tmp_path / "a.bin", files.plain(CHANNELS))))
    faces = torch.rand(3, 3, encoder.config.input_size, encoder.config.input_size) * 2 - 1
    torch.testing.assert_close(encoder(faces)[:, 0], clip(normalised(faces)).image_embeds, rtol=1e-5, atol=1e-5)


def test_files_of_sd15_have_the_published_shapes():
    """ViT-H/14 and both kinds at full size, 16 layers: names and shapes, filled with zeros."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        clip, theirs = ImageEncoder(), CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, projection_dim=1024))
        resampled = ImageEncoder(ImageEncoderConfig(num_layers=31, num_styles=16, style_dim=768, resampler_layers=4, resampler_width=768, resampler_heads=12))
    assert sum(p.numel() for p in clip.parameters()) == 632_076_800
    assert {k: v.shape for k, v in clip.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items() if "position_ids" not in k}
    with torch.device("meta"):
        kinds = {"plain": files.plain(SD15_CHANNELS, 768, 1024), "plus": files.plus(SD15_CHANNELS, 768, 1280, 16, 768, 12)}
    for kind, count in (("plain", 22_319_616), ("plus", 49_087_488)):
        proj, layers = ({k: torch.zeros(()).expand(v.shape) for k, v in part.items()} for part in kinds[kind].values())
        file = IPAdapterFile(proj, layers)
        config = file.adapter_config(768)
        assert (config.num_tokens, config.has_null, config.mode) == ({"plain": 4, "plus": 16}[kind], False, "parallel")
        adapter = load_ip_adapter(file, IdentityAdapter(config, SD15_LAYERS), torch.zeros(16, 768))
        assert len(layers) == 32 and adapter.layers[15].to_k_id.weight.shape == (1280, 768) and not adapter.layers[7].to_v_id.weight.any()
        assert sum(v.numel() for part in (proj, layers) for v in part.values()) == count
    names = {k.removeprefix("resampler."): v.shape for k, v in resampled.state_dict().items() if k.startswith("resampler.")}
    assert names == {k: v.shape for k, v in kinds["plus"]["image_proj"].items() if not k.startswith("norm_out")}


# --- bundles ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles of both kinds, made when they are first asked for: plain fused, plus by the command line and standard."""
    made = {}

    def get(kind):
        if kind not in made:
            folder, model = tmp_path_factory.mktemp(f"{kind}-bundle"), shared("residual", tmp_path_factory)
            torch.manual_seed(2)
            file = files.write(folder / f"{kind}.bin", KINDS[kind](CHANNELS))
            files.write_image_encoder(folder / "clip")
            made[kind] = folder / "bundle"
            if kind == "plain":
                source = Source(model, adapter_file=file, image_encoder=folder / "clip")
                export_bundle(source, made[kind], ExportOptions(outer=0, report="none"))
            else:
                assert main([str(model), str(made[kind]), "--adapter", str(file), "--image-encoder", str(folder / "clip"), "--attention",
                             "standard", "--cached-layers", "0", "--report", "none", "--quiet"]) == 0
        return made[kind]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_whole_pictures_in_onnx_runtime(bundles, monkeypatch, kind):
    """One person, two people in regions from a later step, nobody; not square; against PyTorch."""
    pair = Pair(bundles(kind))
    spec = pair.pipe.bundle.manifest.model
    assert (spec.w_plus_layers, spec.w_plus_dim, spec.face_size, spec.identity.num_groups) == ((1, 10) if kind == "plain" else (5, 16)) + (64, 1)
    options = dict(solver="dpmpp_2m", steps=4, size=(32, 48))
    one = compare(pair, monkeypatch, pair.people[:1], guidance_scale=3.0, **options)
    mask = np.zeros((2, 16, 24), np.float32)
    mask[0, :, :12], mask[1, :, 12:] = 1, 1
    two = compare(pair, monkeypatch, pair.people, id_mask=mask, id_start=0.3, id_scale=0.7, **options)
    off = compare(pair, monkeypatch, pair.people[:1], id_scale=0.0, **options)
    assert min(np.abs(one - two).max(), np.abs(one - off).max()) > 1e-3
    np.testing.assert_array_equal(off, compare(pair, monkeypatch, [], **options))


@pytest.mark.slow
def test_a_photo_gives_the_picture_of_diffusers_pipeline(bundles, tmp_path_factory):
    """From the face to the picture, guided: load_ip_adapter's UNet, transformers' image encoder, diffusers' loop."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPVisionModelWithProjection

    pipe, model = Pipeline.from_bundle(bundles("plus"), threads=1), load_model(bundles("plus"))
    person = pipe.enroll(PHOTO)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 48}
    images = [pipe.generate(person, "a person", "a dark photo", seed=5, scheduler="ddim", id_scale=scale, **options).images[0] for scale in (0.6, 0.0)]
    theirs = StableDiffusionPipeline(
        model.vae, model.text_encoder, model.tokenizer, Source(shared("residual", tmp_path_factory)).unet()[0], make_scheduler(model.scheduler, "ddim", 4),
        None, None, requires_safety_checker=False)
    detach(theirs.unet)
    folder = bundles("plus").parent
    theirs.unet._load_ip_adapter_weights([torch.load(folder / "plus.bin", weights_only=True)], low_cpu_mem_usage=False)
    theirs.set_ip_adapter_scale(0.6)
    theirs.set_progress_bar_config(disable=True)
    pixels, clip = normalised(torch.from_numpy(to_planes(person.face))), CLIPVisionModelWithProjection.from_pretrained(folder / "clip").eval()
    with torch.no_grad():
        nobody, somebody = (clip(p, output_hidden_states=True).hidden_states[-2] for p in (torch.zeros_like(pixels), pixels))
    expected = theirs("a person", negative_prompt="a dark photo", ip_adapter_image_embeds=[torch.stack([nobody, somebody])], output_type="np",
                      latents=torch.from_numpy(_C.randn([5], (4, 16, 24))), **options).images[0]
    assert np.abs(images[0] - 255 * expected).max() < 1.5 and np.abs(images[1] - 255 * expected).max() > 3


@pytest.mark.slow
def test_a_photo_becomes_a_small_file(bundles, tmp_path):
    """The runtime's code of a face is PyTorch's; what only W+ codes can do is refused."""
    pipe, model = Pipeline.from_bundle(bundles("plus"), threads=1), load_model(bundles("plus"))
    person = pipe.enroll(PHOTO)
    with torch.no_grad():
        expected = model.w_plus_encoder(torch.from_numpy(to_planes(person.face)))[0]
    np.testing.assert_allclose(person.w_plus, expected, atol=2e-5)
    person.save(tmp_path / "me.safetensors")
    assert (tmp_path / "me.safetensors").stat().st_size < 20_000
    person = Identity.load(tmp_path / "me.safetensors")
    assert pipe.generate(person, "a person", seed=1, num_inference_steps=1).identity_map is None
    assert pipe.directions == {} and BundleGenerator(bundles("plus"), "onnxruntime", None, None).levels == ()
    for call, sentence in (
            (lambda: pipe.generate(person, "a person", level_scale=(1, 1, 0, 1)), r"level_scale must be all ones for this bundle, .*, got \(1, 1, 0, 1\)"),
            (lambda: pipe.fold(person, (2, 1, 1, 1)), "level_scale must be all ones"),
            (lambda: pipe.mix(person, person, "fine"), "levels must be used with a bundle of W\\+ codes, got 'fine'"),
            (lambda: pipe.edit(person, age=1.0), "edit must be one of .the bundle has none., got 'age'"),
            (lambda: pipe.generate(Identity(np.zeros((6, 512), np.float32)), "a person"), "identity must have a code of 5 x 16 numbers .*, got 6 x 512"),
            (lambda: with_w_plus(model), "model must have a W\\+ encoder to be trained")):
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.slow
def test_a_bundle_is_a_model_again(bundles):
    """What a second export reads from the bundle is what the first one wrote."""
    source, model = Source(bundles("plus")), load_model(bundles("plus"))
    for again, first in ((source.w_plus_encoder(), model.w_plus_encoder), (source.unet()[1], model.adapter)):
        assert again.config == first.config
        assert all(torch.equal(v, first.state_dict()[k]) for k, v in again.state_dict().items())
    assert torch.equal(model.adapter.mapper.latent_avg, -model.w_plus_encoder.nobody) and model.w_plus_encoder.nobody.abs().max() > 0.1
    names = Bundle.open(bundles("plus")).manifest.sources
    assert {"w_plus_encoder/model.safetensors", "w_plus_encoder/plus.bin", "adapter/plus.bin"} <= names.keys(), "its codes are of both"


# --- wrong files -----------------------------------------------------------------------------------------------------

FACE_ID = {"proj.0.weight": torch.zeros(2, 2), "proj.2.weight": torch.zeros(2, 2), "norm.weight": torch.zeros(2)}


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s.pop("ip_adapter"), "must hold image_proj and ip_adapter only, got image_proj"),
    (lambda s: s.update(w_proj={"a": torch.zeros(1)}), r"must hold image_proj and ip_adapter only, got w_proj\.a"),
    (lambda s: s.update(image_proj=FACE_ID), "plain one .* or Plus .* not FaceID or full-face, got image_proj.proj.0.weight"),
    (lambda s: s["image_proj"].update({"proj.weight": torch.zeros(64)}), "must be a plain one"),
    (lambda s: s["ip_adapter"].pop("3.to_v_ip.weight"), "ip_adapter must have exactly .* got missing 1.to_v_id.weight"),
    (lambda s: s["ip_adapter"].update({"2.to_k_ip.weight": torch.zeros(1)}), r"unexpected 2.to_k_ip.weight \(of the file\)"),
    (lambda s: s["image_proj"].pop("proj.bias"), "image_proj must have exactly .* got missing proj_0.bias"),
    (lambda s: s["image_proj"].update({"norm.bias": torch.full((16,), float("nan"))}), "finite weights, got NaN or infinity in norm.bias"),
    (lambda s: s.update(files.plain(CHANNELS, token_dim=8)), "IP-Adapter file must be made for a UNet with text of width 16, got one for 8"),
])
def test_wrong_adapter_files(tmp_path, change, sentence):
    state = files.plain(CHANNELS)
    change(state)
    files.write(tmp_path / "a.bin", state)
    unet = make_unet()
    with pytest.raises(CheckpointError, match=sentence) as error:
        file = IPAdapterFile.read(tmp_path / "a.bin")
        load_ip_adapter(file, attach(unet, file.adapter_config(16)))
    assert "\n" not in str(error.value)


def test_wrong_image_encoders(tmp_path):
    folder, file = tmp_path / "clip", IPAdapterFile(*files.plain(CHANNELS, image_dim=12).values())
    files.write_image_encoder(folder)
    with pytest.raises(CheckpointError, match="must give numbers of width 12, which the IP-Adapter file reads, got 10"):
        load_image_encoder(folder, file)
    resampled = files.plus(CHANNELS)
    del resampled["image_proj"]["layers.2.0.norm1.bias"]
    with pytest.raises(CheckpointError, match="image encoder must have exactly .* got missing resampler.layers.2.0.norm1.bias"):
        load_image_encoder(folder, IPAdapterFile(*resampled.values()))
    config = json.loads((folder / "config.json").read_text())
    for change, sentence in (({"model_type": "clip"}, r"folder of a CLIPVisionModelWithProjection, got .* \(model_type clip\)"),
                             ({"hidden_act": "silu"}, "activation must be gelu or quick_gelu, got 'silu'"),
                             ({"image_size": 80}, "pictures whose side 32 divides, .* got 80")):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=sentence):
            load_image_encoder(folder, IPAdapterFile(*files.plain(CHANNELS).values()))


def test_the_command_says_what_belongs_together(tmp_path, tmp_path_factory, capsys):
    model = shared("residual", tmp_path_factory)
    files.write_image_encoder(tmp_path / "clip")
    file = str(files.write(tmp_path / "a.safetensors", files.plain(CHANNELS)))
    alone = shutil.copytree(model, tmp_path / "alone", ignore=shutil.ignore_patterns("w_plus_encoder"))
    for folder, options, sentence in (
            (model, ["--image-encoder", tmp_path / "clip"], "--image-encoder must be given with an IP-Adapter file as --adapter .* got none"),
            (model, ["--image-encoder", tmp_path / "clip", "--adapter", file, "--encoder", file], "without --encoder, got --encoder too"),
            (model, ["--image-encoder", tmp_path, "--adapter", file], "--image-encoder must be a folder with config.json and model.safetensors, got"),
            (model, ["--image-encoder", tmp_path / "clip", "--adapter", tmp_path / "none.bin"], "must be an existing file, got .*none.bin"),
            (alone, ["--adapter", file], "w_plus_encoder/ or be given --encoder FILE or --image-encoder FOLDER")):
        assert main([str(folder), str(tmp_path / "out"), "--quiet", *map(str, options)]) == 1
        assert re.search(sentence, capsys.readouterr().err) and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="an IP-Adapter file is given with an image encoder"):
        Source(model, adapter_file=tmp_path / "a.safetensors").unet()
