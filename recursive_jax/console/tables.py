"""Numbers and tables that a person can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def clock(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` under an hour."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def flops(n: float) -> str:
    """Operations with a prefix: 12.3 GFLOP, 1.23 PFLOP."""
    power = min(max(int(math.log10(max(n, 1.0)) // 3), 0), 6)
    return f"{n / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"


def count(n: int | float) -> str:
    """A number a person can read: 1,234 · 12.3M · 4.56B."""
    if abs(n) < 1e6:
        return f"{n:,.0f}"
    unit, size = ("B", 1e9) if abs(n) >= 999.5e6 else ("M", 1e6)  # 999.9M is 1B
    n /= size
    return f"{n:,.0f}{unit}" if abs(n) >= 999.5 else f"{n:.3g}{unit}"


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Plain aligned columns; numbers to the right, words to the left."""
    lines = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    numeric = [
        all(not isinstance(row[i], str) or row[i].lstrip("-")[:1].isdigit() for row in rows)
        for i in range(len(widths))
    ]
    out = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    if header:
        out.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(out)
