"""Directories of draws from a teacher (`draws`): the format, how it is written and read.

    DIR/job.json                                 what is being written; removed at the end
    DIR/draws.array_record-00000-of-00010        a record for each of SHARD_ROWS rows of a run
    DIR/draws.array_record-00000-of-00010.json   it is finished: size and checksum
    DIR/manifest.json                            the job and all files, written last

Row n is the n-th row of a run with the same text, seed and length of rows, counted over its epochs
and not by batch or host. A shard belongs to one writer, and its bytes do not depend on the others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from recursive_jax import paths
from recursive_jax.training import draws
from recursive_jax.training.data import Batch, Rows
from recursive_jax.training.token_copy import local_copy
from recursive_jax.training.token_manifest import MANIFEST, File

FORMAT = "recursive_jax draws"
JOB, LOCK = "job.json", "job.lock"
WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclasses.dataclass(frozen=True)
class DrawJob:
    """What determines the bytes of a directory.

    Attributes:
      teacher: its name.
      content: fingerprint of its weights.
      tokenizer: fingerprint.
      text: hash of the text, with the number of its tokens.
      seed: of the order of the rows, and of the draws.
      context_length: tokens of a row.
      rows: of the run.
      draws: K, of every token.
      temperature: of the distribution.
      num_ids: the distribution is over the first so many ids.
      dtype: the teacher's compute dtype.
      shard_rows: of a file.
    """

    teacher: str
    content: str
    tokenizer: str
    text: str
    seed: int
    context_length: int
    rows: int
    draws: int
    temperature: float
    num_ids: int
    dtype: str
    shard_rows: int

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def file(self, shard: int) -> str:
        return f"draws.array_record-{shard:05d}-of-{self.shards:05d}"

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    @property
    def fingerprint(self) -> str:
        """Of the draws of a row. Longer runs, in other files, share it."""
        moved = ("teacher", "rows", "shard_rows")
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in moved}
        return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()

    def differences(self, other: Mapping[str, Any], names: Iterable[str]) -> str:
        """Those of `names` in which another job differs, with both values; '' where none does."""
        mine = dataclasses.asdict(self)
        return ", ".join(
            f"{name} {mine[name]}, not {other.get(name)}"
            for name in names
            if mine[name] != other.get(name)
        )


@dataclasses.dataclass(frozen=True)
class DrawManifest:
    """A finished directory: the job that wrote it, and a file for each of its shards."""

    job: DrawJob
    shards: tuple[File, ...]

    def files(self) -> Iterator[File]:
        yield from self.shards

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": draws.VERSION, **dataclasses.asdict(self)}


def load_manifest(directory: str | os.PathLike) -> DrawManifest | None:
    """The manifest of a finished directory; None where there is none.

    Raises:
      ValueError: it is of something else, of another version, or damaged.
    """
    file = paths.path_of(directory) / MANIFEST
    if not file.is_file():
        return None
    values = _read(file)
    if values.get("format") != FORMAT or values.get("version") != draws.VERSION:
        raise ValueError(
            f"{file} is of {values.get('format')!r}, version {values.get('version')}; expected "
            f"{FORMAT!r}, version {draws.VERSION}, as recursive_jax.teach writes it"
        )
    try:
        shards = tuple(File(**shard) for shard in values["shards"])
        return DrawManifest(DrawJob(**values["job"]), shards)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove {file.parent}") from error


def begin(out: Any, job: DrawJob) -> list[int]:
    """The shards that `out` lacks; a new directory gets its job.json.

    Raises:
      ValueError: `out` holds something else, or another job began to write there.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a directory as --out")
    everything = [field.name for field in dataclasses.fields(job) if field.name != "teacher"]
    manifest = load_manifest(out)
    names = [name for name in paths.entries(out) if name != LOCK]
    if manifest is None and names and JOB not in names:
        raise ValueError(
            f"{out} holds something else than draws of a teacher; choose another --out"
        )
    begun = None
    if manifest is not None:
        begun = dataclasses.asdict(manifest.job)
    elif JOB in names:
        begun = _read(out / JOB)
    if begun is not None and (found := job.differences(begun, everything)):
        raise ValueError(
            f"{out} was begun by another command: this one has {found}. Give another --out, or "
            "the command that it was begun with"
        )
    if manifest is not None:
        return []
    if begun is None:
        out.mkdir(parents=True, exist_ok=True)
        paths.write_whole(out / JOB, _text(dataclasses.asdict(job)))
    return [shard for shard in range(job.shards) if f"{job.file(shard)}.json" not in names]


