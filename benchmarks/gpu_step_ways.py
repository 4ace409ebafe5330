"""One way to compute a UNet step, in a process of its own; gpu_step.py starts these and says when to time.

    python gpu_step_ways.py WAY JOB.json

JOB: root (weights and graphs, gpu_graphs.py), device (cuda | cpu), small, library (gpu_attention.cu, built), repeats. Talks in
lines that begin with "@": sends "@ready" when it is warm, reads a line, sends "@{row}" for each thing it timed, and "@done".
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from gpu_attention import captured
from gpu_graphs import ADAPTER, BATCH, PEOPLE, TOKENS, load_unet, side_of

EMBED = 1024        # of IP-Adapter's picture


def wait_for(path: Path, seconds: float = 120.0) -> Path:
    """Another process writes it, and renames it when it is whole."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise SystemExit(f"{path.name} must be there within {seconds:.0f} s, got none")
        time.sleep(0.05)
    return path


class Job:
    def __init__(self, values: dict) -> None:
        self.root, self.device, self.small = Path(values["root"]), values["device"], values["small"]
        self.library, self.repeats = values["library"], values["repeats"]
        self.side = side_of(self.small)
        self.on_gpu = self.device == "cuda"

    def unet(self):
        return load_unet(self.root, self.small, self.device).to(memory_format=torch.channels_last)

    def inputs(self) -> dict[str, np.ndarray]:
        """Of the step graph; the same in every process."""
        with np.load(self.root / "inputs.npz") as file:
            return dict(file)

    def error(self, got: np.ndarray) -> float | None:
        """Against our step in PyTorch; None where that has failed."""
        path = self.root / "expected.npy"
        return distance(got, np.load(path)) if path.exists() else None

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def row(self, name: str, step, own_stream: bool = False, **facts) -> dict:
        """Medians in milliseconds: `step` by the wall clock to the end of the GPU's work, `gpu` between CUDA events on the
        current stream unless the work is on another, `host` until the call returns."""
        timed = self.on_gpu and not own_stream
        end = time.perf_counter() + 0.3     # and the clocks rise
        for i in itertools.count():
            step()
            self.synchronize()
            if i >= 2 and time.perf_counter() > end:
                break
        times = {"step": [], "gpu": [], "host": []}
        for _ in range(self.repeats):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if timed else []
            begin = time.perf_counter()
            if events:
                events[0].record()
            step()
            if events:
                events[1].record()
            times["host"].append(1e3 * (time.perf_counter() - begin))
            self.synchronize()
            times["step"].append(1e3 * (time.perf_counter() - begin))
            if events:
                times["gpu"].append(events[0].elapsed_time(events[1]))
        found = {k: round(median(v), 3) for k, v in times.items() if v}
        spread = [round(f(times["step"]), 3) for f in (min, max)]
        return {"way": name, **found, "range": spread, **facts}


