"""What an evaluation measures, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from recursive_jax import sharding
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.exit_measures import make_measure
from recursive_jax.decoding.requests import check_number


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
      text: files, directories, tfds:NAME or docstrings[:N]; None measures no perplexity.
      text_tokens: of it, at most.
      tasks: names separated by commas, or 'all'; None measures none.
      task_dir: directory of local tasks; None: lm-eval's own, from a hub.
      context_length: longest context; None: 512 for windows, 2,048 at most for rolling perplexity,
        the model's own for tasks.
      limit: items of every task, at most.
      batch_size: rows per call of the model.
      dtype: compute dtype.
      exits: measure early exits on the text, too; of a model of several loops.
      exit_measure: which tokens leave.
      exit_threshold: of the measure, one or one for each loop but the last; None: the calibrated
        ones of the model if they are for this measure, or else a sweep.
      missing_kv: source of the keys and values of skipped loops, as `EngineConfig` has it.
    """

    text: str | None = None
    text_tokens: int = 20_000
    tasks: str | None = None
    task_dir: str | None = None
    context_length: int | None = None
    limit: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    exits: bool = False
    exit_measure: str = "top1"
    exit_threshold: tuple[float, ...] | None = None
    missing_kv: str = "complete"

    def __post_init__(self):
        if self.text is None and self.tasks is None:
            raise ValueError("nothing to evaluate: give a text, or tasks")
        if self.task_dir is not None and self.tasks is None:
            raise ValueError("task_dir without tasks; name some, or 'all'")
        if self.exits and self.text is None:
            raise ValueError("exits are measured on a text; give one")
        self.exit_config()
        for name in ("text_tokens", "batch_size", "context_length", "limit"):
            value = getattr(self, name)
            if value is not None:
                least = 2 if name == "context_length" else 1
                check_number(name, value, True, least, 2**31 - 1)
        if self.limit is not None and self.tasks is None:
            raise ValueError("limit without tasks; name some, or 'all'")
        object.__setattr__(self, "dtype", sharding.compute_dtype(self.dtype).name)

    def max_length(self, longest: int) -> int:
        return min(self.context_length or longest, longest)

    def exit_config(self) -> EngineConfig:
        """How tokens exit. Raises ValueError for an unknown measure or a bad threshold."""
        measure = make_measure(self.exit_measure)
        return EngineConfig(
            measure=measure, thresholds=self.exit_threshold, missing_kv=self.missing_kv
        )

    def of_source(self) -> Settings:
        """What is measured of the source too: all but exits."""
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kept = {k: v for k, v in rest.items() if "exit" not in k and k != "missing_kv"}
        return Settings(**kept)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
