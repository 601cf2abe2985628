"""The settings of a decode engine, all of them checked where they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from recursive_jax.decoding.exit_measures import Measure, Static
from recursive_jax.decoding.requests import check_number, shown
from recursive_jax.models.config import DecoderConfig

MISSING_KV = ("complete", "propagate", "copy")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How an engine decodes.

        EngineConfig(num_slots=4, context_length=512, measure=TopProbability(0.9))

    Settings that mean the same are equal: a threshold that the measure carries moves into
    `thresholds`.

    Attributes:
      num_slots: requests that decode at once (default 16). On a mesh a multiple of the devices that
        share the batch.
      context_length: tokens of prompt and answer together, at most; the cache rows of a slot
        (default None: the model's `max_length`).
      chunk_length: prompt tokens that run beside the decode lanes in a tick, at most (default 64).
      num_stop: stop ids of a request, at most (default 4).
      measure: decides which tokens leave early (default None: all tokens run all loops).
      thresholds: of the measure, after loop 1, 2, … but the last; one number is for all of them
        (default None: the measure's own). The unit is that of the measure's score.
      missing_kv: source of the keys and values of loops that a token skipped (default 'complete').
        'complete': the token continues through these loops beside its successors, so they are
        exact. 'propagate': they are projected from the state with which it left. 'copy': they are
        those of its last loop. The last prompt token skips no loop.
      lossless: a token that leaves only drafts its successor. The draft is kept if the last loop
        chooses the same, so the tokens are those of full depth. Needs missing_kv='complete'
        (default False).
      depthwise: False is the sequence-wise baseline: slots start their tokens together
        (default True).

    Raises:
      ValueError: a setting is out of range, or two of them contradict each other.
    """

    num_slots: int = 16
    context_length: int | None = None
    chunk_length: int = 64
    num_stop: int = 4
    measure: Measure | None = None
    thresholds: Sequence[float] | float | None = None
    missing_kv: str = "complete"
    lossless: bool = False
    depthwise: bool = True

    def __post_init__(self):
        for name in ("num_slots", "chunk_length", "num_stop"):
            check_number(name, getattr(self, name), True, 1, 2**20)
        if self.context_length is not None:
            check_number("context_length", self.context_length, True, 2, 2**31 - 1)
        for name in ("lossless", "depthwise"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))}; expected True or False")
        if self.measure is not None and not isinstance(self.measure, Measure):
            raise ValueError(
                f"measure={shown(self.measure)}; expected one of decoding.exit_measures, as "
                "make_measure(name) returns"
            )
        self._take_thresholds()
        if self.missing_kv not in MISSING_KV:
            raise ValueError(
                f"missing_kv={shown(self.missing_kv)}; expected one of {', '.join(MISSING_KV)}"
            )
        if self.lossless:
            self._check_lossless()

    def check_loops(self, num_loops: int) -> None:
        """Raises ValueError unless a model with so many loops can decode with these settings."""
        if self.lossless and num_loops < 2:
            raise ValueError(
                "lossless decoding drafts from an earlier loop, and this model has one loop only; "
                "leave it out"
            )
        if self.measure is None:
            return
        self.measure.check_loops(num_loops)
        if self.lossless and self.measure == Static(num_loops):
            raise ValueError(
                f"a draft after loop {num_loops} of {num_loops} is no draft; expected 1 … "
                f"{num_loops - 1}"
            )
        if self.thresholds is not None and len(self.thresholds) not in {1, num_loops - 1}:
            raise ValueError(
                f"{len(self.thresholds)} exit thresholds; expected one, or one after each of the "
                f"first {num_loops - 1} loops"
            )

    def for_model(self, cfg: DecoderConfig) -> EngineConfig:
        """These settings with the sizes that the engine of a model has.

        Raises:
          ValueError: as `check_loops`.
        """
        self.check_loops(cfg.num_loops)
        length = self.context_length or cfg.max_length
        chunk = min(self.chunk_length, length)
        return dataclasses.replace(self, context_length=length, chunk_length=chunk)

    def threshold_row(self, num_loops: int) -> np.ndarray:
        """The threshold after every loop, f32 `[num_loops]`; the last one is not used."""
        row = np.zeros(num_loops, np.float32)
        if self.measure is not None:
            own = self.thresholds is None
            row[:-1] = self.measure.default_threshold if own else self.thresholds
        return row

    def _take_thresholds(self) -> None:
        """Bring `thresholds` into its one form: a tuple of floats, or None."""
        measure, thresholds = self.measure, self.thresholds
        if measure is None:
            if thresholds is not None:
                raise ValueError("exit thresholds without an exit measure; name one")
            return
        if measure.threshold is not None:
            if thresholds is not None:
                raise ValueError(
                    f"thresholds={shown(thresholds)} beside measure={measure}; give one of them"
                )
            thresholds = measure.threshold
            object.__setattr__(self, "measure", dataclasses.replace(measure, threshold=None))
        if thresholds is None:
            return
        try:
            values = np.atleast_1d(np.asarray(thresholds, np.float64)).tolist()
        except (TypeError, ValueError) as error:
            raise ValueError(f"thresholds={shown(thresholds)}; expected numbers") from error
        for value in values:
            measure.check_threshold(value)
        object.__setattr__(self, "thresholds", tuple(values))

    def _check_lossless(self) -> None:
        if self.missing_kv != "complete":
            raise ValueError(
                f"lossless decoding with missing_kv={self.missing_kv!r}; it needs 'complete', the "
                "exact one"
            )
        if self.measure is None or not self.measure.can_exit:
            name = "no exit measure" if self.measure is None else self.measure.name
            raise ValueError(
                f"lossless decoding with {name}, which never drafts; name another, such as static:1"
            )
