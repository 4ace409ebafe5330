"""Memory: graphs of one stage at a time, and a limit that is kept or refused with the need."""

import functools
import gc
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
from control_groups import control_group
from drawn_face import drawn_face
from tiny_bundle import LAYERS, write_tiny_bundle

from pidiff.runtime import Identity, PidiffError, Pipeline, memory
from pidiff.runtime.bundle import Bundle, shipped_bundle
from pidiff.runtime.memory import MIB, STAGE_OF, STAGES, Predictor, parse_size

PROMPT = "a photo of person"
PERSON = Identity(np.random.default_rng(0).standard_normal((LAYERS, 512)).astype(np.float32))
needs_mini = pytest.mark.skipif(not (shipped_bundle() / "manifest.json").exists(), reason="models/mini is not there")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def images(pipe, who=PERSON, **options):
    return np.stack(pipe.generate(who, PROMPT, seed=1, num_images=3, batch_size=2, num_inference_steps=3, **options).images)


def resident_of(file):
    """Return resident bytes of the file's mapping in this process."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(str(file)))
    return next(int(line.split()[1]) << 10 for line in lines[start:] if line.startswith("Rss:"))


@pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are dropped on Linux")
def test_mapped_pages_are_dropped_and_read_again(tmp_path):
    """... those of the arrays alone, and none that this process may have written to."""
    size, arrays = 8 * MIB, {}
    data = np.random.default_rng(0).bytes(size)
    for name, mode in (("given", "r"), ("written", "r+"), ("copied", "c"), ("beside", "r")):
        (tmp_path / name).write_bytes(data)
        arrays[name] = np.memmap(tmp_path / name, np.uint8, mode)
    own = np.frombuffer(data, np.uint8) + 1
    pages = memory.MappedPages([own[3:], *(arrays[n] for n in ("written", "copied")), arrays["given"][5000:7000], arrays["given"][9001:]])
    assert all(a.tobytes() == data and resident_of(tmp_path / name) == size for name, a in arrays.items())
    threads, deadline = threading.active_count(), time.monotonic() + 20
    with pytest.raises(KeyError), pages.dropped():
        while resident_of(tmp_path / "given") > mmap.PAGESIZE:      # the first page is no array's
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert all(resident_of(tmp_path / name) == size for name in arrays if name != "given")
        assert all(a.tobytes() == data for a in arrays.values()) and np.array_equal(own, np.frombuffer(data, np.uint8) + 1)
        {}["what goes wrong in between is passed on"]
    assert threading.active_count() == threads


@pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are dropped on Linux")
def test_what_is_dropped_stays_mapped(tmp_path):
    """Something else could come to lie there, and be wiped."""
    (tmp_path / "weights").write_bytes(bytes(MIB))
    array = np.memmap(tmp_path / "weights", np.uint8, "r")
    address, pages = array.ctypes.data, memory.MappedPages([array[:]])
    del array
    assert any(first <= address < end for first, end in memory._mapped_read_only())
    del pages
    assert not any(first <= address < end for first, end in memory._mapped_read_only())


def test_one_stage_at_a_time_gives_the_same_pictures(tiny, monkeypatch):
    alone, loads = Pipeline.from_bundle(tiny, threads=1, keep=False), []
    load = alone._load
    monkeypatch.setattr(alone, "_load", lambda name: loads.append((name, *alone._engines)) or load(name))
    kept = Pipeline.from_bundle(tiny, threads=1, keep=True)
    assert np.array_equal(images(alone, alone.enroll(drawn_face(256))), images(kept, kept.enroll(drawn_face(256))))
    assert all(len({STAGE_OF[name] for name in loaded}) == 1 for loaded in loads)
    assert [name for name, *_ in loads].count("unet") == [name for name, *_ in loads].count("vae_decoder") == 1
    assert len(alone._engines) == 1 and len(kept._engines) > 6


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_graph_ends_with_its_last_reference(tiny, engine, monkeypatch):
    """No cycle keeps its memory until Python's collector comes by, which takes a second in a large process."""
    pytest.importorskip(engine)
    pipe, loaded = Pipeline.from_bundle(tiny, engine=engine, threads=1, keep=False), {}
    load = pipe._load

    def watched(name):
        made = load(name)
        loaded[name] = weakref.ref(made)
        return made

    monkeypatch.setattr(pipe, "_load", watched)
    gc.disable()
    try:
        images(pipe, pipe.enroll(drawn_face(256)))
        assert [name for name, graph in loaded.items() if graph() is not None] == ["vae_decoder"] and len(loaded) > 6
    finally:
        gc.enable()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_pipeline_ends_with_its_last_reference(tiny, engine):
    """... and all that it keeps loaded with it: another bundle is not opened beside this one."""
    pytest.importorskip(engine)
    gc.disable()
    try:
        pipe = Pipeline.from_bundle(tiny, engine=engine, threads=1, keep=True)
        images(pipe, pipe.enroll(drawn_face(256)))
        left = [weakref.ref(thing) for thing in (pipe, *pipe._engines.values())]
        del pipe
        assert len(left) > 6 and not any(thing() for thing in left)
    finally:
        gc.enable()


