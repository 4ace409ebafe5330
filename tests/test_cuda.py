"""The CUDA kernels on a GPU: compiled wherever nvcc is, run only where there is a device (-m cuda selects these)."""

from __future__ import annotations

import numpy as np
import pytest

import pidiff._C as core
from references import attention_reference, identity_inputs, identity_mix_reference, require_close_16bit

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not core.has_cuda(), reason="no CUDA kernels or no GPU")]

CUDA_DTYPES = ["float32", "float16", "bfloat16"]


def cuda_dtype(name: str) -> type:
    if name == "bfloat16":
        return pytest.importorskip("ml_dtypes").bfloat16
    return getattr(np, name)


@pytest.mark.parametrize("name", CUDA_DTYPES)
@pytest.mark.parametrize("queries,keys", [(1, 1), (77, 77), (129, 300), (65, 77), (4096, 4096)])
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 100, 160])
def test_cuda_attention(rng, name, queries, keys, dim):
    dtype = cuda_dtype(name)
    q, k, v = (rng.standard_normal((1, n, 2 * dim)).astype(dtype) for n in (queries, keys, keys))
    got = core.attention(q, k, v, 2, "cuda")
    rows = slice(None) if queries < 1000 else np.r_[0:8, 2040:2056, 4090:4096]
    require_close_16bit(got[:, rows], attention_reference(q[:, rows], k, v, 2, np.float64), v)


@pytest.mark.parametrize("name", CUDA_DTYPES)
def test_cuda_attention_strided(rng, name):
    dtype = cuda_dtype(name)
    packed = rng.standard_normal((4, 77, 3 * 80)).astype(dtype)[::2]
    q, k, v = packed[..., :80], packed[..., 80:160], packed[..., 160:]
    require_close_16bit(core.attention(q, k, v, 2, "cuda"), attention_reference(q, k, v, 2, np.float64), v)


@pytest.mark.parametrize("name", CUDA_DTYPES)
@pytest.mark.parametrize("null", [True, False])
@pytest.mark.parametrize("people", [0, 1, 3])
@pytest.mark.parametrize("queries,heads,dim,tokens", [(1, 8, 8, 4), (77, 8, 40, 4), (129, 2, 80, 1), (64, 8, 160, 16)])
def test_cuda_identity_mix(rng, name, null, people, queries, heads, dim, tokens):
    dtype = cuda_dtype(name)
    inputs = identity_inputs(rng, dtype, queries, heads, dim, people, tokens, null)
    exact = identity_mix_reference(*inputs, heads, null, np.float64)
    out, mass = core.identity_mix(*inputs, heads, null, "cuda")
    require_close_16bit(out, exact[0], inputs[0], inputs[3])
    require_close_16bit(mass, exact[1])
