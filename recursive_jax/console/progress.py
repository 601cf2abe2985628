"""How far a run is: steps of a training run, prompts of a decoding run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import jax

from recursive_jax.console.tables import clock


class StepProgress:
    """Rates and remaining time of a loop of `total` steps that may start in the middle.

    The first step of a run compiles; it is left out of the rate. So are evaluations and saves
    (`pause`), which only the remaining time counts.
    """

    def __init__(self, total: int, start: int = 0):
        self._total = total
        self._first = start + 1
        self._marks: list[tuple[int, float]] = []
        self._paused = 0.0

    def tick(self, step: int) -> None:
        """Call after step `step` (1-based) has finished."""
        if step >= self._first:
            self._marks.append((step, time.perf_counter() - self._paused))
            del self._marks[:-50]

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around work between two steps that is no part of them."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    @property
    def seconds_per_step(self) -> float:
        if len(self._marks) < 2:
            return math.nan
        (a, start), (b, end) = self._marks[0], self._marks[-1]
        return (end - start) / (b - a)

    def eta(self, step: int) -> str:
        between = self._paused / max(1, step + 1 - self._first)
        seconds = (self.seconds_per_step + between) * (self._total - step)
        return "?" if math.isnan(seconds) else clock(seconds)


class PromptProgress:
    """A bar on standard error: prompts done, tokens per second, time left.

    How far a request is: its tokens over its limit; one that ends before its limit jumps.
    """

    def __init__(self, limits: Mapping[int, int]):
        """limits: `max_new_tokens` of every request."""
        from tqdm import tqdm

        self._limits, self._counts = limits, dict.fromkeys(limits, 0)
        self._share = 0.0  # requests done, parts of them too
        self._tokens, self._start, self._shown = 0, time.perf_counter(), 0.0
        self._bar = tqdm(
            total=len(limits),
            disable=jax.process_index() != 0,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} prompts [{elapsed}{postfix}]",
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, request: int, count: int, over: bool) -> None:
        """A request now has `count` tokens."""
        before = self._counts[request] / self._limits[request]
        self._tokens += count - self._counts[request]
        self._counts[request] = count
        self._share += (1.0 if over else count / self._limits[request]) - before
        if over:
            self._bar.update()
        if self.seconds - self._shown > 0.2 or self._share == len(self._limits):
            self._refresh()

    def _refresh(self) -> None:
        self._shown = self.seconds
        seconds, total = self.seconds, len(self._limits)
        words = f"{self._tokens / seconds:,.1f} tok/s"
        if self._share:
            left = seconds * max(total - self._share, 0.0) / self._share
            words += f", {clock(left)} left"
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.refresh()
