"""Checksums of arrays, and whether an error proves that a checkpoint is damaged."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import hosts, paths

PIECE_BYTES = 64 << 20  # a checksum reads an array in pieces of this size
ADVICE = "Remove its directory to use the step saved before it, or convert again"
# Status codes with which tensorstore reports bytes that are missing or cannot be decoded.
DAMAGE_CODES = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")
# Status codes of trouble that may pass: another process, the network, permissions, memory.
OTHER_CODES = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED"),
    *("CANCELLED", "RESOURCE_EXHAUSTED"),
)
MESSAGE = 1000  # characters of an error that all processes are told
Result = TypeVar("Result")


class Damaged(ValueError):
    """A step is proven to differ from what was saved; `what` is the message without advice."""

    def __init__(self, what: str):
        super().__init__(f"{what}. {ADVICE}")
        self.what = what


def checksums(tree: Any) -> dict[str, int]:
    """A number per array that changes with any flipped bit and does not depend on the sharding.

    Σ bits·(2·index + 1) mod 2³². The factor is odd, so every single-bit change changes the sum.
    """
    return {
        jax.tree_util.keystr(path): _checksum(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _checksum(x: jax.Array | np.ndarray) -> int:
    x = x if np.ndim(x) else x.reshape(1)  # `jnp.atleast_1d` would copy an array that has an axis
    rows, here = len(x), isinstance(x, np.ndarray)
    if here or len(x.sharding.device_set) == 1:
        # In pieces: the integers of an array take as much memory as the array.
        rows = max(1, PIECE_BYTES * rows // max(x.nbytes, 1))
    total = 0
    for start in range(0, len(x), rows):
        size = min(rows, len(x) - start)
        piece = x[start : start + size] if here else _rows(x, start, size)
        total += int(_sum(piece, start))
    return total % 2**32


def _rows(x, start, size):
    # A static slice would be compiled anew for every start.
    return x if size == len(x) else jax.lax.dynamic_slice_in_dim(x, start, size)


@jax.jit
def _sum(x: jax.Array, start: int) -> jax.Array:
    """The part of an array's checksum that its rows x, from row `start` on, contribute."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    weight = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):  # the row-major index, modulo 2³²
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        iota = iota if axis else iota + start.astype(jnp.uint32)
        weight = weight * jnp.uint32(x.shape[axis]) + iota
    return (bits * (2 * weight + 1)).sum(dtype=jnp.uint32)


def json_checksum(data: Any) -> int:
    """CRC-32 of JSON data; the order of keys does not count."""
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def explain(path: Any, error: Exception) -> Exception:
    """The error to raise when reading the step at `path` has failed with `error`.

    Returns:
      `Damaged` if a file is missing, cut or cannot be decoded. A MemoryError as it is. Otherwise a
      ValueError which says that the step could not be read now: a network, permissions, another
      process.
    """
    chain = list(_chain(error))
    reason = _brief(chain[-1])
    text = "\n".join(map(str, chain))
    codes = set(re.findall(r"\b([A-Z_]+):", text))
    if any(isinstance(e, MemoryError) for e in chain):
        return error
    if "RESOURCE_EXHAUSTED" in codes:
        return ValueError(f"checkpoint {path} does not fit into memory: {reason}")
    numbers = {e.errno for e in chain if isinstance(e, OSError)}
    numbers |= {int(n) for n in re.findall(r"os_error_code='(\d+)'", text)}
    blocked = _first_blocked(path)
    blocked = blocked or next((e for e in chain if paths.is_client_fault(e)), None)
    if blocked or codes & set(OTHER_CODES) or numbers - {None, errno.ENOENT, errno.ENOTDIR}:
        return ValueError(
            f"checkpoint {path} could not be read now ({blocked or reason}). This is no sign of "
            "damage: keep it, and run again when it can be read"
        )
    decoding = (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError)
    if codes & set(DAMAGE_CODES) or any(isinstance(e, (*decoding, Undecodable)) for e in chain):
        return Damaged(f"checkpoint {path} is damaged ({reason})")
    return ValueError(
        f"checkpoint {path} cannot be read ({reason}); nothing proves that it is damaged. It may "
        "be of another model or version"
    )


