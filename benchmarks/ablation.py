"""What each term and each form of the adapter is worth.

    python -m benchmarks.ablation --model MODEL --data DATA --embedder FILE.onnx --out OUT

Two tables on one frozen base, with the same data, seed and noise. Terms: the model's own adapter, its mapper frozen, fine-tuned
with each term of the loss off. Forms: new adapters from nothing with equal steps: ours; with lighter terms, and each of them off; W+
Adapter's (residual, its own losses) and an IP-Adapter-like branch (one embedding to 4 tokens, the diffusion loss alone). Each is
then evaluated with pidiff-evaluate. A stopped run goes on; OUT/ablation.md holds the tables. `--variants` trains and evaluates only
those, for runs side by side.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

PLAIN = ["--bg", "0", "--dis", "0", "--loc", "0", "--background-weight", "1"]
TERMS = {
    "all terms": [],
    "without L_bg": ["--bg", "0"],
    "without L_dis": ["--dis", "0"],
    "without L_loc": ["--loc", "0"],
    "with L_id": ["--id", "0.1"],
    "L_rec alone": PLAIN,
}
NEW = ["--new-adapter", "parallel"]
LIGHT = [*NEW, "--bg", "1", "--dis", "0.6", "--background-weight", "0.5"]
FORMS = {
    "ours": NEW,
    "lighter": LIGHT,
    "lighter without L_bg": [*LIGHT, "--bg", "0"],
    "lighter without L_dis": [*LIGHT, "--dis", "0"],
    "lighter without L_loc": [*LIGHT, "--loc", "0"],
    "new, L_rec alone": [*NEW, *PLAIN],
    "W+ Adapter": ["--new-adapter", "residual", *PLAIN, "--preserve", "1"],
    "IP-Adapter-like": ["--new-adapter", "single", *PLAIN],
}
COLUMNS = ("rank1", "similarity_reference", "verification_rate", "disruption", "switched", "identity_map_inside", "background_accuracy")
UNTRAINED = "as it was"


def run_variant(name: str, args) -> None:
    """Train and evaluate one variant in OUT/NAME; what is there already is kept. All paths are absolute: the processes run there,
    where no checkout hides the installed package."""
    folder, new = args.out / name.replace(" ", "-"), name in FORMS
    report, model = folder / "report", folder / "model"
    if (report / "summary.json").is_file():
        return
    if not model.is_dir():
        left_out = (".state", "*.onnx", "manifest.json", *(["adapter"] if new else []))
        shutil.copytree(args.model, model, ignore=shutil.ignore_patterns(*left_out))
    if name != UNTRAINED:
        how = [*FORMS[name], "--steps", str(args.form_steps), "--matrix-learning-rate", "0.01", "--learning-rate", "1e-3"] if new else \
            [*TERMS[name], "--steps", str(args.term_steps)]
        subprocess.run([sys.executable, "-m", "pidiff.train", "adapter", "--data", *map(str, args.data), "--model", str(model),
                        "--batch-size", str(args.batch_size), "--seed", str(args.seed), "--device", args.device, *how], check=True, cwd=folder)
    # Not the default guidance: rows of all dates can be compared.
    subprocess.run([sys.executable, "-m", "pidiff.evaluate", "--checkpoint", str(model), "--data", str(args.data[0]),
                    "--embedder", str(args.embedder), "--people", str(args.people), "--prompts", "1", "--seeds", "1", "--guidance-scale", "2.5",
                    "--curve-people", str(args.curve_people if new else 0), "--curve-starts", "0", "--out", str(report)], check=True, cwd=folder)


def disruption_at(similarity: np.ndarray, disruption: np.ndarray, wanted: float) -> float:
    """Disruption where a curve over id_scale [S] first reaches a similarity, by linear interpolation; NaN if it never does."""
    for (s0, s1), (d0, d1) in zip(zip(similarity, similarity[1:]), zip(disruption, disruption[1:])):
        if s0 <= wanted <= s1:
            return float(d0 + (d1 - d0) * (wanted - s0) / max(s1 - s0, 1e-9))
    return float("nan")


def equal_similarity(curves: dict[str, list[dict]], rival: str = "W+ Adapter", draws: int = 2000) -> list[str]:
    """Sentences: each form's disruption where its mean similarity is the rival's at id_scale 1, as a share of the rival's disruption there,
    with a bootstrap interval over people."""
    scales = sorted({c["id_scale"] for c in curves[rival]})
    people = sorted({c["person"] for c in curves[rival]})
    tables = {}
    for name, rows in curves.items():
        known = {(c["person"], c["id_scale"]): (c["similarity"], c["disruption"]) for c in rows if c["id_start"] == 0}
        tables[name] = np.array([[known[p, s] for s in scales] for p in people], float)     # [people, scales, 2]
    finite = np.all([np.isfinite(t).all((1, 2)) for t in tables.values()], 0)
    rng, one = np.random.default_rng(0), scales.index(1)

    def shares(chosen):
        means = {name: table[finite][chosen].mean(0) for name, table in tables.items()}
        wanted, least = means[rival][one]
        return wanted, least, {name: disruption_at(mean[:, 0], mean[:, 1], wanted) / least for name, mean in means.items() if name != rival}

    count = int(finite.sum())
    wanted, least, found = shares(np.arange(count))
    drawn = [shares(rng.integers(0, count, count))[2] for _ in range(draws)]
    lines = [f"{rival} at id_scale 1: similarity {wanted:.3f}, disruption {least:.2f} ({count} people). Disruption at that similarity, as a share of it:"]
    for name, share in found.items():
        values = np.array([d[name] for d in drawn])
        low, high = np.nanquantile(values, (0.025, 0.975)) if np.isfinite(values).any() else (np.nan, np.nan)
        lines.append(f"{name} {share:.2f} ({low:.2f} - {high:.2f}; not reached in {np.isnan(values).mean():.0%} of the draws).")
    return lines


def cell(score: dict | None) -> str:
    if not score or score["mean"] is None:
        return "-"
    return f"{score['mean']:.3f} ({score['low']:.3f} - {score['high']:.3f})"


def tables(out: Path) -> str:
    """Markdown of every variant that has been evaluated."""
    lines = []
    for names in ((UNTRAINED, *TERMS), tuple(FORMS)):
        lines += ["", "| variant | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for name in names:
            file = out / name.replace(" ", "-") / "report" / "summary.json"
            if file.is_file():
                summary = json.loads(file.read_text())
                lines.append(f"| {name} | " + " | ".join(cell(summary.get(column)) for column in COLUMNS) + " |")
    files = {name: out / name.replace(" ", "-") / "report" / "curves.json" for name in FORMS}
    curves = {name: rows for name, file in files.items() if file.is_file() and (rows := json.loads(file.read_text()))}
    if "W+ Adapter" in curves:
        lines += ["", *equal_similarity(curves)]
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    every, absolute = [UNTRAINED, *TERMS, *FORMS], lambda text: Path(text).resolve()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=absolute, required=True, help="model folder or bundle")
    parser.add_argument("--data", type=absolute, nargs="+", required=True, help="the first is also evaluated on")
    parser.add_argument("--embedder", type=absolute, required=True)
    parser.add_argument("--variants", nargs="*", choices=every, default=every)
    parser.add_argument("--term-steps", type=int, default=300)
    parser.add_argument("--form-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--curve-people", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="to train on; evaluation is on the processor")
    parser.add_argument("--out", type=absolute, required=True)
    args = parser.parse_args()
    for name in args.variants:
        run_variant(name, args)
        (args.out / "ablation.md").write_text(tables(args.out))
    print(tables(args.out))


if __name__ == "__main__":
    main()
