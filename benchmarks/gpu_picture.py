"""Whole pictures of Stable Diffusion 1.5's size on the GPU that is here: PIDiff in ONNX Runtime against diffusers with an IP-Adapter.

    python benchmarks/gpu_picture.py --work FOLDER [--pictures 5] [--steps 20] [--size 512] [--out FILE.json] [WAY ...]

512 x 512 px (--size), float16, DPM++ 2M, guidance, one person, random weights (made in FOLDER once, 6 GB with the bundle). Every way has a
process of its own; they draw in turns, a picture each. First each draws two steps of DDIM without a person from one noise: those
pictures must agree.
`gpu_mib` is what the process holds on the GPU after its first pictures. --device cpu rehearses it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from benchmarks.gpu_step import Process  # noqa: E402
from benchmarks.presets import psnr  # noqa: E402
from benchmarks.rivals import once, prepare_model, run  # noqa: E402

WAYS = ("pidiff exact", "pidiff balanced", "pidiff fast", "diffusers", "diffusers compiled")
PROMPT, SEED, GUIDANCE = "a photo of a person", 7, 7.5
LEAST = 35.0        # dB between two pictures of one noise in float16


def held() -> int:
    """MiB that are taken on the GPU."""
    names = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(names, capture_output=True, text=True, check=True).stdout.split()[0])


def pidiff(args, preset):
    from pidiff.runtime import Pipeline

    pipe = Pipeline.from_bundle(args.work / "bundle", engine="onnxruntime", device=args.device)
    person = pipe.enroll(str(HERE.parent / "examples" / "person-1.jpg"))
    timed = {"preset": preset, **({"num_inference_steps": args.steps, "scheduler": "dpmpp_2m"} if preset == "exact" else {})}

    def draw(identity=True):
        chosen = timed if identity else {"num_inference_steps": 2, "scheduler": "ddim"}
        return pipe.generate(person if identity else None, PROMPT, seed=SEED, height=args.size, width=args.size, guidance_scale=GUIDANCE, **chosen).images[0]

    return draw


def diffusers(args, compiled):
    import torch
    from diffusers_worker import caller, make_pipeline, make_scheduler
    from protocol import Clock

    from pidiff import _C

    noise = args.work / "noise.npy"
    np.save(noise, _C.randn([SEED], (4, args.size // 8, args.size // 8)))      # what PIDiff begins with
    job = {"threads": torch.get_num_threads(), "model": args.work / "sd15", "solver": "ddim", "identity": True, "batch": 1, "noise": noise,
           "prompt": PROMPT, "size": args.size, "guidance_scale": GUIDANCE}
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    pipe, extra = make_pipeline(job, dtype)
    pipe.to(args.device)
    extra = {k: [t.to(args.device) for t in v] for k, v in extra.items()}
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    if compiled:
        pipe.unet.compile(mode="reduce-overhead")
    schedulers = {True: make_scheduler(pipe.scheduler.config, "dpmpp_2m"), False: pipe.scheduler}
    generate = caller(pipe, extra, job, dtype)

    def draw(identity=True):
        pipe.set_ip_adapter_scale(float(identity))
        pipe.scheduler = schedulers[identity]
        return generate(args.steps if identity else 2, Clock())[0]

    return draw


def worker(args, way):
    """Load, then draw whenever a line comes, `base FILE` or `person`, until there are no more. Answers in lines of "@" and JSON."""
    name, _, how = way.partition(" ")
    start = time.perf_counter()
    draw = pidiff(args, how) if name == "pidiff" else diffusers(args, bool(how))
    print("@" + json.dumps({"load_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        kind, _, file = line.strip().partition(" ")
        start = time.perf_counter()
        picture = draw(kind == "person")
        seconds = time.perf_counter() - start
        if file:
            np.save(file, picture)
        print("@" + json.dumps({"seconds": seconds}), flush=True)


class Worker(Process):
    def __init__(self, way: str, args) -> None:
        command = [sys.executable, __file__, "--worker", way, "--work", args.work, "--steps", args.steps, "--size", args.size, "--device", args.device]
        super().__init__(command, args.work / f"{way.replace(' ', '-')}.log")
        self.way, self.row, self.times, self.patience = way, {"way": way}, [], args.patience

    def ask(self, line: str = "") -> dict:
        """Its answer to a line. RuntimeError where it has ended or takes too long."""
        if line:
            self.send(line)
        if answer := self.next(self.patience):
            return json.loads(answer)
        raise RuntimeError(f"{self.way} must answer within {self.patience:g} s, got: {self.last_word()}")

    def close(self) -> None:
        self.process.kill()     # it keeps nothing
        self.process.wait()


def prepare(work: Path) -> None:
    """The random model in diffusers' layout, and its bundle in float16."""
    model = prepare_model(work)
    once(work / "bundle", lambda part: run([sys.executable, "-m", "pidiff.export", model, part, "--fp16", "--report", "none", "--quiet"], work / "export.log"))


