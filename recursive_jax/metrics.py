"""What a person sees of a run: tables, progress lines, metric files."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax


class MetricWriter:
    """`metrics.jsonl` and TensorBoard events under a directory; silent but on process 0.

    `last_step`: where a resumed run goes on. What a killed run wrote behind it is taken out, so
    that every step stands there once.
    """

    def __init__(self, directory: str | pathlib.Path, last_step: int = 0):
        self._file = self._board = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            directory = pathlib.Path(directory)
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / "metrics.jsonl"
            if file.exists():
                _keep_until(file, last_step or -1)  # step 0 is done again
            self._file = open(file, "a", encoding="utf-8")
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=last_step + 1)

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


def _keep_until(file: pathlib.Path, last_step: int) -> None:
    """Keep the whole lines of a metrics file up to a step."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except ValueError:  # cut off by the kill
            continue
        if step <= last_step and line.endswith("\n"):
            kept.append(line)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(file)


class Progress:
    """Rates and remaining time of a loop of `total` steps that may start in the middle.

    The first step of a run compiles; it is left out of the rate. So are evaluations and saves
    (`pause`), which only the remaining time counts.
    """

    def __init__(self, total: int, start: int = 0):
        self._total = total
        self._first = start + 1
        self._marks: list[tuple[int, float]] = []
        self._paused = 0.0

    def tick(self, step: int) -> None:
        """Call after step `step` (1-based) has finished."""
        if step >= self._first:
            self._marks.append((step, time.perf_counter() - self._paused))
            del self._marks[:-50]

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around work between two steps that is no part of them."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    @property
    def seconds_per_step(self) -> float:
        if len(self._marks) < 2:
            return math.nan
        (a, start), (b, end) = self._marks[0], self._marks[-1]
        return (end - start) / (b - a)

    def eta(self, step: int) -> str:
        between = self._paused / max(1, step + 1 - self._first)
        seconds = (self.seconds_per_step + between) * (self._total - step)
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
