"""How much faster a whole UNet is with our kernels: attention in ONNX Runtime, or what they do in OpenVINO.

    pidiff-export MODEL standard --attention standard && pidiff-export MODEL fused
    python -m benchmarks.unet_gain standard/unet.onnx fused/unet.onnx [--side N] [--batch N] [--threads N] [--rounds N]
    python -m benchmarks.unet_gain --openvino fused/unet.onnx [--precision auto|full] ...

The ways are timed in turns of three runs: in ONNX Runtime the two graphs, the second one with precision "full" and "auto"; in OpenVINO one
graph with its own kernels alone, with ours compiled for any batch, and with ours as it is by default. In ONNX Runtime each turn loads its engine, one at
a time (those of Stable Diffusion need the memory).
Medians of wall and processor time of a run, the ratio of processor time to the first, and how far the output is from the first one's.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np

from pidiff.export.to_onnx import read_spec
from pidiff.runtime.engines import load_engine


def arrays(spec, sizes: dict) -> dict:
    """Random inputs and empty outputs."""
    rng = np.random.default_rng(0)
    shape = lambda tensor: [sizes[n] if isinstance(n, str) else n for n in tensor.shape]  # noqa: E731
    inputs = {t.name: rng.standard_normal(shape(t)).astype(t.dtype) for t in spec.inputs}
    # An identity's folded matrices are small numbers.
    inputs["id_fold"] *= np.asarray(0.05, inputs["id_fold"].dtype)
    return inputs | {t.name: np.empty(shape(t), t.dtype) for t in spec.outputs}


def loaded(name: str, path: Path, sizes: dict, own: bool = False, **options) -> tuple:
    """(engine, its arrays), run once. own: OpenVINO with its own kernels alone."""
    spec, kind = read_spec(path), load_engine(name)
    with mock.patch.object(kind, "_use_kernels", lambda *_: None) if own else nullcontext():
        engine, bound = kind(path, spec, static=True, **options), arrays(spec, sizes)
        engine.bind(bound)
    engine.run()
    return engine, bound


def timed(engine) -> list[tuple[float, float]]:
    """(wall, processor seconds) of three runs."""
    times = []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        engine.run()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def ways(args) -> dict[str, dict]:
    """Name -> arguments of `loaded`."""
    if args.openvino:
        common = {"name": "openvino", "path": args.graphs[0], "fused": True, "precision": args.precision}
        return {"OpenVINO's kernels": common | {"own": True}, "any batch": common | {"lean": True}, "ours": common}
    return {name: {"name": "onnxruntime", "path": path, "fused": fused, "precision": precision} for name, path, fused, precision in
            (("standard", args.graphs[0], False, "full"), ("fused, full", args.graphs[-1], True, "full"), ("fused, auto", args.graphs[-1], True, "auto"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graphs", type=Path, nargs="+", help="unet.onnx, standard and fused, or with --openvino fused alone")
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--precision", choices=("auto", "full"), default="auto", help="in OpenVINO")
    parser.add_argument("--side", type=int, default=64, help="latent height and width where the graph takes any")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if len(args.graphs) != (1 if args.openvino else 2):
        parser.error(f"graphs must be {'one' if args.openvino else 'two'}, got {len(args.graphs)}")
    sizes = {"B": args.batch, "P": 1, "h": args.side, "w": args.side}
    variants = ways(args)
    times, outputs, kept = {name: [] for name in variants}, {}, {}
    for _ in range(args.rounds):
        for name, how in variants.items():
            engine, bound = kept.get(name) or loaded(**how, sizes=sizes, threads=args.threads)
            if args.openvino:
                kept[name] = engine, bound
            times[name] += timed(engine)
            outputs[name] = bound["model_output"].astype(np.float32)
            del engine, bound
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
    base = next(iter(variants))
    for name, (wall, cpu) in medians.items():
        error = np.abs(outputs[name] - outputs[base]).max() / np.abs(outputs[base]).max()
        print(f"{name:20} wall {wall:8.4f} s  processor {cpu:8.4f} s  {medians[base][1] / cpu:.2f} times  relative difference {error:.1e}")


if __name__ == "__main__":
    main()
