"""Numbers that are not finite: the error names the step, and the layer that they come from."""

import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from tiny_bundle import write_tiny_bundle

from pidiff.runtime import Identity, Pipeline, diagnosis
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.denoise import Denoiser
from pidiff.runtime.errors import NotFinite
from pidiff.runtime.memory import resident

STEPS = 3


def generate(pipe, **options):
    w_plus = np.random.default_rng(0).standard_normal((pipe.bundle.manifest.model.w_plus_layers, 512)) * 0.1
    return pipe.generate(Identity(w_plus.astype(np.float32)), "a photo of person", seed=1, num_inference_steps=STEPS, guidance_scale=2.0,
                         **options)


# --- real UNets, of random weights ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function (fp16) -> the bundle of a tiny model, in float32 or float16."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tiny_model import shared

    return lambda fp16: shared("fp16" if fp16 else "fused", tmp_path_factory)


@pytest.fixture
def damaged(exported, tmp_path):
    """Return a function (layer, factor, fp16) -> a Pipeline on a bundle with that layer's weights multiplied: no export lets it pass."""
    def make(layer, factor, fp16=False):
        from pidiff.export.weights import stored_tensors

        bundle, file = Path(shutil.copytree(exported(fp16), tmp_path / "b")), "unet/diffusion_pytorch_model.safetensors"
        entry = next(t for k, t in stored_tensors(bundle, file).items() if t.key == f"{layer}.weight")
        with open(bundle / file, "r+b") as handle:
            handle.seek(entry.offset)
            values = np.frombuffer(handle.read(entry.length), np.float16).astype(np.float32) * factor
            handle.seek(entry.offset)
            handle.write(values.clip(-6e4, 6e4).astype(np.float16).tobytes())
        return Pipeline.from_bundle(bundle, verify=False, threads=1)

    return make


def said(pipe, **options):
    """The sentence of the NotFinite that a picture ends with."""
    with pytest.raises(NotFinite) as caught:
        generate(pipe, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAYERS_OF_UNET = {
    "conv_in": "conv_in", "mid_block.resnets.0.conv1": "mid_block (resnets.0.conv1)", "conv_out": "conv_out",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0": "up_blocks.1 (attentions.1.transformer_blocks.0.attn2.to_out.0)",
}


@pytest.mark.parametrize("layer, fp16", [*((n, False) for n in LAYERS_OF_UNET),
                                         pytest.param("mid_block.resnets.0.conv1", True, marks=pytest.mark.slow)])
def test_the_layer_that_is_damaged_is_named(damaged, layer, fp16, monkeypatch):
    pipe, runs = damaged(layer, np.nan, fp16), []
    expected = f"latents must stay finite, got NaN or infinity at step 1 of {STEPS}: NaN comes first in {LAYERS_OF_UNET[layer]}: the model"
    assert said(pipe).startswith(expected)
    # Where memory is short: blocks first.
    fits, run_for = diagnosis._fits, diagnosis.run_for
    monkeypatch.setattr(diagnosis, "_fits", lambda *args: fits(*args) and False)
    monkeypatch.setattr(diagnosis, "run_for", lambda *args: runs.append(len(args[3])) or run_for(*args))
    assert said(pipe).startswith(expected)
    assert len(runs) == 2 and max(runs) < 40


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["up_blocks.1.attentions.1.proj_out", "down_blocks.0.resnets.0.conv2"])
def test_the_layer_that_overflows_in_float16_is_named(damaged, layer, monkeypatch):
    """A GPU that computes in float16 has failed; the processor computes wider, and must still find the number that float16 has not."""
    pipe = damaged(layer, 1e6, True)
    fail_in_step(monkeypatch, 0)
    block, _, rest = diagnosis.split(layer)
    assert f"at step 1 of {STEPS}: numbers overflow first in {block} ({rest}): " in said(pipe)


