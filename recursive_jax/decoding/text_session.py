"""A session that speaks text: pieces as they become certain, stop strings, whole completions.

Text ends where a stop string begins, even one that several tokens spell, and nothing that may
turn out to be part of one is given out before that is decided. `tokens` (and `exit_loops`,
`logprobs`) are cut after the first token with which the answer's text is complete; that token may
reach into the stop string. What the device decoded beyond it within one round is thrown away, and
the slot is free for the next round.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

from recursive_jax import text
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.requests import Completion, Event, Request
from recursive_jax.decoding.session import Session, Stats
from recursive_jax.decoding.state import MAX_TICKS


class News(NamedTuple):
    """What a round brought to one request.

    Attributes:
      index: which of the requests that were submitted.
      piece: its new text.
      tokens: how many its answer has by now.
      completion: the whole of it, once it is over.
    """

    index: int
    piece: str
    tokens: int
    completion: Completion | None


class TextSession:
    """As `session.Session`, with text. `tokenizer` is any of `transformers`."""

    def __init__(self, engine: Engine, tokenizer: Any):
        self._session, self._tokenizer = Session(engine), tokenizer
        self._answers: dict[int, _Answer] = {}

    @property
    def stats(self) -> Stats:
        """Of all rounds so far; tokens behind a stop string are among its tokens."""
        return self._session.stats

    @property
    def idle(self) -> bool:
        return self._session.idle

    def submit(self, request: Request) -> int:
        """Queue a request; returns its index. Raises ValueError when it cannot be answered."""
        index = self._session.submit(request)
        self._answers[index] = _Answer(self._tokenizer, request)
        return index

    def cancel(self, index: int) -> None:
        """No more news of this request; no error when it is over."""
        self._session.cancel(index)
        self._answers.pop(index, None)

    def round(self, max_ticks: int = MAX_TICKS) -> list[News]:
        """Fill free slots, run up to `max_ticks` ticks; news of every request that has some."""
        news = []
        for event in self._session.round(max_ticks)[0]:
            answer = self._answers[event.index]
            piece = answer.add(event)
            completion = answer.completion
            over = completion.finish_reason is not None
            if over:
                self.cancel(event.index)  # a stop string: the engine does not know yet
            count = len(completion.tokens)
            news.append(News(event.index, piece, count, completion if over else None))
        return news


class _Answer:
    """A completion that grows; its text is put together at the end."""

    def __init__(self, tokenizer: Any, request: Request):
        self.completion = Completion(request.id)
        self._detokenizer = text.Detokenizer(tokenizer, request.tokens)
        self._stop = StopStrings(request.stop_strings) if request.stop_strings else None
        self._pieces: list[str] = []
        self._ends: list[int] = []  # characters that are certain after each token

    def add(self, event: Event) -> str:
        """The new piece of text."""
        completion, detokenizer, stop = self.completion, self._detokenizer, self._stop
        completion.add(event)
        if stop is None:
            piece = detokenizer.add(event.tokens)
            if event.finish_reason:
                piece += detokenizer.finish()
        else:
            piece = self._add_until_stop(event, stop)
        self._pieces.append(piece)
        if completion.finish_reason:
            completion.text = "".join(self._pieces)
        return piece

    def _add_until_stop(self, event: Event, stop: StopStrings) -> str:
        piece = ""
        for token in event.tokens:  # one by one: ticks per round trip must not matter
            piece += stop.add(self._detokenizer.add([token]))
            self._ends.append(stop.seen)
            if stop.found is not None:
                break
        if event.finish_reason and stop.found is None:
            piece += stop.add(self._detokenizer.finish())
            piece += stop.finish()
        if stop.found is not None:
            whole = bisect.bisect_left(self._ends, stop.found) + 1 if stop.found else 0
            self.completion.cut(whole)
        return piece


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces.

    Attributes:
      seen: characters that came so far.
      found: where the text ends, in characters: a string begins there. None as long as none did.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""  # may be the beginning of a string
        self.seen = 0
        self.found: int | None = None

    def add(self, piece: str) -> str:
        """What of the text is certainly no part of a string; the rest is held back."""
        window = self._held + piece
        self.seen += len(piece)
        starts = [at for at in (window.find(s) for s in self._strings) if at >= 0]
        if starts:
            self.found = self.seen - len(window) + min(starts)
            self._held = ""
            return window[: min(starts)]
        keep = max(self._overlap(window, s) for s in self._strings)
        certain = window[: len(window) - keep]
        self._held = window[len(certain) :]
        return certain

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(window: str, string: str) -> int:
        """Length of the longest end of `window` that `string` begins with."""
        longest = min(len(string) - 1, len(window))
        return next((n for n in range(longest, 0, -1) if window.endswith(string[:n])), 0)
