"""The training loop: it runs steps, and reads metrics, evaluates, saves and stops on schedule."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax

from recursive_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Intervals in steps. Steps count from 1. The last step always logs, evaluates and saves."""

    num_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    def __post_init__(self):
        for name in ("log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 step, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls.

    Attributes:
      on_step: (step), after every step has been dispatched.
      on_log: (step, metrics as floats).
      on_eval: (step, state).
      on_save: (step, state). The next step donates the arrays: it must not read them after return.
    """

    on_step: Callable[[int], None]
    on_log: Callable[[int, dict[str, float]], None]
    on_eval: Callable[[int, TrainState], None]
    on_save: Callable[[int, TrainState], None]


class Stop:
    """Whether the run has to stop: SIGTERM (the machine is preempted) or Ctrl-C has arrived.

    A context manager; on exit the previous signal handlers are restored. With several processes
    JAX's preemption service handles SIGTERM and informs all of them.

    Args:
      say: shows a line to the user.
    """

    def __init__(self, say: Callable[[str], None] = logging.info):
        self._say, self._requested = say, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        if self._requested:  # the second signal stops at once
            raise KeyboardInterrupt
        self._requested = True
        self._say("\nstopping after this step; the same signal again stops at once")

    def reached(self, step: int) -> bool:
        """True on every process at the same step."""
        if jax.process_count() == 1:
            return self._requested
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


def run(
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batches: Iterator[Any],
    first_step: int,
    schedule: Schedule,
    hooks: Hooks,
    stop: Stop,
) -> tuple[TrainState, int]:
    """State and number of the last step, after steps `first_step + 1 … num_steps` or until `stop`.

    Raises:
      FloatingPointError: a loss or gradient is not finite; no such state has been saved.
    """
    unread = None  # metrics of the previous step: read while the next one runs
    step = first_step
    for step in range(first_step + 1, schedule.num_steps + 1):
        state, metrics = step_fn(state, next(batches))
        if unread is not None:
            finite(unread, step - 1)
        unread = metrics
        last = step == schedule.num_steps
        stopped = stop.reached(step)
        log = last or step == first_step + 1 or step % schedule.log_every == 0
        evaluate = last or step % schedule.eval_every == 0
        save = last or stopped or step % schedule.checkpoint_every == 0
        if log or evaluate or save:
            values, unread = finite(unread, step), None
        hooks.on_step(step)
        if log:
            hooks.on_log(step, values)
        if evaluate:
            hooks.on_eval(step, state)
        if save:
            hooks.on_save(step, state)
        if stopped:
            break
    return state, step


def finite(metrics: dict[str, jax.Array], step: int) -> dict[str, float]:
    """Metrics as floats; FloatingPointError where loss or gradient norm is not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not (math.isfinite(values["loss"]) and math.isfinite(values.get("grad_norm", 0.0))):
        raise FloatingPointError(
            f"loss {values['loss']} and gradient norm {values.get('grad_norm')} at step {step} are "
            "not finite. The last checkpoint is from before. Lower optimizer.learning_rate, "
            "raise optimizer.warmup_steps or use --config.dtype=float32, then run again"
        )
    return values
