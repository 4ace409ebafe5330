"""How close the CPU kernels of attention, convolution and linear layers come to what this machine's arithmetic can do.

    python -m benchmarks.kernels [--threads N] [--rounds N] [--quick] [--callgrind]

The rate they are held against is measured by kernel_rate.cc (needs g++): multiply-adds on registers, in float32 and, where
the processor has AVX-512-BF16 or AMX, in bfloat16. It is an upper bound that no real product reaches; PyTorch's matmul of
1024 x 1024 matrices is printed beside it. All are measured in turns, in one process, by processor time divided by the
threads, so that other work on the machine disturbs as little as it can, and each call's share is of the rate directly before
and after it: a processor's clock follows what the whole machine does. The table has medians. Every output is first compared
with float64, attention's on some rows. Operations of a convolution are those of its definition; Winograd's way does 16 products for 36 of them.

--callgrind counts, instead of timing, the instructions of a call per multiply-add under valgrind, which noise does not touch.
Valgrind does not know AVX-512, so that shows the AVX2 and the portable version only.
"""

import argparse
import ctypes
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's own threads wait in loops, which would count as processor time
import numpy as np  # noqa: E402

SHAPES = [  # queries, keys, heads, head dim
    (4096, 4096, 8, 40), (4096, 4096, 5, 64), (1024, 1024, 8, 80), (256, 256, 8, 160), (4096, 77, 8, 40), (1024, 77, 8, 80),
]
CONVOLUTIONS = [(64, 320, 320), (32, 640, 640), (16, 1280, 1280), (256, 256, 256)]  # height and width, channels, outputs
LINEAR = [(64, 320, 320), (64, 320, 1280), (32, 2560, 640), (16, 1280, 1280)]  # the root of the number of rows, channels, outputs
CALLGRIND_ATTENTION = [(512, 1024, 2, 40), (512, 1024, 2, 64), (512, 77, 2, 40)]
CALLGRIND_CONVOLUTIONS = [(32, 64, 64, 3), (32, 128, 128, 1)]  # height and width, channels, outputs, kernel (1: a linear layer)
KINDS = {"avx512bf16": "bfloat16", "amx": "amx"}  # column -> rate it is held against; float32 else
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def rates() -> dict:
    """Build kernel_rate.cc; returns name -> function that runs it and returns its number of operations."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "rate.so"
        source = Path(__file__).with_name("kernel_rate.cc")
        subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    import pidiff._C as core

    found = {}
    for name in ("float32", "bfloat16", *(["amx"] if "amx" in core.cpu_implementations() else [])):
        function = getattr(loaded, f"{name}_operations")
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
        if function(1):
            found[name] = lambda call=function: call(1_000_000)
    return found


def candidates(q, k, v, heads: int) -> dict:
    """Column -> (dtype it computes in, call that returns [S, C])."""
    import torch

    import pidiff._C as core

    def ours(implementation, dtype=np.float32):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        out = np.empty_like(arrays[0])  # as a session has it: the kernel is timed, not the system's new pages
        return lambda: core.attention(*arrays, heads, implementation, out)[0]

    def sdpa(dtype):
        split = [torch.from_numpy(x).to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        return lambda: torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)[0].float().numpy()

    names = core.cpu_implementations()
    result = {f"{name} f32": ("float32", ours(name)) for name in names if name in ("avx2", "avx512", "neon")}
    result["stored f16"] = ("float16", ours("auto", np.float16))
    result |= {name: ("bfloat16", ours(name)) for name in ("avx512bf16", "amx") if name in names}
    return result | {"torch f32": ("float32", sdpa(torch.float32)), "torch bf16": ("bfloat16", sdpa(torch.bfloat16))}


def check(name: str, dtype: str, got, q, k, v, heads: int) -> None:
    rows = np.unique(np.linspace(0, len(got) - 1, 16).astype(int))
    split = lambda x: x.astype(np.float64).reshape(len(x), heads, -1).transpose(1, 0, 2)  # noqa: E731
    a, b, c = split(q[0][rows]), split(k[0]), split(v[0])
    logits = a @ b.transpose(0, 2, 1) / np.sqrt(a.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    exact = (weights / weights.sum(-1, keepdims=True) @ c).transpose(1, 0, 2).reshape(len(rows), -1)
    error = np.abs(got[rows] - exact).max()
    if not error < TOLERANCE[dtype]:
        raise SystemExit(f"{name} must agree with float64 to {TOLERANCE[dtype]}, got {error}: not timed")


def gflops(operations: float, call, threads: int) -> float:
    start = time.process_time()
    done = call()
    return (operations or done) / (time.process_time() - start) / threads * 1e-9


def attention(queries: int, keys: int, heads: int, dim: int) -> tuple:
    """(column -> (dtype, call), operations of a call), checked."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, heads * dim), dtype=np.float32) for n in (queries, keys, keys))
    calls = candidates(q, k, v, heads)
    for name, (dtype, call) in calls.items():
        check(name, dtype, call(), q, k, v, heads)
    return calls, 4.0 * queries * keys * heads * dim


