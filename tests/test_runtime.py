"""The runtime on a tiny bundle (and on the shipped one where it is present): pictures, options, identities, errors."""

import functools
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from drawn_face import drawn_face
from safetensors.numpy import save
from tiny_bundle import LAYERS, WORDS, write_tiny_bundle

from pidiff import _C
from pidiff.runtime import Cancelled, Identity, IdentityError, PidiffError, Pipeline
from pidiff.runtime.bundle import shipped_bundle
from pidiff.runtime.options import resolve_mask, resolve_seeds
from pidiff.runtime.schedule import SOLVERS, alphas_cumprod

PROMPT = "a photo of person"
needs_mini = pytest.mark.skipif(not (shipped_bundle() / "manifest.json").exists(), reason="models/mini is not there")


@pytest.fixture(scope="module")
def pipe(tiny):
    return Pipeline.from_bundle(tiny, threads=2)


@pytest.fixture(scope="module", params=["fp32", "fp16", pytest.param("mini", marks=needs_mini)])
def any_pipe(request, tiny, tmp_path_factory):
    if request.param == "fp16":
        tiny = write_tiny_bundle(tmp_path_factory.mktemp("tiny16") / "bundle", "float16")
    return Pipeline.from_bundle(None if request.param == "mini" else tiny, threads=2)


def person(seed=0, layers=LAYERS):
    return Identity(np.random.default_rng(seed).standard_normal((layers, 512)).astype(np.float32))


def somebody(pipe, seed=0):
    return person(seed, pipe.bundle.manifest.model.w_plus_layers)


def picture(pipe, who, **options):
    return pipe.generate(who, PROMPT, **{"seed": 1, "num_inference_steps": 4, **options}).images[0].astype(int)


# --- pictures --------------------------------------------------------------------------------------------------------

def test_a_photo_and_a_prompt_give_a_picture(any_pipe):
    model = any_pipe.bundle.manifest.model
    me = any_pipe.enroll(drawn_face(256))
    assert me.w_plus.shape == (model.w_plus_layers, 512) and me.face.shape == (model.face_size,) * 2 + (3,)
    result = any_pipe.generate(me, PROMPT, seed=7, num_inference_steps=4, num_images=2)
    assert [i.shape for i in result.images] == [(model.image_size, model.image_size, 3)] * 2
    assert all(i.dtype == np.uint8 and i.std() > 1 for i in result.images) and result.seeds == [7, 8]
    assert result.identity_map.shape == (2, 1, *model.latent_shape[1:])
    assert 0 <= result.identity_map.min() and result.identity_map.max() <= 1
    assert set(result.seconds) >= {"text", "identity", "plan", "denoise", "decode", "total"}
    assert all(v >= 0 for v in result.seconds.values())


def test_equal_seeds_give_equal_pictures_in_any_batch(any_pipe):
    who = somebody(any_pipe)
    run = lambda **o: any_pipe.generate(who, PROMPT, num_inference_steps=3, **o).images
    batch, again = run(seed=[5, 6, 2**40]), run(seed=[5, 6, 2**40])
    assert all(np.array_equal(a, b) for a, b in zip(batch, again))
    for seed, image in zip([5, 6, 2**40], batch):
        assert np.abs(run(seed=seed)[0].astype(int) - image).max() <= 2  # a GEMM may round by its batch
    for image, other in zip(batch, run(seed=[5, 6, 2**40], batch_size=2)):
        assert np.abs(other.astype(int) - image).max() <= 2
    assert not np.array_equal(batch[0], batch[1])


def test_identity_scale_zero_is_the_base_model(any_pipe):
    base = picture(any_pipe, None)
    assert np.array_equal(picture(any_pipe, somebody(any_pipe), id_scale=0), base)
    assert np.array_equal(picture(any_pipe, somebody(any_pipe), id_start=1.0), base)
    assert not np.array_equal(picture(any_pipe, somebody(any_pipe)), base)
    assert any_pipe.generate(None, PROMPT, num_inference_steps=2).identity_map is None


