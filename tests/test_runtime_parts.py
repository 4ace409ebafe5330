"""Parts of the runtime on a tiny bundle: text, schedule, engine, weights that are no numbers."""


import numpy as np
import pytest
from drawn_face import drawn_face
from tiny_bundle import spec_of, write_tiny_bundle

from pidiff import _C
from pidiff.runtime import EngineError, PidiffError, Pipeline
from pidiff.runtime.bundle import Bundle, BundleError
from pidiff.runtime.engines import call, check_tensors, load_engine
from pidiff.runtime.schedule import SOLVERS, alphas_cumprod, make_schedule
from pidiff.runtime.text import TextTokenizer

PROMPT = "a photo of person"


def test_tokens(tiny):
    tokenizer = TextTokenizer(Bundle.open(tiny))
    assert tokenizer.encode("a photo").tolist() == [[0, 2, 3, 1, 1, 1, 1, 1]]
    assert tokenizer.encode("").tolist() == [[0] + [1] * 7]
    with pytest.warns(UserWarning, match="prompt must fit 6 tokens, got 8: ignored 'blue red'"):
        ids = tokenizer.encode("a photo of person red blue blue red")
    assert ids.tolist() == [[0, 2, 3, 4, 5, 6, 7, 1]]


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_schedule_is_diffusers(kind, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    config = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": kind, "rescale_betas_zero_snr": zero_snr}
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    assert np.abs(alphas_cumprod(config) - expected).max() < 1e-5


@pytest.mark.parametrize("change", [{"beta_schedule": "magic"}, {"beta_start": -1.0}, {"num_train_timesteps": "x"},
                                    {"trained_betas": [0.1]}, {"rescale_betas_zero_snr": "yes"}, {"steps_offset": 1.5},
                                    {"prediction_type": 3}])
def test_bad_noise_schedules(change):
    with pytest.raises(BundleError, match="^schedule.json"):
        make_schedule(change, "ddim", 5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_schedule_passes_over_what_its_solver_does_not_know(solver):
    """As diffusers' classes do: a model whose scheduler has Karras sigmas can be sampled by all."""
    config = {"use_karras_sigmas": True, "timestep_spacing": "leading", "clip_sample": False}
    made = make_schedule(config, solver, 4, {"timestep_spacing": "trailing", "eta": 0.0, "solver": "of somebody else"})
    own = {} if solver not in ("euler", "dpmpp_2m", "unipc") else {"use_karras_sigmas": True}
    expected = _C.Schedule(solver, alphas_cumprod(config), 4, timestep_spacing="trailing", eta=0.0, **own)
    assert made.timesteps.tolist() == expected.timesteps.tolist() and made.timestep_spacing == "trailing"
    assert made.sigmas.tolist() == expected.sigmas.tolist() and made.needs_noise == expected.needs_noise == (solver in ("lcm", "euler_ancestral"))


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_published_configuration_is_sampled_as_diffusers_does(solver, steps):
    """Stable Diffusion 1.5's file says nothing of spacing; diffusers then takes each class's own, not that of the class it names."""
    diffusers = pytest.importorskip("diffusers")
    from pidiff.sampling import SOLVERS as CLASSES, make_scheduler

    config = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
              "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}
    name, extra = CLASSES[solver]
    theirs = getattr(diffusers, name).from_config(diffusers.PNDMScheduler.from_config(config).config, **extra)
    theirs.set_timesteps(steps)
    ours = make_schedule(config, solver, steps)
    for other in (theirs, make_scheduler(config, solver, steps)):
        np.testing.assert_allclose(ours.timesteps, other.timesteps.numpy(), atol=1e-3)
        np.testing.assert_allclose(ours.init_noise_sigma, float(other.init_noise_sigma), rtol=1e-4)
        if hasattr(other, "sigmas"):
            np.testing.assert_allclose(ours.sigmas, other.sigmas.numpy(), rtol=1e-4)


def test_engine_writes_into_the_bound_arrays(tiny):
    bundle = Bundle.open(tiny)
    spec = bundle.graph("text_conditioner")
    engine = load_engine("onnxruntime")(bundle.file(spec.file), spec, threads=1)
    embeds, out = np.zeros((1, 8, 6), np.float32), np.full((1, 8, 20), 7, np.float32)
    engine.bind({"prompt_embeds": embeds, "text_kv": out})
    engine.run()
    assert not out.any()
    embeds += 1  # no copy: the next run sees it, and writes to the same memory
    engine.run()
    assert out.any() and np.allclose(out, call(engine, {"prompt_embeds": embeds})["text_kv"])


@pytest.mark.parametrize("tensors, match", [
    ({"prompt_embeds": np.zeros((1, 8, 6))}, "prompt_embeds must be a contiguous .*float32 array, got .*float64"),
    ({"prompt_embeds": np.zeros((1, 8, 7), np.float32)}, r"\['B', 8, 6\] float32 array, got \[1, 8, 7\]"),
    ({"prompt_embeds": np.zeros((1, 6, 8), np.float32).transpose(0, 2, 1)}, "contiguous"),
    ({"embeds": np.zeros(1, np.float32)}, "tensors must be among prompt_embeds, text_kv, got 'embeds'"),
    ({"prompt_embeds": np.zeros((1, 8, 6), np.float32), "text_kv": np.zeros((2, 8, 20), np.float32)}, r"text_kv must be .* got \[2"),
])
def test_engine_checks_tensors(tiny, tensors, match):
    spec = Bundle.open(tiny).graph("text_conditioner")
    with pytest.raises(EngineError, match=match):
        check_tensors((*spec.inputs, *spec.outputs), tensors)


def test_fused_nodes_run(tmp_path):
    """The engine registers the library with the `pidiff` nodes for a fused bundle."""
    onnx = pytest.importorskip("onnx")
    value = lambda n: onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["B", "S", 16])
    node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["out"], domain="pidiff", num_heads=2)
    graph = onnx.helper.make_graph([node], "g", [value(n) for n in "qkv"], [value("out")])
    domains = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("pidiff", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=domains, ir_version=9), tmp_path / "g.onnx")
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 16)).astype(np.float32)
    engine = load_engine("onnxruntime")(tmp_path / "g.onnx", spec_of(tmp_path / "g.onnx"), threads=1, fused=True)
    assert np.allclose(call(engine, {"q": q, "k": k, "v": v})["out"], _C.attention(q, k, v, 2), atol=1e-5)
    with pytest.raises(EngineError, match="g.onnx must load in ONNX Runtime"):
        load_engine("onnxruntime")(tmp_path / "g.onnx", spec_of(tmp_path / "g.onnx"), fused=False)


