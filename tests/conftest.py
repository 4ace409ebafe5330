"""Shared by all tests: few threads, and numpy seeds that a failure can be repeated with."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

# A job in the background of a script starts with SIGINT ignored, and its children too: the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(100_000, 50, 100)  # exports make millions of objects, few of them in cycles: a tenth of the time
os.environ.setdefault("OMP_NUM_THREADS", "2")
if "PYTEST_XDIST_WORKER" in os.environ:     # one of two processes
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PIDIFF_CACHE"] = "off"  # the user's cache is no place for tests
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests import onnxruntime before pidiff, which sets this

import numpy as np
import pytest

# For benchmarks/; behind the installed package, whose folders the checkout's own would hide.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def total_memory() -> int:
    """Bytes of the machine, or what its container is allowed."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):     # no control group, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


# Files that share what takes long to make stay in one process, and these groups are begun first; every other file is a group.
# What has Stable Diffusion's size takes 8 and 11 GiB of memory: one after the other where there is not enough for both.
GROUPS = {
    **({"large exports": ("export_sd15",), "large training": ("train_sd15",)} if total_memory() >= 21 << 30 else {"large": ("export_sd15", "train_sd15")}),
    "exports": ("export", "parity", "export_source", "ip_adapter", "quantize", "diagnosis"),
    "trained": ("training", "adapter_stage", "localise", "isolate", "distill", "gpu_train"),
}


def group_of(nodeid: str) -> str:
    file = nodeid.split("::")[0].rsplit("/", 1)[-1]
    return next((name for name, files in GROUPS.items() if file.removeprefix("test_").removesuffix(".py") in files), file)


def pytest_collection_modifyitems(items: list) -> None:
    order = list(GROUPS)
    items.sort(key=lambda item: order.index(group) if (group := group_of(item.nodeid)) in order else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Deal tests to processes by group. (`--dist loadgroup` does it by a mark, and not at all with pytest 9.2 and pytest-xdist 3.8.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded from the test's name."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture(scope="session")
def people_folder(tmp_path_factory: pytest.TempPathFactory):
    """A training folder with 20 drawn people."""
    from drawn_people import write_people

    return write_people(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="session")
def people(people_folder):
    """Its training split at 64 px."""
    from pidiff.data.people import load_people

    return load_people(people_folder, 64)


@pytest.fixture(scope="session")
def large_people(people):
    """The same at mini's 128 px."""
    from dataclasses import replace

    import cv2

    images, masks = (np.stack([cv2.resize(x, (128, 128)) for x in some]) for some in (people.images, people.masks))
    return replace(people, images=images, masks=masks)


@pytest.fixture(scope="session")
def trained(people_folder, tmp_path_factory: pytest.TempPathFactory):
    """A model folder after two steps of every stage. Copy it before training it further."""
    pytest.importorskip("torch")
    from trained_folder import train_all

    return train_all(people_folder, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory):
    """The made-up CUDA driver."""
    from fake_tensorrt import FakeDriver

    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    return FakeDriver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def emulate(tmp_path_factory: pytest.TempPathFactory):
    """The step loop's kernels, on the processor."""
    from fake_steps import CSRC, compile_steps

    if shutil.which("g++") is None or not CSRC.is_dir():
        pytest.skip("needs g++ and the repository's sources")
    return compile_steps(tmp_path_factory.mktemp("steps"))


@pytest.fixture
def steps(driver, emulate, monkeypatch):
    """Puts the emulated kernels onto the made-up GPU: the step loop stays on it."""
    import pidiff._C as core
    from fake_steps import FakeSteps

    made = FakeSteps(driver, emulate)
    monkeypatch.setattr(core, "queue_step_input", made.input)
    monkeypatch.setattr(core, "queue_step_output", made.output)
    monkeypatch.setattr(core, "has_cuda", lambda: True)


@pytest.fixture
def gpu(driver, monkeypatch):
    """Return a function that puts the made-up GPU and a module in place; afterwards nothing of them may be left."""
    from fake_tensorrt import BACKENDS, make_module
    from pidiff.runtime import cuda

    def use(backend="tensorrt-rtx", integrated=False, room=1 << 40, **more):
        module = BACKENDS[backend]
        driver.library.fake_setup(integrated, room)
        monkeypatch.setattr(cuda, "LIBRARY", driver.path)
        trt = make_module(driver, module, **more)
        monkeypatch.setitem(sys.modules, module, trt)
        return trt

    gc.freeze()             # what there is already need not be looked through: that takes a second
    yield use
    gc.collect()            # exceptions that were caught keep frames in cycles
    gc.unfreeze()
    left = driver.counts()
    assert (left.live, left.retained) == (0, 0), "memory, streams, graphs or the context were not given back"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A whole bundle of a few weights."""
    from tiny_bundle import write_tiny_bundle
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")
