"""Lines on standard output and standard error, from process 0 only."""

from __future__ import annotations

import sys

import jax


def say(text: str = "") -> None:
    """Print on process 0 only, at once."""
    if jax.process_index() == 0:
        print(text, flush=True)


def note(text: str) -> None:
    """Print to standard error on process 0 only, at once."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def fail(error: Exception) -> None:
    """End the program with a user's mistake told in one line, no traceback."""
    message = str(error)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
