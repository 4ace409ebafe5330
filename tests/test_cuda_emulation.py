"""The CUDA kernels run on the CPU, thread by thread (tests/cuda_emulation), where there is no GPU to run them.

tests/test_cuda.py runs the compiled kernels on a device; both hold them to the same references.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from references import (
    Array,
    attention_reference,
    identity_inputs,
    identity_mix_reference,
    require_close,
    require_close_16bit,
)

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not CSRC.is_dir(), reason="needs g++ and the repository's sources"
)

DTYPES = ["float32", "float16", "bfloat16"]


def dtype_of(name: str) -> type:
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else getattr(np, name)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("emulation") / "emulation.so"
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-DPIDIFF_CUDA_EMULATION", f"-I{HERE}/cuda_emulation",
               f"-I{CSRC}", "-o", str(target), str(HERE / "cuda_emulation" / "harness.cc")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(target))


def pointer(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.__array_interface__["data"][0])


def attention(library: ctypes.CDLL, name: str, q: Array, k: Array, v: Array, heads: int) -> Array:
    out = np.zeros(q.shape, q.dtype)
    strides = [(ctypes.c_int64 * 2)(*(s // x.itemsize for s in x.strides[:2])) for x in (q, k, v)]
    sizes = [q.shape[0], q.shape[1], k.shape[1], heads, q.shape[2] // heads]
    library.emulate_attention(DTYPES.index(name), *map(pointer, (q, k, v, out)), *map(ctypes.c_int64, sizes), *strides)
    return out


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("queries,keys,dim", [(1, 1, 8), (77, 77, 40), (65, 33, 64), (20, 129, 80), (17, 70, 160),
                                              (5, 9, 23), (70, 64, 100), (1030, 70, 40), (1025, 64, 56)])  # fmt: skip
def test_attention(rng, library, name, queries, keys, dim):
    dtype = dtype_of(name)
    q, k, v = (rng.standard_normal((1, n, 2 * dim)).astype(dtype) for n in (queries, keys, keys))
    got = attention(library, name, q, k, v, 2)
    require_close_16bit(got, attention_reference(q, k, v, 2, np.float64), v)


@pytest.mark.parametrize("name", DTYPES)
def test_attention_strided_batches(rng, library, name):
    """Views into one packed projection; 81 elements a row break the alignment that 16-byte loads need."""
    for width in (80, 81):
        packed = rng.standard_normal((3, 20, 3 * width)).astype(dtype_of(name))[::2]
        q, k, v = (packed[..., i * width : i * width + 80] for i in range(3))
        got = attention(library, name, q, k, v, 2)
        require_close_16bit(got, attention_reference(q, k, v, 2, np.float64), v)


@pytest.mark.parametrize("name", DTYPES)
def test_attention_outlier_rows(rng, library, name):
    """Logits of some thousand, and a key block that is far below the ones after it."""
    dtype = dtype_of(name)
    q, k, v = (rng.standard_normal((1, 130, 40)).astype(dtype) for _ in range(3))
    q[:, 3] *= dtype(100)
    k[:, 100] *= dtype(50)
    got = attention(library, name, q, k, v, 1)
    assert np.isfinite(got.astype(np.float32)).all()
    exact = attention_reference(q, k, v, 1, np.float64)
    if name == "float32":
        require_close(got, exact, attention_reference(q, k, v, 1, np.float32), v)
    else:
        require_close_16bit(got, exact, v)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("null", [True, False])
@pytest.mark.parametrize("people", [0, 1, 3])
@pytest.mark.parametrize("queries,heads,dim,tokens", [(1, 2, 8, 4), (33, 8, 40, 4), (16, 5, 64, 16), (9, 4, 56, 256)])
def test_identity_mix(rng, library, name, null, people, queries, heads, dim, tokens):
    h, y, a, v, mask, scale = identity_inputs(rng, dtype_of(name), queries, heads, dim, people, tokens, null)
    out, mass = np.zeros_like(h), np.zeros_like(mask)
    sizes = [2, queries, heads * dim, heads, tokens, people]
    library.emulate_identity_mix(DTYPES.index(name), *map(pointer, (h, y, a, v, mask, scale, out, mass)),
                                 *map(ctypes.c_int64, sizes), int(null))  # fmt: skip
    exact = identity_mix_reference(h, y, a, v, mask, scale, heads, null, np.float64)
    require_close_16bit(out, exact[0], h, v, terms=tokens * people)
    require_close_16bit(mass, exact[1], terms=tokens)
