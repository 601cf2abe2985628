"""Paths of files that may be in a bucket: `gs://…` by etils.epath, all others by pathlib.

Objects of a bucket appear whole or not at all, and cannot be appended to. Orbax and tensorstore
write the arrays of a checkpoint there themselves.
"""

from __future__ import annotations

import errno
import logging
import os
import pathlib
import re
import tempfile
import threading
import zlib
from collections.abc import Iterator
from typing import Any

from recursive_jax import files

BLOCK = 16 << 20  # bytes that a checksum reads at a time
PATIENCE = 60.0  # seconds for the first answer of a bucket
# Packages whose exceptions say that a bucket cannot be reached or refuses; not all are OSErrors.
CLIENTS = ("gcsfs", "google", "aiohttp", "requests", "fsspec", "s3fs", "botocore", "adlfs", "azure")
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}

# What the storage says when it fails for a while, and what it says when it refuses.
PASSING = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.ENOTCONN, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH),
)
PASSING_CODES = r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|INTERNAL): "
REFUSALS = r"PERMISSION_DENIED|UNAUTHENTICATED|Forbidden|Unauthorized"

_reached: set[str] = set()  # buckets that have answered
_copies: list[tempfile.TemporaryDirectory] = []  # removed when the program ends


class StorageFault(OSError):
    """The storage fails while a job runs; the same command goes on when it works again."""


def is_remote(spec: str | os.PathLike) -> bool:
    """Whether a path has a scheme, such as gs://bucket/directory."""
    return "://" in os.fspath(spec)


def path_of(spec: str | os.PathLike) -> Any:
    """A `pathlib.Path`, or an `epath.Path` with the same methods for a path with a scheme.

    Raises:
      ValueError: an unknown scheme, or a bucket that cannot be used: what reads it is not
        installed, it is not there, refuses, or does not answer.
    """
    if not is_remote(spec):
        return pathlib.Path(spec).expanduser()
    from etils import epath

    spec = os.fspath(spec)
    scheme, _, rest = spec.partition("://")
    bucket = rest.split("/")[0]
    try:
        path = epath.Path(spec)
    except KeyError as error:
        raise ValueError(
            f"{spec}: unknown scheme {scheme}://; give a directory, or gs://BUCKET/DIRECTORY"
        ) from error
    if not bucket:
        raise ValueError(f"{spec} names no bucket; expected {scheme}://BUCKET/DIRECTORY")
    root = f"{scheme}://{bucket}"
    if root not in _reached:
        _reach(path, epath.Path(root), scheme)
        _reached.add(root)
    return path


def _reach(path: Any, root: Any, scheme: str) -> None:
    """Raise a ValueError unless the bucket of `path` can be listed within `PATIENCE` seconds."""
    _set_up(scheme)
    found: list[Exception | None] = []

    def ask():
        try:
            if not path.exists():
                next(root.iterdir(), None)
            found.append(None)
        except Exception as error:  # each client has its own kinds
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    error = found[0] if found else TimeoutError(f"no answer within {PATIENCE:.0f} s")
    if error is None:
        return
    if isinstance(error, ImportError | KeyError | NotImplementedError):
        package = PACKAGES.get(scheme, "what reads it")
        extra = "pip install 'recursive_jax[gcs]'" if scheme == "gs" else f"pip install {package}"
        raise ValueError(f"{path} needs {package}, which is not installed: {extra}") from error
    if isinstance(error, FileNotFoundError):
        raise ValueError(f"{path}: there is no bucket {root}; create it, or correct it") from error
    raise ValueError(
        f"{path} cannot be used: {reason_of(error)}. Check the name of the bucket, the network, "
        "and that these credentials may list, read and write it"
    ) from error


def _set_up(scheme: str) -> None:
    """Settings of the clients: no listings of old, and no tracebacks in the log."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it raises the error as well
    try:
        from fsspec.config import conf
    except ImportError:  # TensorFlow can read gs:// too
        return
    protocol = {"gs": "gcs"}.get(scheme, scheme)
    conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def is_fault(error: BaseException) -> bool:
    """Whether an error says that files or a bucket cannot be read or written."""
    return isinstance(error, OSError) or is_client_fault(error)


def is_client_fault(error: BaseException) -> bool:
    """Whether a bucket's client raised an error: the network, or a refusal."""
    return type(error).__module__.split(".")[0] in CLIENTS


def may_pass(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a fault of the storage that is no user's mistake.

    A full disk, a bucket or a mount that is away. A refusal, or a file that is not there at the
    start, is a mistake.
    """
    passing = False
    while error is not None:
        code = getattr(error, "code", getattr(error, "status", None))  # of HTTP
        denied = code in range(400, 500) and code not in (408, 429)
        kind = type(error)
        denied |= kind.__module__.startswith("google.auth") and kind.__name__ != "TransportError"
        if denied or isinstance(error, PermissionError) or re.search(REFUSALS, str(error)):
            return False
        passing |= isinstance(error, StorageFault | TimeoutError | ConnectionError)
        passing |= getattr(error, "errno", None) in PASSING or is_client_fault(error)
        passing |= bool(re.match(PASSING_CODES, str(error)))
        error = error.__cause__
    return passing


def reason_of(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:299]}…"


def resolved(spec: str | os.PathLike) -> Any:
    """`path_of`; a local path is absolute and free of links."""
    path = path_of(spec)
    return path if is_remote(path) else path.resolve()


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
    upload(made, path)
    made.unlink()


def upload(made: pathlib.Path, path: Any) -> None:
    """Copy a local file to an object of a bucket."""
    with open(made, "rb") as source, path.open("wb") as target:
        while block := source.read(BLOCK):
            target.write(block)


def local_copy(directory: Any) -> pathlib.Path:
    """The directory itself, or a copy of a remote one that is there until the program ends."""
    if not is_remote(directory):
        return directory
    _copies.append(tempfile.TemporaryDirectory(prefix="recursive_jax-"))
    place = pathlib.Path(_copies[-1].name) / directory.name
    for name, file in files_below(directory):
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return place


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
