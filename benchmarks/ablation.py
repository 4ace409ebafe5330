"""What each term of the adapter stage is worth: python -m benchmarks.ablation --model MODEL --data DATA --embedder FILE.onnx --out OUT

Trains one new adapter per variant on the same frozen base, with the same data, steps, seed and noise, then evaluates each with
pidiff-evaluate. Variants: ours, ours without each term, with L_id, W+ Adapter (residual, its own losses) and an IP-Adapter-like
branch (no null key, the diffusion loss alone). A stopped run goes on; OUT/ablation.md is the table.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

PLAIN = ["--bg", "0", "--dis", "0", "--loc", "0", "--background-weight", "1"]
OURS = ["--new-adapter", "parallel"]
VARIANTS = {
    "ours": OURS,
    "without L_bg": [*OURS, "--bg", "0"],
    "without L_dis": [*OURS, "--dis", "0"],
    "without L_loc": [*OURS, "--loc", "0"],
    "with L_id": [*OURS, "--id", "0.1"],
    "L_rec alone": [*OURS, *PLAIN],
    "W+ Adapter": ["--new-adapter", "residual", *PLAIN, "--preserve", "1"],
    "IP-Adapter-like": ["--new-adapter", "single", *PLAIN],
}
COLUMNS = ("rank1", "similarity_reference", "verification_rate", "disruption", "switched", "identity_map_inside", "background_accuracy")


def run_variant(name: str, options: list[str], args) -> dict:
    """Train and evaluate one variant in OUT/NAME; what is there already is kept."""
    folder = args.out / name.replace(" ", "-")
    report = folder / "report"
    if not (report / "summary.json").is_file():
        model = folder / "model"
        if not model.is_dir():
            shutil.copytree(args.model, model, ignore=shutil.ignore_patterns(".state", "adapter", "*.onnx", "manifest.json"))
        data = [str(d) for d in args.data]
        subprocess.run([sys.executable, "-m", "pidiff.train", "adapter", "--data", *data, "--model", str(model), "--steps", str(args.steps),
                        "--batch-size", str(args.batch_size), "--seed", str(args.seed), *options], check=True)
        subprocess.run([sys.executable, "-m", "pidiff.evaluate", "--checkpoint", str(model), "--data", data[0], "--embedder", str(args.embedder),
                        "--people", str(args.people), "--prompts", "1", "--seeds", "1", "--out", str(report)], check=True)
    return json.loads((report / "summary.json").read_text())


def cell(score: dict | None) -> str:
    if not score or score["mean"] is None:
        return "-"
    return f"{score['mean']:.3f} ({score['low']:.3f} - {score['high']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder or bundle: its base is used, its adapter is not")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the first is also evaluated on")
    parser.add_argument("--embedder", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = ["| variant | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in args.variants:
        summary = run_variant(name, VARIANTS[name], args)
        lines.append(f"| {name} | " + " | ".join(cell(summary.get(column)) for column in COLUMNS) + " |")
        (args.out / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
