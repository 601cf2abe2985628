"""The lock of a workdir: one training run at a time writes to it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import pathlib
import socket
from collections.abc import Callable, Iterator

import jax

from recursive_jax.weights.integrity import together

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "workdir.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)

_held: set[pathlib.Path] = set()  # workdirs that this process has locked


class WorkdirInUse(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold(
    directory: str | os.PathLike, say: Callable[[str], None] = logging.warning
) -> Iterator[None]:
    """A context that holds the lock of a workdir; all processes of a job enter it.

    Process 0 locks a file in the workdir with flock(2). The kernel releases the lock when the
    process ends, also by SIGKILL. A directory that the lock had to make, and that is still empty,
    is removed again.

    Args:
      directory: the workdir.
      say: is given one line where the file system has no locks; the run then goes on without one.

    Raises:
      WorkdirInUse: names host, process and start of the run that has the lock.
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
    path = directory / LOCK
    descriptor = _lock(path, say)
    _held.add(directory)
    try:
        yield
    finally:
        _held.discard(directory)
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before the lock is released: nobody else has it
            os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _lock(path: pathlib.Path, say: Callable[[str], None]) -> int | None:
    """The descriptor of the locked file; None where there are no locks."""
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise WorkdirInUse(
                    f"{path.parent} is in use by {_owner(path)}; wait until that run has ended, "
                    "stop it, or give another --workdir"
                ) from None
            if error.errno not in NO_LOCKS:
                raise
            break
        if os.fstat(descriptor).st_nlink:  # 0: its holder has removed it before letting go
            _write_owner(descriptor)
            return descriptor
        os.close(descriptor)
    say(
        f"{path.parent} is on a file system without locks (flock); take care that only one run "
        "writes to it"
    )
    return None


def _write_owner(descriptor: int) -> None:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    with contextlib.suppress(OSError):  # a full disk: locked all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode() + b"\n", 0)


def _owner(path: pathlib.Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
