"""Pictures of an evaluation: quality over loops, energy kept, recovery over a training run."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from recursive_jax.console import heatmap
from recursive_jax.console.pictures import check_picture

KIND = ".svg"


def check(directory: str | pathlib.Path) -> None:
    """Make the directory; ValueError if pictures cannot be drawn there. Call it before the work."""
    check_picture(pathlib.Path(directory) / f"quality{KIND}", "--plots")


def save(
    directory: str | pathlib.Path,
    report: Mapping[str, Any],
    certificate: Mapping[str, Any] | None,
    metrics: pathlib.Path | None,
) -> list[pathlib.Path]:
    """Draw what there is, and return the files.

    Args:
      directory: of the pictures.
      report: as `Model.evaluate` returns it.
      certificate: of the model's conversion.
      metrics: metrics.jsonl of a training run.
    """
    source = report.get("source") or {}
    drawn: dict[str, tuple[Callable[..., None], tuple]] = {}
    tasks = {n: t for n, t in report.get("tasks", {}).items() if len(t.get("loops", [])) > 1}
    if tasks:
        drawn["quality"] = _quality, (tasks, source.get("tasks") or {})
    if len(report.get("perplexity", {}).get("windows", {}).get("nll_exits", [])) > 1:
        drawn["perplexity"] = _perplexity, (report["perplexity"], source.get("perplexity"))
    if (certificate or {}).get("energy_kept"):
        kept = certificate["energy_kept"]
        drawn["energy"] = _energy, (kept, certificate.get("energy_kept_by_layer", {}))
    steps = [] if metrics is None or not metrics.is_file() else read_metrics(metrics)
    if any("valid/perplexity" in row for row in steps):
        drawn["recovery"] = _recovery, (steps,)
    files = []
    for name, (draw, data) in drawn.items():
        files.append(pathlib.Path(directory) / f"{name}{KIND}")
        _draw(files[-1], draw, *data)
    if "shown" in report.get("exits", {}):
        files.append(pathlib.Path(directory) / f"exits{KIND}")
        _exits(files[-1], report["exits"])
    return files


def _exits(path: pathlib.Path, exits: Mapping[str, Any]) -> None:
    """The text, every token coloured by the loop after which it leaves."""
    shown = exits["shown"]
    values = ", ".join(f"{value:.4g}" for value in shown["thresholds"])
    title = f"{exits['measure']} > {values}, missing KV {exits['missing_kv']}"
    row = heatmap.Row("the text", shown["pieces"], shown["exit_loops"])
    heatmap.save(path, [row], len(exits["loops"]), title)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; lines that are no records are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _draw(path: pathlib.Path, draw: Callable[..., None], *data: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes, *data)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def _loops(axes: Any, count: int) -> None:
    axes.set_xticks(range(1, count + 1))
    axes.set_xlabel("loops executed")


def _plain_numbers(axes: Any) -> None:
    """40, not 4 × 10¹, at the ticks of a logarithmic axis."""
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def _quality(axes, tasks, source) -> None:
    """Accuracy of every task over loops, with standard errors; a dotted line: the source."""
    for name, task in tasks.items():
        metric = task["metric"]
        exits = [exit_[metric] for exit_ in task["loops"]]
        at = range(1, len(exits) + 1)
        errors = [exit_["stderr"] or 0.0 for exit_ in exits]
        bars = axes.errorbar(at, [e["value"] for e in exits], errors, fmt="o-", label=name)
        if name in source:
            axes.axhline(source[name]["value"], ls=":", color=bars[0].get_color())
        _loops(axes, len(exits))
    axes.set_ylabel("accuracy (dotted: source)" if source else "accuracy")
    axes.legend(fontsize="small")


def _perplexity(axes, found, source) -> None:
    values = found["windows"]["perplexity_exits"]
    axes.plot(range(1, len(values) + 1), values, "o-", label="windows, per token")
    exits = found["rolling"].get("loops")
    if exits:
        rolling = [exit_["perplexity"] for exit_ in exits]
        axes.plot(range(1, len(rolling) + 1), rolling, "s--", label="rolling, per token")
    if source:
        axes.axhline(source["windows"]["perplexity"], ls=":", color="black", label="source")
    _loops(axes, len(values))
    axes.set(ylabel="perplexity", yscale="log")
    _plain_numbers(axes)
    axes.legend()


def _energy(axes, kept, by_layer) -> None:
    """A line over the block's layers for each projection; bars where layers are not known."""
    for name, shares in by_layer.items():
        label = f"{name}: {kept[name]:.0%}"
        axes.plot(range(len(shares)), [100 * share for share in shares], "o-", label=label)
    if by_layer:
        axes.set_xlabel("layer of the block")
        axes.legend(ncol=2)
    else:
        axes.bar(list(kept), [100 * share for share in kept.values()])
        axes.set_xlabel("projection")
    axes.set(ylabel="energy of the residual kept, %", ylim=(0, 100))


def _recovery(axes, rows) -> None:
    """Perplexity of every exit over the tokens of a training run."""
    logged = [row["train/tokens"] for row in rows if "train/tokens" in row]
    each = sum(logged) / len(logged) if logged else 1.0
    measured = [row for row in rows if "valid/perplexity" in row]
    names = sorted({name for row in measured for name in row if "valid/perplexity_exit_" in name})
    for name in names or ["valid/perplexity"]:
        at = [row["step"] * each for row in measured if name in row]
        label = f"after loop {name.rsplit('_', 1)[1]}" if names else "model"
        axes.plot(at, [row[name] for row in measured if name in row], "o-", label=label)
    source = [row["source/perplexity"] for row in rows if "source/perplexity" in row]
    if source:
        axes.axhline(source[-1], ls=":", color="black", label="source")
    axes.set(xlabel="tokens trained on" if logged else "steps", ylabel="perplexity", yscale="log")
    _plain_numbers(axes)
    axes.legend()
