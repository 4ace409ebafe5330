"""Pipelines on compiled engines, on the made-up GPU and module of fake_tensorrt.py: what runs where, and who says why not."""

import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from fake_tensorrt import engine_bytes, profiles
from test_tensorrt import difference
from tiny_bundle import LAYERS, write_tiny_bundle

from pidiff.runtime import EngineError, Identity, Pipeline, cuda
from pidiff.runtime.bundle import Bundle, BundleError
from pidiff.runtime.engine_specs import EngineFile, EngineSet, engine_path
from pidiff.runtime.engine_store import EngineStore
from pidiff.runtime.engines.tensorrt import TensorRtEngine
from pidiff.runtime.preflight import ENGINE_GRAPHS

VERSION, PROMPT = "1.7.1.116", "a photo of person"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "b")


def with_engines(path, graphs=ENGINE_GRAPHS, backend="tensorrt-rtx", version=VERSION, rows=None, targets=("sm89",)):
    """Add engines that the fake loads to a bundle; the UNet's has a profile for guided and one for unguided steps."""
    bundle, engines = Bundle.open(path), EngineSet(backend, version, targets, {})
    with EngineStore(path) as store:
        for graph in graphs:
            spec, many = bundle.graph(graph), rows or (1, 1, 1)
            made = {"unet": (tuple(2 * n for n in many), many), "vae_decoder": (many,)}.get(graph, ((1, 1, 1),))
            made = profiles(spec, *made)
            if graph == "time_conditioner":
                made[0]["timesteps"] = [[1], [5], [1000]]
            store.part(engines, graph).write_bytes(engine_bytes(path / spec.file, spec, made))
            frozen = tuple({n: tuple(map(tuple, s)) for n, s in p.items()} for p in made)
            store.add(engines, graph, EngineFile(engine_path(engines.id, graph), bundle.manifest.files[spec.file].sha256,
                                                 "0" * 64, frozen))
    return path


def person():
    return Identity(np.random.default_rng(0).standard_normal((LAYERS, 512)).astype(np.float32))


def pictures(pipe, **options):
    return np.array(pipe.generate(person(), PROMPT, **{"seed": 1, "num_inference_steps": 4, **options}).images, int)


@pytest.mark.parametrize("backend, integrated", [("tensorrt-rtx", False), ("tensorrt", True)])
def test_pictures_are_onnx_runtimes(folder, driver, gpu, backend, integrated):
    gpu(backend, integrated)
    plain = Pipeline.from_bundle(folder, engine="onnxruntime", threads=1)
    pipe = Pipeline.from_bundle(with_engines(folder, backend=backend), engine=backend, threads=1)
    pipe._graph("face_matting")         # as a photo does
    result = pipe.generate(person(), PROMPT, seed=1, num_inference_steps=4)
    expected = plain.generate(person(), PROMPT, seed=1, num_inference_steps=4)
    assert (result.engine, result.device) == (backend, "cuda")
    assert np.abs(np.array(result.images, int) - expected.images).max() <= 1
    np.testing.assert_allclose(result.identity_map, expected.identity_map, atol=1e-5)
    assert all(isinstance(e, TensorRtEngine) for e in pipe._engines.values()), "what read a photo is let go"
    assert len(pipe._engines) == (2 if integrated else 6) and {"unet", "vae_decoder"} <= set(pipe._engines), "a Jetson's memory is short"
    done = difference(driver, lambda: pictures(pipe, seed=2))
    assert done["launches"] == 4 + 1 and "captures" not in done, "the graphs of the UNet and of the decoder are kept"
    for options in ({"guidance_scale": 1.0}, {"num_images": 3}, {"num_images": 3, "guidance_scale": 1.0}, {"id_scale": 0.0}):
        assert np.abs(pictures(pipe, **options) - pictures(plain, **options)).max() <= 1, options


