"""Writes a directory of tokenised text (`token_shards`), section by section.

    DIR/job.json                    what is being written; removed at the end
    DIR/section-00000.json          a finished section: counts, checksums, where the next one begins
    DIR/section-00000.train         its documents, and .lengths, .hashes of them; .valid likewise

A section is a run of consecutive documents. The same command goes on behind the last finished
section. At the end the files get their names, then the manifest is written. Sections do not depend
on the number of workers or on interruptions, so that the bytes of the directory do not either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from recursive_jax import file_lock, paths
from recursive_jax.text.documents import Documents
from recursive_jax.training.data import TokenizedDocuments
from recursive_jax.training.encoding import Encoded, encoded, encoder
from recursive_jax.training.section_writer import (
    SECTION,
    SIDECARS,
    SPLITS,
    Section,
    json_text,
    sidecar,
)
from recursive_jax.training.token_manifest import (
    GROUP_DOCUMENTS,
    MANIFEST,
    PART_TOKENS,
    File,
    Job,
    Manifest,
    Shard,
    Split,
    load_manifest,
)
from recursive_jax.training.token_shards import TokenDirectory

JOB, LOCK = "job.json", "job.lock"


def write(
    out: str | os.PathLike,
    job: Job,
    docs: Documents,
    tokenizer: Any,
    workers: int = 1,
    progress: Callable[[int], None] = lambda chars: None,
) -> Manifest:
    """The manifest of a finished directory; an interrupted one is gone on with.

    Args:
      out: the directory. It is absent, empty, or of the same job.
      job: what to write.
      docs: of `job.source`.
      tokenizer: of `job.fingerprint`.
      workers: processes that tokenise.
      progress: is called with the characters of each finished document.

    Raises:
      ValueError: the directory holds something else, or there is no text.
      OSError: a file cannot be written.
    """
    out = paths.path_of(out)
    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not paths.is_remote(out):
            stack.enter_context(file_lock.hold(out / LOCK, out, "--out"))
        return _write_alone(out, job, docs, tokenizer, workers, progress)


def _write_alone(out, job, docs, tokenizer, workers, progress) -> Manifest:
    """`write` once nobody else writes to the directory."""
    finished = begin(out, job)
    if isinstance(finished, Manifest):
        TokenDirectory(out, finished)  # raises where a file is missing or cut
        return finished
    start = tuple(finished[-1]["next"]) if finished else (0, 0)
    before = sum(s["splits"][which]["documents"] for s in finished for which in s["splits"])
    with encoder(tokenizer, workers) as encode_many:
        found = encoded(docs, tokenizer, encode_many, start)
        with tempfile.TemporaryDirectory() as scratch:
            local = pathlib.Path(scratch) if paths.is_remote(out) else out
            section = Section(out, local, len(finished), job.bytes_per_id)
            try:
                for which, doc in _routed(found, job.valid_fraction, before):
                    section.add(which, doc)
                    progress(doc.chars)
                    if section.tokens >= job.shard_tokens:
                        finished.append(section.close())
                        section = Section(out, local, len(finished), job.bytes_per_id)
                if section.next is not None:
                    finished.append(section.close())
            finally:
                section.discard()
    return finish(out, job, finished)


def check_out(out: Any) -> None:
    """Raise ValueError for an `out` that holds something else than tokenised text."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a directory as --out")
    if not out.is_dir() or load_manifest(out) is not None or (out / JOB).exists():
        return
    if any(file.name != LOCK for file in out.iterdir()):
        raise ValueError(
            f"{out} holds something else than tokenised text; choose another --out, or remove it"
        )


def begin(out: Any, job: Job) -> list[dict[str, Any]] | Manifest:
    """The finished sections of `out`, or its manifest; a new directory gets its job.json.

    Raises:
      ValueError: another job began to write there.
    """
    manifest = load_manifest(out)
    if manifest is not None:
        job.check_same(dataclasses.asdict(manifest.job), out)
        _remove_sections(out)
        return manifest
    if not (out / f"{SECTION.format(0)}.json").exists():  # nothing is lost by another job
        paths.write_whole(out / JOB, json_text(dataclasses.asdict(job)))
        return []
    job.check_same(_read(out / JOB), out)
    sections = []
    while (file := out / f"{SECTION.format(len(sections))}.json").exists():
        sections.append(_read(file))
    return sections


def _read(file: Any) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}); remove {file.parent} and start again"
        ) from error


def _routed(
    found: Iterable[Encoded], valid_fraction: float, before: int
) -> Iterator[tuple[str, Encoded]]:
    """Documents with their split, as `TokenizedDocuments.split` decides it.

    A corpus of fewer than 1 / valid_fraction documents is held out from by its reader. The first
    so many documents therefore wait until there are enough.

    Args:
      found: the documents.
      valid_fraction: share to hold out; 0: none.
      before: documents with ids in front of `found`.
    """
    waiting, count, enough = [], before, before * valid_fraction >= 1 or not valid_fraction

    def split_of(doc: Encoded) -> str:
        return "valid" if float(doc.hash) < valid_fraction * 2.0**64 else "train"

    for doc in found:
        if enough:
            yield split_of(doc), doc
            continue
        waiting.append(doc)
        count += len(doc.ids) > 0
        if count * valid_fraction >= 1:
            enough = True
            yield from ((split_of(doc), doc) for doc in waiting)
            waiting = []
    yield from (("train", doc) for doc in waiting)


