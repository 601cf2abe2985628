"""Metric files of a run: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax

from recursive_jax import files, paths

METRICS = "metrics.jsonl"


class MetricWriter:
    """`metrics.jsonl` and TensorBoard events under a directory; only process 0 writes.

    Without tensorboardX there are no events, and one warning says so. Objects of a bucket cannot be
    appended to: there the files are written on this machine, and copied whole by `upload`.

    Args:
      directory: made when it does not exist.
      last_step: the step from which a resumed run continues. Later records of a killed run are
        removed, so that every step is recorded once.
    """

    def __init__(self, directory: str | pathlib.Path, last_step: int = 0):
        self._file = self._board = self._remote = None
        if jax.process_index() == 0:
            directory = paths.path_of(directory)
            if paths.is_remote(directory):
                directory = self._mirror(directory)
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / METRICS
            if file.exists():
                _keep_until(file, last_step or -1)  # step 0 is done again
            self._file, self._path = open(file, "a", encoding="utf-8"), file
            self._board = _open_board(directory / "tensorboard", last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Values are named by path, such as `train/loss` or `perf/tokens_per_second`.

        Values that are not finite are left out: JSON cannot express them.

        Raises:
          OSError: the disk is full, or the file is gone; it names the file.
        """
        if self._file is None:
            return
        if not self._path.exists():  # writes to a removed file succeed, and are lost
            raise paths.StorageFault(
                f"{self._path} is gone while the run writes it. Is --workdir still mounted? Mend "
                "that, then run the same command again"
            )
        values = {name: float(value) for name, value in values.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with files.naming(self._path):
            self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _mirror(self, remote: Any) -> pathlib.Path:
        """A local directory with the metrics of a bucket, which `upload` copies back."""
        self._remote, self._scratch = remote, tempfile.TemporaryDirectory()
        local = pathlib.Path(self._scratch.name)
        with contextlib.suppress(FileNotFoundError):
            (local / METRICS).write_bytes((remote / METRICS).read_bytes())
        return local

    def upload(self) -> None:
        """Copy the files to the bucket; a failure is a warning, and the next call copies all."""
        if self._remote is None:
            return
        if self._board is not None:
            self._board.flush()
        try:
            for name, file in paths.files_below(pathlib.Path(self._scratch.name)):
                paths.upload(file, self._remote / name)
        except Exception as error:
            if not paths.is_fault(error):
                raise
            logging.warning("metrics are not in %s: %s", self._remote, paths.reason_of(error))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        self.upload()


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
    """Keep the records of a metrics file up to a step; lines that are no records are dropped."""
    lines = file.read_bytes().split(b"\n")[:-1]  # a line without an end was cut off by a kill
    steps = map(_step_of, lines)
    kept = [a + b"\n" for a, step in zip(lines, steps, strict=True) if step <= last_step]
    files.write_whole(file, b"".join(kept))


def _step_of(line: bytes) -> float:
    """The step of a record; infinite for a line that is no record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf
