"""A lock file: one process at a time writes to what it stands for."""

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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class InUse(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold(
    path: pathlib.Path, what: object, flag: str, say: Callable[[str], None] = logging.warning
) -> Iterator[None]:
    """A context that holds the lock file `path`.

    The file is locked with flock(2) and removed at the end. The kernel releases the lock when the
    process ends, also by SIGKILL.

    Args:
      path: of the lock file, in a directory that exists.
      what: is written to while the lock is held; for messages.
      flag: that gives `what`; for messages.
      say: is given one line where the file system has no locks; there is no lock then.

    Raises:
      InUse: names host, process and start of the run that has the lock.
      OSError: the file cannot be made.
    """
    descriptor = _lock(path, what, flag, say)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before the lock is released: nobody else has it
            os.close(descriptor)


def _lock(path: pathlib.Path, what: object, flag: str, say: Callable[[str], None]) -> int | None:
    """The descriptor of the locked file; None where there are no locks."""
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise InUse(
                    f"{what} is in use by {_owner(path)}; wait until that run has ended, "
                    f"stop it, or give another {flag}"
                ) from None
            if error.errno not in NO_LOCKS:
                raise
            break
        if os.fstat(descriptor).st_nlink:  # 0: its holder has removed it before letting go
            _write_owner(descriptor)
            return descriptor
        os.close(descriptor)
    say(
        f"{what} is on a file system without locks (flock); take care that only one run writes "
        "to it"
    )
    return None


def _write_owner(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a full disk: locked all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(this_process()).encode() + b"\n", 0)


def this_process() -> dict[str, str | int]:
    """Host, process number and time, as they are written into a lock file."""
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _owner(path: pathlib.Path) -> str:
    try:
        return owner_in(path.read_text())
    except OSError:
        return "another process"


def owner_in(text: str) -> str:
    """The owner that the text of a lock file names, in words."""
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
