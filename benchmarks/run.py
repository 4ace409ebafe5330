"""PIDiff and its rivals side by side: the same picture, drawn in turns.

    python -m benchmarks.run [--rivals] [--quick] --out benchmarks/results/DATE-MACHINE.json

Stable Diffusion 1.5's configuration with random weights, 512 px, guidance (two rows a step), 20 steps of DPM++ 2M, decoded; PIDiff
and the rivals that can (diffusers with an IP-Adapter; the same with its UNet and decoder in OpenVINO) draw a person, the others do
without, which is less work. Every way to draw runs in a process of its own, one after another, in rounds, so that a busy moment
meets all of them; numbers are medians. Before anything is timed every way draws two steps of DDIM from the same noise without a person, and
where its maths is PIDiff's the pictures must agree. `--rivals` installs them first, each into an environment of its own under
`--work` (about 25 GB with the weights). Growth with size, batch, people and threads is measured for PIDiff, a step each; `mini`'s
enrolment, cold start and host overhead are measured for themselves. `--quick`: one round, few steps, whole pictures reckoned from
them (marked `derived`), no growth.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pidiff.runtime.presets import resolve_preset

from . import rivals as table
from .mini import measure_mini
from .presets import psnr

PROMPT, GUIDANCE, STEPS, SIZE = "a photo of a person", 7.5, 20, 512
LIKE = {"fp32": 35.0, "full": 35.0, "auto": 25.0, "bf16": 25.0}         # dB that a picture of the same noise must reach
GROWTH = [{"size": 256}, {"size": 512}, {"size": 768}, {"batch": 2}, {"batch": 4}, {"people": 2}, {"people": 4}, {"threads": 1}]


def environment() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=table.ROOT).stdout.strip()
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    where = next((i for i, a in enumerate(sys.argv) if a == "--work"), len(sys.argv))                  # nobody else's path
    command = " ".join(["python -m benchmarks.run", *sys.argv[1:where], *sys.argv[where + 2:]])
    return {"date": datetime.date.today().isoformat(), "commit": commit, "processor": model, "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(), "system": platform.platform(), "command": command}


class Bench:
    """Runs jobs of the workers in a work folder."""

    def __init__(self, work: Path, threads: int):
        from pidiff import _C
        self.work, self.threads, self.count = work, threads, 0
        (work / "jobs").mkdir(exist_ok=True)
        for side in {SIZE} | {g.get("size", SIZE) for g in GROWTH}:
            np.save(self.noise(side), _C.randn([7], (4, side // 8, side // 8)))

    def noise(self, side: int) -> Path:
        return self.work / f"noise-{side}.npy"

    def draw(self, way: table.Way, steps: list[int], **changes) -> dict:
        """What a worker says of the pictures, with `error` where it failed."""
        self.count += 1
        file = self.work / "jobs" / f"{self.count:03d}-{''.join(c if c.isalnum() else '-' for c in way.name)}"
        job = {"size": SIZE, "solver": "dpmpp_2m", "steps": steps, "batch": 1, "threads": self.threads, "guidance_scale": GUIDANCE, "prompt": PROMPT,
               "identity": way.identity, **way.job, **changes}
        job |= {"noise": str(self.noise(job["size"])), "out": str(file.with_suffix(".result.json")), "begun": time.time()}
        file.with_suffix(".json").write_text(json.dumps(job))
        with file.with_suffix(".log").open("wb") as log:
            command = [table.python_of(self.work, way.environment), str(table.WORKERS / f"{way.worker}.py"), str(file.with_suffix(".json"))]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(job["threads"])})
        out = Path(job["out"])
        return json.loads(out.read_text()) if out.is_file() else {"rows": [], "error": f"the process was killed, see jobs/{file.name}.log"}


def check(bench: Bench, ways: list[table.Way]) -> dict[str, str]:
    """Way -> what is known of its picture; those that fail are not timed. The judge is PIDiff in full precision."""
    judge = next(w for w in ways if w.name == "pidiff exact, full precision")
    found, pictures, distinct = {}, {}, [w for w in ways if w.job.get("preset", "exact") == "exact"]
    for way in sorted(distinct, key=lambda w: w is not judge):
        print("check", way.name, flush=True)
        file = bench.work / "picture.npy"
        result = bench.draw(way, [2], identity=False, keep=str(file), solver="ddim")
        if "error" in result:
            found[way.name] = f"failed: {result['error']}"
            continue
        picture = pictures[way.name] = np.load(file)[0]
        wanted = LIKE.get(way.job["precision"], 0) if way.likeness is None else way.likeness
        value = psnr(picture, pictures[judge.name]) if judge.name in pictures and picture.shape == pictures[judge.name].shape else 0.0
        good = picture.shape == (SIZE, SIZE, 3) and picture.std() > 1 and (not way.same or value >= wanted)
        found[way.name] = f"{value:.1f} dB" if way.same else "not comparable (own noise)"
        if not good:
            found[way.name] = f"failed: picture must agree to {wanted} dB, got {value:.1f}"
    return found


def measure(bench: Bench, ways: list[table.Way], rounds: int, quick: bool) -> dict[str, dict]:
    """Name -> row: cold start, s a step, s a picture, memory, of all rounds."""
    rows = {way.name: {"identity": way.identity, "rival": way.rival, "first_s": [], "load_s": [], "step_s": [], "picture_s": [], "rest_s": [],
                       "peak_bytes": [], "derived": False} for way in ways}
    for turn in range(rounds):
        for way in ways[turn % len(ways):] + ways[:turn % len(ways)]:
            row, started = rows[way.name], time.time()
            preset = way.job.get("preset", "exact")
            steps = 4 if quick and preset == "exact" else resolve_preset(preset, {}, STEPS)["num_inference_steps"]
            result = bench.draw(way, [1 if quick else 2, steps] if preset == "exact" else [steps, steps])
            if "error" in result:
                row["error"] = result["error"]
                continue
            last = result["rows"][-1]
            row["picture_s"].append(last["seconds"])
            row["step_s"] += last["step_s"]
            row["rest_s"].append(last["rest_s"])
            row["derived"] |= quick and preset == "exact"
            for key in ("first_s", "load_s", "peak_bytes"):
                row[key].append(result[key])
            row |= {k: result[k] for k in ("version", "engine", "stages") if k in result}
            print(f"{way.name}: {last['seconds']:.1f} s, {len(last['step_s']) + 1} steps ({time.time() - started:.0f} s in all)", flush=True)
    return {name: settle(row) for name, row in rows.items()}


def settle(row: dict) -> dict:
    """A row with medians in place of lists; the lists stay under `all`. A derived picture has STEPS steps of the median's time."""
    lists = {k: v for k, v in row.items() if isinstance(v, list)}
    settled = row | {k: statistics.median(v) if v else None for k, v in lists.items()} | {"all": lists}
    if row["derived"] and settled["step_s"]:
        settled["picture_s"] = settled["rest_s"] + STEPS * settled["step_s"]
    return settled


