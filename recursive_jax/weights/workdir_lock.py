"""The lock of a workdir: one training run at a time writes to it."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator

import jax

from recursive_jax import file_lock
from recursive_jax.weights.integrity import together

LOCK = "workdir.lock"

_held: set[pathlib.Path] = set()  # workdirs that this process has locked


@contextlib.contextmanager
def hold(
    directory: str | os.PathLike, say: Callable[[str], None] = logging.warning
) -> Iterator[None]:
    """A context that holds the lock of a workdir; all processes of a job enter it.

    Process 0 locks a file in the workdir. A directory that the lock had to make, and that is still
    empty, is removed again.

    Args:
      directory: the workdir.
      say: is given one line where the file system has no locks; the run then goes on without one.

    Raises:
      file_lock.InUse: names host, process and start of the run that has the lock.
      OSError: the directory cannot be made or written.
    """
    with contextlib.ExitStack() as stack:
        is_first = jax.process_index() == 0
        together(lambda: stack.enter_context(hold_alone(directory, say)) if is_first else None)
        yield


def is_held(directory: str | os.PathLike) -> bool:
    """Whether this process holds the lock of a workdir."""
    return pathlib.Path(directory).resolve() in _held


@contextlib.contextmanager
def hold_alone(
    directory: str | os.PathLike, say: Callable[[str], None] = logging.warning
) -> Iterator[None]:
    """`hold` for this process only, without the other processes of a job."""
    directory = pathlib.Path(directory).resolve()
    made = [p for p in (directory, *directory.parents) if not p.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        stack.enter_context(file_lock.hold(directory / LOCK, directory, "--workdir", say))
        stack.callback(_held.discard, directory)
        _held.add(directory)
        yield


def _remove_empty(directories: list[pathlib.Path]) -> None:
    with contextlib.suppress(OSError):  # not empty
        for directory in directories:
            directory.rmdir()