def begin(worker: Worker, args, base: np.ndarray | None) -> np.ndarray:
    """Let it load, draw what must agree with `base`, and its first picture; returns the first of them. RuntimeError where it does not agree."""
    before, file = held() if args.device == "cuda" else 0, args.work / "base.npy"
    worker.row |= worker.ask()
    worker.ask(f"base {file}")
    picture = np.load(file)
    likeness = None if base is None else round(psnr(picture, base), 1)
    worker.row |= {"likeness_db": likeness, "first_s": worker.ask("person")["seconds"]}
    if likeness is not None and likeness < LEAST:
        raise RuntimeError(f"its picture without a person must be the first way's within {LEAST} dB, got {likeness}")
    worker.row["gpu_mib"] = held() - before if args.device == "cuda" else None
    return picture


def measure(args) -> list[dict]:
    """A row for every way; one that fails has `error`, and ends there."""
    workers, base = [], None

    def tried(worker, work):
        try:
            return work()
        except (RuntimeError, OSError) as e:
            worker.row["error"] = str(e)
            worker.close()

    for way in args.ways:       # one after the other, so that each one's memory is known
        workers.append(worker := Worker(way, args))
        picture = tried(worker, lambda: begin(worker, args, base))
        base = picture if base is None else base
    for worker in args.pictures * workers:      # in turns
        if "error" not in worker.row:
            tried(worker, lambda: worker.times.append(worker.ask("person")["seconds"]))
    for worker in workers:
        if "error" not in worker.row:
            worker.close()
            worker.row |= {"picture_s": median(worker.times), "range_s": [min(worker.times), max(worker.times)]}
    return [worker.row for worker in workers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", default=WAYS, metavar="WAY")
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--patience", type=float, default=90.0, help="seconds that a way may take for any one thing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prepare", action="store_true", help="make model and bundle, measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [way for way in args.ways if way not in WAYS]:
        parser.error(f"WAY must be among {', '.join(WAYS)}, got {unknown[0]!r}")
    if args.worker:
        worker(args, args.worker)
        return 0
    prepare(args.work)
    if args.prepare:
        return 0
    rows = measure(args)
    print("| way | s a picture | range | first picture s | loaded s | GPU MiB | likeness dB |\n|---|---|---|---|---|---|---|")
    for r in rows:
        if "error" in r:
            print(f"FAILED {r['way']}: {r['error']}")
        else:
            print(f"| {r['way']} | {r['picture_s']:.3f} | {r['range_s'][0]:.3f}-{r['range_s'][1]:.3f} | {r['first_s']:.1f} | {r['load_s']:.1f} | {r['gpu_mib']} | {r['likeness_db']} |")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("error" in r for r in rows))


if __name__ == "__main__":
    sys.path.insert(1, str(HERE / "workers"))
    sys.exit(main())
