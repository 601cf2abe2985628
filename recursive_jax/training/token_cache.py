"""The cache of tokenised text: entries that are written whole, and verified when they are read.

ENTRY/ids.i32      content ids of all documents, end to end
ENTRY/index.npz    lengths of the documents, and hashes of their texts
ENTRY/meta.json    where the text came from, and the CRC-32 of both files
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from recursive_jax.text.documents import Documents

VERSION = 2  # of the files; 2: with checksums
IDS, INDEX, META = "ids.i32", "index.npz", "meta.json"
PIECE_BYTES = 16 << 20  # a checksum reads a file in pieces of this size


class Entry(NamedTuple):
    """The content of an entry: ids int32 `[total]`, lengths int64 `[D]`, hashes uint64 `[D]`."""

    ids: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray


class Content(NamedTuple):
    """A piece of a document: its text, its content ids int32, whether the document ends here."""

    text: str
    ids: np.ndarray
    last: bool


def name(*fingerprints: str) -> str:
    """The name of the entry for documents and tokenizer of these fingerprints."""
    text = " ".join([str(VERSION), *fingerprints])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load(entry: pathlib.Path) -> Entry | None:
    """An entry, its ids memory-mapped; None when it is absent, damaged or without checksums."""
    try:
        expected = json.loads((entry / META).read_text())["crc32"]
        if any(_crc32(entry / file) != expected[file] for file in (IDS, INDEX)):
            return None
        with np.load(entry / INDEX) as index:
            lengths, hashes = index["lengths"], index["hashes"]
        return Entry(np.memmap(entry / IDS, np.int32, mode="r"), lengths, hashes)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def create(
    entry: pathlib.Path, docs: Documents, contents: Iterable[Content], progress: bool
) -> Entry:
    """Write an entry and load it; an entry that is there and damaged is replaced.

    Args:
      entry: its directory.
      docs: the documents, for messages and progress bar.
      contents: their pieces in order. A document without ids is left out.
      progress: show a progress bar after a few seconds.

    Raises:
      ValueError: no document has ids, or one cannot be read.
      OSError: the entry cannot be written.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        _write(partial, docs, contents, progress)
        _rename(partial, entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    found = load(entry)
    if found is None:
        raise OSError(
            f"the cache of tokenised text {entry} is not what has just been written to it; remove "
            "it, or set data.cache_dir to a directory on another disk"
        )
    return found


def _write(
    directory: pathlib.Path, docs: Documents, contents: Iterable[Content], progress: bool
) -> None:
    from tqdm import tqdm

    lengths, hashes, dropped = [], [], 0
    total = begin = checksum = 0
    digest, blank = hashlib.blake2b(digest_size=8), True  # of one document
    bar = tqdm(
        total=docs.num_chars,
        desc=f"tokenising {docs.source}",
        unit="char",
        unit_scale=True,
        delay=3,
        disable=not progress,
    )
    with bar, open(directory / IDS, "wb") as file:
        for text, ids, last in contents:
            data = ids.tobytes()
            file.write(data)
            checksum = zlib.crc32(data, checksum)
            total += len(ids)
            digest.update(text.encode("utf-8", "replace"))
            blank = blank and not text.strip()
            bar.update(len(text))
            if last:
                if total > begin:
                    lengths.append(total - begin)
                    hashes.append(int.from_bytes(digest.digest(), "big"))
                elif not blank:
                    dropped += 1
                begin, digest, blank = total, hashlib.blake2b(digest_size=8), True
        _sync(file)
    if not lengths:
        reason = "the tokenizer drops every character" if dropped else "every document is empty"
        raise ValueError(f"no text in {docs.source}: {reason}")
    if dropped:
        logging.warning(
            "%s: %d documents are left out; the tokenizer drops every character of them",
            docs.source,
            dropped,
        )
    buffer = io.BytesIO()
    np.savez(buffer, lengths=np.asarray(lengths, np.int64), hashes=np.asarray(hashes, np.uint64))
    index = buffer.getvalue()
    meta = {
        "source": docs.source,
        "documents": len(lengths),
        "crc32": {IDS: checksum, INDEX: zlib.crc32(index)},
    }
    for file_name, data in ((INDEX, index), (META, json.dumps(meta, indent=1).encode())):
        with open(directory / file_name, "wb") as file:
            file.write(data)
            _sync(file)
    _sync_directory(directory)
    logging.info("tokenised %s: %d documents, %d tokens", docs.source, len(lengths), total)


def _rename(partial: pathlib.Path, entry: pathlib.Path) -> None:
    try:
        os.replace(partial, entry)
    except OSError:  # a damaged entry has the name, or the whole one of a process that was faster
        if load(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.replace(partial, entry)
    _sync_directory(entry.parent)


def _crc32(file: pathlib.Path) -> int:
    checksum = 0
    with open(file, "rb") as data:
        while piece := data.read(PIECE_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _sync(file: io.BufferedWriter) -> None:
    """Write a file to the disk. After a power cut, a renamed file may otherwise hold zeros."""
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: pathlib.Path) -> None:
    """Write the names in a directory to the disk, where its file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
