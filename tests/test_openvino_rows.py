"""What guidance's two rows of a picture share is computed once in OpenVINO, and changes no picture."""

import numpy as np
import pytest

pytest.importorskip("openvino")
pytest.importorskip("torch")

from test_openvino import drawn_inputs, opened
from test_openvino_weights import large  # noqa: F401 (a fixture)
from tiny_model import shared

from pidiff.runtime import Identity, Pipeline
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engines import call
from pidiff.runtime.engines import openvino as engine_module
from pidiff.runtime.engines.openvino import OpenVinoEngine

pytestmark = pytest.mark.usefixtures("large")


@pytest.mark.parametrize("graph", ["unet", "unet_cached"])
def test_rows_with_the_same_latents_are_drawn_as_if_apart(graph, tmp_path_factory, rng):
    bundle = Bundle.open(shared("fused", tmp_path_factory))
    spec = bundle.graph(graph)
    inputs = drawn_inputs(spec, rng, B=4, P=2, h=8, w=8)
    inputs["latents"][2:] = inputs["latents"][:2]
    apart = call(opened(bundle, graph, "onnxruntime"), inputs)
    engine = opened(bundle, graph, static=True)
    engine.copies = 2
    twice = call(engine, inputs)
    assert engine._request.get_tensor("latents").shape[0] == 2
    inputs["latents"][2:] = 7       # not looked at: they are promised to be the first ones
    again = call(engine, inputs)
    for key, value in apart.items():
        np.testing.assert_allclose(twice[key], value, rtol=2e-3, atol=2e-3 * np.abs(value).max(), err_msg=key)
        assert np.array_equal(again[key], twice[key])
    engine.copies = 1
    assert np.abs(call(engine, inputs)["model_output"] - twice["model_output"])[2:].max() > 0.01


def test_graphs_put_together_otherwise_draw_every_row(tmp_path_factory, rng):
    """Those with ONNX's own attention: more than tensors and their shapes goes from one part to the other."""
    bundle = Bundle.open(shared("standard23", tmp_path_factory))
    inputs = drawn_inputs(bundle.graph("unet"), rng, B=2, P=1, h=8, w=8)
    engine = opened(bundle, "unet", static=True)
    engine.copies = 2
    got = call(engine, inputs)
    for key, value in call(opened(bundle, "unet", "onnxruntime"), inputs).items():
        np.testing.assert_allclose(got[key], value, rtol=2e-3, atol=2e-3 * np.abs(value).max(), err_msg=key)


@pytest.mark.parametrize("options, at_once, copies", [({"guidance_interval": (0.0, 0.5)}, None, {1, 2}),
                                                      *(pytest.param(*case, marks=pytest.mark.slow) for case in (
                                                          ({}, None, {2}), ({"guidance_scale": 1.0}, None, {1}), ({}, 1, {1})))])
def test_pictures_do_not_change(options, at_once, copies, tmp_path_factory, monkeypatch):
    """Guided in all steps, in some, in none; and where rows are run one by one."""
    bundle, seen, bind, conditions = shared("fused", tmp_path_factory), set(), OpenVinoEngine.bind, Pipeline._conditions
    monkeypatch.setattr(OpenVinoEngine, "bind", lambda self, *args: (self._shares and seen.add(self.copies), bind(self, *args))[1])
    monkeypatch.setattr(Pipeline, "_conditions", lambda self, *args: conditions(self, *args[:-1], at_once))
    w_plus = (np.random.default_rng(0).standard_normal((6, 512)) * 0.1).astype(np.float32)

    def pictures():
        pipe = Pipeline.from_bundle(bundle, engine="openvino", precision="full", threads=1)
        return pipe.generate(Identity(w_plus), "a photo of person", seed=[1, 2], num_inference_steps=4, **{"guidance_scale": 2.0, **options}).images

    sharing = pictures()
    assert seen == copies
    monkeypatch.setattr(engine_module, "share_rows", lambda model: False)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(sharing, pictures())) <= 1
