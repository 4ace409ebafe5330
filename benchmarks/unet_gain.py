"""How much faster ONNX Runtime's whole UNet is with our attention operators.

    pidiff-export MODEL standard --attention standard && pidiff-export MODEL fused
    python -m benchmarks.unet_gain standard/unet.onnx fused/unet.onnx [--side N] [--batch N] [--threads N] [--rounds N]

The graphs are timed in turns, the second one with precision "full" and "auto"; each turn opens a session (one at a time: those
of Stable Diffusion need the memory), runs it once to warm up and then three times. Medians of wall and processor time of
a run, the ratio to the first, and how far the output is from the first one's.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from pidiff.export.to_onnx import read_spec
from pidiff.runtime.engines.onnxruntime import OnnxRuntimeEngine


def arrays(spec, sizes: dict) -> dict:
    """Random inputs and empty outputs."""
    rng = np.random.default_rng(0)
    shape = lambda tensor: [sizes[n] if isinstance(n, str) else n for n in tensor.shape]  # noqa: E731
    inputs = {t.name: rng.standard_normal(shape(t)).astype(t.dtype) for t in spec.inputs}
    # An identity's folded matrices are small numbers.
    inputs["id_fold"] *= np.asarray(0.05, inputs["id_fold"].dtype)
    return inputs | {t.name: np.empty(shape(t), t.dtype) for t in spec.outputs}


def turn(path: Path, fused: bool, precision: str, sizes: dict, threads: int) -> tuple[list, np.ndarray]:
    """[(wall, processor seconds)] of three runs, and the model's output."""
    spec = read_spec(path)
    engine, bound = OnnxRuntimeEngine(path, spec, threads=threads, fused=fused, precision=precision), arrays(spec, sizes)
    engine.bind(bound)
    engine.run()
    times = []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        engine.run()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times, bound["model_output"].astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("standard", type=Path)
    parser.add_argument("fused", type=Path)
    parser.add_argument("--side", type=int, default=64, help="latent height and width where the graph takes any")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sizes = {"B": args.batch, "P": 1, "h": args.side, "w": args.side}
    variants = {"standard": (args.standard, False, "full"), "fused, full": (args.fused, True, "full"),
                "fused, auto": (args.fused, True, "auto")}
    times, outputs = {name: [] for name in variants}, {}
    for _ in range(args.rounds):
        for name, (path, fused, precision) in variants.items():
            measured, outputs[name] = turn(path, fused, precision, sizes, args.threads)
            times[name] += measured
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
    first = outputs["standard"]
    for name, (wall, cpu) in medians.items():
        ratio = medians["standard"][1] / cpu
        error = np.abs(outputs[name] - first).max() / np.abs(first).max()
        print(f"{name:12} wall {wall:8.4f} s  processor {cpu:8.4f} s  {ratio:.2f} times  relative difference {error:.1e}")


if __name__ == "__main__":
    main()
