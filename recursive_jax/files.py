"""Files that are whole or absent, and errors that name the file. Every package may import it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


def write_whole(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file whole or not at all; the bytes are on disk when this returns.

    Args:
      path: its directory is made.
      data: bytes, or text that is written as UTF-8.

    Raises:
      OSError: names `path`. An older file of this name is then unchanged.
    """
    path = pathlib.Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, made = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(descriptor, "wb") as f:
                f.write(data.encode() if isinstance(data, str) else data)
            os.chmod(made, 0o644)
            put_in_place(made, path)
        except BaseException:
            pathlib.Path(made).unlink(missing_ok=True)
            raise


def put_in_place(made: str | os.PathLike, path: str | os.PathLike) -> None:
    """Rename a finished file or directory to `path`; its bytes are on disk before that.

    Without the fsync a power cut may leave the name with an empty file behind it.
    """
    for root, _, names in os.walk(made):
        for name in names:
            _sync(os.path.join(root, name))
        _sync(root)
    if not os.path.isdir(made):
        _sync(made)
    os.replace(made, path)
    _sync(os.path.dirname(os.path.abspath(path)))


def _sync(path: str | os.PathLike) -> None:
    is_directory = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if is_directory:  # Windows does not open directories
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not is_directory:  # some file systems cannot sync directories
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """A context in which every OSError names `path`.

    The operating system names no file when a write fails, and a temporary one when a rename does.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(path):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
