"""Our CUDA attention with the folded identity term against PyTorch's fused attention, at Stable Diffusion 1.5's shapes.

    python benchmarks/gpu_attention.py libgpu_attention.so

Per layer and dtype: checks against float64 first, then times. `ours` is attention + identity_mix in place; `torch` is
scaled_dot_product_attention over the text, the identity query projection, scaled_dot_product_attention over the
identity keys (null key included), and the masked add. Called by gpu_check.sh.
"""

from __future__ import annotations

import ctypes
import sys

BATCH, TOKENS, PEOPLE, HEADS = 2, 4, 1, 8
LAYERS = [(4096, 320), (1024, 640), (256, 1280), (64, 1280)]  # positions, channels


CALLS, REPEATS = 10, 30


def captured(torch, step):
    """A function that replays the step, warmed and captured in a CUDA graph, and its output, which every replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


def milliseconds(torch, function, calls: int) -> float:
    """Of one call: median over replays of a CUDA graph with `calls` of them, so that launching from Python is not timed."""
    replay, _ = captured(torch, lambda: [function() for _ in range(calls)])
    times = []
    for _ in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times[3:])[REPEATS // 2]


class Layer:
    """Inputs of one cross-attention layer and both ways to compute it."""

    def __init__(self, torch, library, queries: int, keys: int, channels: int, dtype) -> None:
        self.torch, self.library, self.dim = torch, library, channels // HEADS
        self.code = [torch.float32, torch.float16, torch.bfloat16].index(dtype)
        new = lambda *shape: torch.randn(*shape, device="cuda").to(dtype)  # noqa: E731
        self.q, self.x = new(BATCH, queries, channels), new(BATCH, queries, channels)
        self.k, self.v = new(BATCH, keys, channels), new(BATCH, keys, channels)
        self.w_q = new(channels, channels) / channels**0.5
        self.k_id = new(BATCH, PEOPLE, TOKENS + 1, channels)
        self.v_id = new(BATCH, PEOPLE, TOKENS, channels)
        self.v_with_null = torch.nn.functional.pad(self.v_id[:, 0], (0, 0, 0, 1))
        self.mask, self.scale = new(BATCH, PEOPLE, queries).abs().clamp(0, 1), new(BATCH)
        keys_by_head = self.k_id.double().unflatten(-1, (HEADS, -1))
        weights = self.w_q.double().unflatten(0, (HEADS, -1))
        fold = torch.einsum("bpthd,hdc->bpcht", keys_by_head, weights) / self.dim**0.5
        self.a = fold.flatten(-2).to(dtype).contiguous()
        self.out, self.mass = torch.empty_like(self.q), torch.empty_like(self.mask)

    def sizes(self, *values: int):
        return map(ctypes.c_int64, values)

    def attention(self, k, v) -> None:
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (self.q, k, v, self.out))
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        sizes = self.sizes(BATCH, self.q.shape[1], k.shape[1], HEADS, self.dim)
        if self.library.device_attention(self.code, *pointers, *sizes, stream):
            raise SystemExit("device_attention failed")

    def ours(self):
        self.attention(self.k, self.v)
        tensors = (self.out, self.x, self.a, self.v_id, self.mask, self.scale, self.out, self.mass)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
        sizes = self.sizes(BATCH, self.q.shape[1], self.q.shape[2], HEADS, TOKENS, PEOPLE)
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        if self.library.device_identity_mix(self.code, *pointers, *sizes, 1, stream):
            raise SystemExit("device_identity_mix failed")
        return self.out

    def theirs(self, convert=lambda t: t):
        """The unfolded form; `convert` widens every input for the reference."""
        torch = self.torch
        split = lambda t: convert(t).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
        merge = lambda t: t.transpose(1, 2).flatten(-2)  # noqa: E731
        attend = torch.nn.functional.scaled_dot_product_attention
        h = merge(attend(split(self.q), split(self.k), split(self.v)))
        q_id = (convert(self.x) @ convert(self.w_q).T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        identity = merge(attend(q_id, split(self.k_id[:, 0]), split(self.v_with_null)))
        return h + convert(self.scale)[:, None, None] * convert(self.mask)[:, 0, :, None] * identity

    def own(self):
        self.attention(self.x, self.x)
        return self.out

    def their_own(self, convert=lambda t: t):
        split = lambda t: convert(t).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
        found = self.torch.nn.functional.scaled_dot_product_attention(split(self.q), split(self.x), split(self.x))
        return found.transpose(1, 2).flatten(-2)


def measure(torch, layer: Layer, ours, theirs) -> tuple[float, float, float, float]:
    """(our error, PyTorch's, our milliseconds, PyTorch's); errors are the largest against float64."""
    calls = 2 if layer.q.dtype == torch.float32 else CALLS     # our float32 kernel is for checking, and slow
    exact = theirs(convert=lambda t: t.double())
    layer.out.fill_(float("nan"))
    errors = [(f().double() - exact).abs().max().item() for f in (ours, theirs)]
    return (*errors, *(milliseconds(torch, f, calls) for f in (ours, theirs)))


def main() -> int:
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: nothing to compare with")
        return 0
    if not torch.cuda.is_available():
        print("PyTorch has no CUDA: nothing to compare with")
        return 0
    library, wrong = ctypes.CDLL(sys.argv[1]), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {BATCH}, milliseconds of one layer, median of {REPEATS} "
          f"replays of {CALLS} calls (float32: 2); cross: 77 text keys and {TOKENS} tokens of {PEOPLE} person, self: S keys")  # fmt: skip
    print("| dtype | S | C | d | attention | ours | torch | torch / ours | ours, TFLOP/s | error, ours | error, torch |\n" + "|---" * 11 + "|")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for queries, channels in LAYERS:
            layer = Layer(torch, library, queries, 77, channels, dtype)
            for name, keys, ours, theirs in (("cross", 77, layer.ours, layer.theirs), ("self", queries, layer.own, layer.their_own)):
                error, their_error, time, their_time = measure(torch, layer, ours, theirs)
                work = 4e-9 * BATCH * queries * keys * channels / time
                print(f"| {str(dtype)[6:]} | {queries} | {channels} | {channels // HEADS} | {name} | {time:.4f} | {their_time:.4f} | "
                      f"{their_time / time:.2f} | {work:.0f} | {error:.1e} | {their_error:.1e} |", flush=True)  # fmt: skip
                if not error <= 4 * their_error + 1e-5:
                    wrong.append(f"{name} at S {queries}, C {channels}, {str(dtype)[6:]}: error {error:.1e}")
    print(*(f"WRONG {w}" for w in wrong), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