def test_unet_and_decoder_stay_loaded(tiny, monkeypatch):
    """By itself a pipeline never holds all graphs: those of a person and a prompt are let go when they have done their work."""
    pipe, loads, most = Pipeline.from_bundle(tiny, engine="onnxruntime", threads=1), [], []
    load = pipe._load
    monkeypatch.setattr(pipe, "_load", lambda name: loads.append(name) or most.append({STAGE_OF[e] for e in pipe._engines} - {STAGE_OF[name]}) or load(name))
    first = images(pipe, pipe.enroll(drawn_face(256)))
    assert all(stages <= {"denoise", "decode"} for stages in most)
    loads.clear()
    assert np.array_equal(images(pipe, pipe.enroll(drawn_face(256))), first)
    assert "w_plus_encoder" in loads and not {"unet", "vae_decoder"} & set(loads)
    loads.clear()
    pipe.generate(None, "another prompt", seed=1, num_inference_steps=1)
    assert {"text_encoder", "text_conditioner"} <= set(loads) and not {"unet", "vae_decoder"} & set(loads)


def test_graphs_stay_loaded_where_they_fit(tiny, monkeypatch):
    """Unless somebody says it: a machine with little memory draws slower, and is not brought down."""
    kept = lambda **options: Pipeline.from_bundle(tiny, engine="onnxruntime", threads=1, **options)._keeps
    assert kept() == ("denoise", "decode") and not kept(max_memory=1 << 40)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    assert kept() == ("denoise", "decode")
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * MIB)
    with pytest.warns(UserWarning, match=r"memory is short, 20 MiB of \d+: graphs are loaded anew for every picture"):
        assert not kept()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept(keep=True) == tuple(STAGES) and not kept(keep=False)


def test_sizes():
    assert [parse_size(t) for t in ("800M", "1.5G", "4096", "2 GiB", "1k", "3MB")] == [800 << 20, 3 << 29, 4096, 2 << 30, 1024, 3 << 20]
    for wrong in ("", "M", "-1M", "1X", "1e3"):
        with pytest.raises(PidiffError, match="max_memory must be a size such as 800M or 1.5G"):
            parse_size(wrong)


@pytest.mark.parametrize("wrong", [0, -5, 1.5, "800M", True])
def test_impossible_limits(tiny, wrong):
    with pytest.raises(PidiffError, match="max_memory must be a number of bytes or None"):
        Pipeline.from_bundle(tiny, max_memory=wrong)


@needs_mini
def test_weights_are_counted_as_they_are_multiplied():
    bundle = Bundle.open()
    stored = bundle.manifest.files["unet/diffusion_pytorch_model.safetensors"].size
    assert 1.4 * stored < Predictor(bundle).weights("unet") < 2 * stored  # float16 on disk, float32 in the graph
    assert Predictor(bundle).weights("face_onet") == bundle.manifest.files["face_onet.onnx"].size  # weights inside


