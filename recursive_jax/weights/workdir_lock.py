"""The lock of a workdir: one training run at a time writes to it.

A directory is locked with flock(2). A bucket has no locks that end with their process. There the
lock file names the run that began last: that run goes on, and the one before it stops at its next
save. A run that was killed is thus no obstacle for the one that takes its place.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import jax

from recursive_jax import file_lock, paths
from recursive_jax.weights.integrity import together

LOCK = "workdir.lock"

_held: dict[Any, str] = {}  # workdirs that this process has locked; of buckets, the text written


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
        Also where the run before it in a bucket has left its lock.

    Raises:
      file_lock.InUse: names host, process and start of the run that has the lock.
      OSError: the directory cannot be made or written.
    """
    with contextlib.ExitStack() as stack:
        is_first = jax.process_index() == 0
        lock = _in_bucket if paths.is_remote(directory) else hold_alone
        together(lambda: stack.enter_context(lock(directory, say)) if is_first else None)
        yield


def is_held(directory: str | os.PathLike) -> bool:
    """Whether this process holds the lock of a workdir."""
    return paths.resolved(directory) in _held


def check(directory: Any) -> None:
    """Raise ValueError if another run has taken over a workdir in a bucket.

    Args:
      directory: as `paths.resolved` returns it.
    """
    mine = _held.get(directory)
    if not mine:
        return
    try:
        there = (directory / LOCK).read_text()
    except FileNotFoundError:
        there = ""
    if there != mine:
        other = file_lock.owner_in(there) if there else "another run, which has ended"
        raise ValueError(
            f"{directory} is taken over by {other}; this run stops and saves nothing more there. "
            "Give every run its own --workdir"
        )


@contextlib.contextmanager
def hold_alone(
    directory: str | os.PathLike, say: Callable[[str], None] = logging.warning
) -> Iterator[None]:
    """`hold` for this process only, without the other processes of a job.

    In a bucket it raises file_lock.InUse where a lock is, also that of a run which was killed.
    """
    directory = paths.resolved(directory)
    if paths.is_remote(directory):
        if (directory / LOCK).exists():
            owner = file_lock.owner_in((directory / LOCK).read_text())
            raise file_lock.InUse(f"{directory} is in use by {owner}, or was when that was killed")
        with _in_bucket(directory, say):
            yield
        return
    made = [p for p in (directory, *directory.parents) if not p.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        stack.enter_context(file_lock.hold(directory / LOCK, directory, "--workdir", say))
        stack.callback(_held.pop, directory, None)
        _held[directory] = ""
        yield


@contextlib.contextmanager
def _in_bucket(directory: str | os.PathLike, say: Callable[[str], None]) -> Iterator[None]:
    """A context in which the lock file of a bucket names this run, until another one begins."""
    directory = paths.resolved(directory)
    file = directory / LOCK
    if file.exists():
        say(
            f"{directory} was in use by {file_lock.owner_in(file.read_text())}, which was killed "
            "or still runs. This run takes over; the other one stops at its next save"
        )
    mine = json.dumps({**file_lock.this_process(), "run": secrets.token_hex(8)})
    paths.write_whole(file, mine)
    _held[directory] = mine
    try:
        yield
    finally:
        del _held[directory]
        with contextlib.suppress(Exception):  # the bucket is gone: so is the run
            if file.read_text() == mine:
                file.unlink()


def _remove_empty(directories: list[pathlib.Path]) -> None:
    with contextlib.suppress(OSError):  # not empty
        for directory in directories:
            directory.rmdir()