def convolution(side: int, channels: int, outputs: int, kernel: int = 3) -> tuple:
    """As `attention`; pictures of kernels that round are bfloat16, too. kernel: 1 for a linear layer of side x side rows."""
    import torch

    import pidiff._C as core

    x = torch.randn(1, channels, side, side).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, channels, kernel, kernel) / (kernel**2 * channels) ** 0.5, torch.randn(outputs)

    def ours(implementation, dtype):
        packed, last = core.pack_convolution(weight.numpy(), implementation, "winograd" if kernel == 3 else "direct"), x.movedim(1, -1).to(dtype).contiguous()
        last = last.view(torch.uint16 if dtype == torch.bfloat16 else dtype).numpy()
        out = np.empty((1, side, side, outputs), last.dtype)
        return lambda: torch.from_numpy(core.convolution(last, packed, bias.numpy(), implementation=implementation, out=out)).view(dtype)

    def theirs(dtype):
        arguments = [a.to(dtype) for a in (x, weight.to(memory_format=torch.channels_last), bias)]
        if kernel == 1:
            rows, matrix, shift = arguments[0].movedim(1, -1), arguments[1].flatten(1), arguments[2]
            return lambda: torch.nn.functional.linear(rows, matrix, shift)
        return lambda: torch.nn.functional.conv2d(*arguments, padding=1).movedim(1, -1)

    names = core.cpu_implementations()
    found = {f"{name} f32": ("float32", ours(name, torch.float32)) for name in names if name in ("avx2", "avx512", "neon")}
    found |= {name: ("bfloat16", ours(name, torch.bfloat16)) for name in names if name == "avx512bf16"}
    found |= {"torch f32": ("float32", theirs(torch.float32)), "torch bf16": ("bfloat16", theirs(torch.bfloat16))}
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=kernel // 2).movedim(1, -1)
    for name, (dtype, call) in found.items():
        error = ((call() - exact).abs().max() / exact.abs().max()).item()
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"{name} must agree with float64 to {TOLERANCE[dtype]}, got {error}: not timed")
    return found, 2.0 * (kernel * side) ** 2 * channels * outputs


def measure(calls: dict, operations: float, rounds: int, threads: int, rate: dict) -> dict:
    """Column -> medians of GFLOP/s, of its share of the rate and of that rate."""
    repeats = max(1, round(4e9 / operations))
    rows = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (_, call) in calls.items():
            peak = rate[KINDS.get(name, "float32")]
            for _ in range(2):
                call()  # what it reads comes from the caches then, as a layer's does; the others' calls have taken it out of them
            before = gflops(0, peak, 1)
            speed = gflops(operations * repeats, lambda call=call: [call() for _ in range(repeats)], threads)
            around = (before + gflops(0, peak, 1)) / 2
            rows[name].append((speed, speed / around, around))
    return {name: tuple(map(statistics.median, zip(*row))) for name, row in rows.items()}