def finish(out: Any, job: Job, sections: list[dict[str, Any]]) -> Manifest:
    """Give the files of all sections their names, and write the manifest last.

    Raises:
      ValueError: there is no text, or nothing is left to train on.
    """
    count = {which: sum(s["splits"][which]["documents"] for s in sections) for which in SPLITS}
    dropped = sum(s["dropped"] for s in sections)
    if not sum(count.values()):
        reason = "the tokenizer drops every character" if dropped else "every document is empty"
        raise ValueError(f"no text in {job.source}: {reason}")
    if dropped:
        logging.warning(
            "%s: %d documents are left out; the tokenizer drops every character of them",
            job.source, dropped,
        )  # fmt: skip
    held_out = "none" if not job.valid_fraction else "hash" if count["valid"] else "reader"
    if held_out == "reader":
        _check_split(out, job, sections)
    elif not count["train"]:
        raise ValueError(
            f"{job.source}: nothing is left to train on: the held-out share (valid_fraction="
            f"{job.valid_fraction}) took all documents; give more text, or a smaller share"
        )
    splits = {
        which: _finish_split(out, job, sections, which, held_out == "reader")
        for which in SPLITS
        if count[which]
    }
    manifest = Manifest(job, max(s["max_id"] for s in sections), held_out, splits)
    paths.write_whole(out / MANIFEST, json_text(manifest.to_json()))
    _remove_sections(out)
    return manifest


def _check_split(out: Any, job: Job, sections: list[dict[str, Any]]) -> None:
    """Raise the ValueError that a reader of this small corpus would meet."""
    lengths, hashes = (
        np.concatenate([sidecar(out, i, "train", kind) for i in range(len(sections))])
        for kind in SIDECARS
    )
    starts = np.zeros(len(lengths), np.int64)
    none = np.zeros(0, np.int32)
    whole = TokenizedDocuments(none, starts, lengths.astype(np.int64), hashes)
    try:
        whole.split("train", job.valid_fraction)
    except ValueError as error:
        raise ValueError(f"{job.source}: {error}") from error


def _finish_split(
    out: Any, job: Job, sections: list[dict[str, Any]], which: str, keep_hashes: bool
) -> Split:
    """The files of a split under their names."""
    used = [i for i, s in enumerate(sections) if s["splits"][which]["documents"]]
    shards = []
    for number, i in enumerate(used):
        made = out / f"{SECTION.format(i)}.{which}"
        name = f"{job.name}-{which}.array_record-{number:05d}-of-{len(used):05d}"
        if made.exists():  # else: renamed before an interruption
            made.replace(out / name)
        size = sections[i]["splits"][which]["bytes"]
        if not (out / name).exists() or paths.size(out / name) != size:
            raise ValueError(f"{out / name} is not what was written; remove {out} and start again")
        shards.append(Shard(name, **sections[i]["splits"][which]))
    group_tokens, group_records, records = [], [], 0
    content, rest = hashlib.blake2b(digest_size=8), np.zeros(0, "<u4")
    for i in used:
        content.update(sidecar(out, i, which, "hashes").tobytes())
        rest = np.concatenate([rest, sidecar(out, i, which, "lengths")])
        while len(rest) >= GROUP_DOCUMENTS or (len(rest) and i == used[-1]):
            group, rest = rest[:GROUP_DOCUMENTS].astype(np.int64), rest[GROUP_DOCUMENTS:]
            group_tokens.append(int(group.sum()))
            group_records.append(records)
            records += int((-(-group // PART_TOKENS)).sum())
    files = {
        kind: _join(out, job, which, kind, used)
        for kind in ("lengths", "hashes")
        if kind == "lengths" or keep_hashes
    }
    return Split(
        tuple(shards),
        files["lengths"],
        tuple(group_tokens),
        tuple(group_records),
        content.hexdigest(),
        files.get("hashes"),
    )


def _join(out: Any, job: Job, which: str, kind: str, used: list[int]) -> File:
    """One file of the `kind` files of all sections."""
    path = out / f"{job.name}-{which}.{kind}"
    with tempfile.TemporaryDirectory() as scratch:
        made = (pathlib.Path(scratch) if paths.is_remote(out) else out) / "section-all.partial"
        with open(made, "wb") as file:
            for i in used:
                file.write((out / f"{SECTION.format(i)}.{which}.{kind}").read_bytes())
        size = made.stat().st_size
        paths.put(made, path)
    return File(path.name, size, paths.crc32(path))


def _remove_sections(out: Any) -> None:
    for name in paths.entries(out):
        if name == JOB or name.startswith("section-") or name.endswith(".tmp"):
            (out / name).unlink(missing_ok=True)
