"""A section of a directory that is being tokenised; `shard_writer` describes the files."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from recursive_jax import paths
from recursive_jax.training import token_shards
from recursive_jax.training.encoding import Encoded

SECTION = "section-{:05d}"
SPLITS = ("train", "valid")
SIDECARS = {"lengths": "<u4", "hashes": "<u8"}  # numbers of every document


class Section:
    """A run of consecutive documents that is being written.

    Args:
      out: the directory.
      scratch: local directory for unfinished files.
      index: of the section.
      bytes_per_id: 2 or 4.

    Attributes:
      tokens: so far.
      next: place of the document behind the last one; None: there is none.
    """

    def __init__(self, out: Any, scratch: pathlib.Path, index: int, bytes_per_id: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._out, self._name, self._bytes_per_id = out, SECTION.format(index), bytes_per_id
        self._partial = {which: scratch / f"{self._name}.{which}.partial" for which in SPLITS}
        self._writers = {
            which: ArrayRecordWriter(str(file), token_shards.WRITER_OPTIONS)
            for which, file in self._partial.items()
        }
        self._lengths: dict[str, list[int]] = {which: [] for which in SPLITS}
        self._hashes: dict[str, list[int]] = {which: [] for which in SPLITS}
        self._records = dict.fromkeys(SPLITS, 0)
        self.tokens = self._max_id = self._dropped = 0
        self.next: tuple[int, int] | None = None

    def add(self, which: str, doc: Encoded) -> None:
        """Append a document; one without ids is left out."""
        self.next = doc.unit, doc.number + 1
        if not len(doc.ids):
            self._dropped += not doc.blank
            return
        largest = int(doc.ids.max())
        if largest >= 256**self._bytes_per_id:
            raise ValueError(
                f"the tokenizer gives id {largest}, which its vocabulary does not have"
            )
        records = token_shards.encode_records(doc.ids, doc.hash, self._bytes_per_id)
        with _naming(self._partial[which]):
            for record in records:
                self._writers[which].write(record)
        self._lengths[which].append(len(doc.ids))
        self._hashes[which].append(doc.hash)
        self._records[which] += len(records)
        self._max_id = max(self._max_id, largest)
        self.tokens += len(doc.ids)

    def close(self) -> dict[str, Any]:
        """Put the files in place; returns what the section's JSON file holds."""
        record = {"next": self.next, "dropped": self._dropped, "max_id": self._max_id, "splits": {}}
        for which in SPLITS:
            lengths, partial = self._lengths[which], self._partial[which]
            with _naming(partial):
                self._writers[which].close()
            size, checksum = partial.stat().st_size, paths.crc32(partial)
            paths.put(partial, self._out / f"{self._name}.{which}")
            for kind, values in (("lengths", lengths), ("hashes", self._hashes[which])):
                data = np.asarray(values, SIDECARS[kind]).tobytes()
                paths.write_whole(self._out / f"{self._name}.{which}.{kind}", data)
            record["splits"][which] = {
                "bytes": size,
                "crc32": checksum,
                "documents": len(lengths),
                "tokens": sum(lengths),
                "records": self._records[which],
            }
        paths.write_whole(self._out / f"{self._name}.json", json_text(record))
        return json.loads(json.dumps(record))

    def discard(self) -> None:
        """Remove unfinished files."""
        for which in SPLITS:
            if self._writers[which].is_open():
                self._writers[which].close()
            self._partial[which].unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(file: pathlib.Path) -> Iterator[None]:
    """A context in which array_record's RuntimeErrors are OSErrors that name the file."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{file} cannot be written: {' '.join(str(error).split())}") from error


def sidecar(out: Any, section: int, which: str, kind: str) -> np.ndarray:
    """The 'lengths' (uint32) or 'hashes' (uint64) of a section's documents."""
    data = (out / f"{SECTION.format(section)}.{which}.{kind}").read_bytes()
    return np.frombuffer(data, SIDECARS[kind])


def json_text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