class ShardWriter:
    """Writes one shard; it is there whole after `close`, or not at all.

    Args:
      out: the directory.
      job: that is written.
      shard: its number.
    """

    def __init__(self, out: Any, job: DrawJob, shard: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._file = out / job.file(shard)
        self._scratch = tempfile.TemporaryDirectory()
        place = pathlib.Path(self._scratch.name) if paths.is_remote(out) else out
        self._partial = place / f"{self._file.name}.partial"
        self._writer = ArrayRecordWriter(str(self._partial), WRITER_OPTIONS)

    def write(self, record: bytes) -> None:
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise self._broken(error) from error

    def close(self) -> None:
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._broken(error) from error
        found = File(self._file.name, self._partial.stat().st_size, paths.crc32(self._partial))
        paths.put(self._partial, self._file)
        record = self._file.parent / f"{self._file.name}.json"
        paths.write_whole(record, _text(dataclasses.asdict(found)))
        self._scratch.cleanup()

    def discard(self) -> None:
        """Remove an unfinished file."""
        if self._writer.is_open():
            self._writer.close()
        self._partial.unlink(missing_ok=True)
        self._scratch.cleanup()

    def _broken(self, error: RuntimeError) -> OSError:
        return OSError(f"{self._partial} cannot be written: {' '.join(str(error).split())}")


def finish(out: Any, job: DrawJob) -> DrawManifest:
    """The manifest of a directory that has all shards; written here."""
    manifest = load_manifest(out)
    if manifest is not None:
        _remove_rest(out)
        return manifest
    shards = tuple(File(**_read(out / f"{job.file(s)}.json")) for s in range(job.shards))
    manifest = DrawManifest(job, shards)
    paths.write_whole(out / MANIFEST, _text(manifest.to_json()))
    _remove_rest(out)
    return manifest


def _remove_rest(out: Any) -> None:
    for name in paths.entries(out):
        if name != MANIFEST and (name.endswith((".json", ".partial", ".tmp"))):
            (out / name).unlink(missing_ok=True)


def _read(file: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); remove {file.parent} and start again"
        ) from error


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


def find_manifest(directory: str | os.PathLike) -> DrawManifest:
    """The manifest of `data.teacher`; ValueError where the directory is not finished."""
    manifest = load_manifest(directory)
    if manifest is None:
        raise ValueError(
            f"data.teacher={directory} is no finished directory of draws; write it with python -m "
            f"recursive_jax.teach --out={directory} and this --config"
        )
    return manifest


class DrawDirectory:
    """A finished directory, opened for a run; all sizes have been verified.

    Args:
      path: of the directory. One in a bucket is copied to `cache_dir` first.
      cache_dir, progress: as `token_copy.local_copy` takes them.

    Raises:
      ValueError: it is not finished, or a file is missing or cut.
    """

    def __init__(
        self, path: str | os.PathLike, cache_dir: str | None = None, progress: bool = True
    ):
        manifest = find_manifest(path)
        self.path, self.job, self._shards = path, manifest.job, manifest.shards
        self._local = local_copy(paths.path_of(path), manifest, cache_dir, progress)
        for file in self._shards:
            place = self._local / file.file
            if not place.is_file() or paths.size(place) != file.bytes:
                raise ValueError(f"{place} is damaged: it is missing or cut; {self._advice()}")
        self._reader = functools.lru_cache(16)(self._open)

    def check(self, run: Mapping[str, Any], rows: int) -> None:
        """Raise ValueError if the draws are not those of a run.

        Args:
          run: fields of its job.
          rows: of the run.
        """
        if found := self.job.differences(run, run):
            raise ValueError(
                f"data.teacher={self.path} has draws of {found} of this run; give the directory "
                "that recursive_jax.teach wrote with this --config"
            )
        if rows > self.job.rows:
            raise ValueError(
                f"data.teacher={self.path} has draws of {self.job.rows:,} rows, this run takes "
                f"{rows:,}; lower config.tokens, or write draws of more rows"
            )

    def join(self, row: int, batch: Batch) -> Batch:
        """Row `row` of the run with its draws.

        Raises:
          ValueError: the directory has none of this row, or its file is damaged.
        """
        if row >= self.job.rows:
            raise ValueError(f"{self.path} has draws of {self.job.rows} rows, not of row {row}")
        shard, place = divmod(row, self.job.shard_rows)
        try:
            record = self._reader(shard).read([place])[0]
            found = draws.decode(record, row, batch.tokens, self.job.draws)
        except (RuntimeError, IndexError, ValueError, draws.binary.error) as error:
            file, reason = self._local / self._shards[shard].file, " ".join(str(error).split())
            raise ValueError(f"{file}: {reason}; {self._advice()}") from error
        return batch.replace(teacher=found)

    def _open(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        return ArrayRecordReader(str(self._local / self._shards[shard].file), READER_OPTIONS)

    def _advice(self) -> str:
        return f"copy it again, or write {self.path} anew (python -m recursive_jax.teach)"


def text_of(rows: Rows) -> str:
    """The text of a run, as a job names it."""
    return f"{rows.content}, {rows.num_tokens} tokens"
