"""What the page must know of the server before it can offer anything."""

from __future__ import annotations

from typing import Any

from recursive_jax.decoding.engine import Engine
from recursive_jax.serving.served import Served


def facts(engine: Engine, served: Served) -> dict[str, Any]:
    """The facts, as JSON.

    `measure` is None where no threshold can be set. Its `own` thresholds are those of the engine,
    after loop 1, 2, … but the last.
    """
    kind, measure = engine.config.measure, None
    if kind is not None and kind.takes_threshold:
        own = engine.config.threshold_row(engine.num_loops)[:-1].tolist()
        low, high = kind.range
        measure = {"name": kind.name, "low": low, "high": high, "own": own}
    return {
        "model": served.name,
        "slots": engine.num_slots,
        "lanes": engine.num_lanes,
        "loops": engine.num_loops,
        "context": served.context_length,
        "vocabulary": served.limits.vocab_size,
        "can_exit": served.limits.can_exit,
        "measure": measure,
        "lossless": served.lossless,
        "chat": bool(getattr(served.tokenizer, "chat_template", None)),
    }
