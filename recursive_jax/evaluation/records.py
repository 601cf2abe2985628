"""Results of requests in a file that grows, from which an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from recursive_jax import files
from recursive_jax.evaluation.likelihood import Likelihoods, Pair, Score


def key(*parts: Any) -> str:
    """A name, in hex, of what was asked; `parts` are JSON values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class Records:
    """Results by key, in memory and in a file of JSON lines.

    The first line names the run: the weights and all settings that results depend on. A file of
    another run is renamed, never overwritten. A last line that a kill has cut off is dropped.

    Args:
      path: the file; None keeps the results in memory only.
      run: what results depend on, as a text.
      say: is given a line on what was found.
      write: whether this process writes; False on all processes but one.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        run: str = "",
        say: Callable[[str], None] = str,
        write: bool = True,
    ):
        self._path = None if path is None else pathlib.Path(path)
        self._results: dict[str, Any] = {}
        self._file = None
        self._write = write and self._path is not None
        if self._path is None:
            return
        header = json.dumps({"run": hashlib.blake2b(run.encode(), digest_size=16).hexdigest()})
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
        if lines and lines[0] != header.encode():
            if self._write:
                aside = _free_name(self._path)
                os.rename(self._path, aside)
                say(
                    f"{self._path} held results of another run (other weights or settings); "
                    f"it is {aside} now"
                )
            lines = []
        kept = [line for line in lines[1:] if self._read(line)]
        if self._results:
            say(f"{len(self._results):,} results are in {self._path} already")
        if self._write:
            files.write_whole(self._path, b"".join(x + b"\n" for x in [header.encode(), *kept]))
            self._file = open(self._path, "a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._results)

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def __getitem__(self, name: str) -> Any:
        return self._results[name]

    def add(self, results: Iterable[tuple[str, Any]]) -> None:
        """Keep results, JSON values; they are on disk when this returns."""
        lines = []
        for name, value in results:
            self._results[name] = value
            lines.append(json.dumps([name, value]) + "\n")
        if self._file is not None:
            with files.naming(self._path):
                self._file.write("".join(lines))
                self._file.flush()

    def close(self, remove: bool = False) -> None:
        """Close the file. `remove`: its results are in a report now."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if remove:
                self._path.unlink(missing_ok=True)

    def _read(self, line: bytes) -> bool:
        """Keep the result of a line of the file; False for a damaged line."""
        try:
            name, value = json.loads(line)
        except (ValueError, RecursionError):
            return False
        self._results[name] = value
        return True


def recorded_scores(
    likelihoods: Likelihoods,
    pairs: Sequence[Pair],
    records: Records,
    progress: Callable[[float], None] = float,
) -> list[Score]:
    """The scores of pairs of ids. Those that `records` lacks are computed and recorded.

    `progress`: is given the share of that work that is done, in [0, 1].
    """
    names = [key(list(context), list(continuation)) for context, continuation in pairs]
    missing = {name: n for n, name in enumerate(names) if name not in records}
    order = list(missing.values())
    for done, batch in likelihoods([pairs[n] for n in order]):
        records.add((names[order[k]], score) for k, score in batch.items())
        progress(done)
    progress(1.0)
    return [Score(*records[name]) for name in names]


def _free_name(path: pathlib.Path) -> pathlib.Path:
    """PATH.1, or the next number that no file has."""
    names = (pathlib.Path(f"{path}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
