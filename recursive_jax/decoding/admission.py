"""What an engine must know before it starts: whether a request and thresholds suit it."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recursive_jax.decoding.exit_measures import Measure, Recorded, Static
from recursive_jax.decoding.requests import Request, Sampling, check_number

if TYPE_CHECKING:
    from recursive_jax.decoding.engine import Engine


def check(request: Request, engine: Engine) -> None:
    """Raises ValueError unless the engine can answer the request."""
    num_loops, vocab_size = engine.num_loops, engine.model.cfg.vocab_size
    request.check_fits(engine.context_length)
    if len(request.stop) > engine.num_stop:
        raise ValueError(
            f"request {request.id!r} has {len(request.stop)} stop ids; this engine was made "
            f"for {engine.num_stop}"
        )
    for token in request.stop:
        check_number(f"stop id of request {request.id!r}", token, True, 0, 2**31 - 1)
    for token in request.tokens:
        if not hasattr(token, "__index__") or not 0 <= token < vocab_size:
            raise ValueError(
                f"request {request.id!r} has token {token!r}; expected an integer in "
                f"0 … {vocab_size - 1}"
            )
    if not isinstance(request.sampling, Sampling):
        raise ValueError(
            f"request {request.id!r} has sampling={request.sampling!r}; expected a Sampling"
        )
    for name in ("min_loops", "max_loops"):
        if (getattr(request, name) or 1) > num_loops:
            raise ValueError(
                f"request {request.id!r} has {name}={getattr(request, name)}; the model has "
                f"{num_loops} loops"
            )
    leaves = (request.max_loops or num_loops) < num_loops
    # the last loop as the only exit: an engine made for requests' own bounds
    judges = engine.can_exit and engine.measure != Static(num_loops)
    if (leaves and not engine.can_exit) or (request.exit_threshold is not None and not judges):
        raise ValueError(
            f"request {request.id!r} asks for early exits, this engine runs all loops; make "
            "it with an exit measure (--exit_measure)"
        )
    if request.exit_threshold is not None:
        engine.measure.check_threshold(request.exit_threshold)
    if isinstance(engine.measure, Recorded):
        loops = request.recorded_loops
        good = all(isinstance(n, numbers.Integral) and 1 <= n <= num_loops for n in loops)
        if len(loops) != request.max_new_tokens or not good:
            raise ValueError(
                f"request {request.id!r} has {len(loops)} recorded_loops; expected one in "
                f"1 … {num_loops} for each of {request.max_new_tokens} new tokens"
            )


def threshold_row(
    measure: Measure | None, thresholds: Sequence[float] | float | None, num_loops: int
) -> np.ndarray:
    """Thresholds as `Engine` takes them -> f32 `[L]`, the last entry unused; ValueError if bad."""
    row = np.zeros(num_loops, np.float32)
    if thresholds is None:
        row[:-1] = measure.default_threshold if measure else 0.0
        return row
    if measure is None:
        raise ValueError("exit thresholds without an exit measure; name one")
    per_loop = np.atleast_1d(np.asarray(thresholds, np.float64)).tolist()
    if len(per_loop) not in (1, num_loops - 1):
        raise ValueError(
            f"{len(per_loop)} exit thresholds; expected one, or one after each of the first "
            f"{num_loops - 1} loops"
        )
    for value in per_loop:
        measure.check_threshold(value)
    row[:-1] = per_loop
    return row
