"""Paths of files that may be in a bucket: `gs://…` by etils.epath, all others by pathlib."""

from __future__ import annotations

import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from recursive_jax import files

BLOCK = 16 << 20  # bytes that a checksum reads at a time


def is_remote(spec: str | os.PathLike) -> bool:
    """Whether a path has a scheme, such as gs://bucket/directory."""
    return "://" in os.fspath(spec)


def path_of(spec: str | os.PathLike) -> Any:
    """A `pathlib.Path`, or an `epath.Path` with the same methods for a path with a scheme.

    Raises:
      ValueError: what reads the scheme is not installed, such as gcsfs for gs://.
    """
    if not is_remote(spec):
        return pathlib.Path(spec).expanduser()
    try:
        from etils import epath

        path = epath.Path(spec)
        path.exists()  # looks up what reads this scheme
    except (ImportError, KeyError) as error:
        raise ValueError(f"{spec} cannot be opened: {error}") from error
    return path


def entries(directory: Any) -> list[str]:
    """The names in a directory, sorted; none where there is no directory.

    Raises:
      OSError, or an exception of a client: it cannot be listed. `is_dir` would return False.
    """
    try:
        return sorted(path.name for path in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def files_below(directory: Any) -> Iterator[tuple[str, Any]]:
    """Relative name and path of every file in a directory and its subdirectories, sorted."""
    for name in entries(directory):
        path = directory / name
        if path.is_dir():
            yield from ((f"{name}/{inner}", file) for inner, file in files_below(path))
        else:
            yield name, path


def write_whole(path: Any, data: str | bytes) -> None:
    """Write a file whole or not at all; an object of a bucket is never half there."""
    if is_remote(path):
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    else:
        files.write_whole(path, data)


def put(made: pathlib.Path, path: Any) -> None:
    """Move a finished local file to `path`."""
    if not is_remote(path):
        files.put_in_place(made, path)
        return
    with open(made, "rb") as source, path.open("wb") as target:
        while block := source.read(BLOCK):
            target.write(block)
    made.unlink()


def size(path: Any) -> int:
    """The bytes of a file."""
    stat = path.stat()
    return stat.length if is_remote(path) else stat.st_size


def modified(path: Any) -> int:
    """When a file was modified: nanoseconds, or seconds of a remote one."""
    stat = path.stat()
    return stat.mtime if is_remote(path) else stat.st_mtime_ns


def crc32(path: Any) -> int:
    """The CRC-32 of a file, read block by block."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