def test_the_whole_path_step_by_step(tiny, pipe):
    """`generate` equals the same graphs called one by one, with guidance and solver spelled out."""
    session = lambda name: ort.InferenceSession(tiny / f"{name}.onnx")
    run = lambda name, **inputs: session(name).run(None, inputs)
    who, seed, guidance = person(3), 11, 2.5
    ids = np.full((2, 8), 1, np.int64)
    ids[:, 0] = 0
    ids[1, 1:5] = [WORDS.index(w) for w in PROMPT.split()]
    text_kv = run("text_conditioner", prompt_embeds=run("text_encoder", input_ids=ids)[0])[0]
    levels = np.array([[1.0, 0.5, 0.0, 2.0]] * 2, np.float32)
    w_plus = np.stack([np.zeros_like(who.w_plus), who.w_plus])
    fold = run("id_conditioner", w_plus=w_plus, level_scale=levels)[0][:, None]
    schedule = _C.Schedule("dpmpp_2m", alphas_cumprod({}), 5, prediction_type="v_prediction", timestep_spacing="leading")
    table = run("time_conditioner", timesteps=schedule.timesteps)[0]
    latents = _C.randn([seed], (4, 4, 4)) * np.float32(schedule.init_noise_sigma)
    solver, unet, ones = _C.Solver(schedule), session("unet"), np.ones((2, 1, 4, 4), np.float32)
    for i in range(5):
        scale = np.full(2, 0.8 if i >= 2 else 0, np.float32)
        model_input = np.repeat(solver.scale_model_input(i, latents), 2, 0)
        out = unet.run(None, {"latents": model_input, "time_row": table[i:i + 1], "text_kv": text_kv, "id_fold": fold,
                              "id_mask": ones, "id_scale": scale})[0]
        latents, _ = solver.step(i, out[:1] + guidance * (out[1:] - out[:1]), latents)
    image = run("vae_decoder", latents=latents)[0][0].transpose(1, 2, 0)
    result = pipe.generate(who, PROMPT, seed=seed, guidance_scale=guidance, num_inference_steps=5, id_scale=0.8, id_start=0.4,
                           level_scale=[1, 0.5, 0, 2])
    assert np.abs(result.images[0] - (image * 127.5 + 127.5)).max() < 0.75


def test_what_is_asked_changes_the_picture(pipe):
    base = picture(pipe, person())
    for change in ({"seed": 2}, {"id_scale": 0.3}, {"level_scale": (0, 1, 1, 1)}, {"guidance_scale": 4.0}, {"id_start": 0.5},
                   {"negative_prompt": "blue"}, {"num_inference_steps": 7}, {"edits": {"smile": 2.0}},
                   {"id_mask": [(0, 0, 0.5, 1)]}):
        assert not np.array_equal(picture(pipe, person(), **change), base), change
    assert not np.array_equal(pipe.generate(person(), "red sketch", seed=1, num_inference_steps=4).images[0], base)
    assert np.array_equal(picture(pipe, person()), base)


def test_no_guidance_ignores_the_negative_prompt(pipe):
    plain = picture(pipe, person(), guidance_scale=1.0)
    assert np.array_equal(picture(pipe, person(), guidance_scale=0), plain), "diffusers' word for none"
    assert np.array_equal(picture(pipe, person(), guidance_scale=1.0, negative_prompt="blue"), plain)


def test_a_region_keeps_the_identity_inside(pipe):
    """The tiny model is local: outside the region the picture is the base model's, inside it is the person's."""
    base, full = picture(pipe, None), picture(pipe, person())
    left = picture(pipe, person(), id_mask=[(0, 0, 0.5, 1)])
    assert np.array_equal(left[:, 16:], base[:, 16:]) and np.array_equal(left[:, :16], full[:, :16])
    mask = np.zeros((1, 64, 64))
    mask[:, :, :32] = 1
    assert np.array_equal(picture(pipe, person(), id_mask=mask), left)


