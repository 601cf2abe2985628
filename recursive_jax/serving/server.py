"""A server: the engine's thread, the event loop, and uvicorn between them and the network."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools
import math
import socket
import threading
from collections.abc import Callable

import uvicorn

from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.requests import Event, Request
from recursive_jax.serving import page
from recursive_jax.serving.app import App
from recursive_jax.serving.engine_thread import EngineThread, Ticket
from recursive_jax.serving.guard import LOOPBACK
from recursive_jax.serving.limits import ServerLimits
from recursive_jax.serving.metrics import Metrics
from recursive_jax.serving.page.facts import facts
from recursive_jax.serving.page.feed import Feed
from recursive_jax.serving.running import Mailbox, Runner
from recursive_jax.serving.scoring import LoopScorer, Scorer
from recursive_jax.serving.served import Served

Change = Callable[[Engine], None]


@dataclasses.dataclass
class Server:
    """Everything that answers on one socket.

    Attributes:
      engine: compiled.
      served: the model, as clients see it.
      limits: of requests.
      key: that clients send; None: no key.
      scorer: of prompts; None: prompts are not scored.
      loop_scorer: likewise, after every loop.
      load: step or None -> the step that was loaded, and what puts it into the engine; called in a
        thread of its own. None: weights are not replaced.
      drain_seconds: that running requests have after SIGTERM.
      warmed: is called when the first token came out; None: nothing is.
    """

    engine: Engine
    served: Served
    limits: ServerLimits = dataclasses.field(default_factory=ServerLimits)
    key: str | None = None
    scorer: Scorer | None = None
    loop_scorer: LoopScorer | None = None
    load: Callable[[int | None], tuple[int | None, Change]] | None = None
    drain_seconds: float = 30.0
    warmed: Callable[[], None] | None = None

    def __post_init__(self):
        self._ready = threading.Event()
        self._uvicorn: uvicorn.Server | None = None

    def run(self, listener: socket.socket) -> None:
        """Answer on a bound socket until a signal, or until `stop`."""
        asyncio.run(self._run(listener))

    def stop(self) -> None:
        """Begin to drain, as SIGTERM does; for other threads."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    async def _run(self, listener: socket.socket) -> None:
        engine = self.engine
        metrics = Metrics(engine.num_slots, engine.num_lanes, engine.num_loops)
        mailbox = Mailbox(asyncio.get_running_loop())
        feed = Feed(engine.num_slots, engine.num_loops)
        # Two threads do not share a tokenizer.
        tokenizer = copy.deepcopy(self.served.tokenizer)
        thread = EngineThread(engine, tokenizer, (metrics, feed), mailbox.flush)
        thread.submit(Ticket(Request("first", (0,), 1), self._first))
        runner = Runner(thread, mailbox, self.scorer, self.limits, metrics)

        by_loop = self.loop_scorer and functools.partial(runner.run_scorer, self.loop_scorer)

        def ready() -> bool:
            return self._ready.is_set() and thread.is_alive()

        async def reload(step: int | None) -> int | None:
            found, change = await asyncio.to_thread(self.load, step)
            await asyncio.wrap_future(thread.exchange(change))
            return found

        app = App(
            self.served, runner, self.limits, metrics, engine.num_slots, ready,
            None if self.load is None else reload, self.key, is_local(listener),
            page.routes(
                feed, functools.partial(facts, engine, self.served), self._closing,
                self.limits.max_body_bytes, by_loop,
            ),
        )  # fmt: skip
        config = uvicorn.Config(
            app.asgi(), lifespan="off", access_log=False, log_config=None, server_header=False,
            timeout_graceful_shutdown=math.ceil(self.drain_seconds),
        )  # fmt: skip
        self._uvicorn = uvicorn.Server(config)
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[listener]))
        while not (self._uvicorn.started or serving.done()):
            await asyncio.sleep(0.01)
        thread.start()
        try:
            await serving
        finally:
            thread.close()
            await asyncio.to_thread(thread.join, 10)

    def _closing(self) -> bool:
        return self._uvicorn is not None and self._uvicorn.should_exit

    def _first(self, event: Event) -> None:
        if event.completion is not None and event.error is None:
            self._ready.set()
            if self.warmed is not None:
                self.warmed()


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address; connections are refused until the server runs.

    Raises:
      ValueError: there is no such address, or it is taken.
    """
    with contextlib.ExitStack() as stack:
        try:
            if not 0 <= port < 1 << 16:  # the system's resolver would take its last 16 bits
                raise OverflowError("expected a port in 0 … 65535")
            family, kind, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = stack.enter_context(socket.socket(family, kind))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except (OSError, OverflowError, UnicodeError) as error:
            raise ValueError(
                f"--host={host} --port={port}: {error}; choose another port, or 0 for a free one"
            ) from error
        stack.pop_all()
    return listener


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    return listener.getsockname()[0] in LOOPBACK


def address(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
