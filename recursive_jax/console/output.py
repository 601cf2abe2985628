"""Lines on standard output and standard error; but for `tell` and errors, from process 0 only."""

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


def tell(text: str) -> None:
    """Print to standard error on any process, at once; also before JAX knows its processes."""
    print(text, file=sys.stderr, flush=True)


def tell_error(text: str) -> None:
    """Print an error line on any process."""
    tell(f"error: {text}")


def fail(error: Exception, code: int = 2) -> None:
    """End the program with an error told in one line, no traceback; code 2: a user's mistake."""
    tell_error(str(error))
    sys.exit(code)
