"""Signals that end a job."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM has arrived.

    Attributes:
      exit_code: 130 or 143, as a shell reports such an end.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """A context in which SIGINT and SIGTERM raise `Stopped`; it restores the handlers."""

    def handle(number, frame):
        raise Stopped(number)

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
