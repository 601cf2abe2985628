"""What happens between the steps of a run: records, evaluations and saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from recursive_jax.training.clock import RunClock
from recursive_jax.training.state import TrainState

Quality = dict[str, Any]  # as `evaluation.perplexity` returns it


class Callback:
    """Does nothing; a subclass overrides what it needs. Steps count from 1; 0 is the start."""

    def before_step(self, step: int) -> None:
        """Before a step is dispatched."""

    def on_step(self, step: int) -> None:
        """After every step has been dispatched."""

    def on_skip(self, step: int, what: str) -> None:
        """A step has changed nothing, because a value was not finite; `what`: which, in words."""

    def on_log(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of a step have been read. `skipped` counts the skipped steps of the run."""

    def on_evaluate(self, step: int, state: TrainState) -> None:
        """Time to evaluate."""

    def on_quality(self, step: int, name: str, quality: Quality) -> None:
        """A model has been evaluated: 'valid' is the one in training, 'source' the teacher."""

    def on_save(self, step: int, state: TrainState) -> None:
        """Time to save. The next step donates the arrays: nothing may read them after return."""

    def on_saved(self, step: int, seconds: float) -> None:
        """A save has begun; the steps had to wait so long for it."""

    def on_best(self, step: int, loss: float) -> None:
        """Of the saved steps another one has the lowest validation loss, in nats per token."""

    def close(self) -> None:
        """The run ends, perhaps by an error."""


class Tick(Callback):
    """Tells the clock of every step.

    Args:
      clock: of the run.
      trainer: a `trainer.Trainer`.
      flops: loops of a step -> operations of the step.
    """

    def __init__(self, clock: RunClock, trainer: Any, flops: Callable[[int], float]):
        self._clock, self._trainer, self._flops = clock, trainer, flops

    def on_step(self, step):
        self._clock.tick(step, self._flops(self._trainer.loops), self._trainer.compiled)

    def on_skip(self, step, what):
        self._clock.skip()


class Evaluate(Callback):
    """Evaluates the weights in training and tells the listeners.

    Args:
      measure: params -> quality.
      listeners: get `on_quality`.
      history: of evaluations, is appended to.
    """

    def __init__(
        self,
        measure: Callable[[Any], Quality],
        listeners: Sequence[Callback],
        history: list[dict[str, Any]],
    ):
        self._measure, self._listeners, self.history = measure, listeners, history

    def on_evaluate(self, step, state):
        self.record(step, "valid", self._measure(state.weights))

    def record(self, step: int, name: str, quality: Quality) -> None:
        self.history.append({"step": step, "name": name, **quality})
        for listener in self._listeners:
            listener.on_quality(step, name, quality)


class Saver(Protocol):
    """A `weights.checkpoint.Writer`."""

    def save(
        self, step: int, *, progress: dict[str, Any], losses: dict[int, float], **arrays: Any
    ) -> None: ...

    def check(self) -> None: ...

    def best(self) -> int | None: ...

    def close(self) -> None: ...


class Save(Callback):
    """Saves the state, and `progress()`: JSON with everything else that a resumed run needs.

    A save goes on in the background. If it fails, the next step raises its error.

    Args:
      saver: writes steps.
      progress: () -> JSON, with the `history` of evaluations.
      listeners: get `on_saved` and `on_best`.
    """

    def __init__(
        self,
        saver: Saver,
        progress: Callable[[], dict[str, Any]],
        listeners: Sequence[Callback] = (),
    ):
        self._saver, self._progress, self._listeners = saver, progress, listeners
        self._best: int | None = None

    def on_step(self, step):
        self._saver.check()

    def on_save(self, step, state):
        began, progress = time.perf_counter(), self._progress()
        losses = {e["step"]: e["nll"] for e in progress["history"] if e["name"] == "valid"}
        self._saver.save(step, **state.saved(), progress=progress, losses=losses)
        for listener in self._listeners:
            listener.on_saved(step, time.perf_counter() - began)
        best = self._saver.best()
        if best not in (None, self._best):
            self._best = best
            for listener in self._listeners:
                listener.on_best(best, losses[best])

    def close(self):  # a pending save is completed even after an error
        self._saver.close()


class Record(Callback):
    """Writes metrics to files.

    Args:
      writer: a `metrics.MetricWriter`.
      learning_rate: step, counted from 0 -> rate.
      performance: () -> metrics of the latest steps, by the part of their name behind `perf/`.
    """

    def __init__(
        self,
        writer: Any,
        learning_rate: Callable[[int], Any],
        performance: Callable[[], dict[str, float]],
    ):
        self._writer, self._rate, self._performance = writer, learning_rate, performance

    def on_log(self, step, metrics):
        values = {f"train/{name}": value for name, value in metrics.items()}
        done = step - 1 - metrics.get("skipped", 0)  # by the optimizer, before this step
        values["train/learning_rate"] = float(self._rate(max(done, 0)))
        values |= {f"perf/{name}": value for name, value in self._performance().items()}
        self._writer.write(step, values)

    def on_quality(self, step, name, quality):
        values = {f"{name}/nll": quality["nll"], f"{name}/perplexity": quality["perplexity"]}
        exits = quality.get("perplexity_exits", [])
        values |= {f"{name}/perplexity_exit_{i}": x for i, x in enumerate(exits, 1)}
        self._writer.write(step, values)

    def on_save(self, step, state):
        self._writer.upload()

    def on_saved(self, step, seconds):
        self._writer.write(step, {"perf/save_blocked_seconds": seconds})

    def close(self):
        self._writer.close()
