"""Training data: documents -> token ids on disk -> packed rows -> shuffled batches.

    tokenized = tokenize(documents(source), encode_batch, fingerprint, cache_dir)
    rows = PackedRows(tokenized.split("train", 0.01), prefix, context_length, seed)
    for batch in batches(rows, batch_size, seed): ...

A packed row is a function of its index, the ids on disk and the seed. Counting, shuffling, sharding
over processes and resuming are therefore index arithmetic, which grain does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from flax import struct

from recursive_jax.text.documents import Documents
from recursive_jax.text.pieces import Piece, pieces
from recursive_jax.training import token_cache

CHARS_PER_CALL = 4_000_000  # per call of the tokenizer, which uses all cores


@struct.dataclass
class Batch:
    """One training batch, or one row of it when the leading axis is absent.

    Attributes:
      tokens: int32 `[B, T]`.
      targets: int32 `[B, T]`, the next token of the same document, else 0.
      weights: f32 `[B, T]`, 1 where the target is scored, else 0.
      positions: int32 `[B, T]`, restarting at 0 with every segment.
      segment_ids: int32 `[B, T]`, 1, 2, ... per document in the row, 0 on padding.
      teacher: `draws.Draws` from the teacher's distributions; None: the teacher runs in the step.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    teacher: Any = None


@dataclasses.dataclass(frozen=True)
class TokenizedDocuments:
    """Content ids (no BOS) of many documents in one array, usually memory-mapped.

    Attributes:
      ids: int32 `[total]`.
      starts, lengths: int64 `[D]`; document d is `ids[starts[d] : starts[d] + lengths[d]]`.
      hashes: uint64 `[D]`, of the texts; the held-out split is chosen by them.
    """

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, d: int) -> np.ndarray:
        """Content ids of document d, int32 `[lengths[d]]`; IndexError past the end."""
        return self.ids[self.starts[d] : self.starts[d] + self.lengths[d]]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def split(self, which: str, valid_fraction: float) -> TokenizedDocuments:
        """The 'train' part or the held-out 'valid' part; each token is in exactly one of them.

        A document is held out if the hash of its text is in the first `valid_fraction` of the
        range; at least one document is. A text is therefore always in the same part, whatever the
        rest of the corpus, and copies stay together. Where fewer than one held-out document is
        expected, the last `valid_fraction` of every document is held out instead.

        Raises:
          ValueError: nothing would be left to train on.
        """
        if which not in ("train", "valid"):
            raise ValueError(f"split {which!r}; expected 'train' or 'valid'")
        if not 0 < valid_fraction < 1:
            raise ValueError(f"valid_fraction={valid_fraction}; expected a number between 0 and 1")
        valid = which == "valid"
        if len(self) * valid_fraction < 1:
            tails = np.maximum((self.lengths * valid_fraction).astype(np.int64), 1)
            if len(self) and (tails == self.lengths).all():
                raise _nothing_to_train_on("every document has one token", valid_fraction)
            starts = self.starts + (self.lengths - tails if valid else 0)
            part = dataclasses.replace(
                self, starts=starts, lengths=tails if valid else self.lengths - tails
            )
            return part._take(part.lengths > 0)
        held_out = self.hashes.astype(np.float64) < valid_fraction * 2.0**64
        held_out |= self.hashes == self.hashes.min()
        if held_out.all():
            same = (self.hashes == self.hashes[0]).all()
            reason = "all documents have the same text" if same else "a share takes whole documents"
            raise _nothing_to_train_on(reason, valid_fraction)
        return self._take(held_out if valid else ~held_out)

    def without_first(self, tokens: int) -> TokenizedDocuments:
        """The documents without the first tokens of the corpus."""
        cut = np.clip(tokens - self.starts, 0, self.lengths)
        part = dataclasses.replace(self, starts=self.starts + cut, lengths=self.lengths - cut)
        return part._take(part.lengths > 0)

    def pieces(self, length: int) -> Iterator[np.ndarray]:
        """Content ids in pieces of at most `length`.

        The first piece of every document comes first, in shuffled order, then the second pieces,
        and so on. A few pieces are therefore from many documents.
        """
        order = np.random.default_rng(0).permutation(len(self))
        for start in range(0, int(self.lengths.max()), length):
            for d in order[self.lengths[order] > start]:
                yield self[d][start : start + length]

    def _take(self, mask: np.ndarray) -> TokenizedDocuments:
        return TokenizedDocuments(
            self.ids, self.starts[mask], self.lengths[mask], self.hashes[mask]
        )


