"""What a person sees of a run: tables, progress lines, metric files."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Mapping

import jax


class MetricWriter:
    """`metrics.jsonl` and TensorBoard events under a directory; silent but on process 0.

    `last_step`: where a resumed run goes on. What a killed run wrote behind it is taken out, so
    that every step stands there once.
    """

    def __init__(self, directory: str | pathlib.Path, last_step: int = 0):
        self._file = self._board = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            directory = pathlib.Path(directory)
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / "metrics.jsonl"
            if file.exists():
                _keep_until(file, last_step or -1)  # step 0 is done again
            self._file = open(file, "a", encoding="utf-8")
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Values are named by path, such as `train/loss` or `perf/tokens_per_second`.

        One that is not finite is left out: JSON has no word for it, and no plot a place.
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in values.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def _keep_until(file: pathlib.Path, last_step: int) -> None:
    """Keep the whole lines of a metrics file up to a step."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except ValueError:  # cut off by the kill
            continue
        if step <= last_step and line.endswith("\n"):
            kept.append(line)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(file)