def test_engines_are_warm_once_loaded(folder, driver, gpu):
    """... unless that is not wanted, or not possible for the picture that is drawn by default."""
    gpu()
    opened = lambda path=folder, **more: Pipeline.from_bundle(path, engine="tensorrt-rtx", threads=1, **more)
    with_engines(folder)
    assert len(opened()._engines) == 6 and not opened(warm=False)._engines and not opened(keep=False)._engines
    pipe = opened()
    done = difference(driver, lambda: pictures(pipe, num_inference_steps=None))
    assert done["launches"] > 5 and not {"captures", "allocations"} & set(done), "the first picture replays"
    with_engines(folder, rows=(2, 2, 2))
    assert opened().generate(person(), PROMPT, num_images=2, num_inference_steps=1).engine == "tensorrt-rtx"
    with pytest.raises(EngineError, match="must be built for the shapes that it is given"):
        opened(warm=True)


def test_graphs_without_an_engine_run_on_onnx_runtime(folder, gpu):
    gpu()
    plain = Pipeline.from_bundle(folder, engine="onnxruntime", threads=1)
    pipe = Pipeline.from_bundle(with_engines(folder, ("unet",)), engine="tensorrt-rtx", device="cuda", threads=1)
    assert np.abs(pictures(pipe) - pictures(plain)).max() <= 1
    assert [n for n, e in pipe._engines.items() if isinstance(e, TensorRtEngine)] == ["unet"]


def test_pictures_at_once_are_what_the_engine_takes(folder, gpu):
    gpu()
    pipe = Pipeline.from_bundle(with_engines(folder, rows=(1, 2, 2)), engine="tensorrt-rtx", threads=1)
    seen = []
    pipe.generate(person(), PROMPT, seed=1, num_images=5, num_inference_steps=1,
                  callback=lambda step, total, preview: seen.append(len(preview())))
    assert seen == [2, 2, 1]


def test_the_command_builds_what_is_missing(folder, gpu):
    """The exporter's own parser reads it back."""
    from pidiff.export.__main__ import build_parser

    gpu()
    pipe = Pipeline.from_bundle(with_engines(folder, rows=(2, 2, 2)), engine="tensorrt-rtx", threads=1)
    two = [person(), person()]
    for options, batch, people in (({}, "1:2:2", "1"), ({"guidance_scale": 1.0}, "1:2:2", "1"),
                                   ({"num_images": 2, "id_mask": [(0, 0, .5, 1), (.5, 0, 1, 1)]}, "2", "1:1:2")):
        with pytest.raises(EngineError, match="engine of .* must be built for the shapes that it is given, got ") as caught:
            pipe.generate(two if "id_mask" in options else person(), PROMPT, callback=lambda *_: pytest.fail("too late"), **options)
        args = build_parser().parse_args(shlex.split(str(caught.value).partition("build it with: ")[2])[1:])
        ends = lambda text: (text.split(":")[0], text.split(":")[-1])
        assert (args.into, args.engine, args.target) == (folder, "tensorrt-rtx", "sm89")
        assert ends(args.batch) == ends(batch) and ends(args.people) == ends(people)


@pytest.mark.parametrize("how, sentence", [
    ({"graphs": ()}, "bundle must hold engines of tensorrt-rtx, got .* without any: build them with: pidiff-export --into"),
    ({"version": "1.6"}, "engine tensorrt-rtx must run .* on this machine, got: rebuild: it was built by tensorrt-rtx 1.6, here is "
                         "1.7.1.116; rebuild with: pidiff-export --into .* --engine tensorrt-rtx --target sm89"),
])
def test_an_engine_that_was_asked_for_is_used_or_an_error(folder, gpu, how, sentence):
    gpu()
    with_engines(folder, **how)
    with pytest.raises(EngineError, match=sentence):
        Pipeline.from_bundle(folder, engine="tensorrt-rtx")
    if "version" in how:
        with pytest.warns(UserWarning, match="engine tensorrt-rtx cannot be used: .*; onnxruntime is used instead"):
            pipe = Pipeline.from_bundle(folder)
        assert pipe.engine == "onnxruntime" and pictures(pipe).std() > 1