def tokenize(
    docs: Documents,
    encode_batch: Callable[[list[str]], list[list[int]]],
    fingerprint: str,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> TokenizedDocuments:
    """Content ids of all documents; from the cache if they were tokenised before.

    Args:
      docs: the documents; empty ones are left out.
      encode_batch: texts -> ids without BOS, see `text.encode_batch`.
      fingerprint: of the tokenizer. The cache entry is named by it and by that of the documents.
      cache_dir: directory of the cache; None: `default_cache_dir()`. Entries are written whole or
        not at all, so runs may share a directory and may be killed.
      progress: show a progress bar after a few seconds.

    The files of an entry have checksums, which are verified here. A damaged entry is made again.

    Raises:
      ValueError: there is no text, or a document cannot be read.
      OSError: the cache cannot be read or written.
    """
    cache = pathlib.Path(cache_dir or default_cache_dir()).expanduser()
    entry = cache / token_cache.name(docs.fingerprint, fingerprint)
    found = token_cache.load(entry)
    if found is None:
        found = token_cache.create(entry, docs, _contents(docs, encode_batch), progress)
    ids, lengths, hashes = found
    return TokenizedDocuments(ids, np.cumsum(lengths) - lengths, lengths, hashes)


def default_cache_dir() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root).expanduser() / "recursive_jax" / "tokens"


def _contents(docs: Documents, encode_batch) -> Iterator[token_cache.Content]:
    """The content ids of all documents, piece by piece."""
    found = (piece for _, text in docs.read() for piece in pieces(text, encode_batch))
    for chunk in _chunks(found):
        for piece, ids in zip(chunk, encode_batch([p.text for p in chunk]), strict=True):
            content = np.asarray(ids[piece.skip :], np.int32)
            yield token_cache.Content(piece.text[piece.overlap :], content, piece.last)


