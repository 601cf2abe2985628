"""Steps that a run skips because their loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

GRADIENT = "grad_norm_"  # begins the metric of a group's gradient


class Skips:
    """Counts skipped steps. The counts are equal on all processes: they follow from the metrics.

    Args:
      limit: after so many skipped steps in a row the run stops.
      saved: `to_json()` of the run that goes on.

    Attributes:
      total: skipped steps of the run.
      in_row: how many of them are the latest steps.
    """

    def __init__(self, limit: int, saved: Mapping[str, int] | None = None):
        self.limit = limit
        saved = saved or {}
        self.total, self.in_row = saved.get("total", 0), saved.get("in_row", 0)

    def to_json(self) -> dict[str, int]:
        return {"total": self.total, "in_row": self.in_row}

    def count(self, step: int, metrics: Mapping[str, Any]) -> str:
        """What was not finite if the update of `step` was skipped, in words; else ''.

        One scalar is read from the devices. The other metrics are read for a skipped step only.

        Raises:
          FloatingPointError: `limit` steps in a row have been skipped.
        """
        if not jax.device_get(metrics.get("skipped", 0)):
            self.in_row = 0
            return ""
        self.total, self.in_row = self.total + 1, self.in_row + 1
        what = not_finite(read(metrics))
        if self.in_row < self.limit:
            return what
        first = step - self.in_row + 1
        steps = f"step {step} was" if first == step else f"steps {first} to {step} were"
        raise FloatingPointError(
            f"{steps} skipped (max_skipped_steps={self.limit}): loss or gradient was not finite; "
            f"at step {step} {what}. No checkpoint has changed by them. Lower "
            "optimizer.learning_rate, raise optimizer.warmup_steps or use --config.dtype=float32, "
            "then run again"
        )


def read(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats."""
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


def not_finite(values: Mapping[str, float]) -> str:
    """Which value of a skipped step is not finite, in words: the loss, or parts of the gradient."""
    if not math.isfinite(values["loss"]):
        return f"the loss is {values['loss']}"
    groups = [n for n, x in values.items() if n.startswith(GRADIENT) and not math.isfinite(x)]
    names = ", ".join(name.removeprefix(GRADIENT) for name in groups)
    return f"the gradient is {values.get('grad_norm')}" + (f" in {names}" if names else "")