def test_engine_names(tiny):
    with pytest.raises(EngineError, match=r"engine must be one of .*onnxruntime.*\(installed: .*onnxruntime.*\), got 'tpu'"):
        Pipeline.from_bundle(tiny, engine="tpu")
    with pytest.raises(EngineError, match="device must be cpu"):
        Pipeline.from_bundle(tiny, device="quantum").prepare(PROMPT)
    with pytest.raises(PidiffError, match="threads must be an integer"):
        Pipeline.from_bundle(tiny, threads=0)


def test_a_graph_that_is_not_onnx(tiny):
    bundle = Bundle.open(tiny)
    with pytest.raises(EngineError, match="schedule.json must load in ONNX Runtime .*, got: ") as caught:
        load_engine("onnxruntime")(bundle.file("schedule.json"), bundle.graph("unet"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("graph, match", [("unet", "at step 1 of .*: NaN comes first in"), ("text_encoder", "at step 1 of "), ("vae_decoder", "the VAE decoder must give finite"),
                                          ("w_plus_encoder", "w_plus must be finite")])
def test_nan_weights(tmp_path, graph, match):
    pipe = Pipeline.from_bundle(write_tiny_bundle(tmp_path / "b", poison=graph), threads=2)
    with pytest.raises(PidiffError, match=match):
        pipe.generate(pipe.enroll(drawn_face(128)), PROMPT, seed=1)
