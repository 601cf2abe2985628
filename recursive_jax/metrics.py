"""What a person sees of a run: tables, progress lines, metric files."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax


class MetricWriter:
    """`metrics.jsonl` and TensorBoard events under a directory; silent but on process 0."""

    def __init__(self, directory: str | pathlib.Path):
        self._file = self._board = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            directory = pathlib.Path(directory)
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(directory / "metrics.jsonl", "a", encoding="utf-8")
            self._board = SummaryWriter(str(directory / "tensorboard"), write_to_disk=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Values are named by path, such as `train/loss` or `perf/tokens_per_second`.

        One that is not finite is left out: JSON has no word for it, and no plot a place.
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in values.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class Progress:
    """Rates and remaining time of a loop of `total` steps that may start in the middle.

    The first step of a run compiles; it is left out of the rate.
    """

    def __init__(self, total: int, start: int = 0):
        self._total = total
        self._first = start + 1
        self._marks: list[tuple[int, float]] = []

    def tick(self, step: int) -> None:
        """Call after step `step` (1-based) has finished."""
        if step >= self._first:
            self._marks.append((step, time.perf_counter()))
            del self._marks[:-50]

    @property
    def seconds_per_step(self) -> float:
        if len(self._marks) < 2:
            return math.nan
        (a, start), (b, end) = self._marks[0], self._marks[-1]
        return (end - start) / (b - a)

    def eta(self, step: int) -> str:
        seconds = self.seconds_per_step * (self._total - step)
        return "?" if math.isnan(seconds) else clock(seconds)


def clock(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` under an hour."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


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


def say(text: str = "") -> None:
    """Print on process 0 only, at once."""
    if jax.process_index() == 0:
        print(text, flush=True)


def fail(error: Exception) -> None:
    """End the program with a user's mistake told in one line, no traceback."""
    message = str(error)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
