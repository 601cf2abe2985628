"""A trace of some steps for XProf."""

from __future__ import annotations

import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable

import jax

from recursive_jax import paths
from recursive_jax.training.callbacks import Callback


def profile_steps(text: str, num_steps: int) -> tuple[int, int]:
    """The first and last step of START:STOP; ValueError unless 1 ≤ START ≤ STOP ≤ `num_steps`."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last <= num_steps:
        raise ValueError(
            f"--profile={text}; expected START:STOP, the first and the last step to trace, from 1 "
            f"to {num_steps}"
        )
    return first, last


class Profile(Callback):
    """Traces steps on process 0, and says where the trace is.

    Args:
      steps: the first and the last step.
      directory: of the trace; may be in a bucket.
      wait: returns when the devices have done the latest step.
      say: shows a line.
    """

    def __init__(
        self,
        steps: tuple[int, int],
        directory: str,
        wait: Callable[[], object],
        say: Callable[[str], None],
    ):
        self._first, self._last = steps
        self._directory, self._wait, self._say = directory, wait, say
        # XLA writes local files only.
        self._local = tempfile.mkdtemp() if paths.is_remote(directory) else directory
        self._began: int | None = None

    def before_step(self, step):
        if self._began is None and self._first <= step <= self._last and not jax.process_index():
            self._wait()
            jax.profiler.start_trace(self._local)
            self._began = step

    def on_step(self, step):
        if step == self._last and self._began is not None:
            began = self._began
            self._wait()
            self._stop()
            self._say(
                f"trace of steps {began} to {step}: {self._directory}\n"
                f"to look at it: pip install xprof; xprof --logdir={self._directory}"
            )

    def close(self):
        if self._began is not None:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._began = None
        if self._local != self._directory:
            for file in filter(pathlib.Path.is_file, pathlib.Path(self._local).rglob("*")):
                target = paths.path_of(self._directory) / str(file.relative_to(self._local))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            shutil.rmtree(self._local)
