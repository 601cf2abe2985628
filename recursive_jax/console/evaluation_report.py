"""What a person sees of an evaluation: the start-up table, and the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recursive_jax.console import tables

_CONTEXT = "512 tokens for windows, up to 2,048 rolling, the model's own for tasks"


def start(model: Any, settings: Any, out: str | None) -> str:
    """The table of what is about to be measured.

    `model`: a `model.Model`; `settings`: `evaluation_settings.Settings`; `out`: file of the report.
    """
    cfg = model.cfg
    loops = f"{cfg.num_loops} loops × " if cfg.num_loops > 1 else ""
    rows = [("model", f"{model.name} ({cfg.family}, {loops}{cfg.num_layers} layers)")]
    if settings.text is not None:
        rows.append(("text", f"{settings.text}, up to {settings.text_tokens:,} tokens"))
    if settings.tasks is not None:
        place = settings.task_dir or "lm-eval's own, from a hub"
        items = "" if settings.limit is None else f", {settings.limit:,} items each"
        rows.append(("tasks", f"{settings.tasks} ({place}{items})"))
    length = settings.context_length
    rows.append(("context", f"{length:,} tokens" if length else _CONTEXT))
    rows.append(("dtype", settings.dtype))
    rows.append(("report", out or "not kept: give --out=FILE"))
    return tables.table(rows)


def table(report: Mapping[str, Any]) -> str:
    """All numbers of a report, and those of the source beside them."""
    source = report.get("source") or {}
    blocks = []
    if "perplexity" in report:
        blocks.append(_perplexity(report["perplexity"], source.get("perplexity") or {}))
    if "tasks" in report:
        blocks.append(_tasks(report["tasks"], source.get("tasks") or {}))
        if any("rates" in task for task in report["tasks"].values()):
            blocks.append(_rates(report["tasks"]))
    blocks += _about(report, source)
    return "\n\n".join(blocks)


def _perplexity(found: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    windows, rolling = found["windows"], found["rolling"]
    rows = []
    errors = windows.get("nll_stderr_exits") or [windows["nll_stderr"]]
    nlls = windows.get("nll_exits") or [windows["nll"]]
    exits = rolling.get("loops") or [rolling]
    perplexities = windows.get("perplexity_exits") or [windows["perplexity"]]
    values = zip(nlls, errors, perplexities, exits, strict=True)
    for n, (nll, error, perplexity, other) in enumerate(values, 1):
        name = f"after loop {n}" if len(nlls) > 1 else "model"
        rows.append((name, *_measured(nll, error, perplexity, other)))
    if source:
        parts = source["windows"], source.get("rolling")
        rows.append(("source", *_measured(*(parts[0][n] for n in _WINDOW), parts[1])))
    header = ("", "nll", "perplexity", "rolling", "by word", "by byte")
    lines = [tables.table(rows, header)]
    lines.append(
        f"nll, perplexity: windows of {windows['context_length']:,} tokens, "
        f"{windows['tokens']:,} tokens scored, the tokenizer's own prefix"
    )
    lines.append(
        f"rolling, by word, by byte: lm-eval's rolling perplexity, max_length "
        f"{rolling['max_length']:,}, {rolling['tokens']:,} tokens, {rolling['words']:,} words, "
        f"{rolling['bytes']:,} bytes"
    )
    return "\n".join(lines)


_WINDOW = ("nll", "nll_stderr", "perplexity")


def _measured(nll, error, perplexity, rolling) -> tuple[str, ...]:
    spread = "" if error is None else f" ± {error:.4f}"
    if rolling is None:
        return f"{nll:.4f}{spread}", f"{perplexity:,.2f}", "", "", ""
    return (
        f"{nll:.4f}{spread}", f"{perplexity:,.2f}", f"{rolling['perplexity']:,.2f}",
        f"{rolling['word_perplexity']:,.2f}", f"{rolling['byte_perplexity']:.4f}",
    )  # fmt: skip


def _tasks(found: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    most = max(len(task.get("loops", [0])) for task in found.values())
    rows = []
    for name, task in found.items():
        metric = task["metric"]
        exits = [exit_.get(metric) for exit_ in task.get("loops", [])]
        earlier = [_percent(exit_) for exit_ in exits[:-1]] or [""] * (most - 1)
        beside = source.get(name)
        rows.append(
            (name, f"{task['items']:,}", metric, *earlier, _percent(task),
             *([_percent(beside)] if source else []))
        )  # fmt: skip
    names = [f"loop {n}" for n in range(1, most)] + [f"loop {most}" if most > 1 else "value"]
    header = ["task", "items", "metric", *names, *(["source"] if source else [])]
    if len(found) > 1 and all(task["metric"].startswith("acc") for task in found.values()):
        rows.append(_mean_row(found, source, most))
    return tables.table(rows, header)


def _mean_row(found, source, most) -> tuple[str, ...]:
    def mean(values):
        return f"{100 * sum(values) / len(values):.1f} %"

    cells = []
    for n in range(most):
        exits = [task.get("loops") for task in found.values()]
        if all(exits):
            metrics = [task["metric"] for task in found.values()]
            values = [e[n][m]["value"] for e, m in zip(exits, metrics, strict=True)]
        elif n == most - 1:
            values = [task["value"] for task in found.values()]
        else:
            values = []
        cells.append(mean(values) if values else "")
    if source:
        known = [source[name]["value"] for name in found if name in source]
        cells.append(mean(known) if len(known) == len(found) else "")
    return ("mean", "", "", *cells)


def _percent(measured: Mapping[str, Any] | None) -> str:
    """A share with its standard error; other numbers as they are."""
    if measured is None:
        return ""
    value, error = measured["value"], measured["stderr"]
    if not 0 <= value <= 1:
        return f"{value:,.2f}" + ("" if error is None else f" ± {error:.2f}")
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"


def _rates(found: Mapping[str, Any]) -> str:
    rows = []
    for name, task in found.items():
        rates = task.get("rates")
        if rates is None:
            continue
        numbers = (rates[n] for n in ("loop_gain", "self_correction", "overthinking"))
        for n, values in enumerate(zip(*numbers, strict=True), 1):
            rows.append((name, f"loop {n}", *(f"{100 * value:+.1f} %" for value in values)))
    header = ("task", "since", "loop gain", "self-correction", "overthinking")
    return tables.table(rows, header)


def _about(report: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    """Where the source's numbers come from, and whether they may be compared."""
    if not source:
        return []
    lines = []
    check = source.get("check") or {}
    if source["from"] in ("nowhere", "certificate"):
        lines.append(f"source: {source['from']}; {source['reason']}")
    if check.get("agrees") is False:
        lines.append(
            f"REFUSED: no number here may be called good. On {check['text']} the source gives nll "
            f"{check['measured']:.4f}, and the certificate stores {check['stored']:.4f}. The "
            "source is another model now, or is computed otherwise; give the right one (--source)"
        )
    elif check.get("agrees"):
        lines.append(
            f"the source gives its certified nll on {check['text']} "
            f"(|Δ| {abs(check['measured'] - check['stored']):.1e})"
        )
        lines += _kept(report, source)
    elif check:
        lines.append(f"the source was not checked: {check['reason']}")
        lines += _kept(report, source)
    return ["\n".join(lines)] if lines else []


def _kept(report: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    """How far the model is from its source."""
    lines = []
    if "perplexity" in report and "perplexity" in source:
        gap = report["perplexity"]["windows"]["nll"] - source["perplexity"]["windows"]["nll"]
        lines.append(f"{gap:+.3f} nats per token against the source")
    both = [(t["value"], source["tasks"][n]["value"]) for n, t in report.get("tasks", {}).items()
            if n in source.get("tasks", {}) and t["metric"].startswith("acc")]  # fmt: skip
    if both:
        mean = 100 * sum(ours - theirs for ours, theirs in both) / len(both)
        lines.append(f"{mean:+.1f} points of accuracy against the source, tasks: {len(both)}")
    return lines
