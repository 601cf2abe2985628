"""Early exits of a text, and calibrated thresholds, as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recursive_jax.console import tables

FEW_DOCUMENTS = 30
HEADER = ("perplexity", "accuracy", "agrees", "loops", "left after loop", "FLOPs")


def table(exits: Mapping[str, Any]) -> str:
    """The tables of `early_exits.measure_exits`: every loop, thresholds, the oracle, the rates."""
    rates = exits["rates"]
    rows = [(f"all after loop {n}", *_cells(row)) for n, row in enumerate(exits["loops"], 1)]
    for row in exits["by_threshold"]:
        values = ", ".join(f"{value:.4g}" for value in row["thresholds"])
        rows.append((f"{exits['measure']} > {values}", *_cells(row)))
    rows.append(("oracle, teacher-forced", *_cells(exits["oracle"])))
    return "\n".join(
        [
            f"early exits on {exits['tokens']:,} tokens ({exits['tokens_are']}), missing KV "
            f"{exits['missing_kv']}",
            tables.table(rows, ("exit", *HEADER)),
            "agrees: with the last loop. FLOPs: of a token, head counted, beside those of full "
            "depth. The oracle knows the last loop's answer: no engine can exit like this.",
            f"loop gain {rates['loop_gain'][0]:+.1%} accuracy after the first, self-correction "
            f"{rates['ever_corrected']:.1%}, overthinking {rates['ever_overthought']:.1%}",
        ]
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    depth = " / ".join(f"{share:.0%}" for share in row["depth"])
    return (
        f"{row['perplexity']:,.2f}",
        f"{row['accuracy']:.1%}",
        f"{row['agreement']:.1%}",
        f"{row['mean_loops']:.2f}",
        depth,
        f"{row['flops_share']:.0%}",
    )


def calibrated(thresholds: Any) -> str:
    """What was calibrated. `thresholds`: of `decoding.thresholds`, with their record."""
    record = thresholds.record
    values = ", ".join(f"{value:.4g}" for value in thresholds.thresholds)
    rows = [
        ("measure", thresholds.measure),
        ("thresholds", f"{values} (after loop 1 and on)"),
        ("promise", thresholds.promise),
        ("text", f"{thresholds.text}: {record['windows']:,} windows, "
                 f"{record['tested_windows']:,} of them to test"),
        ("on this text", f"{thresholds.risk} {record['risk_on_text']:.2%}, "
                         f"p = {record['p_value']:.3f}, {record['mean_loops']:.3f} loops a token"),
        ("missing KV", thresholds.missing_kv),
    ]  # fmt: skip
    lines = [tables.table(rows)]
    if record["documents"] < FEW_DOCUMENTS:
        lines.append(
            f"the text has {record['documents']} documents only: the bound is for text from these, "
            "not for other documents"
        )
    return "\n".join(lines)