def test_two_people_in_two_regions(pipe):
    a, b, regions = person(1), person(2), [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    both = pipe.generate([a, b], PROMPT, seed=1, num_inference_steps=4, id_mask=regions)
    image = both.images[0].astype(int)
    assert np.array_equal(image[:, :16], picture(pipe, a)[:, :16]) and np.array_equal(image[:, 16:], picture(pipe, b)[:, 16:])
    assert both.identity_map.shape == (1, 2, 4, 4) and not both.identity_map[0, 0, :, 2:].any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver(pipe, solver):
    result = pipe.generate(person(), PROMPT, seed=1, num_inference_steps=4, scheduler=solver)
    assert result.scheduler == solver and result.images[0].std() > 1


def test_threads_take_turns(tiny):
    """Several users of one pipeline, as in a server: each gets the picture that it gets alone."""
    pipe = Pipeline.from_bundle(tiny, engine="onnxruntime", threads=1)
    draw = lambda n: (pipe.fold(pipe.edit(person(n), smile=1.0)), pipe.generate(person(n), ("blue", "red", "a photo")[n % 3], seed=n).images[0])
    alone, inside, most = [draw(n) for n in range(6)], [], []
    begun = type(pipe)._denoised

    def counted(*given):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        yield from begun(*given)
        inside.pop()

    pipe._denoised = functools.partial(counted, pipe)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for (fold, image), (other_fold, other) in zip(alone, pool.map(draw, range(6))):
                assert np.array_equal(fold, other_fold) and np.array_equal(image, other)
    assert most == [1] * 18


def test_a_callback_does_not_draw_with_its_own_pipeline(pipe):
    """Both pictures would use one memory. Afterwards, and for other threads, the pipeline is as before."""
    again = lambda step, total, preview: picture(pipe, person(2))
    with pytest.raises(PidiffError, match="^callback must not draw with the pipeline that calls it, got a call of generate$"):
        picture(pipe, person(), callback=again)
    prepared = lambda step, total, preview: pipe.prepare("sketch") is None
    assert np.array_equal(picture(pipe, person(), callback=prepared), picture(pipe, person()))


def test_eta_says_how_random_tcd_is(pipe):
    given = lambda **how: pipe.generate(person(), PROMPT, seed=1, num_inference_steps=4, scheduler="tcd", **how).images[0].astype(int)
    assert np.array_equal(given(), given(eta=0.3)) and np.array_equal(given(eta=0.0), given(eta=0))
    assert min(np.abs(given(eta=a) - given(eta=b)).max() for a, b in ((0, 0.3), (0.3, 1), (0, 1))) > 2
    with pytest.raises(PidiffError, match="^eta must be given with the scheduler tcd only, got 0.5 with dpmpp_2m$"):
        picture(pipe, person(), eta=0.5)
    with pytest.raises(PidiffError, match=r"^eta must be a number in \[0, 1\], got 2$"):
        given(eta=2)


def test_how_to_sample_may_stand_in_the_bundle(tmp_path):
    path = write_tiny_bundle(tmp_path / "bundle")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["scheduler"] |= {"solver": "tcd", "eta": 0, "timestep_spacing": "trailing", "use_karras_sigmas": True, "num_inference_steps": 4}
    (path / "manifest.json").write_text(json.dumps(manifest))
    pipe = Pipeline.from_bundle(path, threads=1)
    assert not pipe.plan().schedule.needs_noise and pipe.plan(eta=0.5).schedule.needs_noise
    assert pipe.plan(scheduler="ddim").schedule.timesteps.tolist() == [999, 749, 499, 249], "karras sigmas are not for ddim"
    assert pipe.plan(scheduler="euler").schedule.timesteps.tolist() != [999, 749, 499, 249]
    assert pipe.generate(person(), PROMPT, seed=1).scheduler == "tcd"


def test_defaults_come_from_the_bundle(pipe):
    result = pipe.generate(None, PROMPT)
    assert (result.num_inference_steps, result.guidance_scale, result.scheduler) == (5, 2.0, "dpmpp_2m")
    assert len(result.seeds) == 1 and result.seeds != pipe.generate(None, PROMPT).seeds


def test_prompts_and_plans_are_kept(pipe):
    assert pipe.prepare("a photo") is pipe.prepare("a photo") and pipe.plan(6) is pipe.plan(6, "dpmpp_2m")
    assert pipe.fold(person(1)) is pipe.fold(person(1)) and pipe.fold(person(1)) is not pipe.fold(person(2))


# --- progress, cancel, interrupts ------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"preset": "fast"}, {"people": 2}])
def test_after_warming_up_nothing_is_loaded(tiny, monkeypatch, options):
    pipe, loaded = Pipeline.from_bundle(tiny, engine="onnxruntime", threads=1, keep=True), []
    load = pipe._load
    monkeypatch.setattr(pipe, "_load", lambda name: loaded.append(name) or load(name))
    pipe.warm_up(enroll=True, **options)
    assert "w_plus_encoder" in loaded and "unet" in loaded and "vae_decoder" in loaded
    known = len(loaded)
    people = options.pop("people", 1)
    code = pipe.bundle.manifest.model
    person = Identity(np.ones((code.w_plus_layers, code.w_plus_dim), np.float32))
    pipe.generate([person] * people, "a photo", id_mask=[(0, 0, 1, 1)] * people, **options)
    pipe.enroll(drawn_face(256))
    assert len(loaded) == known


def test_opened_warm(tiny):
    opened = lambda **more: Pipeline.from_bundle(tiny, engine="onnxruntime", threads=1, **more)
    assert "unet" in opened(warm=True)._engines and not opened()._engines
    with pytest.raises(PidiffError, match="keep must be True for warm_up"):
        opened(warm=True, keep=False)
    with pytest.raises(PidiffError, match="keep must be True for warm_up with enroll, whose graphs the first picture would let go, got None"):
        opened().warm_up(enroll=True)


def test_warming_up_in_vain(tiny):
    with pytest.raises(PidiffError, match="keep must be True for warm_up, which loads what is kept, got False"):
        Pipeline.from_bundle(tiny, keep=False).warm_up()
    for people in (0, 9, True):
        with pytest.raises(PidiffError, match="people must be an integer in .1, 8., got"):
            Pipeline.from_bundle(tiny).warm_up(people)


def test_callback_sees_every_step_and_previews(pipe):
    seen = []
    result = pipe.generate(person(), PROMPT, seed=1, num_images=3, batch_size=2, num_inference_steps=4,
                           callback=lambda step, total, preview: seen.append((step, total, preview())))
    assert [s[:2] for s in seen] == [(i + 1, 8) for i in range(8)]
    assert seen[0][2].shape == (2, 32, 32, 3) and seen[7][2].shape == (1, 32, 32, 3)
    assert np.abs(seen[7][2][0].astype(int) - result.images[2]).max() <= 1  # the last prediction is the picture


def test_cancel(pipe):
    seen = []
    with pytest.raises(Cancelled):
        pipe.generate(person(), PROMPT, callback=lambda step, *_: seen.append(step) or step == 2)
    assert seen == [1, 2]
    assert picture(pipe, person()).std() > 1  # the pipeline is still usable


def test_errors_in_the_callback_reach_the_caller(pipe):
    def broken(*_):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        pipe.generate(person(), PROMPT, callback=broken)


def test_ctrl_c_in_the_loop(pipe):
    steps = []

    def press(step, *_):
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pipe.generate(person(), PROMPT, num_inference_steps=100, callback=press)
    assert len(steps) <= 3


# --- arguments -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, sentence", [
    ({"num_inference_steps": 0}, "num_inference_steps must be an integer in [1, 1000], got 0"),
    ({"num_inference_steps": 2.5}, "num_inference_steps must be an integer in [1, 1000], got 2.5"),
    ({"guidance_scale": -1}, "guidance_scale must be a number in [0, 100], got -1"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a number in [0, 100], got nan"),
    ({"guidance_interval": 0.5}, "guidance_interval must be two numbers (start, end), got 0.5"),
    ({"guidance_interval": (0, 0.5, 1)}, "guidance_interval must be two numbers (start, end)"),
    ({"guidance_interval": (0, 1.5)}, "guidance_interval must be a number in [0, 1], got 1.5"),
    ({"guidance_interval": (0.5, 0.5)}, "guidance_interval must end after it starts, got (0.5, 0.5)"),
    ({"cache_interval": 0}, "cache_interval must be an integer in [1, 1000], got 0"),
    ({"cache_interval": 2}, "cache_interval must be 1 for this bundle, which has no graph unet_cached (export it again), got 2"),
    ({"id_scale": float("inf")}, "id_scale must be a number in [0, 10], got inf"),
    ({"id_scale": "1"}, "id_scale must be a number in [0, 10], got '1'"),
    ({"id_start": 1.5}, "id_start must be a number in [0, 1], got 1.5"),
    ({"level_scale": (1, 1, 1)}, "level_scale must be four numbers"),
    ({"level_scale": 1.0}, "level_scale must be four numbers"),
    ({"level_scale": (1, 1, 1, -1)}, "level_scale must be a number in [0, 10], got -1"),
    ({"scheduler": "ddpm"}, "scheduler must be one of ddim, euler"),
    ({"seed": -1}, "seed must be an integer in"), ({"seed": 2**63}, "seed must be an integer in"),
    ({"seed": 1.5}, "seed must be an integer in"), ({"seed": []}, "seed must hold at least one seed"),
    ({"seed": [1, 2], "num_images": 3}, "num_images must equal the number of seeds, 2, got 3"),
    ({"num_images": 0}, "num_images must be an integer in [1, 1024], got 0"),
    ({"batch_size": 0}, "batch_size must be an integer in [1, 64], got 0"),
    ({"negative_prompt": None}, "negative_prompt must be text, got NoneType"),
    ({"edits": {"beard": 1.0}}, "edit must be one of smile, got 'beard'"),
    ({"edits": {"smile": float("nan")}}, "edit smile must be a strength in [-20, 20], got nan"),
    ({"id_mask": [(0, 0, 1)]}, "id_mask must be boxes"), ({"id_mask": [(0.5, 0, 0.5, 1)]}, "id_mask must be boxes"),
    ({"id_mask": [(0, 0, 1, 1)] * 2}, "id_mask must hold one region per person, 1, got 2"),
    ({"id_mask": np.full((1, 8, 8), 2.0)}, "id_mask must hold values in [0, 1]"),
    ({"id_mask": np.full((1, 8, 8), np.nan)}, "id_mask must hold values in [0, 1]"),
    ({"id_mask": 3}, "id_mask must be arrays"), ({"callback": 3}, "callback must be callable or None, got int"),
])
def test_impossible_arguments(pipe, options, sentence):
    with pytest.raises(PidiffError) as caught:
        pipe.generate(person(), PROMPT, **options)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("who, sentence", [
    ("me", "identity must be an Identity or a list of them, got str"),
    ([person(1), person(2)], "id_mask must be given for several people, got None"),
    ([person(1)] * 9, "identity must be at most 8 people, got 9"),
    (person(0, 7), "identity must have a code of 4 x 512 numbers for this bundle, got 7 x 512"),
])
def test_impossible_people(pipe, who, sentence):
    with pytest.raises(PidiffError, match="must") as caught:
        pipe.generate(who, PROMPT)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("prompt", [None, 3, b"bytes", "\ud800", "x" * 10_001])
