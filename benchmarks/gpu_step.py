"""One UNet step at Stable Diffusion 1.5's size (two rows of 512 px, float16, one person in 16 layers): diffusers eager and
compiled with an IP-Adapter, against PIDiff's step in PyTorch and in ONNX Runtime.

    python gpu_step.py --root FOLDER --library libgpu_attention.so [--hold FILE] [--seconds 120] [--out FILE.json] [WAY ...]

FOLDER holds unet-FORM.onnx of gpu_graphs.py; the weights are made there. Every way has a process of its own, all get ready at
once, and then one after the other is timed while the others wait, so that the GPU does one thing. What fails, or is not ready
in time, costs its own rows only. --hold: times nothing before this file appears; FOLDER/ready tells when all are ready.
Called by gpu_check.sh; --cpu rehearses it with a small UNet (gpu_graphs.py --small) on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WAYS = ["diffusers", "ours", "runtime", "ort-fused", "compiled", "ort-fused-nhwc", "ort-standard-23", "ort-standard"]
LONGEST, USUAL = 30.0, 5.0      # seconds that timing one way may take, and takes


class Process:
    """A process whose lines that begin with "@" come in through a thread; what else it says goes to a log."""

    def __init__(self, command: list, log: Path) -> None:
        self.log, self.lines, self.ended = log, queue.Queue(), False
        with log.open("w") as out:
            self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("@"):
                self.lines.put(line[1:].strip())
        self.lines.put(None)

    def next(self, seconds: float):
        """Its next line; None where it has ended, "" where none came in time."""
        if self.ended:
            return None
        try:
            line = self.lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            return ""
        self.ended = line is None
        return line

    def send(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def last_word(self) -> str:
        """The end of its log."""
        last = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-1:] or ["no word"]
        return last[0][:300]


class Worker(Process):
    """Computes one way."""

    def __init__(self, way: str, job: Path, log: Path) -> None:
        super().__init__([sys.executable, HERE / "gpu_step_ways.py", way, job], log)
        self.way, self.ready, self.rows, self.done = way, False, [], False

    def wait_ready(self, end: float) -> bool:
        if not self.ready:
            self.ready = self.next(end - time.monotonic()) == "ready"
        return self.ready

    def time(self, end: float) -> None:
        self.send("go")
        while (line := self.next(end - time.monotonic())) and line != "done":
            self.rows.append(json.loads(line))
        self.done = line == "done"

    def close(self) -> str:
        """Ends the process; returns the last line of its log where it had failed."""
        late = self.process.poll() is None and not self.rows
        if self.process.poll() is None:
            try:
                self.process.wait(2 if self.rows else 0.1)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                if self.done:       # it takes its time to end
                    return ""
        if self.process.returncode == 0:
            return ""
        return ("not ready in time; " if late else "") + self.last_word()


def graph_form(way: str) -> str | None:
    """The form of the graph that a way runs, None for those without."""
    return "fused" if way == "runtime" else way.removeprefix("ort-").removesuffix("-nhwc") if way.startswith("ort-") else None


def prepare(root: Path, small: bool) -> None:
    command = [sys.executable, HERE / "gpu_graphs.py", root, *(["--small"] if small else []), "--forms"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the weights must be made, got {done.stderr.strip().splitlines()[-1:]}")
    (root / "prepared").touch()


def table(rows: list[dict], failed: dict[str, str]) -> str:
    base = next((r["step"] for r in rows if r["way"] == "diffusers eager"), None)
    lines = ["| way | step ms | range | GPU ms | host ms | against diffusers eager | error |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        ratio = f"{base / r['step']:.2f} x" if base else ""
        cells = [r["way"], r["step"], "-".join(map(str, r["range"])), r.get("gpu", ""), r["host"], ratio, f"{r['error']:.1e}" if r.get("error") is not None else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    notes = [f"{r['way']}: no CUDA graph: {r['no_graph']}" for r in rows if r.get("no_graph")]
    return "\n".join(lines + notes + [f"FAILED {way}: {why}" for way, why in failed.items()])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", default=WAYS, metavar="WAY")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--library", default="")
    parser.add_argument("--hold", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)
    end, root = time.monotonic() + args.seconds, args.root
    for name in ("prepared", "expected.npy", "ready"):
        (root / name).unlink(missing_ok=True)
    job = root / "job.json"
    job.write_text(json.dumps({"root": str(root.absolute()), "device": "cpu" if args.cpu else "cuda", "small": args.cpu, "library": args.library,
                               "repeats": args.repeats}))
    ways = [w for w in args.ways if (form := graph_form(w)) is None or (root / f"unet-{form}.onnx").is_file()]
    workers = [Worker(way, job, root / f"{way}.log") for way in ways]
    try:
        prepare(root, args.cpu)
        for worker in workers:
            worker.wait_ready(end - LONGEST / 2 - USUAL * len(workers))
        late = [w.way for w in workers if not w.ready and w.process.poll() is None]
        (root / "ready").write_text(" ".join(w.way for w in workers if w.ready))
        while args.hold and not args.hold.exists() and time.monotonic() < end - USUAL * len(workers):
            time.sleep(0.05)
        for worker in sorted(workers, key=lambda w: not w.ready):
            if worker.wait_ready(end):
                worker.time(min(end, time.monotonic() + LONGEST))
    finally:
        failed = {w.way: why for w in workers if (why := w.close())}
    rows = [row for w in workers for row in w.rows]
    print(table(rows, failed))
    if late:
        print(f"not quiet: {', '.join(late)} still got ready while the others were timed")
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "failed": failed}, indent=1) + "\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
