"""A picture of answers: every token in a box, coloured by the loop after which it exited."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

from recursive_jax import text
from recursive_jax.console.pictures import check_picture
from recursive_jax.decoding.prompts import Prompt
from recursive_jax.decoding.requests import Completion, Request

COLUMNS = 100  # characters of a line
MAX_LINES = 240  # of the picture; its title says when answers are left out
LINE, CHARACTER = 0.235, 0.0836  # inches, of DejaVu Sans Mono at 10 points
SHOWN = str.maketrans({"\n": "↵", "\t": "→", "\r": "␍"})


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer.

    Attributes:
      title: the prompt.
      pieces: text of every token; '' where a token only begins a character.
      exit_loops: of every token, 1 … num_loops.
    """

    title: str
    pieces: Sequence[str]
    exit_loops: Sequence[int]


def make_row(tokenizer: Any, prompt: Prompt, request: Request, completion: Completion) -> Row:
    """The row of one answer. `tokenizer`: any of `transformers`."""
    content = prompt.content
    question = content if isinstance(content, str) else content[-1]["content"]
    detokenizer = text.Detokenizer(tokenizer, request.tokens)
    pieces = [detokenizer.add([token]) for token in completion.tokens]
    return Row(f"{prompt.id}: {question}", pieces, completion.exit_loops)


def check(path: str | pathlib.Path) -> None:
    """Raise ValueError if `save` cannot draw into this file. Call it before the work."""
    check_picture(path, "a heat map")


def save(path: str | pathlib.Path, rows: Sequence[Row], num_loops: int, title: str) -> None:
    """Draw answers into a file that passes `check`. Its suffix chooses the file format."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    lines, left_out = wrap(rows)
    width = COLUMNS * CHARACTER + 0.4
    top = 1.0  # inches, for title and legend
    height = len(lines) * LINE + top + 0.2
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    # More loops have a stronger colour. All colours are pale enough for black letters.
    shades = matplotlib.colormaps["YlOrRd"]
    colour = {n: shades(0.05 + 0.5 * (n - 1) / max(num_loops - 1, 1)) for n in range(num_loops + 1)}
    font = {"family": "DejaVu Sans Mono", "size": 10, "va": "center", "parse_math": False}
    for i, line in enumerate(lines):
        y = top + (i + 0.5) * LINE
        if isinstance(line, str):
            axes.text(0.2, y, _drawable(line), weight="bold", **font)
            continue
        for column, piece, loops in line:
            x, length = 0.2 + column * CHARACTER, _width(piece) * CHARACTER
            box = (x, y - 0.44 * LINE), length, 0.88 * LINE
            axes.add_patch(Rectangle(*box, fc=colour[loops], ec="white", lw=0.8))
            axes.text(x, y, _drawable(piece), **font)
    counts = collections.Counter(n for row in rows for n in row.exit_loops)
    total = max(counts.total(), 1)
    axes.legend(
        [Patch(fc=colour[n], ec="grey") for n in range(1, num_loops + 1)],
        [
            f"{n} loop{'s' * (n > 1)}: {counts[n] / total:.0%} of {total:,} tokens"
            for n in range(1, num_loops + 1)
        ],
        loc="upper left",
        bbox_to_anchor=(0.1 / width, 1 - 0.3 / height),
        ncols=min(num_loops, 3),
        frameon=False,
    )
    title += f"; {left_out}" if left_out else ""
    axes.text(0.2, 0.2, _drawable(title), va="center", size=11, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # matplotlib draws a box instead
        figure.savefig(path)


def wrap(rows: Sequence[Row]) -> tuple[list[str | list[tuple[int, str, int]]], str]:
    """Break answers into lines of at most `COLUMNS` characters.

    Returns:
      the lines, each a title or a list of (column, piece, loops); and which answers are shown, ''
      when all are.
    """
    lines: list[str | list[tuple[int, str, int]]] = []
    for shown, row in enumerate(rows):
        block: list[str | list[tuple[int, str, int]]] = [
            textwrap.shorten(row.title, COLUMNS, placeholder=" …") or "(empty prompt)", []
        ]  # fmt: skip
        column = 0
        for piece, loops in zip(row.pieces, row.exit_loops, strict=True):
            ends_line = "\n" in piece
            piece = piece.translate(SHOWN) or "·"
            piece = piece if len(piece) <= COLUMNS else piece[: COLUMNS - 1] + "…"
            if column + _width(piece) > COLUMNS:
                block.append([])
                column = 0
            block[-1].append((column, piece, loops))
            column = COLUMNS if ends_line else column + _width(piece)
        if lines and len(lines) + len(block) > MAX_LINES:
            return lines, f"the first {shown} of {len(rows)} answers"
        lines += [*block[:MAX_LINES], ""]
        if len(block) > MAX_LINES:
            return lines, f"the beginning of answer 1 of {len(rows)}"
    return lines, ""


def _drawable(line: str) -> str:
    """A line without half surrogate pairs, which are no characters."""
    return line.encode("utf-8", "replace").decode("utf-8")


def _width(piece: str) -> int:
    """Columns that a piece takes. Chinese characters and the like take two."""
    return len(piece) + sum(unicodedata.east_asian_width(c) in "WF" for c in piece)
