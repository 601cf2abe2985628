"""Stop strings: where in a growing text the first of them begins. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces.

    Text that may be the beginning of a string is held back until later pieces decide.

    Attributes:
      length: characters that have arrived.
      found: the character at which the first string begins; None while no string was found.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""
        self.length = 0
        self.found: int | None = None

    def add(self, piece: str) -> str:
        """Return the text that is certainly part of no string, and hold back the rest."""
        window = self._held + piece
        self.length += len(piece)
        starts = [at for at in (window.find(s) for s in self._strings) if at >= 0]
        if starts:
            self.found = self.length - len(window) + min(starts)
            self._held = ""
            return window[: min(starts)]
        keep = max(_overlap(window, s) for s in self._strings)
        certain = window[: len(window) - keep]
        self._held = window[len(certain) :]
        return certain

    def finish(self) -> str:
        """Return the text that was held back. Call it when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(window: str, string: str) -> int:
    """Length of the longest proper prefix of `string` with which `window` ends."""
    longest = min(len(string) - 1, len(window))
    return next((n for n in range(longest, 0, -1) if window.endswith(string[:n])), 0)
