"""The step loop's kernels without a GPU: run by tests/cuda_emulation, alone or on the made-up driver of fake_tensorrt.py."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np

import pidiff._C as core
from fake_tensorrt import KERNEL

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
POINTERS = 15       # STEP_PARAMS begins with so many addresses


def compile_steps(folder):
    """Compile the emulated kernels; returns a function (output, params int64 with addresses that the host can read)."""
    target = folder / "steps.so"
    subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-DPIDIFF_CUDA_EMULATION",
                    f"-I{HERE}/cuda_emulation", f"-I{CSRC}", "-o", str(target),
                    str(HERE / "cuda_emulation" / "step_harness.cc")], check=True)
    library = ctypes.CDLL(str(target))
    return lambda output, params: library.emulate_step(int(output), ctypes.c_void_p(params.ctypes.data))


class FakeSteps:
    """Takes the place of _C's launches on the made-up driver: they are queued there and resolve their addresses when they run."""

    def __init__(self, driver, emulate):
        self._driver, self._emulate, self._kernels = driver, emulate, []
        self._callback = KERNEL(self._run)

    def input(self, params, stream):
        self._queue(False, params, stream)

    def output(self, params, stream):
        self._queue(True, params, stream)

    def _queue(self, output, params, stream):
        self._kernels.append((output, params.copy()))
        assert self._driver.library.fake_kernel(stream, self._callback, len(self._kernels) - 1) == 0

    def _run(self, number):
        output, params = self._kernels[number]
        values = dict(zip(core.STEP_PARAMS, params.tolist()))
        for name in core.STEP_PARAMS[:POINTERS]:
            if values[name]:
                values[name] = self._driver.library.fake_resolve(values[name], 1) or 0
                if not values[name]:
                    return 1
        self._emulate(output, np.array(list(values.values()), np.int64))
        return 0