def test_what_does_not_overflow_here_is_told_with_the_largest_value(exported, monkeypatch):
    fail_in_step(monkeypatch, 2)
    found = re.search(rf"at step {STEPS} of {STEPS}: on the processor no layer overflows, the largest value is (\S+) in (\S+) \(float16 ends at "
                      "65504\\)", said(Pipeline.from_bundle(exported(True), threads=1)))
    assert 0.1 < float(found[1]) < 1000 and found[2].split(".")[0] in ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")


def test_the_cached_graph_is_looked_at_where_it_has_failed(exported, monkeypatch):
    graphs, run_for = [], diagnosis.run_for
    monkeypatch.setattr(diagnosis, "run_for", lambda path, *args: graphs.append(path.stem) or run_for(path, *args))
    fail_in_step(monkeypatch, 1)
    assert f"at step 2 of {STEPS}: on the processor no layer overflows" in said(Pipeline.from_bundle(exported(False), threads=1), cache_interval=2)
    assert graphs == ["unet_cached"]


def fail_in_step(monkeypatch, step):
    """Make an engine of the loop on the processor report in a step what one does that looks itself."""
    loop = Denoiser.run

    def run(self, *args):
        count = itertools.count()
        for engine in {engine for engine, _ in self._calls}:
            engine.run = lambda call=engine.run: call() if next(count) != step else fail()
        return loop(self, *args)

    def fail():
        raise NotFinite("graph unet must give finite numbers, got NaN or infinity in model_output", "unet")

    monkeypatch.setattr(Denoiser, "run", run)


# --- graphs without names -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("poison, sentence", [
    ("unet", f"latents must stay finite, got NaN or infinity at step 1 of {STEPS}: NaN comes first in time: "),
    ("text_encoder", f"at step 1 of {STEPS}: NaN or infinity is in the input text_kv of unet: "),
    ("vae_decoder", "the VAE decoder must give finite pictures, got NaN or infinity: NaN comes first in a: ")])
def test_other_graphs(tmp_path, poison, sentence):
    pipe = Pipeline.from_bundle(write_tiny_bundle(tmp_path / "b", poison=poison), threads=1)
    assert sentence in said(pipe)
    assert sentence in said(pipe), "and the pipeline still works"


def test_the_error_is_never_hidden(tmp_path, monkeypatch):
    pipe = Pipeline.from_bundle(write_tiny_bundle(tmp_path / "b", poison="unet"), threads=1)
    step = f"latents must stay finite, got NaN or infinity at step 1 of {STEPS}: "
    with monkeypatch.context() as patch:
        patch.setattr(pipe._budget, "room", lambda: 1)
        assert re.search(step + r"the layer is not known \(finding it takes \d+ MiB, 0 MiB are free\): the model's weights", said(pipe))
    def broken(*args):
        raise RuntimeError("no such\noption")

    monkeypatch.setattr(diagnosis, "run_for", broken)
    assert step + "the layer is not known (no such option): the model's weights" in said(pipe)


def test_a_limit_counts_for_it(tmp_path):
    pipe = Pipeline.from_bundle(write_tiny_bundle(tmp_path / "b"), max_memory=8 << 30)
    pipe._budget._limit = resident() + (5 << 20)
    assert pipe._budget.room() <= 6 << 20


def test_an_error_of_the_callback_stays_what_it_is(tmp_path):
    pipe = Pipeline.from_bundle(write_tiny_bundle(tmp_path / "b"), threads=1)

    def callback(*_):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        generate(pipe, callback=callback)


def test_a_graph_is_read_and_extended_as_onnx_does(tmp_path):
    bundle = Bundle.open(write_tiny_bundle(tmp_path / "b"))
    data = bundle.file("unet.onnx").read_bytes()
    values = [name for _, name in diagnosis.layer_values(data)]
    graph = onnx.load_from_string(data).graph
    assert values == [name for node in graph.node for name in node.output]
    longer = onnx.load_from_string(diagnosis.with_outputs(data, ["s1", "t" * 200]))
    assert [o.name for o in longer.graph.output] == ["model_output", "identity_map", "s1", "t" * 200]
    assert longer.graph.node == graph.node