def test_impossible_prompts(pipe, prompt):
    with pytest.raises(PidiffError, match="^prompt must"):
        pipe.generate(person(), prompt)


def test_seeds():
    assert resolve_seeds(3, 2) == [3, 4] and resolve_seeds([9, 1], None) == [9, 1] and len(resolve_seeds(None, 4)) == 4
    assert resolve_seeds(np.int64(3), None) == [3]


def test_masks_cover_what_the_box_covers():
    mask = resolve_mask([(0.125, 0, 0.5, 0.375)], 1, 4, 4)
    assert np.allclose(mask[0], np.outer([1, 0.5, 0, 0], [0.5, 1, 0, 0]))
    assert np.array_equal(resolve_mask(None, 1, 3, 5), np.ones((1, 3, 5)))


# --- identities ------------------------------------------------------------------------------------------------------

def test_identity_file_round_trip(tmp_path, pipe):
    me = pipe.enroll(drawn_face(200))
    me.save(tmp_path / "me.safetensors")
    again = Identity.load(tmp_path / "me.safetensors")
    assert np.array_equal(again.w_plus, me.w_plus) and np.array_equal(again.face, me.face) and again.encoder == me.encoder
    assert np.array_equal(picture(pipe, again), picture(pipe, me))
    assert os.listdir(tmp_path) == ["me.safetensors"]