def _brief(error: BaseException) -> str:
    """The first line of an error. Tensorstore's begins with a code and ends with the cause."""
    line = (str(error).strip() or repr(error)).splitlines()[0]
    line = re.sub(r" \[tensorstore_spec.*", "", line)
    return line if len(line) <= 200 else f"{line[:60]} … {line[-130:]}"


class Undecodable(Exception):
    """Bytes that can be read from disk, and are not what was written."""


def storage_fault(error: Exception) -> str | None:
    """What a failed write says about the storage, such as "disk full"; None for other errors."""
    names = {
        errno.ENOSPC: "disk full",
        errno.EDQUOT: "disk quota exceeded",
        errno.EFBIG: "file too large for this file system or user",
    }
    for link in _chain(error):
        for number, words in names.items():
            if getattr(link, "errno", None) == number or os.strerror(number) in str(link):
                return words
    return None


def write_fault(error: Exception) -> str | None:
    """What else the storage says of a failed write, such as a refusal; None for other errors."""
    for link in _chain(error):
        if paths.is_fault(link):
            return paths.reason_of(link)
        # Tensorstore raises ValueErrors that begin with a status code.
        if re.match(r"[A-Z_]+: ", str(link)):
            return _brief(link)
    return None


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """A context without Orbax's warnings and tracebacks: it raises the error as well.

    After an error, reads that are under way end later, on an event loop that is closed. Their
    reports are left out for the rest of the process.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    logging.getLogger("asyncio").addFilter(_is_no_orbax_task)
    logger.addFilter(_is_not_orbax)

    def report(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = report
    try:
        yield
    except Exception:
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise
    else:
        sys.unraisablehook = hook
    finally:
        logger.removeFilter(_is_not_orbax)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or "orbax" not in pathlib.Path(record.pathname).parts


def _is_no_orbax_task(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(word in message for word in ("/orbax/", "tensorstore_spec"))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_blocked(path: Any) -> Exception | None:
    """The error of the first file or directory below `path` that this user cannot open."""
    if paths.is_remote(path):
        try:
            paths.entries(path)  # not every file of a bucket: each is a request
        except Exception as error:  # each client has its own kinds
            return error
        return None
    errors: list[OSError] = []
    for root, _, names in os.walk(path, onerror=errors.append):
        for name in names:
            try:
                with open(os.path.join(root, name), "rb") as f:
                    f.read(1)
            except OSError as error:
                errors.append(error)
    return next((e for e in errors if not isinstance(e, FileNotFoundError)), None)


def together(function: Callable[[], Result], where: str = "a file that all read") -> Result:
    """The result of a function that all processes call; if one of them fails, all raise.

    Damage on one process counts before other errors: the others may only have waited in vain.

    Args:
      function: reads or writes files.
      where: the point in the program, in words.

    Raises:
      Damaged, ValueError, OSError: the function's error, or on another process its message.
      hosts.MissingHosts, hosts.OtherHostFailed: a process does not come here.
    """
    if jax.process_count() == 1:
        return function()
    result = error = None
    try:
        result = function()
    except (ValueError, OSError) as caught:
        error = caught
    grade = 0 if error is None else 2 if isinstance(error, Damaged) else 1
    words = getattr(error, "what", str(error or ""))[:MESSAGE]
    again = error is not None and paths.may_pass(error)
    worst, process, message, again = hosts.decide(where, [grade, words, again], _worst)
    if not worst:
        return result
    if worst == grade:
        raise hosts.on_all_processes(error)
    kind = Damaged if worst == 2 else paths.StorageFault if again else ValueError
    raise hosts.on_all_processes(kind(f"process {process}: {message}")) from error


def _worst(found: list[tuple[int, str, bool]]) -> tuple[int, int, str, bool]:
    """The gravest error: its grade, its process, its message, and whether it may pass."""
    process = max(range(len(found)), key=lambda p: (found[p][0], -p))
    grade, message, again = found[process]
    return grade, process, message, again
