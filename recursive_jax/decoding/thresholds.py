"""Exit thresholds: of an engine, and calibrated ones in a checkpoint's `thresholds.json`."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from recursive_jax.decoding.exit_measures import Measure, make_measure
from recursive_jax.decoding.requests import check_number


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Calibrated thresholds, `thresholds.json` of a checkpoint.

    Attributes:
      measure: name of the measure they are for.
      thresholds: after loop 1, 2, …, L - 1; the last loop needs none.
      bound: share of tokens that may differ from full depth, as asked for in calibration.
      text: what they were calibrated on.
      date: when, as YYYY-MM-DD.
    """

    measure: str
    thresholds: tuple[float, ...]
    bound: float
    text: str
    date: str

    FILE: ClassVar[str] = "thresholds.json"

    def __post_init__(self):
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        if not isinstance(self.measure, str):
            raise ValueError(f"measure={self.measure!r}; expected a name")
        measure = make_measure(self.measure)
        for value in self.thresholds:
            measure.check_threshold(value)
        check_number("bound", self.bound, False, 0, 1)

    def save(self, directory: str | os.PathLike) -> None:
        path = pathlib.Path(directory) / self.FILE
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Thresholds | None:
        """Those of a checkpoint, None when it has none.

        Raises:
          ValueError: a file that is not what `save` writes.
        """
        path = pathlib.Path(directory) / cls.FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, RecursionError) as error:
            names = [field.name for field in dataclasses.fields(cls)]
            raise ValueError(
                f"{path} is damaged ({error}); expected {', '.join(names)}; calibrate again"
            ) from error


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
