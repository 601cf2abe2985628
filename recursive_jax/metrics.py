"""Metric files of a run: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import logging
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax


class MetricWriter:
    """`metrics.jsonl` and TensorBoard events under a directory; only process 0 writes.

    Without tensorboardX there are no events, and one warning says so.

    Args:
      directory: made when it does not exist.
      last_step: the step from which a resumed run continues. Later records of a killed run are
        removed, so that every step is recorded once.
    """

    def __init__(self, directory: str | pathlib.Path, last_step: int = 0):
        self._file = self._board = None
        if jax.process_index() == 0:
            directory = pathlib.Path(directory)
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / "metrics.jsonl"
            if file.exists():
                _keep_until(file, last_step or -1)  # step 0 is done again
            self._file = open(file, "a", encoding="utf-8")
            self._board = _open_board(directory / "tensorboard", last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Values are named by path, such as `train/loss` or `perf/tokens_per_second`.

        Values that are not finite are left out: JSON cannot express them.
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in values.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _open_board(directory: pathlib.Path, purge_step: int) -> Any:
    """A TensorBoard writer; None and a warning where tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        logging.warning(
            "TensorBoard events are left out because tensorboardX is not installed; metrics.jsonl "
            "has the same numbers. pip install 'recursive_jax[train]'"
        )
        return None
    return SummaryWriter(str(directory), purge_step=purge_step)


def _keep_until(file: pathlib.Path, last_step: int) -> None:
    """Keep the whole lines of a metrics file up to a step."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except ValueError:  # the process was killed while it wrote this line
            continue
        if step <= last_step and line.endswith("\n"):
            kept.append(line)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(file)
