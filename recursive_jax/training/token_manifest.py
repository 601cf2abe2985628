"""The manifest of a directory of tokenised text; `token_shards` describes the directory."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from recursive_jax import paths

FORMAT, VERSION = "recursive_jax tokens", 1
MANIFEST = "manifest.json"
PART_TOKENS = 16_384  # of a record
GROUP_DOCUMENTS = 16_384  # consecutive documents that are shuffled and packed together


@dataclasses.dataclass(frozen=True)
class Job:
    """What determines the bytes of a directory.

    Attributes:
      name: in the names of the files.
      source: of the text, as `text.documents` takes it.
      text: fingerprint of its listing.
      tokenizer: its name.
      fingerprint: of the tokenizer.
      bytes_per_id: 2 or 4.
      valid_fraction: share of documents to hold out; 0: none.
      shard_tokens: a section ends with the document that reaches so many.
    """

    name: str
    source: str
    text: str
    tokenizer: str
    fingerprint: str
    bytes_per_id: int
    valid_fraction: float
    shard_tokens: int

    def check_same(self, other: dict[str, Any], out: Any) -> None:
        """Raise ValueError, with both values, where `out` was begun by another job."""
        moved = ("source", "tokenizer")  # names; what they stand for has a fingerprint
        for name, value in dataclasses.asdict(self).items():
            if name not in moved and other.get(name) != value:
                what = {"text": "source", "fingerprint": "tokenizer"}.get(name, name)
                then, now = other.get(what), getattr(self, what)
                if then == now:
                    then, now = f"{then} (as it was then)", f"{now} (as it is now)"
                raise ValueError(
                    f"{out} was begun with {what} {then}, now {now}; give another --out, or the "
                    "command it was begun with"
                )


@dataclasses.dataclass(frozen=True)
class File:
    """A file of the directory, with its size and CRC-32."""

    file: str
    bytes: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class Shard(File):
    documents: int
    tokens: int
    records: int


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents of the corpus in its order.

    Attributes:
      shards: of the documents.
      lengths: file of uint32, tokens of every document.
      group_tokens: tokens of every `GROUP_DOCUMENTS` documents.
      group_records: records in front of every group.
      content: hash over the hashes of the texts.
      hashes: file of uint64, hashes of the texts; only where the reader holds out.
    """

    shards: tuple[Shard, ...]
    lengths: File
    group_tokens: tuple[int, ...]
    group_records: tuple[int, ...]
    content: str
    hashes: File | None = None

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory holds.

    Attributes:
      job: that wrote it.
      max_id: the largest id in the text.
      held_out: 'hash': the documents of the split 'valid'. 'reader': the reader applies
        `TokenizedDocuments.split`, because the corpus is small. 'none'.
      splits: 'train', and 'valid' where documents are held out by hash.
    """

    job: Job
    max_id: int
    held_out: str
    splits: Mapping[str, Split]

    def files(self) -> Iterator[File]:
        """All files of the directory besides the manifest."""
        for split in self.splits.values():
            yield from (*split.shards, split.lengths, *filter(None, [split.hashes]))

    def to_json(self) -> dict[str, Any]:
        counts = {
            name: {"documents": split.documents, "tokens": split.tokens}
            for name, split in self.splits.items()
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "group_documents": GROUP_DOCUMENTS,
            "part_tokens": PART_TOKENS,
            "counts": counts,
            **dataclasses.asdict(self),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """Raises KeyError or TypeError for other JSON."""
        splits = {
            name: Split(
                tuple(Shard(**shard) for shard in split["shards"]),
                File(**split["lengths"]),
                tuple(split["group_tokens"]),
                tuple(split["group_records"]),
                split["content"],
                File(**split["hashes"]) if split["hashes"] else None,
            )
            for name, split in values["splits"].items()
        }
        return cls(Job(**values["job"]), values["max_id"], values["held_out"], splits)


def load_manifest(directory: str | os.PathLike) -> Manifest | None:
    """The manifest of a directory; None where it holds no tokenised text.

    Raises:
      ValueError: the manifest is damaged, or of another version.
    """
    file = paths.path_of(directory) / MANIFEST
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        if values.get("format") != FORMAT:
            return None
        version = values["version"]
        sizes = values["group_documents"], values["part_tokens"]
        if version != VERSION or sizes != (GROUP_DOCUMENTS, PART_TOKENS):
            raise ValueError(
                f"{file} is of format version {version}, groups and parts {sizes}; this version "
                f"reads {VERSION}, {(GROUP_DOCUMENTS, PART_TOKENS)}. Tokenise the text again"
            )
        return Manifest.from_json(values)
    except (AttributeError, KeyError, TypeError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); remove the directory and tokenise the text again"
        ) from error
