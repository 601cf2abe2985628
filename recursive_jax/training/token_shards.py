"""Directories of tokenised text: the format, and how it is read.

    DIR/manifest.json                             what follows, with counts and checksums
    DIR/NAME-train.array_record-00000-of-00010    documents of a part of the corpus
    DIR/NAME-valid.array_record-00000-of-00010    held-out documents of the same part
    DIR/NAME-train.lengths                        uint32: tokens of every document, in order

The names are those of TFDS. A record is a header (`HEADER`) and the little-endian ids of one
document, without BOS. A document of more than `PART_TOKENS` ids takes several records, so that a
row of training does not read a whole book. Its records follow each other.

A reader holds the manifest, and 8 bytes for every `RECORDS_PER_CHUNK` records that it has seen.
Lengths and ids are read when they are needed.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import os
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from recursive_jax import paths
from recursive_jax.training.data import TokenizedDocuments
from recursive_jax.training.token_manifest import (
    GROUP_DOCUMENTS,
    PART_TOKENS,
    VERSION,
    File,
    Manifest,
    Shard,
)

HEADER = struct.Struct("<2sBBIQ")  # b"RT", version, bytes per id, number of the part, text hash
MAGIC = b"RT"
# Random access reads and checks one chunk. The reader's index has an entry for every chunk, and a
# read takes longer with more of them.
RECORDS_PER_CHUNK = 16
OPEN_SHARDS = 256
WRITER_OPTIONS = f"group_size:{RECORDS_PER_CHUNK},uncompressed,max_parallelism:1"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
READER_BUFFER = 32_768


def encode_records(ids: np.ndarray, text_hash: int, bytes_per_id: int) -> list[bytes]:
    """The records of one document with at least one id."""
    dtype = f"<u{bytes_per_id}"
    return [
        HEADER.pack(MAGIC, VERSION, bytes_per_id, part, text_hash)
        + ids[start : start + PART_TOKENS].astype(dtype).tobytes()
        for part, start in enumerate(range(0, len(ids), PART_TOKENS))
    ]


def decode_record(record: bytes) -> np.ndarray:
    """The ids of a record, int32; ValueError for other bytes."""
    magic, version, bytes_per_id, _, _ = HEADER.unpack_from(record)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"a record begins with {record[:3]!r}; expected token ids of version 1")
    return np.frombuffer(record, f"<u{bytes_per_id}", offset=HEADER.size).astype(np.int32)


class TokenDirectory:
    """An opened directory; all sizes and the lengths have been verified.

    Attributes:
      path: of the directory.
      manifest: what it holds.

    Raises:
      ValueError: names a file that is missing, cut or damaged.
    """

    def __init__(self, path: str | os.PathLike, manifest: Manifest):
        self.path, self.manifest = paths.path_of(path), manifest
        for file in manifest.files():
            self._check(file)
            if not isinstance(file, Shard):
                self._check_sum(file)
        self._reader = functools.lru_cache(OPEN_SHARDS)(self._open)
        self._before = {  # records in front of every shard
            name: [0, *itertools.accumulate(shard.records for shard in split.shards)]
            for name, split in manifest.splits.items()
        }

    def verify(self) -> None:
        """Read all shards; ValueError names one whose checksum is another."""
        for file in self.manifest.files():
            self._check_sum(file)

    def documents(self, which: str, group: int | None = None) -> TokenizedDocuments:
        """The documents of a split or of one of its groups; ids are read when sliced."""
        split = self.manifest.splits[which]
        lengths = self._array(split.lengths, "<u4", group).astype(np.int64)
        hashes = np.zeros(0, np.uint64)
        if split.hashes is not None:
            hashes = self._array(split.hashes, "<u8", group).astype(np.uint64)
        first = split.group_records[group or 0]
        ids = StoredIds(lengths, first, functools.partial(self._record, which))
        return TokenizedDocuments(ids, np.cumsum(lengths) - lengths, lengths, hashes)

    def _array(self, file: File, dtype: str, group: int | None) -> np.ndarray:
        size = np.dtype(dtype).itemsize * GROUP_DOCUMENTS
        with (self.path / file.file).open("rb") as f:
            if group is None:
                return np.frombuffer(f.read(), dtype)
            f.seek(group * size)
            return np.frombuffer(f.read(size), dtype)

    def _record(self, which: str, number: int) -> np.ndarray:
        """The ids of a record of a split."""
        before = self._before[which]
        index = bisect.bisect_right(before, number) - 1
        shard = self.manifest.splits[which].shards[index]
        try:
            return decode_record(self._reader(shard).read([number - before[index]])[0])
        except (RuntimeError, IndexError, struct.error) as error:  # array_record raises the first
            reason = " ".join(str(error).split()) or repr(error)
            raise ValueError(self._damaged(shard, reason)) from error

    def _open(self, shard: Shard) -> Any:
        try:
            self._check(shard)  # the reader takes a missing or cut file for an empty one
        except ValueError as error:  # it was whole at the start
            raise paths.StorageFault(f"data.train: {error}") from error
        from array_record.python.array_record_module import ArrayRecordReader

        file = os.fspath(self.path / shard.file)
        reader = ArrayRecordReader(file, READER_OPTIONS, file_reader_buffer_size=READER_BUFFER)
        if reader.num_records() != shard.records:
            found = f"it has {reader.num_records()} records, expected {shard.records}"
            raise ValueError(self._damaged(shard, found))
        return reader

    def _check(self, file: File) -> None:
        path = self.path / file.file
        if not path.is_file():
            raise ValueError(self._damaged(file, "it is missing"))
        size = paths.size(path)
        if size != file.bytes:
            raise ValueError(self._damaged(file, f"it has {size} bytes, expected {file.bytes}"))

    def _check_sum(self, file: File) -> None:
        if paths.crc32(self.path / file.file) != file.crc32:
            raise ValueError(self._damaged(file, "its checksum is another"))

    def _damaged(self, file: File, reason: str) -> str:
        return (
            f"{self.path / file.file} is damaged: {reason}. Copy it again, or tokenise the text "
            f"again into another directory (python -m recursive_jax.tokenize "
            f"--data={self.manifest.job.source})"
        )


class StoredIds:
    """The ids of consecutive documents end to end; a slice inside a document is a `Span`.

    Args:
      lengths: int64 `[D]`, tokens of the documents.
      first: number of the first document's first record.
      read: number of a record -> its ids.
    """

    def __init__(self, lengths: np.ndarray, first: int, read: Callable[[int], np.ndarray]):
        self._read, self._ends = read, np.cumsum(lengths)
        records = -(-lengths // PART_TOKENS)
        self._records = first + np.cumsum(records) - records

    def __getitem__(self, span: slice) -> Span:
        return Span(self, int(span.start), int(span.stop))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of one document, int32; no record outside of them is read."""
        if stop <= start:
            return np.zeros(0, np.int32)
        d = int(np.searchsorted(self._ends, start, side="right"))
        begin = int(self._ends[d - 1]) if d else 0
        low, high = start - begin, stop - begin
        parts = range(low // PART_TOKENS, (high - 1) // PART_TOKENS + 1)
        ids = np.concatenate([self._read(int(self._records[d]) + part) for part in parts])
        low -= parts.start * PART_TOKENS
        return ids[low : low + stop - start]


@dataclasses.dataclass(frozen=True)
class Span:
    """Ids [start, stop) of `ids`, read where a slice of them is taken."""

    ids: StoredIds
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> np.ndarray:
        low, high, _ = part.indices(len(self))
        return self.ids.read(self.start + low, self.start + high)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)
