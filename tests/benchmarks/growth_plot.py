"""Draws how a tick's cost grows, from the rows that `engine.py growth` printed.

python tests/benchmarks/growth_plot.py docs/results.jsonl docs/growth.svg
"""

from __future__ import annotations

import json
import pathlib
import sys

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


def main(rows: str, picture: str) -> None:
    found = [json.loads(line) for line in pathlib.Path(rows).read_text().splitlines() if line]
    found = [row for row in found if row["result"] == "engine growth"]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, 3)
    for axis, (grown, words) in zip(axes, NAMES.items(), strict=True):
        mine = sorted((r for r in found if r["grown"] == grown), key=lambda r: r[grown])
        at = [row[grown] for row in mine]
        axis.plot(at, [row["tick_ms"] for row in mine], "o-", label="block")
        axis.plot(at, [row["head_ms"] for row in mine], "s--", label="head")
        axis.set(xlabel=words, ylim=0)
        if grown != "num_loops":
            axis.set_xscale("log", base=2)
        axis.set_xticks(at, [str(n) for n in at])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds of a tick")
    axes[0].legend()
    figure.savefig(picture)


NAMES = {"slots": "slots", "context": "context, tokens", "num_loops": "loops over 24 layers"}

if __name__ == "__main__":
    main(*sys.argv[1:])
