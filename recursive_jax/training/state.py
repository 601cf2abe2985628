"""The arrays of a run: everything that a resumed run needs except the data position."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class TrainState:
    """Arrays that a step replaces.

    Attributes:
      step: int32 `[]`, steps done.
      params: float32.
      opt_state: of the optimizer.
      ema: averaged params, float32; None without averaging.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def weights(self) -> Any:
        """The params that are evaluated and used: the averaged ones where there are any."""
        return self.params if self.ema is None else self.ema

    def saved(self) -> dict[str, Any]:
        """The parts that a checkpoint stores, by name; `step` is its number."""
        parts = {"params": self.params, "opt_state": self.opt_state, "ema": self.ema}
        return {name: part for name, part in parts.items() if part is not None}


def init_state(params: Any, tx: Any, ema: bool = False) -> TrainState:
    """The state before the first step. `tx`: an `optax.GradientTransformation`."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)
