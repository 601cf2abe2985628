"""Requests in, events out: a scheduler and an engine, round by round.

engine = Engine(model, params, num_slots=16, context_length=1024, measure=TopProbability())
completions = generate(engine, requests)
for event in stream(engine, requests): ...
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from recursive_jax.decoding.engine import Engine, NewToken, Tick
from recursive_jax.decoding.requests import Completion, Event, Request, not_numbers
from recursive_jax.decoding.scheduler import Scheduler
from recursive_jax.decoding.state import MAX_TICKS


@dataclasses.dataclass
class Stats:
    """What an engine has done.

    Attributes:
      ticks: passes of the block.
      busy: lanes in use, summed over ticks.
      head_rows: lanes that ran the vocabulary head.
      dropped: lanes given up because a draft was wrong.
      drafted: tokens whose successor started before it was certain.
      slot_ticks: slots in which a token ran, summed over ticks.
      exit_loops: tokens by loops executed before their successor could start; where nothing is
        lost, those below num_loops are the accepted drafts.
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
        """New tokens, stop tokens too."""
        return self.exit_loops.total()

    @property
    def mean_loops(self) -> float:
        return sum(n * count for n, count in self.exit_loops.items()) / max(self.tokens, 1)

    @property
    def ticks_per_token(self) -> float:
        """Of a slot that decodes; prompts and waiting are left out."""
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
    """One engine and the requests it answers.

    Requests may be submitted and cancelled between rounds; they are known by the order in which
    they were submitted, from 0 on. A new session of an engine ends the one before.

    Attributes:
      stats: of all rounds so far.
    """

    def __init__(self, engine: Engine):
        engine.reset()
        self._engine = engine
        self._scheduler = Scheduler(
            engine.num_slots,
            engine.num_loops,
            engine.chunk_length,
            depthwise=engine.depthwise,
            can_exit=engine.can_exit,
        )
        self._requests: dict[int, Request] = {}  # that are not answered
        self._counts: collections.Counter[int] = collections.Counter()  # tokens so far
        self._submitted = 0
        self.stats = Stats(engine.num_lanes)

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    def submit(self, request: Request) -> int:
        """Queue a request; returns its index.

        Raises:
          ValueError: it cannot be answered. Its index is used up all the same.
        """
        index, self._submitted = self._submitted, self._submitted + 1
        self._engine.check(request)
        self._scheduler.submit(index, len(request.tokens) - 1)
        self._requests[index] = request
        return index

    def cancel(self, index: int) -> None:
        """No more events of this request; no error when it is over."""
        if self._requests.pop(index, None) is not None:
            self._counts.pop(index, None)
            slot = self._scheduler.cancel(index)
            if slot is not None:
                self._engine.release(slot)

    def round(self, max_ticks: int = MAX_TICKS) -> tuple[list[Event], list[Tick]]:
        """Fill free slots, run up to `max_ticks` ticks.

        Returns:
          an event for every request that has news, and what each tick did.
        """
        scheduler, engine = self._scheduler, self._engine
        for slot, index in scheduler.admit():
            engine.admit(slot, self._requests[index])
        chunks = scheduler.chunks(min(max_ticks, MAX_TICKS))
        ticks = engine.step(chunks, scheduler.tick, until_free=scheduler.num_waiting > 0)
        news: dict[int, list[NewToken]] = {}
        finished = set()
        for tick in ticks:
            self.stats.add(tick)
            indices = scheduler.slots
            for slot, token in tick.tokens.items():
                news.setdefault(indices[slot], []).append(token)
            finished.update(indices[slot] for slot in tick.finished)
            scheduler.record(tick.exited, tick.finished)
        return [self._event(i, tokens, i in finished) for i, tokens in news.items()], ticks

    def _event(self, index: int, tokens: list[NewToken], finished: bool) -> Event:
        request, reason, error = self._requests[index], None, None
        self._counts[index] += len(tokens)
        if finished:
            del self._requests[index]
            reason = "length"
            if math.isnan(tokens[-1].logprob):
                reason, error = "error", not_numbers(self._counts[index])
            elif tokens[-1].token in request.stop:
                reason = "stop"
            tokens = tokens if reason == "length" else tokens[:-1]
            del self._counts[index]
        columns = zip(*tokens, strict=True) if tokens else ((), (), ())
        return Event(index, *columns, finish_reason=reason, error=error)


def generate(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Answers, in order; `stream` tells them as they come. Texts: `text_session.TextSession`."""
    completions = [Completion(request.id) for request in requests]
    for event in stream(engine, requests):
        completions[event.index].add(event)
    return completions


def stream(
    engine: Engine, requests: Sequence[Request], max_ticks: int = MAX_TICKS
) -> Iterator[Event]:
    """Answer all requests; the last event of each has a `finish_reason`.

    One that cannot be answered ends with 'error' and a reason; the others are untouched.
    """
    session = Session(engine)
    for index, request in enumerate(requests):
        try:
            session.submit(request)
        except ValueError as error:
            yield Event(index, (), (), (), "error", str(error))
    while not session.idle:
        events, _ = session.round(max_ticks)
        yield from events