GOOD, NOTES = {"w_plus": np.zeros((4, 512), np.float32)}, {"format": "pidiff-identity", "version": "1"}


@pytest.mark.parametrize("content, sentence", [
    (b"", "safetensors file"), (b"just text, no tensors at all", "safetensors file"), (save(GOOD, NOTES)[:-5], "safetensors file"),
    (save(GOOD, NOTES)[:40], "safetensors file"), (b"\xff" * 8 + b"{}", "safetensors file"),
    (save(GOOD), "written by this version"), (save(GOOD, {**NOTES, "version": "9"}), "written by this version"),
    (save({"w": GOOD["w_plus"]}, NOTES), "hold w_plus and at most a face"),
    (save({**GOOD, "more": np.zeros(3, np.float32)}, NOTES), "hold w_plus and at most a face"),
    (save({**GOOD, **{f"t{i}": np.zeros(3) for i in range(300)}}, NOTES), "at most 258 tensors"),
    (save({"w_plus": np.zeros((4, 4097), np.float32)}, NOTES), "w_plus must be a float32 array [L, D] of at most [64, 4096], got float32 [4, 4097]"),
    (save({"w_plus": np.zeros((4, 512))}, NOTES), "w_plus must be a float32 array"),
    (save({"w_plus": np.full((4, 512), np.nan, np.float32)}, NOTES), "w_plus must be finite"),
    (save({"w_plus": np.full((4, 512), 1e30, np.float32)}, NOTES), "w_plus must be finite"),
    (save({**GOOD, "face": np.zeros((3, 4, 3), np.uint8)}, NOTES), "face must be a uint8 array [E, E, 3]"),
    (bytes(9 << 20), "at most 8 MiB"),
], ids=lambda value: "content" if isinstance(value, bytes) else None)  # safetensors orders its header at random
def test_hostile_identity_files(tmp_path, content, sentence):
    (tmp_path / "me.safetensors").write_bytes(content)
    with pytest.raises(IdentityError) as caught:
        Identity.load(tmp_path / "me.safetensors")
    assert sentence in str(caught.value)