def test_auto_takes_the_engines_that_run_here(folder, gpu, monkeypatch, recwarn):
    gpu()
    assert Pipeline.from_bundle(folder).engine == "onnxruntime"
    with_engines(folder)
    pipe = Pipeline.from_bundle(folder, threads=1)
    assert (pipe.engine, pipe.device) == ("tensorrt-rtx", "cuda") and pictures(pipe).std() > 1
    monkeypatch.setattr(cuda, "LIBRARY", "no-such-driver.so")
    assert Pipeline.from_bundle(folder).engine == "onnxruntime" and not recwarn.list, "no GPU is an ordinary machine"
    with pytest.raises(EngineError, match="must run id_conditioner on this machine|must run text_encoder on this machine"):
        Pipeline.from_bundle(folder, engine="tensorrt-rtx")


def test_auto_falls_back_when_an_engine_does_not_load(folder, gpu):
    trt = gpu()
    pipe = Pipeline.from_bundle(with_engines(folder), threads=1, warm=False)
    trt.fail = "create_execution_context"
    with pytest.warns(UserWarning, match="engine tensorrt-rtx cannot be used: graph .* must get an execution context"):
        result = pipe.generate(person(), PROMPT, seed=1, num_inference_steps=4)
    plain = Pipeline.from_bundle(folder, engine="onnxruntime", threads=1)
    assert (result.engine, result.device) == ("onnxruntime", "cpu") and np.array_equal(pictures(plain)[0], result.images[0])


def test_engines_for_another_card_are_used_with_a_warning(folder, gpu):
    gpu()
    with pytest.warns(UserWarning, match="engine tensorrt-rtx is slower than it could be: it was built for sm86, here is sm89; rebuild"):
        pipe = Pipeline.from_bundle(with_engines(folder, targets=("sm86",)), engine="tensorrt-rtx", threads=1)
    assert pictures(pipe).std() > 1


def test_a_changed_engine_never_reaches_tensorrt(folder, gpu, monkeypatch):
    """... even if it is changed after the preflight."""
    trt = gpu()
    pipe = Pipeline.from_bundle(with_engines(folder), engine="tensorrt-rtx", threads=1, warm=False)
    file = next(folder.rglob("unet.engine"))
    file.write_bytes(file.read_bytes().replace(b"latents", b"Latents"))
    seen, load = [], trt.Runtime.deserialize_cuda_engine
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, data: seen.append(bytes(data)) or load(self, data))
    with pytest.raises(BundleError, match="unet.engine must have the sha256"):
        pictures(pipe)
    assert seen and not [d for d in seen if b"Latents" in d]


def test_not_installed(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt" else find(name))
    with pytest.raises(EngineError, match=r"engine must be installed .*, got 'tensorrt': it comes with JetPack"):
        Pipeline.from_bundle(folder, engine="tensorrt")


BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_engines.py"


@pytest.mark.skipif(not BENCHMARK.is_file(), reason="benchmarks/ is not part of the installed package")
def test_the_gpu_check_compares_and_times(folder, gpu, capsys, monkeypatch):
    """What gpu_check.sh runs on a GPU, on the made-up one: the numbers mean nothing here, the comparison does."""
    spec = importlib.util.spec_from_file_location("gpu_engines", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    gpu()
    arguments = [str(with_engines(folder)), "--steps", "5"]
    assert benchmark.main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["engine"] == "tensorrt-rtx" and said["captured"] and said["same_again"] and said["mean_difference"] < 0.1
    times = said["milliseconds"]
    assert 0 < times["wait"] < times["run"] < times["step"] and times["engine"] + times["wait"] == pytest.approx(times["run"], abs=1e-3)
    decode = Pipeline._decode
    wrong = lambda self, latents, **tile: 255 - decode(self, latents) if self._compiled else decode(self, latents)
    monkeypatch.setattr(Pipeline, "_decode", wrong)
    assert benchmark.main(arguments) == 1 and "the picture must be ONNX Runtime's" in capsys.readouterr().err
