"""Requests in, events out: one engine, its scheduler, and the answers in progress.

    engine = Engine(model, params, EngineConfig(num_slots=16, measure=TopProbability(0.9)))
    completions = generate(engine, requests, tokenizer)
    for event in stream(engine, requests, tokenizer): ...

With a tokenizer, events carry text and stop strings end requests. The text ends where the first
stop string begins, even if several tokens spell the string. Text that may be the beginning of a
stop string is held back until later tokens decide.

The completion of such a request ends with the first token that completes its text. This token may
reach into the stop string. Tokens that the device decoded after it in the same round are dropped,
and the slot is free in the next round.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from recursive_jax import text
from recursive_jax.decoding.engine import Engine, NewToken, Tick
from recursive_jax.decoding.requests import Completion, Event, Request, not_numbers
from recursive_jax.decoding.scheduler import Scheduler
from recursive_jax.decoding.state import MAX_TICKS
from recursive_jax.decoding.stop_strings import StopStrings


@dataclasses.dataclass
class Stats:
    """Sums over the ticks of a session.

    Attributes:
      ticks: passes of the block.
      busy: lanes in use, summed over ticks.
      head_rows: lanes that ran the vocabulary head, summed over ticks.
      dropped: lanes freed because a draft was wrong.
      drafted: tokens whose next token was drafted before they were verified.
      slot_ticks: slots in which a token ran, summed over ticks.
      exit_loops: number of tokens by the loops that ran before their next token could start. For a
        lossless engine the tokens below num_loops are the accepted drafts.
    """

    num_lanes: int
    ticks: int = 0
    busy: int = 0
    head_rows: int = 0
    dropped: int = 0
    drafted: int = 0
    slot_ticks: int = 0
    exit_loops: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, tick: Tick) -> None:
        self.ticks += 1
        self.busy += tick.busy
        self.head_rows += tick.head_rows
        self.drafted += tick.drafted
        self.dropped += tick.dropped
        self.slot_ticks += len(tick.lanes)
        self.exit_loops.update(new.exit_loops for new in tick.tokens.values())

    @property
    def tokens(self) -> int:
        """New tokens, including stop tokens and tokens after a stop string."""
        return self.exit_loops.total()

    @property
    def mean_loops(self) -> float:
        return sum(n * count for n, count in self.exit_loops.items()) / max(self.tokens, 1)

    @property
    def ticks_per_token(self) -> float:
        """Ticks per new token of a decoding slot, without prompt chunks and waiting."""
        return self.slot_ticks / max(self.tokens, 1)

    @property
    def occupancy(self) -> float:
        """Share of the lanes that were in use."""
        return self.busy / max(self.ticks * self.num_lanes, 1)

    def to_json(self) -> dict[str, Any]:
        record = {name: getattr(self, name) for name in ("ticks", "tokens", "mean_loops")}
        record |= {name: getattr(self, name) for name in ("occupancy", "head_rows", "dropped")}
        return record | {
            "exit_loops": {str(n): self.exit_loops[n] for n in sorted(self.exit_loops)}
        }


class Session:
    """One engine and the requests that it answers.

    Requests can be submitted and cancelled between rounds. `submit` numbers them 0, 1, 2, … A new
    session resets its engine, so it ends the engine's previous session.

    Args:
      engine: it runs the requests.
      tokenizer: any tokenizer of `transformers`. Without one, events have no text and stop strings
        have no effect.

    Attributes:
      scheduler: decides which request has which slot.
      stats: of all rounds so far.
    """

    def __init__(self, engine: Engine, tokenizer: Any = None):
        engine.reset()
        self._engine, self._tokenizer, self._reset = engine, tokenizer, engine.resets
        self.scheduler = Scheduler(
            engine.num_slots,
            engine.num_loops,
            engine.config.chunk_length,
            depthwise=engine.config.depthwise,
            can_exit=engine.can_exit,
        )
        self._answers: dict[int, _Answer] = {}  # of unfinished requests
        self._submitted = 0
        self.stats = Stats(engine.num_lanes)

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return self.scheduler.idle

    def submit(self, request: Request) -> int:
        """Queue a request; returns its index.

        Raises:
          ValueError: the engine cannot answer the request. Its index is not used again. Or a newer
            session has the engine.
        """
        self._check_engine()
        index, self._submitted = self._submitted, self._submitted + 1
        self._engine.check(request)
        self.scheduler.submit(index, len(request.tokens) - 1)
        self._answers[index] = _Answer(index, request, self._tokenizer)
        return index

    def cancel(self, index: int) -> None:
        """End a request without further events. A request that is over is no error."""
        if self._answers.pop(index, None) is not None:
            slot = self.scheduler.cancel(index)
            if slot is not None and self._engine.resets == self._reset:
                self._engine.release(slot)

    def round(self, max_ticks: int = MAX_TICKS) -> tuple[list[Event], list[Tick]]:
        """Fill the free slots, then run up to `max_ticks` ticks.

        Returns:
          one event for every request with new tokens, and the ticks that ran.

        Raises:
          ValueError: a newer session has the engine.
        """
        self._check_engine()
        scheduler, engine = self.scheduler, self._engine
        for slot, index in scheduler.admit():
            engine.admit(slot, self._answers[index].request)
        chunks = scheduler.chunks(min(max_ticks, MAX_TICKS))
        ticks = engine.step(chunks, scheduler.tick, until_free=scheduler.num_waiting > 0)
        new: dict[int, list[NewToken]] = {}
        finished = set()
        for tick in ticks:
            self.stats.add(tick)
            indices = scheduler.slots
            for slot, token in tick.tokens.items():
                new.setdefault(indices[slot], []).append(token)
            finished.update(indices[slot] for slot in tick.finished)
            scheduler.record(tick.exited, tick.finished)
        events = [self._answers[i].add(tokens, i in finished) for i, tokens in new.items()]
        for event in events:
            if event.completion is not None:
                self.cancel(event.index)  # after a stop string the slot still decodes
        return events, ticks

    def events(self, max_ticks: int = MAX_TICKS) -> Iterator[Event]:
        """Run rounds of `max_ticks` ticks until all requests are over; yields their events."""
        while not self.idle:
            yield from self.round(max_ticks)[0]

    def _check_engine(self) -> None:
        if self._engine.resets != self._reset:
            raise ValueError(
                "a newer session uses this engine, which has forgotten the requests of this one; "
                "read all answers of one session before the next one begins"
            )


class _Answer:
    """The growing answer to one request."""

    def __init__(self, index: int, request: Request, tokenizer: Any):
        self.request = request
        self._index, self._completion = index, Completion(request.id)
        self._detokenizer = self._stop = None
        if tokenizer is not None:
            self._detokenizer = text.Detokenizer(tokenizer, request.tokens)
            if request.stop_strings:
                self._stop = StopStrings(request.stop_strings)
        self._pieces: list[str] = []
        self._lengths: list[int] = []  # characters after each token, for stop strings

    def add(self, new: list[NewToken], finished: bool) -> Event:
        """Append new tokens; returns them as an event.

        Args:
          new: at least one token.
          finished: whether the engine has ended the request with the last of them.
        """
        completion, start = self._completion, len(self._completion.tokens)
        reason = error = None
        if finished:
            reason = "length"
            if math.isnan(new[-1].logprob):
                reason, error = "error", not_numbers(start + len(new))
            elif new[-1].token in self.request.stop:
                reason = "stop"
            new = new if reason == "length" else new[:-1]
        columns = zip(*new, strict=True) if new else ((), (), ())
        event = Event(self._index, *columns, finish_reason=reason, error=error)
        completion.add(event)
        piece = self._read(event.tokens)
        self._pieces.append(piece)
        if completion.finish_reason is None:
            return dataclasses.replace(event, piece=piece)
        completion.text = "".join(self._pieces)
        return Event(
            self._index,
            tuple(completion.tokens[start:]),
            tuple(completion.exit_loops[start:]),
            tuple(completion.logprobs[start:]),
            completion.finish_reason,
            completion.error,
            piece,
            completion,
        )

    def _read(self, tokens: Sequence[int]) -> str:
        """The text of the newest tokens; cuts the completion at a stop string."""
        completion, detokenizer, stop = self._completion, self._detokenizer, self._stop
        if detokenizer is None:
            return ""
        if stop is None:
            piece = detokenizer.add(tokens)
            return piece + detokenizer.finish() if completion.finish_reason else piece
        piece = ""
        for token in tokens:  # one by one: the result must not depend on ticks per round
            piece += stop.add(detokenizer.add([token]))
            self._lengths.append(stop.length)
            if stop.found is not None:
                break
        if completion.finish_reason and stop.found is None:
            piece += stop.add(detokenizer.finish())
            piece += stop.finish()
        if stop.found is not None:
            needed = bisect.bisect_left(self._lengths, stop.found) + 1 if stop.found else 0
            completion.cut(needed)
        return piece


def generate(
    engine: Engine, requests: Sequence[Request], tokenizer: Any = None
) -> list[Completion]:
    """The answers to all requests, in order. They have text if there is a tokenizer."""
    completions = {}
    for event in stream(engine, requests, tokenizer):
        if event.completion is not None:
            completions[event.index] = event.completion
    return [completions[index] for index in range(len(requests))]


def stream(
    engine: Engine,
    requests: Sequence[Request],
    tokenizer: Any = None,
    max_ticks: int = MAX_TICKS,
) -> Iterator[Event]:
    """Answer all requests; yields events. The last event of each request has its completion.

    A request that the engine cannot answer ends with finish_reason 'error'. The other requests go
    on.
    """
    session = Session(engine, tokenizer)
    for index, request in enumerate(requests):
        try:
            session.submit(request)
        except ValueError as error:
            completion = Completion.failed(request.id, error)
            yield Event(index, (), (), (), "error", str(error), completion=completion)
    yield from session.events(max_ticks)