def _chunks(found: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces for one call of the tokenizer each."""
    chunk, size = [], 0
    for piece in found:
        chunk.append(piece)
        size += len(piece.text)
        if size >= CHARS_PER_CALL:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _nothing_to_train_on(reason: str, valid_fraction: float) -> ValueError:
    return ValueError(
        f"nothing is left to train on: {reason}, and the held-out share "
        f"(valid_fraction={valid_fraction}) took all; give more text, or held-out text of its own "
        "(data.valid)"
    )


class PackedRows:
    """Documents in shuffled order, each after BOS, laid end to end and cut into rows.

    `rows[i]` is a `Batch` of `[T]` arrays.

    A document that does not fit continues in the next row, as a new segment. That segment does not
    attend to the previous row, and begins with BOS again: models trained with BOS fail without it.
    Every content token is the target of exactly one weighted position. The last position of a row
    predicts the first token of the next row. Without a BOS rule, the first token of a document is
    not predicted.

    Args:
      docs: the documents to pack.
      prefix: ids of the BOS rule, may be empty.
      context_length: T.
      seed: of the document order; None keeps the order of the corpus.
    """

    def __init__(
        self,
        docs: TokenizedDocuments,
        prefix: Sequence[int],
        context_length: int,
        seed: int | Sequence[int] | None = None,
    ):
        if context_length <= len(prefix):
            raise ValueError(
                f"context_length={context_length} leaves no token for text after the BOS rule "
                f"{list(prefix)}; expected at least {len(prefix) + 1}"
            )
        if not len(docs):
            raise ValueError("no documents to pack: this part of the data is empty")
        if not len(prefix) and docs.lengths.max() < 2:
            raise ValueError(
                "no position to predict: every document is one token long, and the tokenizer puts "
                "no BOS in front of it; give longer documents"
            )
        self.docs = docs
        self._prefix = np.asarray(prefix, np.int32)
        self._length = context_length
        self._order = np.arange(len(docs))
        if seed is not None:
            self._order = np.random.default_rng(seed).permutation(len(docs))
        self._ends = np.cumsum(docs.lengths[self._order] + len(prefix))  # in the laid-out stream
        self._stride = context_length - len(prefix)  # stream tokens per row, besides BOS

    @property
    def num_tokens(self) -> int:
        """Content tokens of one epoch."""
        return self.docs.num_tokens

    @property
    def content(self) -> str:
        """Hash over the hashes of the documents: another text has another."""
        data = np.ascontiguousarray(self.docs.hashes).tobytes()
        return hashlib.blake2b(data, digest_size=8).hexdigest()

    def endless(self, seed: int) -> grain.MapDataset:
        """The rows of all epochs; each is shuffled anew by index arithmetic."""
        return grain.MapDataset.source(self).shuffle(seed=seed).repeat()

    def __len__(self) -> int:
        return int(-(-self._ends[-1] // self._stride))

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = Batch(
            tokens=np.zeros(self._length, np.int32),
            targets=np.zeros(self._length, np.int32),
            weights=np.zeros(self._length, np.float32),
            positions=np.zeros(self._length, np.int32),
            segment_ids=np.zeros(self._length, np.int32),
        )
        begin, end = i * self._stride, (i + 1) * self._stride
        first = int(np.searchsorted(self._ends, begin, side="right"))
        at = 0
        for segment, d in enumerate(range(first, len(self._ends)), 1):
            document = self.docs[self._order[d]]
            start = int(self._ends[d]) - len(document) - len(self._prefix)
            if start >= end:
                break
            at += self._fill(row, at, segment, document, max(begin - start, 0), end - start)
        return row

    def _fill(self, row: Batch, at: int, segment: int, document, low: int, high: int) -> int:
        """Write tokens [low, high) of BOS + document as a segment at `at`; returns its length."""
        bos = len(self._prefix)
        lead = self._prefix[:low]  # repeated in front of a continuation
        # One token more than the row holds is the target of the segment's last position.
        text = document[max(low - bos, 0) : max(high + 1 - bos, 0)]
        sequence = np.concatenate([lead, self._prefix[low : high + 1], text])
        length = len(lead) + min(high, bos + len(document)) - low
        here = slice(at, at + length)
        row.tokens[here] = sequence[:length]
        row.positions[here] = np.arange(length)
        row.segment_ids[here] = segment
        # Position p predicts sequence[p + 1]. Exceptions: BOS itself, and the first token of a
        # continuation, which the previous row predicts.
        predicted = np.arange(max(bos, len(lead) + 1), len(sequence))
        row.targets[at + predicted - 1] = sequence[predicted]
        row.weights[at + predicted - 1] = 1.0
        return length


class Rows(Protocol):
    """Rows of one epoch: `PackedRows`, or those of `token_rows`."""

    num_tokens: int  # content tokens of one epoch
    content: str  # changes with the text and the order of its rows

    def __len__(self) -> int: ...

    def endless(self, seed: int) -> grain.MapDataset: ...


def batches(
    rows: Rows,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    join: Callable[[int, Batch], Batch] | None = None,
) -> grain.DatasetIterator:
    """Endless iterator of `Batch`es of numpy arrays, reshuffled every epoch.

    Args:
      rows: of an epoch.
      batch_size: B over all processes; this process gets every `process_count`-th row of a batch.
      seed: of the row order.
      process_index, process_count: this process, and how many there are.
      join: number of a row in the run, counted over epochs, and the row -> the row with more.

    Returns:
      An iterator with `get_state() -> dict` (one number) and `set_state`. With the same arguments,
      a restored iterator continues exactly where the saved one was. The rows of the n-th batch over
      all processes do not depend on `process_count`.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {process_count} processes; "
            "expected a multiple"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}; expected 0..{process_count - 1}")
    endless = rows.endless(seed)
    if join is not None:
        endless = endless.map_with_index(join)
    share = endless[process_index::process_count]
    share = share.batch(batch_size // process_count, drop_remainder=True)  # endless: no remainder
    # One thread builds the next batch while a step runs. More would only wait for Python's lock.
    return iter(share.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
