"""A file of answers that grows while they are made, and from which an interrupted run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping

from recursive_jax import file_lock
from recursive_jax.decoding.requests import Completion, Request


def digest(request: Request, run: str) -> str:
    """A number, in hex, that differs when an answer may differ.

    Args:
      request: the request.
      run: all else that answers depend on: the model and the settings of the engine, as a text.
    """
    return hashlib.blake2b(repr((run, request)).encode(), digest_size=16).hexdigest()


def check_writable(path: str | os.PathLike) -> None:
    """Make the directory of a file that will be written; ValueError if the file is not writable."""
    if _is_stream(pathlib.Path(path)):
        return
    real = pathlib.Path(os.path.realpath(path))
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=real.parent):  # permission bits alone do not tell
            writable = not real.is_dir() and (not real.exists() or os.access(real, os.W_OK))
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"cannot write {path}; expected a file in a writable directory")


@contextlib.contextmanager
def _explained(path: str | os.PathLike, more: Callable[[], str] = str) -> Iterator[None]:
    """A context whose OSErrors, such as that of a full disk, name the file. `more`: added words."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}{more()}") from error


class Answers:
    """A file of answers. FILE.part grows as answers finish; `close` writes FILE in order.

    A line of FILE.part also has a `checksum` of the answer and of its `digest`. `resume` finds by
    it the answers of an interrupted run.

    As a context manager it holds a lock, FILE.part.lock, and closes at the end. After an error or a
    signal FILE.part stays. A pipe or a device such as /dev/stdout has no FILE.part and no lock: it
    gets all finished answers in any case.

    Args:
      path: FILE, or a link to it. Its directory is made.
      write: whether this process writes; False on all processes but one.

    Attributes:
      part: FILE.part.
    """

    def __init__(self, path: str | os.PathLike, write: bool = True):
        self._stream = _is_stream(pathlib.Path(path))
        self.path = pathlib.Path(path if self._stream else os.path.realpath(path))
        self.part = pathlib.Path(f"{self.path}.part")
        self._write, self._file = write, None
        self._lock = contextlib.ExitStack()
        self._lines: dict[int, str] = {}  # of FILE
        self._digests: dict[int, str] | None = None  # None before `resume`
        if write:
            check_writable(path)

    def __enter__(self) -> Answers:
        if self._write and not self._stream:
            lock = pathlib.Path(f"{self.part}.lock")
            self._lock.enter_context(file_lock.hold(lock, self.part, "--out"))
        return self

    def __exit__(self, kind, *_) -> None:
        with self._lock:
            if kind is None or self._stream:
                self.close()
            elif self._file is not None:
                with contextlib.suppress(OSError):  # of a full disk, which has been told
                    self._file.close()

    def resume(
        self, digests: Mapping[str | int, tuple[int, str]], say: Callable[[str], None]
    ) -> dict[int, Completion]:
        """The answers that an interrupted run left in FILE.part, by their place in the file.

        These answers are not to be added again. A FILE.part with other lines, such as those of
        another model or of other settings, is renamed first. Lines of requests that could not be
        answered are left out: such requests fail again.

        Args:
          digests: the place of every answer in the file and its `digest`, by the id of its request.
          say: shows a line to the user.
        """
        self._digests = dict(digests.values())
        if self._stream or not self.part.exists():
            return {}
        found: dict[int, Completion] = {}
        kept, others = [], 0
        for line in self.part.read_bytes().split(b"\n")[:-1]:  # the last line may be torn
            record = _read(line)
            if record.get("finish_reason") == "error":
                continue
            place, digest_ = digests.get(record.get("id"), (None, ""))
            if record.pop("checksum", None) == _checksum(_text(record), digest_):
                found[place] = Completion(**record)
                self._lines[place] = _text(record)
                kept.append(line + b"\n")
            else:
                others += 1
        if self._write:
            new = pathlib.Path(f"{self.part}.new")
            try:
                with self._naming(new):
                    new.write_bytes(b"".join(kept))
                    if others:
                        aside = _free_name(self.part)
                        os.rename(self.part, aside)
                        say(
                            f"{self.part} held {others:,} answers of another run (other model, "
                            f"settings or prompts); it is {aside} now"
                        )
                    os.replace(new, self.part)
            finally:
                new.unlink(missing_ok=True)
        if found:
            say(f"{len(found):,} answers are in {self.part} already")
        return found

    def add(self, index: int, completion: Completion, logprobs: bool = False) -> None:
        """Write one answer; it is on disk when this returns.

        Args:
          index: place of the answer in the file.
          completion: the answer.
          logprobs: whether its record has the log-probabilities of the tokens.
        """
        if self._digests is None:
            self.resume({}, lambda line: None)
        record = completion.to_json(logprobs)
        self._lines[index] = _text(record)
        if self._write and not self._stream:
            checksum = _checksum(_text(record), self._digests.get(index, ""))
            with self._naming(self.part):
                self._file = self._file or _open(self.part, "a")
                self._file.write(_text(record | {"checksum": checksum}) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Write FILE and remove FILE.part."""
        if not self._write:
            return
        if self._stream:
            with _explained(self.path):
                self._write_all(self.path)
        elif self._lines:
            sorted_ = pathlib.Path(f"{self.path}.sorted")
            try:
                with self._naming(sorted_):
                    if self._file is not None:
                        self._file.close()
                    self._write_all(sorted_)
                    os.replace(sorted_, self.path)
                self.part.unlink(missing_ok=True)
            finally:
                with contextlib.suppress(OSError):
                    sorted_.unlink(missing_ok=True)
        self._write = False

    def _naming(self, path: pathlib.Path) -> contextlib.AbstractContextManager:
        def finished():
            return (
                f". {count_answers(self.part):,} answers are in {self.part}; mend this, then run "
                "the same command again to go on from there"
            )

        return _explained(path, finished)

    def _write_all(self, path: pathlib.Path) -> None:
        with _open(path, "w") as f:
            f.writelines(self._lines[index] + "\n" for index in sorted(self._lines))


def count_answers(part: pathlib.Path) -> int:
    """Whole lines in a file; 0 if there is no such file."""
    return part.read_bytes().count(b"\n") if part.is_file() else 0


def _free_name(path: pathlib.Path) -> pathlib.Path:
    """PATH.1, or the next number that no file has."""
    names = (pathlib.Path(f"{path}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _text(record: Mapping) -> str:
    return json.dumps(record, ensure_ascii=False)


def _checksum(text: str, digest: str) -> str:
    data = f"{digest}:{text}".encode(errors="backslashreplace")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _read(line: bytes) -> dict:
    """The record of a line of FILE.part; {} for a damaged one."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return {}
    named = isinstance(record, dict) and isinstance(record.get("id"), str | int)
    return record if named else {}


def _open(path: pathlib.Path, mode: str):
    # Half a surrogate pair in an id is not UTF-8; it is written as a JSON escape.
    number = _descriptor(path)
    where = path if number is None else os.dup(number)
    return open(where, mode, encoding="utf-8", errors="backslashreplace")


def _is_stream(path: pathlib.Path) -> bool:
    """Whether a path is a pipe, a device or an open file, which must not be replaced by a file."""
    if not path.exists() or path.is_dir():
        return False
    return not path.is_file() or _descriptor(path) is not None


def _descriptor(path: pathlib.Path) -> int | None:
    """The descriptor behind /dev/stdout and the like.

    It is duplicated, not opened by name: a file opened by name is written from its beginning.
    """
    names = {"/dev/stdout": 1, "/dev/stderr": 2}
    number = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", os.path.abspath(path))
    return int(number[1]) if number else names.get(os.path.abspath(path))
