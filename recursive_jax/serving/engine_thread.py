"""The thread that runs the engine. Other threads only put work into its inbox.

Between two rounds of the engine it takes what is in the inbox: new requests, cancelled ones, and
functions to call. A round has at most eight ticks, and as few as one token takes while a client
reads a stream.

A failed round ends the requests that were in slots. The engine is reset, and requests that waited
for a slot go on waiting. To replace the weights, the requests in slots end first; no token is made
of two models.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from recursive_jax.decoding.engine import Engine, Tick
from recursive_jax.decoding.requests import Completion, Event, Request
from recursive_jax.decoding.session import Session
from recursive_jax.decoding.state import MAX_TICKS

FAILED = "the engine failed while it made this answer; send the request again"


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request on its way through the engine.

    Attributes:
      request: checked by `Limits.check`.
      deliver: is called in the engine's thread with every event; it must not block.
      stream: a client reads the answer while it grows.
      index: in the running session; None before it is submitted and after its end.
    """

    request: Request
    deliver: Callable[[Event], None]
    stream: bool = False
    index: int | None = None


class Observer(Protocol):
    """Called in the engine's thread."""

    def round_ended(self, ticks: Sequence[Tick], waiting: int, running: int) -> None: ...


class EngineThread(threading.Thread):
    """Runs requests with one engine until `close`.

    Args:
      engine: compiled; no other thread uses it.
      tokenizer: no other thread uses it.
      observers: of rounds.
      flush: called after the events of a round were delivered.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        observers: Sequence[Observer],
        flush: Callable[[], None],
    ):
        super().__init__(name="engine", daemon=True)
        self._engine, self._tokenizer, self._observers = engine, tokenizer, observers
        self._flush = flush
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._session = Session(engine, tokenizer)
        self._tickets: dict[int, Ticket] = {}  # in the session
        self._held: list[Ticket] = []  # wait for new weights
        self._exchange: Callable[[], None] | None = None  # puts new weights into the engine
        self._closed = False

    # Other threads.

    def submit(self, ticket: Ticket) -> None:
        self._inbox.put(functools.partial(self._submit, ticket))

    def cancel(self, ticket: Ticket) -> None:
        """End a request without further events. One that is over is no error."""
        self._inbox.put(functools.partial(self._cancel, ticket))

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Run a function between two rounds; returns the future of its result."""
        future: concurrent.futures.Future = concurrent.futures.Future()

        def run():
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self._inbox.put(run)
        return future

    def exchange(self, change: Callable[[Engine], None]) -> concurrent.futures.Future:
        """Change the engine once its slots are free; requests in the queue wait for that."""
        future: concurrent.futures.Future = concurrent.futures.Future()

        def run():
            try:
                future.set_result(change(self._engine))
            except Exception as error:
                future.set_exception(error)

        def hold():
            self._exchange = run
            running = set(self._session.scheduler.slots)
            for index in [i for i in self._tickets if i not in running]:
                self._held.append(self._take(index))

        self._inbox.put(hold)
        return future

    def close(self) -> None:
        """End the thread after the running round; open requests get no further events."""
        self._inbox.put(self._close)

    # The engine's thread.

    def run(self) -> None:
        while not self._closed:
            idle = self._session.idle and self._exchange is None
            if idle:  # the last request may have been cancelled, which is no round
                self._observe([])
            self._read_inbox(wait=idle)
            if self._session.idle and self._exchange is not None:
                exchange, self._exchange = self._exchange, None
                exchange()
                held, self._held = self._held, []
                for ticket in held:
                    self._enter(ticket)
            if not self._session.idle and not self._closed:
                self._round()

    def _read_inbox(self, wait: bool) -> None:
        """Do what the inbox holds now; with `wait`, at least one thing."""
        for _ in range(max(self._inbox.qsize(), int(wait))):
            self._inbox.get()()

    def _round(self) -> None:
        streams = any(ticket.stream for ticket in self._tickets.values())
        try:
            events, ticks = self._session.round(self._engine.num_loops if streams else MAX_TICKS)
        except Exception:
            logging.exception("the engine failed; requests in its slots end")
            self._recover()
            return
        for event in events:
            ticket = self._tickets[event.index]
            if event.completion is not None:
                self._take(event.index)
            ticket.deliver(event)
        self._flush()
        self._observe(ticks)

    def _observe(self, ticks: Sequence[Tick]) -> None:
        scheduler = self._session.scheduler
        running = sum(index is not None for index in scheduler.slots)
        waiting = scheduler.num_waiting + len(self._held)
        for observer in self._observers:
            observer.round_ended(ticks, waiting, running)

    def _recover(self) -> None:
        """Make a new session of the requests that were in no slot."""
        touched = set(self._session.scheduler.slots)
        tickets, self._tickets = self._tickets, {}
        self._session = Session(self._engine, self._tokenizer)
        for index, ticket in tickets.items():
            ticket.index = None
            if index in touched:
                _fail(ticket, FAILED)
            else:
                self._enter(ticket)
        self._flush()

    def _submit(self, ticket: Ticket) -> None:
        if self._exchange is not None:
            self._held.append(ticket)
        else:
            self._enter(ticket)

    def _enter(self, ticket: Ticket) -> None:
        try:
            ticket.index = self._session.submit(ticket.request)
        except ValueError as error:  # checked before, so this is our own mistake
            _fail(ticket, str(error))
            self._flush()
        else:
            self._tickets[ticket.index] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        if ticket in self._held:
            self._held.remove(ticket)
        elif ticket.index is not None:
            self._take(ticket.index)

    def _take(self, index: int) -> Ticket:
        """Take a ticket out of the session."""
        ticket = self._tickets.pop(index)
        self._session.cancel(index)
        ticket.index = None
        return ticket

    def _close(self) -> None:
        self._closed = True


def _fail(ticket: Ticket, error: str) -> None:
    completion = Completion.failed(ticket.request.id, error)
    ticket.deliver(Event(0, (), (), (), "error", error, completion=completion))
