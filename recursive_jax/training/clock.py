"""Where the wall time of a run goes: steps, data, evaluations, saves; over all its starts."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

Batch = TypeVar("Batch")

WINDOW = 50  # steps that rates are measured over


class Mark(NamedTuple):
    """The end of a step: its number, and seconds and operations until then, without pauses."""

    step: int
    time: float
    waited: float
    flops: float


class RunClock:
    """Rates of the latest steps, and times of the whole run.

    A step that compiles is left out of all rates. Evaluations and saves (`pause`) are no steps.

    Args:
      saved: `to_json()` of the run that goes on.
      began: `time.time()` of this start; None: now.

    Attributes:
      seconds: of the whole run, by what they were spent on: 'waiting' for data, 'evaluating' and
        'saving'; and 'steps' that count, of earlier starts.
      saved_for: seconds that the latest save blocked the steps.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None, began: float | None = None):
        now = time.time() if began is None else began
        saved = saved or {}
        self._first_start, self._ended = saved.get("first_start", now), saved.get("at", now)
        kinds = ("steps", "waiting", "evaluating", "saving")
        self.seconds = {kind: saved.get("seconds", {}).get(kind, 0.0) for kind in kinds}
        self._steps_before, self._flops_before = saved.get("steps", 0), saved.get("flops", 0.0)
        self._ticks = self._regular = self._skipped = 0  # steps of this start
        self._regular_seconds = 0.0  # of those that did not compile
        self._marks: list[Mark] = []
        self._paused = self._paused_before = self._waited = self._flops = 0.0
        self.saved_for = math.nan

    def tick(self, step: int, flops: float = 0.0, compiled: bool = False) -> None:
        """Call behind step `step`; `compiled`: its program was compiled first."""
        now = time.perf_counter() - self._paused
        if not self._ticks:
            self._paused_before = self._paused
        self._ticks += 1
        self._flops += flops
        if compiled:
            self._marks.clear()
        elif self._marks:
            before = self._marks[-1]
            self._regular += 1
            self._regular_seconds += now - before.time - (self._waited - before.waited)
        self._marks.append(Mark(step, now, self._waited, self._flops))
        del self._marks[:-WINDOW]

    def skip(self) -> None:
        """Call for a step that has changed nothing: it does not count."""
        self._skipped += 1

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """A context around work between two steps: 'evaluating' or 'saving'."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self._paused += spent
        self.seconds[kind] += spent
        if kind == "saving":
            self.saved_for = spent

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time that each of them takes counts as waiting for data."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            spent = time.perf_counter() - began
            self._waited += spent
            self.seconds["waiting"] += spent
            yield batch

    # Of the latest steps; nan before there are two

    @property
    def seconds_per_step(self) -> float:
        return self._difference("time") / self._difference("step")

    @property
    def flops_per_second(self) -> float:
        return self._difference("flops") / self._difference("time")

    @property
    def data_wait(self) -> float:
        """Share of their time that was spent waiting for batches."""
        return self._difference("waited") / self._difference("time")

    def remaining(self, steps: int) -> float:
        """Seconds that so many steps take, with evaluations and saves as often as until now."""
        between = (self._paused - self._paused_before) / max(1, self._ticks)
        return (self.seconds_per_step + between) * steps

    def _difference(self, name: str) -> float:
        if len(self._marks) < 2:
            return math.nan
        first, last = (getattr(mark, name) for mark in (self._marks[0], self._marks[-1]))
        return max(last - first, 1e-9)

    # Of the whole run

    @property
    def steps(self) -> int:
        """The steps that count: not those that were skipped, or repeated after a crash."""
        return self._steps_before + self._ticks - self._skipped

    @property
    def flops(self) -> float:
        """Operations of the steps that count."""
        return self._flops_before + self._flops * (1 - self._skipped / max(self._ticks, 1))

    @property
    def goodput(self) -> float:
        """Share of the time since the first start that was spent on steps that count.

        Compiling, evaluations, saves, waiting for data and the time between two starts are not.
        """
        end = time.time() if self._ticks else self._ended
        return self.all_seconds()["steps"] / max(end - self._first_start, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """What the next start goes on from. It is saved with a step: later steps do not count."""
        return {
            "first_start": self._first_start,
            "at": time.time(),
            "steps": self.steps,
            "flops": self.flops,
            "seconds": self.all_seconds(),
        }

    def all_seconds(self) -> dict[str, float]:
        """`seconds`, with the steps of this start; one that compiles counts as the others do."""
        mean = self._regular_seconds / max(self._regular, 1)
        steps = self.seconds["steps"] + mean * (self._ticks - self._skipped)
        return self.seconds | {"steps": steps}
