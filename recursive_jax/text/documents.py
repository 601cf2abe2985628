"""Where training text comes from: readers that turn one `source` string into documents.

A source is a comma-separated list of

* `book.txt`, `page.md`: the file;
* `lines.jsonl`, `.jsonl.gz`, `.jsonl.zst`: the `text` field of every line;
* `DIR`: all of these below the directory, in sorted order. Other files there are counted in a
  warning. A README.md beside nothing but other files is no corpus;
* `tfds:NAME`, `tfds:DIR`: a TFDS data set stored as array_record, its split `train` or the one
  named behind an `@`, as in `tfds:lm1b@train[:10%]`;
* `docstrings`, `docstrings:N`: what the installed Python packages say about themselves, N MB at
  most.

Nothing here imports TensorFlow, and nothing installed is imported in order to read its docstrings.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from recursive_jax import paths
from recursive_jax.text import docstrings, readers

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst")
# Names of text files that describe the other files of a directory.
CARDS = "readme license licence copying notice changelog contributing citation authors".split()


Reader = Callable[[], Iterator[tuple[str, str | Iterable[str]]]]
TFDS_UNIT = 10_000  # records


@dataclasses.dataclass(frozen=True)
class Documents:
    """A stream of documents that can be read again and again, always in the same order.

    Attributes:
      source: what the user asked for.
      fingerprint: changes when the listing (names, sizes, modification times, versions) does, and
        is known without reading the text: the key of every cache.
      num_chars: estimate of the characters to come, for progress bars.
      read: starts a new pass; yields `(name, text)`. The name says where the text came from. The
        text is a string, or an iterable of strings where a document may be too large for memory.
      units: readers of consecutive parts of the stream, such as its files: a job that goes on
        starts at one of them. Empty: `read` is the only one.

    Iterating yields `(name, text)` with every text as one string.
    """

    source: str
    fingerprint: str
    num_chars: int
    read: Reader
    units: tuple[Reader, ...] = ()

    def read_from(self, unit: int, number: int) -> Iterator[tuple[int, int, str | Iterable[str]]]:
        """`(unit, number, text)` from document `number` of a unit on; numbers count in the unit."""
        units = self.units or (self.read,)
        for u in range(unit, len(units)):
            first = number if u == unit else 0
            for n, (_, text) in enumerate(units[u]()):
                if n >= first:
                    yield u, n, text

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for name, text in self.read():
            yield name, text if isinstance(text, str) else "".join(text)


def documents(source: str) -> Documents:
    """The documents of a source (grammar above); listing is immediate, reading is lazy.

    Raises:
      FileNotFoundError: a file, directory or TFDS data set does not exist.
      ValueError: an item is none of the above, a directory holds no text, or the package that
        reads an item is not installed.
    While reading: ValueError naming file and line for text that is not UTF-8, malformed JSON, a
    missing `text` field or half a surrogate pair in it.
    """
    items = [item.strip() for item in source.split(",") if item.strip()]
    if not items:
        raise ValueError(
            "no data source given; expected files, directories, tfds:NAME or docstrings, "
            "separated by commas"
        )
    parts = [_open_item(item) for item in items]

    def read():
        for part in parts:
            yield from part.read()

    return Documents(
        source,
        _digest([part.fingerprint for part in parts]),
        sum(part.num_chars for part in parts),
        read,
        tuple(unit for part in parts for unit in part.units or (part.read,)),
    )


def _open_item(item: str) -> Documents:
    if item == "docstrings" or item.startswith("docstrings:"):
        return _docstrings(item)
    if item.startswith("tfds:"):
        return _tfds(item, item.removeprefix("tfds:"))
    path = paths.path_of(item)
    if not path.exists():
        raise FileNotFoundError(
            f"data source {item!r} does not exist; expected a file or directory of "
            f"{', '.join(SUFFIXES)}, tfds:NAME, or docstrings"
        )
    if path.is_dir() and (path / "dataset_info.json").exists():
        return _tfds(item, item)
    return _files(item, path)


# Files


def _files(item: str, path: Any) -> Documents:
    if path.is_dir():
        files = _text_files(item, path)
    elif path.name.endswith(SUFFIXES):
        files = [(path.name, path)]
    else:
        raise ValueError(
            f"cannot read {item} as training text; expected a name ending in {', '.join(SUFFIXES)}"
        )
    for _, file in files:
        if file.name.endswith(".zst"):  # an error before the text is read
            readers.load_zstandard(file)
            break
    listing = [(name, paths.size(file), paths.modified(file)) for name, file in files]

    def read_file(file):
        if file.name.endswith((".txt", ".md")):
            yield str(file), readers.read_text(file)
        else:
            yield from readers.read_jsonl(file)

    def read():
        for _, file in files:
            yield from read_file(file)

    packed = 3  # what gzip and zstd make of English, roughly
    size = sum(n * (packed if name.endswith((".gz", ".zst")) else 1) for name, n, _ in listing)
    units = tuple(functools.partial(read_file, file) for _, file in files)
    return Documents(item, _digest(listing), size, read, units)


def _text_files(item: str, directory: Any) -> list[tuple[str, Any]]:
    """The files with text below a directory, sorted: their names in it, and paths.

    A warning says how many others there are.

    Raises:
      ValueError: there is no text, or only a README or the like beside other files.
    """
    files, others = [], []
    for name, file in sorted(_files_below(directory), key=lambda found: found[0].split("/")):
        if name.endswith(SUFFIXES):
            files.append((name, file))
        elif not any(part.startswith(".") for part in name.split("/")):
            others.append(name)
    expected = f"{', '.join(SUFFIXES)} files"
    if not files and not others:
        raise ValueError(f"no text in directory {item}; expected {expected}")
    if others:
        unread = others[0] + (f" and {len(others) - 1} more" if others[1:] else "")
        if not files:
            raise ValueError(f"no text in directory {item}; expected {expected}, found {unread}")
        if all(_is_card(file.name) for _, file in files):
            first = files[0][1]
            raise ValueError(
                f"no text in directory {item} but {first.name}: {unread} cannot be read; "
                f"expected {expected}. Write the texts as .jsonl, or give {first} by itself"
            )
        logging.warning(
            "%s: %d of %d files are left out, %s; expected %s",
            item, len(others), len(others) + len(files), unread, expected,
        )  # fmt: skip
    return files


def _files_below(directory: Any) -> Iterable[tuple[str, Any]]:
    if paths.is_remote(directory):
        return paths.files_below(directory)
    found = (path for path in directory.rglob("*") if path.is_file())
    return ((path.relative_to(directory).as_posix(), path) for path in found)


def _is_card(name: str) -> bool:
    """Whether a file describes its directory and holds no data: README.md, LICENSE.txt."""
    stem, _, suffix = name.lower().partition(".")
    return stem in CARDS and suffix in ("txt", "md")


# TFDS


def _tfds(item: str, name: str) -> Documents:
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data source {item!r}: a TFDS data set needs tensorflow-datasets, which is not "
            "installed; pip install 'recursive_jax[tfds]'"
        ) from error
    name, _, split = name.partition("@")
    split = split or "train"
    try:
        directory = name if "://" in name else str(pathlib.Path(name).expanduser())
        if "://" in name or (pathlib.Path(directory) / "dataset_info.json").exists():
            builder = tfds.builder_from_directory(directory)
        else:
            builder = tfds.builder(name, file_format="array_record")
        records = builder.as_data_source(split=split)
    except Exception as error:  # TFDS raises many kinds; all mean: not prepared here
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise FileNotFoundError(
            f"TFDS data set {name!r}, split {split!r}, cannot be read: {reason}. It "
            "must be prepared as array_record: "
            "tfds.builder(NAME, file_format='array_record').download_and_prepare()"
        ) from error
    field = _text_feature(builder.info.features, name)

    def read(start=0, stop=None):
        for i in range(start, len(records) if stop is None else min(stop, len(records))):
            text = records[i][field]
            yield f"{name}@{split}[{i}]", readers.decode(bytes(text), f"{name}@{split}[{i}]")

    info = builder.info
    listing = [str(builder.data_dir), info.full_name, split, len(records), info.dataset_size]
    units = tuple(
        functools.partial(read, start, start + TFDS_UNIT)
        for start in range(0, len(records), TFDS_UNIT)
    )
    return Documents(item, _digest(listing), int(info.splits[split].num_bytes), read, units)


def _text_feature(features, name: str) -> str:
    """The feature named `text`, or else the only one that holds strings."""
    from tensorflow_datasets import features as kinds

    strings = [key for key, value in features.items() if isinstance(value, kinds.Text)]
    if "text" in features:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise ValueError(
        f"cannot tell which feature of TFDS data set {name!r} is the text; expected one named "
        f"`text` or a single Text feature, found {sorted(features)}"
    )


# Docstrings


def _docstrings(item: str) -> Documents:
    limit = None
    if ":" in item:
        try:
            limit = int(float(item.removeprefix("docstrings:")) * 1e6)
        except ValueError as error:
            raise ValueError(
                f"{item!r}: expected docstrings or docstrings:N with N in megabytes, "
                "e.g. docstrings:20"
            ) from error
    modules = docstrings.modules()
    sizes = [file.stat().st_size for _, file in modules]
    fingerprint = _digest([sys.version, limit, [name for name, _ in modules], sizes])
    expected = sum(sizes) // 6  # the share of docstrings in source code

    def read():
        size = 0
        for name, text in docstrings.read(modules):
            yield name, text
            size += len(text)
            if limit is not None and size >= limit:
                return

    return Documents(item, fingerprint, min(expected, limit or expected), read)


def _digest(value) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
