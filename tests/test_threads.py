"""How many threads engines and kernels use: what a control group grants, and one socket."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from control_groups import control_group
from tiny_bundle import write_tiny_bundle

from pidiff.runtime import Pipeline, control_group as groups, memory, pipeline as pipeline_module

PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
needs_two = pytest.mark.skipif(PROCESSORS < 2, reason="needs two processors")
HALF, ONE, ALL = ("50000", "100000"), ("100000", "100000"), (f"{PROCESSORS}00000", "100000")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Folders of control groups, and a function that says which of them this process is in."""
    monkeypatch.setattr(groups, "ROOT", tmp_path / "groups")
    monkeypatch.setattr(groups, "OWN", tmp_path / "own")
    (tmp_path / "groups").mkdir()
    return tmp_path / "groups", lambda *lines: (tmp_path / "own").write_text("".join(f"{line}\n" for line in lines))


def limit(folder, version, quota, period="100000"):
    folder.mkdir(parents=True, exist_ok=True)
    files = {"cpu.max": f"{quota} {period}\n"} if version == 2 else {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": f"{period}\n"}
    for name, text in files.items():
        (folder / name).write_text(text)


@needs_two
@pytest.mark.parametrize("version, own, folder", [(2, "0::/user.slice/app", "user.slice/app"), (2, "0::/user.slice/app", "user.slice"), (2, "0::/", ""),
                                                  (1, "4:cpu:/a/b", "cpu/a/b"), (1, "4:cpu,cpuacct:/a/b", "cpu,cpuacct/a"), (1, "4:cpu:/host/path", "cpu")])
def test_a_quota_of_any_group_above(tree, version, own, folder):
    root, enter = tree
    enter("3:freezer:/", own)
    assert groups.granted_threads() is None
    for quota, threads in ((HALF, 1), (ONE, 1), (ALL, None), (("max" if version == 2 else "-1",), None), (("what",), None)):
        limit(root / folder, version, *quota)
        assert groups.granted_threads() == threads, quota


@needs_two
def test_the_smallest_quota_counts(tree):
    root, enter = tree
    enter("0::/a/b")
    limit(root / "a", 2, *ONE)
    limit(root / "a" / "b", 2, *ALL)
    assert groups.granted_threads() == 1
    enter("0::/elsewhere")
    assert groups.granted_threads() is None


@pytest.mark.parametrize("own, folder, files", [
    ("0::/app", "app", {"memory.max": "{}", "memory.current": "600000", "memory.stat": "anon 5\ninactive_file 100000\n"}),
    ("0::/gone", "", {"memory.max": "{}", "memory.current": "600000", "memory.stat": "inactive_file 100000"}),
    ("4:memory:/app", "memory/app", {"memory.limit_in_bytes": "{}", "memory.usage_in_bytes": "600000", "memory.stat": "total_inactive_file 100000"}),
])
def test_memory_that_a_group_leaves(tree, own, folder, files):
    root, enter = tree
    enter(own)
    machine = memory.available_memory()
    assert machine > 100 << 20
    (root / folder).mkdir(parents=True, exist_ok=True)
    for bound, available in (("max", machine), ("9223372036854771712", machine), ("800000", 300_000)):
        for name, text in files.items():
            (root / folder / name).write_text(text.format(bound))
        assert abs(memory.available_memory() - available) < (4 << 30 if available == machine else 1)


def test_no_groups_at_all(tree):
    assert groups.granted_threads() is None and groups.available_bytes() is None


def test_a_pipeline_takes_what_is_granted(tmp_path, monkeypatch):
    bundle = write_tiny_bundle(tmp_path / "tiny")
    monkeypatch.setattr(pipeline_module, "granted_threads", lambda: 1)
    assert Pipeline.from_bundle(bundle).threads == 1 and Pipeline.from_bundle(bundle, threads=2).threads == 2
    monkeypatch.setattr(pipeline_module, "granted_threads", lambda: None)
    assert Pipeline.from_bundle(bundle).threads is None


def run(source, *before):
    done = subprocess.run([*before, sys.executable, "-c", source], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent,
                          env={**os.environ, "PIDIFF_NUM_THREADS": str(PROCESSORS)})       # tests use one by themselves
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# What the threads of OpenVINO's engine and of our kernels in its graphs come to, with a large UNet whose every attention they compute.
COUNTED = """
import json
import numpy as np
from test_openvino import drawn_inputs
from pidiff import _C
from pidiff.runtime import Pipeline
from pidiff.runtime.engines import call, openvino, openvino_attention
openvino._is_large, openvino_attention.KEYS = lambda *_: True, 1
given, attention = set(), _C.attention
_C.attention = lambda *a, threads, **how: given.add(threads) or attention(*a, threads=threads, **how)
pipe = Pipeline.from_bundle({bundle!r}, engine="openvino")
engine = pipe._graph("unet")
call(engine, drawn_inputs(pipe.bundle.graph("unet"), np.random.default_rng(0), B=2, P=1, h=8, w=8))
compiled = engine._request.get_compiled_model()
print(json.dumps([pipe.threads, compiled.get_property("INFERENCE_NUM_THREADS"), *given]))
"""


@pytest.fixture
def counted(tmp_path_factory):
    pytest.importorskip("openvino")
    pytest.importorskip("torch")
    from tiny_model import shared

    return COUNTED.format(bundle=str(shared("fused", tmp_path_factory)))


@needs_two
def test_a_container_with_time_for_one_thread(counted):
    """The real thing: OpenVINO by itself would start a thread for every processor that it sees."""
    with control_group("cpu", {"cpu.max": "100000 100000", "cpu.cfs_quota_us": 100000}) as group:
        assert run(counted, "sh", "-c", f'echo $$ > {group}; exec "$@"', "sh") == [1, 1, 1]
    granted, threads, *kernels = run(counted)
    assert granted == groups.granted_threads() and kernels == [threads]


def two_sockets(folder):
    """Copy what the system says about its processors, each of which is said to be in a socket and a NUMA node of its own."""
    system, count = Path("/sys/devices/system"), os.cpu_count()
    for kind in ("cpu", "node"):
        (folder / kind).mkdir()
        for name in ("online", "possible", "present"):
            (folder / kind / name).write_text(f"0-{count - 1}\n")
    for number in range(count):
        here = folder / "cpu" / f"cpu{number}"
        for file in (f for part in ("topology", "cache") for f in (system / "cpu" / here.name / part).rglob("*") if f.is_file()):
            copy = here / file.relative_to(system / "cpu" / here.name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            own = {"physical_package_id": f"{number}\n", "core_id": f"{number}\n"}.get(file.name)
            copy.write_text(own or (f"{number}\n" if file.name.endswith("_list") else file.read_text()))
        (folder / "node" / f"node{number}").mkdir()
        (folder / "node" / f"node{number}" / "cpulist").write_text(f"{number}\n")


@pytest.mark.skipif(not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
                    reason="needs a mount namespace")
@pytest.mark.skipif(not Path("/sys/devices/system/node/node0").is_dir(), reason="needs Linux with NUMA nodes")
@needs_two
def test_one_socket_of_several(counted, tmp_path):
    """A picture is too little work for two: OpenVINO keeps to one for latency, and our kernels in its graphs to as many threads."""
    two_sockets(tmp_path)
    mounts = "; ".join(f"mount --bind {tmp_path / kind} /sys/devices/system/{kind}" for kind in ("cpu", "node"))
    granted, threads, *kernels = run(counted, "unshare", "-m", "sh", "-c", f'{mounts}; exec "$@"', "sh")
    assert granted == groups.granted_threads() and threads == 1 and kernels == [threads]
