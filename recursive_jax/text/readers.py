"""Readers of one file: plain text in blocks, and .jsonl, .jsonl.gz or .jsonl.zst by lines."""

from __future__ import annotations

import codecs
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator

BLOCK_BYTES = 1 << 20  # a text file is read in blocks of this size


def read_text(file: pathlib.Path) -> Iterator[str]:
    """The text of a file in blocks, without a byte order mark."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with file.open("rb") as data:
        while True:
            block = data.read(BLOCK_BYTES)
            pending = len(decoder.getstate()[0])  # of a character that began in the last block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                byte = position - pending + error.start
                raise ValueError(f"{file} is not UTF-8 text (byte {byte})") from error
            yield text if position else text.removeprefix("\ufeff")
            if not block:
                return
            position += len(block)


def read_jsonl(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    """The `text` fields of a .jsonl file, packed or not, with file and line.

    Raises:
      ValueError: names file and line of text that is not UTF-8, malformed JSON, a missing `text`
        field or half a surrogate pair in it.
    """
    number = 0
    try:
        for number, line in enumerate(_lines(file), 1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            content = decode(line, where)
            try:
                record = json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where} is not read: a number of too many digits, or lists too deep in each "
                    "other; mend or remove it"
                ) from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                found = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(
                    f'{where} has no string field "text" (found {found}); '
                    'every line must be an object like {"text": "..."}'
                )
            try:
                record["text"].encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f'{where}: half a surrogate pair in "text" (character {error.start}); mend it'
                ) from error
            yield where, record["text"]
    except (EOFError, OSError, zlib.error) as error:  # what damaged files raise
        raise ValueError(f"{file} is damaged after line {number}: {error}") from error


def _lines(file: pathlib.Path) -> Iterator[bytes]:
    if file.name.endswith(".zst"):
        yield from _zstd_lines(file)
    else:
        with file.open("rb") as data:
            yield from gzip.open(data) if file.name.endswith(".gz") else data


def _zstd_lines(file: pathlib.Path) -> Iterator[bytes]:
    """Lines of one or more zstd frames. zstandard's own reader takes a cut file for a short one."""
    library = load_zstandard(file)
    frame, tail = None, b""
    with file.open("rb") as compressed:
        while data := compressed.read(1 << 20):
            while data:
                frame = frame or library.ZstdDecompressor().decompressobj()
                try:
                    *lines, tail = (tail + frame.decompress(data)).split(b"\n")
                except library.ZstdError as error:
                    raise OSError(str(error)) from error
                yield from lines
                data = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise OSError("the file ends inside a zstd frame")
    if tail:
        yield tail


def load_zstandard(file: pathlib.Path):
    """The module zstandard, or a ValueError that names the file which needs it."""
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{file}: reading .zst needs zstandard, which is not installed; "
            "pip install 'recursive_jax[train]'"
        ) from error
    return zstandard


def decode(data: bytes, where: str) -> str:
    """UTF-8 text without a byte order mark; `where` names it in a ValueError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start})") from error