def grow(bench: Bench, way: table.Way) -> list[dict]:
    """A step's time of PIDiff at other sizes, batches, people and threads; with the base case again in front, for the ratio."""
    found = []
    for change in ({}, *GROWTH):
        if change != {"size": SIZE}:
            result = bench.draw(way, [4], **change)
            steps = result["rows"][-1]["step_s"] if result["rows"] else []
            found.append({**change, "step_s": statistics.median(steps) if steps else None, "peak_bytes": result.get("peak_bytes"), **({"error": result["error"]} if "error" in result else {})})
            print("growth", json.dumps(found[-1]), flush=True)
    return found


def folder_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())


def package_sizes(work: Path, ways: list[table.Way]) -> dict[str, int]:
    """Bytes of what pip put into each rival's environment, and into one with PIDiff's core alone."""
    names = {w.environment for w in ways if w.environment}
    core = work / "envs" / "pidiff"
    if not (core / "installed").is_file():
        table.venv.create(core, with_pip=True)
        table.run([core / "bin" / "python", "-m", "pip", "install", "-q", table.ROOT], work / "install-pidiff.log")
        (core / "installed").write_text("")
    return {name: folder_bytes(work / "envs" / name / "lib") for name in sorted(names | {"pidiff"})}


def speedups(rows: dict[str, dict], need_identity: bool) -> dict[str, float | None]:
    """preset -> how many times faster than the fastest rival's whole picture."""
    times = [r["picture_s"] for r in rows.values() if r["rival"] and r["picture_s"] and (r["identity"] or not need_identity)]
    own = {preset: rows[f"pidiff {preset}"]["picture_s"] for preset in ("exact", "balanced", "fast")}
    return {preset: min(times) / seconds if times and seconds else None for preset, seconds in own.items()}


def markdown(report: dict) -> str:
    lines = ["| way | person | s a step | s a picture | first picture, cold | peak memory | same noise |", "|---|---|---|---|---|---|---|"]
    for name, row in sorted(report["rows"].items(), key=lambda item: (item[1]["picture_s"] or 1e9)):
        cell = lambda value, form="{:.2f}": form.format(value) if value else "-"
        picture = cell(row["picture_s"], "{:.1f}") + (" (derived)" if row["derived"] else "")
        lines.append(f"| {name} | {'yes' if row['identity'] else 'no'} | {cell(row['step_s'])} | {picture} | {cell(row['first_s'], '{:.1f}')} | "
                     f"{cell((row['peak_bytes'] or 0) / 2**30, '{:.2f} GiB')} | {row.get('error', report['pictures'].get(name, ''))} |")
    for key in ("speedup_over_fastest_rival", "speedup_over_fastest_rival_with_identity"):
        lines += ["", key + ": " + ", ".join(f"{p} {'-' if s is None else f'{s:.2f}'}" for p, s in report[key].items())]
    lines += ["", *(f"growth {json.dumps(g)}" for g in report["growth"]), "mini: " + json.dumps(report["mini"]), "installed bytes: " + json.dumps(report["package_bytes"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", action="store_true", help="install and measure rivals too")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--int8", action="store_true", help="export and measure the model in int8 too")
    parser.add_argument("--rounds", type=int, help="default: 3, or 1 with --quick")
    parser.add_argument("--only", nargs="*", help="rivals whose names contain one of these")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work, report = args.work.resolve(), {"environment": environment(), "growth": []}
    work.mkdir(parents=True, exist_ok=True)
    model, *bundles = table.prepare_ours(work, args.int8)
    bench, ways = Bench(work, args.threads), table.ours(*bundles)
    for way in table.rivals(model, work) if args.rivals else []:
        if not args.only or any(part in way.name for part in args.only):
            print("prepare", way.name, flush=True)
            table.prepare(way, work, model, {"size": SIZE, "threads": args.threads, "batch": 1, "identity": True})
            ways.append(way)
    report["pictures"] = check(bench, ways)
    usable = [w for w in ways if not report["pictures"].get(w.name, "").startswith("failed")]
    report["rows"] = measure(bench, usable, args.rounds or (1 if args.quick else 3), args.quick)
    report["growth"] = [] if args.quick else grow(bench, ways[0])
    report["mini"], report["package_bytes"] = measure_mini(bench), package_sizes(work, ways)
    report["speedup_over_fastest_rival"] = speedups(report["rows"], False)
    report["speedup_over_fastest_rival_with_identity"] = speedups(report["rows"], True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))


if __name__ == "__main__":
    main()
