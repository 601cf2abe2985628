"""The requests that an engine accepts. Standard library only."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

from recursive_jax.decoding.requests import Request, Sampling, check_number, shown


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes and abilities of an engine.

    Attributes:
      can_exit: tokens may leave before the last loop.
      check_threshold: raises ValueError unless its argument is a threshold of the engine's exit
        measure; None: no measure decides, requests may only bound their loops.
      needs_recorded_loops: requests must bring `recorded_loops`.
    """

    context_length: int
    vocab_size: int
    num_loops: int
    num_stop: int
    can_exit: bool = False
    check_threshold: Callable[[Any], None] | None = None
    needs_recorded_loops: bool = False

    def check(self, request: Request) -> None:
        """Raises ValueError unless the engine can answer the request."""
        request.check_fits(self.context_length)
        name = f"request {shown(request.id)}"
        if len(request.stop) > self.num_stop:
            raise ValueError(
                f"{name} has {len(request.stop)} stop ids; this engine was made for {self.num_stop}"
            )
        for token in request.stop:
            check_number(f"stop id of {name}", token, True, 0, 2**31 - 1)
        for token in request.tokens:
            if not hasattr(token, "__index__") or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name} has token {shown(token)}; expected an integer in 0 … "
                    f"{self.vocab_size - 1}"
                )
        if not isinstance(request.sampling, Sampling):
            raise ValueError(f"{name} has sampling={shown(request.sampling)}; expected a Sampling")
        for field in ("min_loops", "max_loops"):
            if (getattr(request, field) or 1) > self.num_loops:
                raise ValueError(
                    f"{name} has {field}={getattr(request, field)}; the model has "
                    f"{self.num_loops} loops"
                )
        self._check_exits(request, name)

    def _check_exits(self, request: Request, name: str) -> None:
        leaves = (request.max_loops or self.num_loops) < self.num_loops
        has_threshold = request.exit_threshold is not None
        if (leaves and not self.can_exit) or (has_threshold and self.check_threshold is None):
            raise ValueError(
                f"{name} asks for early exits, this engine runs all loops; make it with an exit "
                "measure (--exit_measure)"
            )
        if has_threshold:
            self.check_threshold(request.exit_threshold)
        if self.needs_recorded_loops:
            loops = request.recorded_loops
            good = all(isinstance(n, numbers.Integral) and 1 <= n <= self.num_loops for n in loops)
            if len(loops) != request.max_new_tokens or not good:
                raise ValueError(
                    f"{name} has {len(loops)} recorded_loops; expected one in 1 … "
                    f"{self.num_loops} for each of {request.max_new_tokens} new tokens"
                )
