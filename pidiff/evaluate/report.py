"""Files of an evaluation: summary.json, scores.csv, report.md, and PNG plots (with matplotlib)."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np

from pidiff.runtime.memory import resident

from . import metrics
from .protocol import ID_SCALES, Evaluation

FALSE_MATCH_RATES = (1e-2, 1e-3)                # the first is the one that groups and the inversion ceiling are judged by
PER_PICTURE = ("rank1", "similarity_reference", "similarity_other", "copy_paste", "disruption", "identity_map_inside",
               "background_accuracy", "style_accuracy", "expression_accuracy", "pose_accuracy", "face_found", "diversity")


def summarise(evaluation: Evaluation, ceilings: dict, settings: dict, groups: dict[str, list[str]] | None = None) -> dict:
    """Every score with its interval, the anchors beside them, `groups` of people on their own, and what was skipped."""
    records, rng = evaluation.records, np.random.default_rng(0)
    people = [row["person"] for row in records.rows]
    names = [p[0].name for p in evaluation.people]
    references, others, impostor = evaluation.gallery, evaluation.others, evaluation.impostor
    genuine = (others * references).sum(1)

    def column(key):
        return metrics.interval([row.get(key, float("nan")) for row in records.rows], people, rng)

    summary = {"settings": {**settings, "people": len(names), "pictures": len(records.rows)},
               **{key: column(key) for key in PER_PICTURE}, "anchors": {
                   "genuine_similarity": metrics.interval(genuine, names, rng),
                   "genuine_rank1": metrics.interval([metrics.rank1(v, references, i) for i, v in enumerate(others)], names, rng),
                   "impostor_similarity": round(float(impostor.mean()), 4),
                   "id_scale_0_similarity": column("similarity_base"),
                   "pasted_reference": {"similarity_reference": 1.0, "copy_paste": 1.0, "similarity_other": metrics.interval(genuine, names, rng)},
                   **ceilings}}
    for rate in FALSE_MATCH_RATES:
        limit, key = metrics.threshold(impostor, rate), "verification_rate" + ("" if rate == 1e-2 else f"_{rate:g}")
        accepted = [float(row["similarity_reference"] > limit) for row in records.rows]
        summary[key] = {**metrics.interval(accepted, people, rng), "false_match_rate": rate, "threshold": round(limit, 4)}
        summary["anchors"]["genuine_" + key] = metrics.interval((genuine > limit).astype(float), names, rng)
    summary["groups"] = {group: group_scores(records.rows, set(members), summary["verification_rate"]["threshold"], rng)
                         for group, members in (groups or {}).items()}
    summary["switched"] = metrics.interval([v for _, v in records.switched], [n for n, _ in records.switched], rng)
    summary["leakage"] = metrics.interval([v for _, v in records.leakage], [n for n, _ in records.leakage], rng)
    summary["level_change_inside"] = {level: metrics.interval([v for _, v in rows], [n for n, _ in rows], rng)
                                      for level, rows in records.levels.items()}
    for name, rows in records.edits.items():
        who = [n for n, *_ in rows]
        summary[f"edit_{name}_spearman"] = metrics.interval([rho for _, rho, _ in rows], who, rng)
        summary[f"edit_{name}_similarity"] = metrics.interval([s for *_, s in rows], who, rng)
    seconds = [row["seconds"] for row in records.rows]
    summary["seconds_per_picture"] = {"median": round(float(np.median(seconds)), 4), "best": round(min(seconds), 4)}
    summary["peak_memory_mb"] = round(resident(peak=True) / 2**20, 1)
    summary["skipped"] = records.skipped
    return summary


def group_scores(rows: list[dict], members: set[str], threshold: float, rng: np.random.Generator) -> dict:
    """Identity scores of one group's people; the gallery and the threshold are everybody's."""
    own = [row for row in rows if row["person"] in members]
    people = [row["person"] for row in own]
    return {**{key: metrics.interval([row[key] for row in own], people, rng) for key in ("rank1", "similarity_reference")},
            "verification_rate": metrics.interval([float(row["similarity_reference"] > threshold) for row in own], people, rng)}


def write(out: Path, evaluation: Evaluation, summary: dict) -> None:
    """Write every file of the report into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    records = evaluation.records
    with (out / "scores.csv").open("w", newline="") as file:
        keys = list(dict.fromkeys(key for row in records.rows for key in row))
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in records.rows)
    (out / "report.md").write_text(markdown(summary))
    cv2.imwrite(str(out / "people.png"), sheet(list(records.pictures.values())[:16])[..., ::-1])
    plot_similarity(out / "similarity.png", evaluation, summary)
    if records.curves:
        (out / "curves.json").write_text(json.dumps(records.curves, indent=1) + "\n")
        plot_curves(out / "curves.png", records.curves)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _cell(value: dict) -> str:
    return "-" if value["mean"] is None else f"{value['mean']:.3f} | {value['low']:.3f} - {value['high']:.3f} | {value['people']}"


