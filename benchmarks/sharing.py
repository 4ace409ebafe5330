"""What of a UNet's memory two processes that draw with one bundle share (Linux).

    python -m benchmarks.sharing BUNDLE [--engine openvino|onnxruntime] [--precision auto|full] [--lean]

Each process loads the UNet, runs it once for a guided picture of one person, and waits. Then both are there, and the system says of each
what it holds (Rss), what of that is its own alone (private) and what it is charged where shared pages are divided (Pss). --lean: as with `max_memory`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

FIELDS = ("Rss", "Private_Clean", "Private_Dirty", "Pss")


def memory() -> list[int]:
    """MiB: held, private, charged."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    held, clean, dirty, charged = (int(lines[name].split()[0]) >> 10 for name in FIELDS)
    return [held, clean + dirty, charged]


def hold(args) -> None:
    """The work of one process: prints `memory` when it is asked to by a line of its input."""
    from benchmarks.unet_gain import loaded

    size = {"B": 2, "P": 1, "h": args.side, "w": args.side}
    options = {"precision": args.precision, **({"lean": args.lean} if args.engine == "openvino" else {})}
    engine = loaded(args.engine, args.bundle / "unet.onnx", size, fused=True, threads=args.threads, **options)
    print("ready", flush=True)
    sys.stdin.readline()
    print(*memory(), flush=True)
    sys.stdin.read()
    del engine


def start() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "benchmarks.sharing", *sys.argv[1:], "--hold"], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def table(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
        answer = process.stdout.readline().split()
        if len(answer) != 3:
            raise SystemExit("a process must load the UNet, got none (see above)")
        print("  {:>6} MiB held, {:>6} private, {:>6} charged".format(*answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", choices=("openvino", "onnxruntime"), default="openvino")
    parser.add_argument("--precision", choices=("auto", "full"), default="auto")
    parser.add_argument("--lean", action="store_true")
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold:
        return hold(args)
    processes = []
    try:
        for _ in range(3):      # one after the other; the first one only fills the cache
            processes.append(start())
            processes[-1].stdout.readline()
            if len(processes) == 3:
                processes.pop(0).communicate()
        table(processes)
    finally:
        for process in processes:
            process.communicate()


if __name__ == "__main__":
    main()
