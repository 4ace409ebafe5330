"""The NEON kernels, cross-compiled for 64-bit Arm and run under qemu: neon_attention.cc compares them with the clear
loops."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next(filter(shutil.which, ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12")), None)
EMULATOR = next(filter(shutil.which, ("qemu-aarch64", "qemu-aarch64-static")), None)
SOURCES = [*(f"csrc/kernels/{name}.cc" for name in ("attention", "attention_reference", "attention_portable", "convolution", "group_norm", "parallel")),
           "tests/neon_attention.cc"]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the repository's sources"),
    pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64 (Debian: qemu-user)"),
]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_neon_kernels_agree_with_the_clear_loops(tmp_path):
    """The flags are those of CMakeLists.txt, where 64-bit Arm needs none of its own; -static: qemu needs no sysroot."""
    program = tmp_path / "neon_attention"
    run(COMPILER, "-std=c++17", "-O3", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-static", "-pthread",
        f"-I{ROOT}/csrc", *(ROOT / s for s in SOURCES), "-o", program)  # fmt: skip
    assert run(EMULATOR, program) == "125 cases\n"


def test_neon_tiles_use_fused_multiply_add(tmp_path):
    """What makes them fast: the inner loops are vector instructions, not scalar code."""
    listing = tmp_path / "portable.s"
    run(COMPILER, "-std=c++17", "-O3", "-ffp-contract=fast", "-S", f"-I{ROOT}/csrc",
        ROOT / "csrc/kernels/attention_portable.cc", "-o", listing)  # fmt: skip
    lines = [line.split() for line in listing.read_text().splitlines()]
    fused = [words for words in lines if words and words[0] == "fmla" and words[1].endswith(".4s,")]
    assert len(fused) > 100