def table(args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    rate = rates()
    a = torch.randn(1024, 1024)
    square = statistics.median(gflops(2 * 1024**3 * 4, lambda: [a @ a for _ in range(4)], args.threads) for _ in range(9))
    print(f"torch matmul of 1024 x 1024, float32: {square:.0f} GFLOP/s a thread")
    works = [("S {} keys {} heads {} d {}", attention, shape) for shape in (SHAPES[:1] + SHAPES[4:5] if args.quick else SHAPES)]
    works += [("3 x 3 convolution of {0} x {0}, {1} channels to {2}", convolution, shape) for shape in CONVOLUTIONS[:1 if args.quick else None]]
    works += [("linear layer of {0} x {0} rows, {1} channels to {2}", convolution, (*shape, 1)) for shape in LINEAR[:1 if args.quick else None]]
    for title, make, shape in works:
        print(title.format(*shape) + ": GFLOP/s a thread")
        for name, (speed, share, peak) in measure(*make(*shape), args.rounds, args.threads, rate).items():
            shown = "" if name == "torch bf16" else f"  {share:.2f} of the rate, {peak:.0f}"
            print(f"  {name:12} {speed:6.1f}{shown}", flush=True)


def instructions(prepare: str, call: str, calls: int, folder: str) -> int:
    """Instructions of a Python process that prepares, then calls the kernel `calls` times."""
    code = f"import numpy as np, pidiff._C as c\n{prepare}\nfor _ in range({calls}): {call}"
    done = subprocess.run(
        ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", sys.executable, "-c", code], text=True,
        capture_output=True, cwd=folder, env=os.environ | {"PIDIFF_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"})
    if done.returncode:
        raise SystemExit(f"valgrind failed: {done.stderr[-500:]}")
    return int(re.search(r"Collected : (\d+)", done.stderr).group(1))


def counted(implementation: str):
    """(title, multiply-adds, what a process prepares, its call) of every kernel whose instructions are counted."""
    for queries, keys, heads, dim in CALLGRIND_ATTENTION:
        yield (f"S {queries} keys {keys} heads {heads} d {dim}", 2 * queries * keys * heads * dim,
               f"q, k = np.ones((1, {queries}, {heads * dim}), 'f'), np.ones((1, {keys}, {heads * dim}), 'f')",
               f"c.attention(q, k, k, {heads}, '{implementation}')")
    for side, channels, outputs, kernel in CALLGRIND_CONVOLUTIONS:
        weight, method = f"np.ones(({outputs}, {channels}, {kernel}, {kernel}), 'f')", "winograd" if kernel == 3 else "direct"
        yield (f"{kernel} x {kernel} convolution of {side} x {side}, {channels} channels to {outputs}", (kernel * side) ** 2 * channels * outputs,
               f"x, bias = np.ones((1, {side}, {side}, {channels}), 'f'), np.zeros({outputs}, 'f')\n"
               f"packed = c.pack_convolution({weight}, '{implementation}', '{method}')",
               f"c.convolution(x, packed, bias, implementation='{implementation}')")


def callgrind() -> None:
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind must be installed for --callgrind")
    with tempfile.TemporaryDirectory() as folder:
        for implementation in ("portable", "avx2"):
            for title, multiply_adds, prepare, call in counted(implementation):
                # The difference leaves out the interpreter's own, and what is prepared.
                three, one = (instructions(prepare, call, calls, folder) for calls in (3, 1))
                print(title, f"{implementation:9} {(three - one) / 2 / multiply_adds:.3f} instructions a multiply-add", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument("--callgrind", action="store_true", help="count instructions instead")
    args = parser.parse_args()
    os.environ["PIDIFF_NUM_THREADS"] = str(args.threads)
    callgrind() if args.callgrind else table(args)


if __name__ == "__main__":
    main()