def test_a_smaller_limit_makes_smaller_batches(tiny):
    pipe = Pipeline.from_bundle(tiny, threads=1, max_memory=4 << 30)
    rows = []
    denoise = pipe._denoise
    pipe._denoise = lambda plan, seeds, *rest: rows.append(len(seeds)) or denoise(plan, seeds, *rest)
    expected = images(pipe)
    pipe._budget._predictor._activations = lambda graph, batch, *size: batch * (100 << 20) if graph == "unet" else 0
    pipe._budget._limit = pipe._budget.need(denoise={"batch": 3})
    assert np.abs(images(pipe).astype(int) - expected).max() <= 1 and rows == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"guidance_interval": (0.3, 0.7)}, {"guidance_scale": 1}])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_smallest_limit_runs_the_unet_row_by_row(tiny, engine, options, monkeypatch):
    pytest.importorskip(engine)
    pipe, rows = Pipeline.from_bundle(tiny, engine=engine, threads=1, max_memory=4 << 30, precision="full"), []
    run = pipe._engine_class.run

    def counted(engine, *how):
        if engine is pipe._engines.get("unet"):
            rows.append(len(engine._bound["latents"]))
        run(engine, *how)

    monkeypatch.setattr(pipe._engine_class, "run", counted)
    expected = images(pipe, **options)
    pipe._budget._predictor._activations = lambda graph, batch, *size: batch * (100 << 20) if graph == "unet" else 0
    pipe._budget._limit = pipe._budget.need(denoise={"batch": 1})
    at_once, rows[:] = list(rows), []
    assert np.abs(images(pipe, **options).astype(int) - expected).max() <= 1
    assert max(at_once) == (2 if "guidance_scale" in options else 4) and set(rows) == {1} and len(rows) == sum(at_once)


COMMAND = """
import sys
from pidiff.runtime.__main__ import generate
code = generate(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def draw_within(folder, engine, limit, group="/dev/null"):
    """Run the command with a limit in a process of its own, which joins a control group first."""
    photo = Path(__file__).resolve().parent.parent / "examples" / "person-1.jpg"
    arguments = ["--face", photo, "--prompt", "a photo of a person", "--out", folder / "out.png", "--seed", "1", "--steps", "2",
                 "--num-images", "3", "--threads", "1", "--engine", engine, "--max-memory", limit]
    return subprocess.run(["sh", "-c", f'echo $$ > {group}; exec "$@"', "sh", sys.executable, "-c", COMMAND, *map(str, arguments)],
                          cwd=folder, capture_output=True, text=True, timeout=300)


@functools.cache
def kept_limit(engine):
    """(MiB that the command names in the end, the process that kept to them): enrolment is refused first, then the picture."""
    with tempfile.TemporaryDirectory() as folder:
        limit, done = 120, draw_within(Path(folder), engine, "120M")
        assert re.search(r"max_memory must be at least \d+ MiB for this bundle and this work, got 120 MiB", done.stderr)
        while done.returncode != 0:
            assert done.returncode == 1 and done.stderr.count("\n") == 1 and not os.listdir(folder)
            before, limit = limit, int(re.search(r"at least (\d+) MiB", done.stderr)[1])
            assert limit > before
            done = draw_within(Path(folder), engine, f"{limit}M")
        assert len(os.listdir(folder)) == 3
    return limit, done


@needs_mini
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_limit_is_kept_or_refused(engine):
    """What is refused names a limit, and under that limit the peak of resident memory stays."""
    pytest.importorskip(engine)
    limit, done = kept_limit(engine)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) << 10
    assert peak <= limit * MIB, f"{peak / MIB:.0f} MiB over {limit}"
    assert peak > 0.5 * limit * MIB, "a prediction that refuses what would fit twice is no prediction"


@needs_mini
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_control_group_of_the_limit_ends_nothing(tmp_path, engine):
    """The system's own measure: what takes more is killed, as in a third of it."""
    pytest.importorskip(engine)
    limit = kept_limit(engine)[0] * MIB
    for part, status in ((1, 0), (3, -signal.SIGKILL)):
        with control_group("memory", {"memory.max": limit // part, "memory.limit_in_bytes": limit // part}) as group:
            assert draw_within(tmp_path, engine, f"{kept_limit(engine)[0]}M", group).returncode == status
