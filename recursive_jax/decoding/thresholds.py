"""Calibrated exit thresholds: a checkpoint's `thresholds.json`."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from typing import ClassVar

from recursive_jax import paths
from recursive_jax.decoding.exit_measures import make_measure
from recursive_jax.decoding.requests import check_number


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Calibrated thresholds, `thresholds.json` of a checkpoint.

    Attributes:
      measure: name of the measure they are for.
      thresholds: after loop 1, 2, …, L - 1; the last loop needs none.
      bound: of the risk, as asked for in calibration.
      text: what they were calibrated on.
      date: when, as YYYY-MM-DD.
      step: of the checkpoint on which they were calibrated.
      params: checksum of the params of that step (`checkpoint.params_checksum`).
      risk: what is bounded: 'disagreement', the share of tokens that differ from full depth, or
        'perplexity', its relative rise.
      confidence: probability that the bound holds on other text of the same kind.
      missing_kv: the source of skipped keys and values that they were calibrated with.
      record: JSON: how the calibration went.
      stale: why they are not for the weights in use; empty if they are. It is not saved.
    """

    measure: str
    thresholds: tuple[float, ...]
    bound: float
    text: str
    date: str
    step: int
    params: int
    risk: str = "disagreement"
    confidence: float = 0.9
    missing_kv: str = "complete"
    record: dict = dataclasses.field(default_factory=dict, compare=False)
    stale: str = dataclasses.field(default="", compare=False)

    FILE: ClassVar[str] = "thresholds.json"

    def __post_init__(self):
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        if not isinstance(self.measure, str):
            raise ValueError(f"measure={self.measure!r}; expected a name")
        measure = make_measure(self.measure)
        for value in self.thresholds:
            measure.check_threshold(value)
        check_number("bound", self.bound, False, 0, 1)
        check_number("confidence", self.confidence, False, 0, 1)
        for name in ("step", "params"):
            check_number(name, getattr(self, name), True, 0, 2**63)

    def save(self, directory: str | os.PathLike) -> None:
        """Write them into a checkpoint, with a checksum of the file itself."""
        record = dataclasses.asdict(self)
        del record["stale"]
        record["checksum"] = _checksum(record)
        path = paths.path_of(directory) / self.FILE
        paths.write_whole(path, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Thresholds | None:
        """Those of a checkpoint, None when it has none.

        Raises:
          ValueError: a file that is not what `save` writes.
        """
        path = paths.path_of(directory) / cls.FILE
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            checksum = record.pop("checksum", None)
            found = cls(**record)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            names = [field.name for field in dataclasses.fields(cls) if field.name != "stale"]
            raise ValueError(
                f"{path} is damaged, or of an older version ({error}); expected "
                f"{', '.join(names)}, checksum; calibrate again"
            ) from error
        if checksum != _checksum(record):
            raise ValueError(f"{path} is damaged (checksums differ); calibrate again")
        return found

    def compare(self, step: int, params: int) -> Thresholds:
        """The same thresholds; `stale` says so if they are not for these params of this step."""
        if params == self.params:
            return self
        stale = (
            f"{self.FILE} was calibrated on step {self.step}, and step {step} has other weights; "
            "calibrate again, or name an exit measure and give --exit_threshold"
        )
        return dataclasses.replace(self, stale=stale)

    @property
    def promise(self) -> str:
        """What they keep, in words."""
        what = {
            "disagreement": f"at most {self.bound:.2%} of tokens differ",
            "perplexity": f"perplexity rises by at most {self.bound:.2%}",
        }
        of = "on text like the calibration's"
        return f"{what.get(self.risk, self.risk)} {of}, confidence {self.confidence:g}"

    def check_missing_kv(self, missing_kv: str) -> None:
        """Raise a ValueError if they were calibrated with keys and values of another source."""
        if missing_kv != self.missing_kv:
            raise ValueError(
                f"{self.FILE} keeps its bound with missing_kv={self.missing_kv}, not with "
                f"{missing_kv}; calibrate again with --missing_kv={missing_kv}, or name an exit "
                "measure and give --exit_threshold"
            )

    def check_current(self) -> None:
        """Raise a ValueError if the thresholds are for other weights than those in use."""
        if self.stale:
            raise ValueError(self.stale)


def _checksum(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
