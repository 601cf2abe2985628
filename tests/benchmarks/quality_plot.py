"""Draws what a start keeps untrained, and what training adds, from rows of docs/results.jsonl.

python tests/benchmarks/quality_plot.py docs/results.jsonl docs/starts.svg

Left: KL from the source before training, with two loops (rows of `starts.py`; a model without a
row for every start is left out). Right: nats per token over the tokens trained on, of the embedded
model (rows of `comparisons.py --recipes`).
"""

from __future__ import annotations

import json
import pathlib
import sys

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

STARTS = {
    "svd": "average + SVD\n(the paper's)",
    "split": "split: fitted together,\nno metric",
    "activations": "joint, activations",
    "fisher": "joint, activations\nand gradients",
}
RECIPES = {
    "svd, labels and source": ("average + SVD, labels and source", "C3"),
    "split, labels and source": ("split, labels and source", "C1"),
    "joint, source alone": ("joint, source alone", "C0"),
}


def main(rows: str, picture: str) -> None:
    found = [json.loads(line) for line in pathlib.Path(rows).read_text().splitlines() if line]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    bars, curves = figure.subplots(1, 2)
    draw_starts(bars, [r for r in found if r["result"] == "start" and "max_block" not in r["case"]])
    draw_recovery(curves, [r for r in found if r["result"] == "comparisons" and "rate" in r])
    figure.savefig(picture)


def draw_starts(axes, rows) -> None:
    models = {"tiny": ("embedded model", 16), "SMOLLM2_DIR": ("SmolLM2-135M", 64)}
    found = {}
    for model, (name, rank) in models.items():
        mine = {
            row["case"]["start"]: row["text"]["kl"]
            for row in rows
            if (row["case"]["model"], row["case"]["rank"], row["case"]["loops"]) == (model, rank, 2)
        }
        if set(mine) >= set(STARTS):
            found[f"{name}, rank {rank}"] = [mine[start] for start in STARTS]
    height = 0.8 / len(found)
    for place, (label, values) in enumerate(found.items()):
        at = [n + height * (place - (len(found) - 1) / 2) for n in range(len(STARTS))]
        bars = axes.barh(at, values, 0.9 * height, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(STARTS)), STARTS.values())
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="KL from the source, nats per token, untrained")
    axes.legend(loc="lower right")


def draw_recovery(axes, rows) -> None:
    two = [row for row in rows if (row["loops"], row["rank"], row["seed"]) == (2, 16, 0)]
    for name, (label, color) in RECIPES.items():
        points: dict[int, float] = {}
        for row in two:
            if name in row["rows"]:
                after = row["rows"][name]["after"]
                points[row["tokens"]] = min(after, points.get(row["tokens"], after))
                points[0] = row["rows"][name]["before"]
        at = sorted(points)
        axes.plot([t / 1000 for t in at], [points[t] for t in at], "o-", label=label, color=color)
    axes.set(xlabel="thousand tokens trained on", ylabel="nats per token, held out")
    axes.set_ylim(top=4.0)
    axes.grid(alpha=0.3)
    axes.legend()


if __name__ == "__main__":
    main(*sys.argv[1:])