def distance(got, expected) -> float:
    """Relative error in the 2-norm."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# --- diffusers --------------------------------------------------------------------------------------------------------


def diffusers(job: Job, compiled: bool):
    from diffusers_worker import ip_adapter

    unet = job.unet()
    state = {part: {k: v.to(job.device, torch.float16) for k, v in group.items()} for part, group in ip_adapter(unet).items()}
    unet._load_ip_adapter_weights([state])
    unet.to(job.device, torch.float16)
    new = lambda *shape: torch.randn(*shape, device=job.device, dtype=torch.float16)  # noqa: E731
    latents = new(BATCH, 4, job.side, job.side).to(memory_format=torch.channels_last)
    text, person = new(BATCH, TOKENS, unet.config.cross_attention_dim), [new(BATCH, 1, EMBED)]
    now = torch.tensor(500.0, device=job.device)
    forward = torch.compile(unet) if compiled else unet
    step = lambda: forward(latents, now, text, added_cond_kwargs={"image_embeds": person}, return_dict=False)[0]  # noqa: E731
    begin = time.perf_counter()
    step()
    job.synchronize()
    first = round(time.perf_counter() - begin, 1)
    name = "diffusers torch.compile" if compiled else "diffusers eager"
    yield
    yield job.row(name, step, first_seconds=first)
    if job.on_gpu:
        replay, _ = captured(torch, step)
        yield job.row(name + ", CUDA graph", replay)


# --- our step in PyTorch ----------------------------------------------------------------------------------------------


class Kernels:
    """Our CUDA kernels in place of the exporter's two attention functions."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(str(wait_for(Path(path))))

    def _call(self, name: str, tensors, *numbers: int) -> None:
        code = [torch.float32, torch.float16, torch.bfloat16].index(tensors[0].dtype)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if getattr(self.library, name)(code, *pointers, *numbers, stream):
            raise RuntimeError(f"{name} failed")

    def self_attention(self, q, k, v, num_heads, form):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, (batch, queries, channels) = torch.empty_like(q), q.shape
        sizes = map(ctypes.c_int64, (batch, queries, k.shape[1], num_heads, channels // num_heads))
        self._call("device_attention", (q, k, v, out), *sizes)
        return out

    def identity_attention(self, q, k, v, x, a, v_id, mask, scale, num_heads, has_null, residual, form):
        out, (batch, queries, channels) = self.self_attention(q, k, v, num_heads, form), q.shape
        y, a, v_id, mask = out if residual else x.contiguous(), a.contiguous(), v_id.contiguous(), mask.contiguous()
        mass = torch.empty_like(mask)
        sizes = map(ctypes.c_int64, (batch, queries, channels, num_heads, v_id.shape[2], v_id.shape[1]))
        self._call("device_identity_mix", (out, y, a, v_id, mask, scale, out, mass), *sizes, int(has_null))
        return out, mass


def ours(job: Job):
    import pidiff.export.attention as attention
    from pidiff.export.attention import Form
    from pidiff.export.step import step_unet

    unet = job.unet()
    inputs = [torch.from_numpy(a).to(job.device) for a in job.inputs().values()]
    with torch.no_grad(), step_unet(unet, ADAPTER, Form("standard", 23), 0) as module:
        widened = [t.float() for t in inputs]
        expected = module.float()(*widened).cpu().numpy()
        np.save(job.root / "part.npy", expected)
        (job.root / "part.npy").rename(job.root / "expected.npy")
        module.half()
        step = lambda: module(*inputs)  # noqa: E731
        plain = attention.self_attention, attention.identity_attention
        ways = [("PIDiff in PyTorch, its attention", plain)]
        if job.on_gpu:
            kernels = Kernels(job.library)
            ways.append(("PIDiff in PyTorch, our kernels", (kernels.self_attention, kernels.identity_attention)))
        for _, functions in ways:
            attention.self_attention, attention.identity_attention = functions
            step()
        job.synchronize()
        yield
        for name, functions in ways:
            attention.self_attention, attention.identity_attention = functions
            yield job.row(name, step, error=distance(step().cpu().numpy(), expected))
            if job.on_gpu:
                replay, output = captured(torch, step)
                row = job.row(name + ", CUDA graph", replay)
                yield {**row, "error": distance(output.cpu().numpy(), expected)}


# --- our step in ONNX Runtime -----------------------------------------------------------------------------------------


def session(job: Job, form: str, graph: bool, provider: dict):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    for axis, size in {"B": BATCH, "P": PEOPLE, "h": job.side, "w": job.side}.items():
        options.add_free_dimension_override_by_name(axis, size)   # so that no shape is computed in a step
    if form == "fused":
        from pidiff.runtime.engines.onnxruntime import custom_op_library

        options.register_custom_ops_library(str(custom_op_library()))
    providers = ["CPUExecutionProvider"]
    if job.on_gpu:
        providers = [("CUDAExecutionProvider", {**provider, "enable_cuda_graph": str(int(graph))}), *providers]
    made = ort.InferenceSession(str(job.root / f"unet-{form}.onnx"), options, providers=providers)
    if job.on_gpu and made.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(f"ONNX Runtime must use CUDAExecutionProvider, got {made.get_providers()}")
    return ort, made


def onnxruntime(job: Job, form: str, nhwc: bool):
    name, provider = f"PIDiff in ONNX Runtime, {form}{', NHWC' if nhwc else ''}", {"prefer_nhwc": str(int(nhwc))}
    if form == "fused" and job.on_gpu:
        wait_for(Path(job.library))
    arrays, problem = job.inputs(), None
    begin = time.perf_counter()
    try:
        ort, made = session(job, form, True, provider)
    except Exception as error:  # such a session refuses graphs with nodes on the processor
        problem = " ".join(str(error).split())[:300]
        ort, made = session(job, form, False, provider)
    binding, device = made.io_binding(), (job.device, 0)
    values = {k: ort.OrtValue.ortvalue_from_numpy(a, *device) for k, a in arrays.items()}
    for key, value in values.items():
        binding.bind_ortvalue_input(key, value)
    output = ort.OrtValue.ortvalue_from_numpy(np.full_like(arrays["latents"], np.nan), *device)
    binding.bind_ortvalue_output("model_output", output)
    plain, graph = ort.RunOptions(), ort.RunOptions()
    if job.on_gpu:
        plain.add_run_config_entry("gpu_graph_id", "-1")    # neither captured nor replayed
    for _ in range(3):
        made.run_with_iobinding(binding, plain)
    first = round(time.perf_counter() - begin, 1)
    yield
    error = lambda: job.error(output.numpy())  # noqa: E731
    yield job.row(name, lambda: made.run_with_iobinding(binding, plain), True, error=error(), first_seconds=first, no_graph=problem)
    if job.on_gpu and problem is None:
        row = job.row(name + ", CUDA graph", lambda: made.run_with_iobinding(binding, graph), True)
        yield {**row, "error": error()}


def runtime(job: Job):
    """As the runtime does it: its engine class, the run captured by us."""
    from pidiff.export.to_onnx import read_spec
    from pidiff.runtime.engines.onnxruntime import OnnxRuntimeEngine

    wait_for(Path(job.library))
    path, arrays = job.root / "unet-fused.onnx", job.inputs()
    begin = time.perf_counter()
    engine = OnnxRuntimeEngine(path, read_spec(path), device="cuda", fused=True, static=True)
    axes = {axis: size for t in engine.inputs() for axis, size in zip(t.shape, arrays[t.name].shape)}
    held = {name: torch.from_numpy(a).cuda() for name, a in arrays.items()}
    held |= {t.name: torch.full([axes.get(a, a) for a in t.shape], float("nan"), dtype=getattr(torch, t.dtype), device="cuda") for t in engine.outputs()}
    torch.cuda.synchronize()
    binding = engine.bind_device({name: (t.data_ptr(), tuple(t.shape)) for name, t in held.items()})
    binding.settle()
    for _ in range(3):
        binding.queue(engine.stream)
    engine.stream.synchronize()
    first = round(time.perf_counter() - begin, 1)
    yield
    error = lambda: job.error(held["model_output"].cpu().numpy())  # noqa: E731
    yield {**job.row("PIDiff's runtime", lambda: binding.queue(engine.stream), True, first_seconds=first), "error": error()}
    if binding.capturable(engine.stream):
        held["model_output"].fill_(float("nan"))
        torch.cuda.synchronize()
        graph = engine.stream.capture(lambda: binding.queue(engine.stream))
        yield {**job.row("PIDiff's runtime, CUDA graph", graph.launch, True), "error": error()}


WAYS = {
    "compiled": lambda job: diffusers(job, True),
    "diffusers": lambda job: diffusers(job, False),
    "ours": ours,
    "runtime": runtime,
    "ort-fused": lambda job: onnxruntime(job, "fused", False),
    "ort-fused-nhwc": lambda job: onnxruntime(job, "fused", True),
    "ort-standard-23": lambda job: onnxruntime(job, "standard-23", False),
    "ort-standard": lambda job: onnxruntime(job, "standard", False),
}


def main(way: str, file: str) -> int:
    job = Job(json.loads(Path(file).read_text()))
    torch.backends.cudnn.allow_tf32 = False     # the reference is in float32
    wait_for(job.root / "prepared")
    with torch.no_grad():
        rows = WAYS[way](job)
        next(rows)
        print("@ready", flush=True)
        sys.stdin.readline()
        for row in rows:
            print("@" + json.dumps(row), flush=True)
        print("@done", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parent / "workers"))
    sys.exit(main(*sys.argv[1:3]))
