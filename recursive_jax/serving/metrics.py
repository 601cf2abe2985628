"""What a server counts, for Prometheus. No text of prompts or answers is in it."""

from __future__ import annotations

from collections.abc import Sequence

import prometheus_client as prometheus

from recursive_jax.decoding.engine import Tick

PREFIX = "recursive_jax_"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, num_slots: int, num_lanes: int, num_loops: int):
        self.registry = registry = prometheus.CollectorRegistry()

        def make(kind, name, text, *labels, **options):
            return kind(PREFIX + name, text, labels, registry=registry, **options)

        gauge, counter, histogram = (
            prometheus.Gauge,
            prometheus.Counter,
            prometheus.Histogram,
        )
        make(gauge, "slots", "Requests that decode at once, at most").set(num_slots)
        make(gauge, "lanes", "Rows of a tick, at most").set(num_lanes)
        make(gauge, "loops", "Loops of the model").set(num_loops)
        self._waiting = make(gauge, "requests_waiting", "Requests that wait for a slot")
        self._running = make(gauge, "requests_running", "Requests in slots")
        self._lanes_busy = make(gauge, "lanes_busy", "Rows in use in the last tick")
        self._ticks = make(counter, "ticks", "Passes of the block")
        self._busy = make(counter, "busy_lanes", "Rows in use, summed over ticks")
        self._exits = make(counter, "exits", "New tokens by loops they ran", "loops")
        for loops in range(1, num_loops + 1):
            self._exits.labels(loops)
        self.prompt_tokens = make(counter, "prompt_tokens", "Tokens of prompts")
        self.new_tokens = make(counter, "generation_tokens", "Tokens of answers")
        self.ends = make(counter, "answers", "Answers by their finish reason", "reason")
        for reason in ("stop", "length", "error"):
            self.ends.labels(reason)
        self.http = make(counter, "http_responses", "Answers by path and status", "path", "status")
        self.first_token = make(
            histogram, "time_to_first_token_seconds", "From arrival to the first token",
            buckets=SECONDS,
        )  # fmt: skip
        self.next_token = make(
            histogram, "inter_token_seconds", "Between two tokens of an answer", buckets=SECONDS
        )

    def round_ended(self, ticks: Sequence[Tick], waiting: int, running: int) -> None:
        """Count what the ticks of a round did."""
        self._waiting.set(waiting)
        self._running.set(running)
        self._lanes_busy.set(ticks[-1].busy if ticks and running else 0)
        self._ticks.inc(len(ticks))
        self._busy.inc(sum(tick.busy for tick in ticks))
        for tick in ticks:
            for token in tick.tokens.values():
                self._exits.labels(token.exit_loops).inc()

    def text(self) -> bytes:
        """The numbers in Prometheus's text format."""
        return prometheus.generate_latest(self.registry)


CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