def test_missing_identity_file(tmp_path):
    with pytest.raises(IdentityError, match="identity must be a file written by pidiff-enroll"):
        Identity.load(tmp_path / "me.safetensors")


def test_edit_and_mix(pipe):
    me, other = person(1), person(2)
    moved = pipe.edit(me, smile=-1.5)
    assert np.allclose(moved.w_plus, me.w_plus - 1.5 * pipe.directions["smile"], atol=1e-6)
    mixed = pipe.mix(me, other, ["middle", "finest"])
    assert np.array_equal(mixed.w_plus[[0, 2]], me.w_plus[[0, 2]])
    assert np.allclose(mixed.w_plus[[1, 3]], other.w_plus[[1, 3]], atol=1e-6)
    assert np.allclose(pipe.mix(me, other, "coarse", 0.25).w_plus[0], 0.75 * me.w_plus[0] + 0.25 * other.w_plus[0], atol=1e-6)
    with pytest.raises(PidiffError, match="levels must be among coarse, middle, fine, finest, got 'top'"):
        pipe.mix(me, other, ["top"])
    with pytest.raises(IdentityError, match=r"layers must lie in \[0, 4\), got \[9\]"):
        me.mix(other, [9])


def test_another_encoder_is_mentioned(pipe):
    with pytest.warns(UserWarning, match="enrolled with another encoder"):
        pipe.generate(Identity(person().w_plus, encoder="0" * 64), PROMPT)


def test_a_bundle_without_matting_says_so(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "b")
    (tmp_path / "b" / "face_matting.onnx").unlink()
    data = json.loads((tmp_path / "b" / "manifest.json").read_text())
    del data["graphs"]["face_matting"], data["files"]["face_matting.onnx"]
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="has no face_matting graph: the background stays in the identity"):
        face = Pipeline.from_bundle(tmp_path / "b").enroll(drawn_face(256, background=(20, 30, 40))).face
    assert face[0].mean() < 100


def test_background_is_painted_white(pipe):
    face = pipe.enroll(drawn_face(256, background=(20, 30, 40))).face
    assert (face[0] == 255).all() and (face[-1] == 255).all() and face[20:40, 20:40].mean() < 230
