"""Signals that end a job."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
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
    """A context in which SIGINT and SIGTERM raise `Stopped`; it restores the handlers.

    Python ignores exceptions in some places, such as callbacks of the garbage collector. The signal
    is then sent again, a moment later.
    """

    def handle(number, frame):
        raise Stopped(number)

    def ignored(unraisable):
        error = unraisable.exc_value
        if isinstance(error, Stopped):
            threading.Timer(0.05, signal.raise_signal, [error.exit_code - 128]).start()
        else:
            hook(unraisable)

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
