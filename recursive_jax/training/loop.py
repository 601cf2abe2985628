"""The training loop: it runs steps, and reads metrics, evaluates, saves and stops on schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from recursive_jax.training.callbacks import Callback
from recursive_jax.training.skips import Skips, read
from recursive_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Intervals in steps. Steps count from 1. The last step always logs, evaluates and saves."""

    num_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int


class NotStarted(KeyboardInterrupt):
    """A signal arrived before the first step, so that there is nothing to save.

    No `Exception`: libraries that a run calls catch these, and the signal would be lost.
    """


class Stop:
    """Whether the run has to stop: SIGTERM (the machine is preempted) or Ctrl-C has arrived.

    A context manager, to be entered after `jax.distributed.initialize`. On exit the previous signal
    handlers are restored. Before `begin_steps`, a signal raises `NotStarted`. Afterwards, it stops
    the run behind the step that is running. With several processes JAX's preemption service handles
    SIGTERM and informs all of them; Ctrl-C at one of them becomes a SIGTERM.

    Args:
      say: shows a line to the user.
      signals: to handle, in the main thread; all others are left to the caller.

    Attributes:
      requested: a signal has arrived in this process.
    """

    def __init__(
        self,
        say: Callable[[str], None] = logging.info,
        signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM),
    ):
        self._say, self._signals = say, signals
        self._stepping = self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1
            for number in self._signals:
                if alone or number == signal.SIGINT:
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def begin_steps(self) -> None:
        """From now on a signal stops behind a step; `NotStarted` if one has arrived before.

        The handler's own `NotStarted` is lost where Python ignores exceptions, as in callbacks of
        the garbage collector.
        """
        if self.requested and jax.process_count() == 1:
            raise NotStarted("a signal")
        self._stepping = True

    def _request(self, number, frame):
        if jax.process_count() > 1:
            self.requested = True
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells all processes of it
            return
        if not self._stepping:
            self.requested = True
            raise NotStarted(signal.Signals(number).name)
        if self.requested:  # the second signal stops at once
            raise KeyboardInterrupt
        self.requested = True
        self._say("\nstopping after this step; the same signal again stops at once")

    def reached(self, step: int) -> bool:
        """True on every process at the same step."""
        if jax.process_count() == 1:
            return self.requested
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


class Steps(Protocol):
    """A `trainer.Trainer`."""

    state: TrainState

    def step(self, batch: Any) -> dict[str, jax.Array]: ...


def run(
    trainer: Steps,
    batches: Iterator[Any],
    first_step: int,
    schedule: Schedule,
    callbacks: Sequence[Callback],
    stop: Stop,
    pause: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
    skips: Skips | None = None,
) -> int:
    """The number of the last step, after steps `first_step + 1 … num_steps` or until `stop`.

    Args:
      trainer: holds the state.
      batches: batches of this process.
      first_step: steps that the state has done.
      schedule: when to log, evaluate and save.
      callbacks: called in order.
      stop: asked after every step.
      pause: a context around 'evaluating' and 'saving', which are no training time.
      skips: counts the steps that change nothing; None: the first one stops the run.

    Raises:
      ValueError: the batches end before the last step.
      FloatingPointError: too many losses or gradients in a row are not finite. No such step has
        changed the state.
    """
    skips = skips or Skips(1)

    def count(step: int, metrics: dict[str, jax.Array]) -> None:
        if what := skips.count(step, metrics):
            for callback in callbacks:
                callback.on_skip(step, what)

    unread = None  # metrics of the previous step: read while the next one runs
    step = first_step
    for step in range(first_step + 1, schedule.num_steps + 1):
        batch = next(batches, None)
        if batch is None:  # one process that ended alone would leave the others in a collective
            raise ValueError(
                f"the text ended after step {step - 1} of {schedule.num_steps}; give more text, or "
                "set --config.tokens lower. The last checkpoint is from before"
            )
        for callback in callbacks:
            callback.before_step(step)
        metrics = trainer.step(batch)
        if unread is not None:
            count(step - 1, unread)
        unread = metrics
        last = step == schedule.num_steps
        stopped = stop.reached(step)
        log = last or step == first_step + 1 or step % schedule.log_every == 0
        evaluate = last or step % schedule.eval_every == 0
        save = last or stopped or step % schedule.checkpoint_every == 0
        if log or evaluate or save:
            count(step, unread)
            values, unread = read(unread) | {"skipped": skips.total}, None
        for callback in callbacks:
            callback.on_step(step)
            if log:
                callback.on_log(step, values)
        if evaluate:
            with pause("evaluating"):
                for callback in callbacks:
                    callback.on_evaluate(step, trainer.state)
        if save:
            with pause("saving"):
                for callback in callbacks:
                    callback.on_save(step, trainer.state)
        if stopped:
            break
    return step
