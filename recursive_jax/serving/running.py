"""From requests to events: one HTTP request's way through the engine's thread."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from recursive_jax.decoding.requests import Completion, Event
from recursive_jax.serving.asked import Asked
from recursive_jax.serving.engine_thread import EngineThread, Ticket
from recursive_jax.serving.errors import ApiError
from recursive_jax.serving.limits import ServerLimits
from recursive_jax.serving.metrics import Metrics
from recursive_jax.serving.scoring import PromptPass, Scorer, Scores
from recursive_jax.serving.served import Served

Item = tuple[int, Event]  # number of the choice, and what is new


class Mailbox:
    """Carries events from the engine's thread to the event loop, once a round."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._items: list[tuple[asyncio.Queue, Item]] = []

    def put(self, queue: asyncio.Queue, item: Item) -> None:
        self._items.append((queue, item))

    def flush(self) -> None:
        items, self._items = self._items, []
        if items and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, items)


def _deliver(items: list[tuple[asyncio.Queue, Item]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)


class Runner:
    """Runs what requests ask for.

    Args:
      thread: of the engine.
      mailbox: for events.
      scorer: of prompts; None: prompts cannot be scored.
    """

    def __init__(
        self,
        thread: EngineThread,
        mailbox: Mailbox,
        scorer: Scorer | None,
        limits: ServerLimits,
        metrics: Metrics,
    ):
        self._thread, self._mailbox, self._scorer = thread, mailbox, scorer
        self._limits, self._metrics = limits, metrics
        self._open = 0  # choices in the engine's thread

    def take_room(self, count: int, num_slots: int) -> Callable[[], None]:
        """Reserve room for so many choices; returns what gives it back, once.

        Raises:
          ApiError: 429, the queue is full.
        """
        if self._open + count > self._limits.max_queue + num_slots:
            raise ApiError(429, "too many requests wait; send the request again later")
        self._open += count

        def give_back() -> None:
            self._open -= count

        return give_back

    async def score(self, ids: list[int]) -> Scores:
        """The scores of a prompt."""
        return await self.run_scorer(self._scorer, ids)

    async def run_scorer(self, scorer: PromptPass, ids: list[int]) -> Any:
        """What a scorer returns for a prompt. Compiling for it does not hold up the engine."""
        await asyncio.to_thread(scorer.prepare, len(ids))
        return await asyncio.wrap_future(self._thread.call(functools.partial(scorer, ids)))

    async def events(self, asked: Asked, deadline: float) -> AsyncIterator[Item]:
        """Events of all choices. The requests end with the iterator.

        Args:
          deadline: time of the event loop.

        Raises:
          ApiError: 504 after the deadline, 500 where the engine failed.
        """
        queue: asyncio.Queue = asyncio.Queue()
        began, last = time.perf_counter(), {}
        tickets = []
        for number, request in enumerate(asked.requests):

            def deliver(event: Event, number: int = number) -> None:
                self._mailbox.put(queue, (number, event))

            tickets.append(Ticket(request, deliver, asked.body.stream))
        for ids in asked.prompts:
            self._metrics.prompt_tokens.inc(len(ids))
        for ticket in tickets:
            self._thread.submit(ticket)
        left = len(tickets)
        try:
            while left:
                try:
                    async with asyncio.timeout_at(deadline):
                        number, event = await queue.get()
                except TimeoutError as error:
                    seconds = f"{self._limits.max_seconds:g}"
                    raise ApiError(504, f"not answered within {seconds} s") from error
                self._count(event, number, began, last)
                if event.finish_reason == "error":
                    raise ApiError(500, event.error)
                left -= event.completion is not None
                yield number, event
        finally:
            for ticket in tickets:
                self._thread.cancel(ticket)

    def _count(self, event: Event, number: int, began: float, last: dict[int, float]) -> None:
        now, count = time.perf_counter(), len(event.tokens)
        if event.completion is not None:
            self._metrics.ends.labels(event.finish_reason).inc()
        if not count:
            return
        self._metrics.new_tokens.inc(count)
        if number not in last:
            self._metrics.first_token.observe(now - began)
            count -= 1
        for _ in range(count):
            self._metrics.next_token.observe((now - last.get(number, now)) / len(event.tokens))
        last[number] = now


def next_token(asked: Asked, number: int, scores: Scores, served: Served) -> Event | None:
    """The only token of a choice, where the scores of its prompt already have it.

    The first token runs all loops, as the scores do. The token that ends a text has a
    log-probability too, so it is part of the event.
    """
    request = asked.requests[number]
    sampling = request.sampling
    neutral = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    if request.max_new_tokens > 1 or sampling.temperature or neutral != (1, 0, 0):
        return None
    ((token, logprob), *_) = scores.top[-1]
    loops = served.limits.num_loops
    piece = served.tokenizer.decode([token], skip_special_tokens=True)
    reason = "stop" if token in request.stop else "length"
    done = Completion(number, piece, [token], [loops], [logprob], reason)
    return Event(0, (token,), (loops,), (logprob,), reason, None, piece, done)


async def until(work: Any, gone: Any) -> Any:
    """The result of `work`, which is cancelled when `gone` is over first; then None."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
