"""What further loops change in what a model gets right."""

from __future__ import annotations

from typing import Any

import numpy as np


def loop_report(right: np.ndarray) -> dict[str, Any]:
    """What further loops change, as shares of all items or tokens.

    Args:
      right: bool `[E, N]`, whether n is right after e + 1 loops.

    Returns:
      `loop_gain`: accuracy at the end minus that after each earlier loop. `self_correction`: wrong
      after that loop, right at the end. `overthinking`: right after that loop, wrong at the end.
      Their difference is the gain. `ever_corrected` and `ever_overthought`: over any earlier loop.
    """
    earlier, last = right[:-1], right[-1]
    corrected, lost = ~earlier & last, earlier & ~last
    return {
        "loop_gain": [float(x) for x in last.mean() - earlier.mean(1)],
        "self_correction": [float(x) for x in corrected.mean(1)],
        "overthinking": [float(x) for x in lost.mean(1)],
        "ever_corrected": float(corrected.any(0).mean()),
        "ever_overthought": float(lost.any(0).mean()),
    }