def _range(value: dict) -> str:
    return "-" if value["mean"] is None else f"{value['mean']:.2f} ({value['low']:.2f} - {value['high']:.2f})"


def markdown(summary: dict) -> str:
    """Tables of scores, of factor readers on real pictures, and of anchors."""
    settings = ", ".join(f"{k}: {v}" for k, v in summary["settings"].items())
    lines = ["# Evaluation", "", settings, "", "| score | mean | 95 % interval over people | people |", "|---|---|---|---|"]
    scores = [k for k, v in summary.items() if isinstance(v, dict) and "mean" in v]
    lines += [f"| {k} | {_cell(summary[k]) if summary[k]['mean'] is not None else '- | - | 0'} |" for k in scores]
    lines += ["", "Share of the change inside the person when one W+ level group is another person's:", "",
              "| level | mean | 95 % interval | people |", "|---|---|---|---|"]
    lines += [f"| {k} | {_cell(v) if v['mean'] is not None else '- | - | 0'} |" for k, v in summary["level_change_inside"].items()]
    if summary["groups"]:
        lines += ["", "Apparent groups (skin tone by the typology angle of the cheeks, age by the code):", "",
                  "| group | people | rank1 | similarity_reference | verification_rate |", "|---|---|---|---|---|"]
        lines += [f"| {group} | {scores['rank1']['people']} | " + " | ".join(_range(score) for score in scores.values()) + " |"
                  for group, scores in summary["groups"].items()]
    lines += ["", "Anchors:", "", "| anchor | value |", "|---|---|"]
    for key, value in summary["anchors"].items():
        text = value if not isinstance(value, dict) else value.get("mean", json.dumps(value))
        lines.append(f"| {key} | {text} |")
    lines += ["", f"{summary['seconds_per_picture']['median']} s a picture (median), {summary['peak_memory_mb']} MB at the peak."]
    lines += [f"Skipped: {name}: {why}" for name, why in summary["skipped"].items()]
    return "\n".join(lines) + "\n"


def sheet(rows: list[list[np.ndarray]], size: int = 128) -> np.ndarray:
    """One row of pictures per person."""
    return np.concatenate([np.concatenate([cv2.resize(p, (size, size), interpolation=cv2.INTER_AREA) for p in row], 1) for row in rows])


def _axes(width: int, height: int, columns: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plot_similarity(path: Path, evaluation: Evaluation, summary: dict) -> None:
    """Distributions of similarity: impostors, generated pictures, another photo; and the decision thresholds."""
    figure, (axis,) = _axes(6, 3.5)
    others = np.stack([p[3] for p in evaluation.people])
    scores = others @ evaluation.gallery.T
    bins = np.linspace(-0.3, 1, 53)
    for values, label in ((scores[~np.eye(len(scores), dtype=bool)], "other people"),
                          ([r["similarity_reference"] for r in evaluation.records.rows], "generated, to the reference"),
                          (np.diag(scores), "another photo of the person")):
        axis.hist(values, bins, density=True, alpha=0.55, label=label)
    for key in ("verification_rate", "verification_rate_0.001"):
        axis.axvline(summary[key]["threshold"], color="k", lw=0.8, ls="--")
    axis.set_xlabel("cosine similarity"), axis.set_ylabel("density"), axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_curves(path: Path, curves: list[dict]) -> None:
    """Operating curves: likeness against change of the background, over id_scale, one line per id_start."""
    figure, axes = _axes(9, 3.5, 2)
    for start in sorted({c["id_start"] for c in curves}):
        points = np.array([[np.nanmean([c[k] for c in curves if c["id_start"] == start and c["id_scale"] == scale])
                            for k in ("disruption", "similarity", "background_accuracy")] for scale in ID_SCALES])
        for axis, column in zip(axes, (0, 2)):
            axis.plot(points[:, column], points[:, 1], "o-", ms=4, label=f"id_start {start}")
        for scale, point in zip(ID_SCALES, points):
            axes[0].annotate(f"{scale:g}", point[:2], fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes[0].set_xlabel("change of the background (0-255)"), axes[1].set_xlabel("background accuracy")
    axes[0].set_ylabel("similarity to the reference"), axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
