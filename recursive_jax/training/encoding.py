"""Documents to token ids, in this process or in several."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from recursive_jax.text import encode_batch
from recursive_jax.text.documents import Documents
from recursive_jax.text.pieces import Piece, pieces

CHARS_PER_CALL = 1_000_000  # per call of a tokenizer
CALLS_AHEAD = 2  # per worker: calls that wait for it

EncodeMany = Callable[[Iterator[list[str]]], Iterator[list[np.ndarray]]]


class Encoded(NamedTuple):
    """A document as ids.

    Attributes:
      unit, number: its place in `Documents.units`.
      hash: of the text, 64 bits; the held-out split is chosen by it.
      ids: int32, without BOS; empty where the tokenizer drops every character.
      chars: of the text.
      blank: the text is white space.
    """

    unit: int
    number: int
    hash: int
    ids: np.ndarray
    chars: int
    blank: bool


def encoded(
    docs: Documents, tokenizer: Any, encode_many: EncodeMany, start: tuple[int, int] = (0, 0)
) -> Iterator[Encoded]:
    """The documents of `docs` as ids, in order, from `start` (unit, number) on.

    The ids of one document are in memory at a time, besides some calls of the tokenizer.
    """
    places: collections.deque[tuple[int, int]] = collections.deque()
    waiting: collections.deque[list[Piece]] = collections.deque()

    def chunks() -> Iterator[list[str]]:
        chunk, size = [], 0
        for unit, number, document in docs.read_from(*start):
            places.append((unit, number))
            for piece in pieces(document, lambda texts: encode_batch(tokenizer, texts)):
                chunk.append(piece)
                size += len(piece.text)
                if size >= CHARS_PER_CALL:
                    waiting.append(chunk)
                    yield [piece.text for piece in chunk]
                    chunk, size = [], 0
        if chunk:
            waiting.append(chunk)
            yield [piece.text for piece in chunk]

    digest, parts, chars, blank = hashlib.blake2b(digest_size=8), [], 0, True
    for batch in encode_many(chunks()):
        for piece, ids in zip(waiting.popleft(), batch, strict=True):
            text = piece.text[piece.overlap :]
            digest.update(text.encode("utf-8", "replace"))
            parts.append(ids[piece.skip :])
            chars += len(text)
            blank = blank and not text.strip()
            if piece.last:
                value = int.from_bytes(digest.digest(), "big")
                yield Encoded(*places.popleft(), value, np.concatenate(parts), chars, blank)
                digest, parts, chars, blank = hashlib.blake2b(digest_size=8), [], 0, True


@contextlib.contextmanager
def encoder(tokenizer: Any, workers: int) -> Iterator[EncodeMany]:
    """A function that encodes batches of texts in order, in `workers` processes.

    With one worker no process is started; the tokenizer's own threads use all cores. The ids do
    not depend on the number of workers.

    Raises:
      OSError: a worker process ended.
    """
    if workers <= 1:
        yield lambda batches: (_arrays(tokenizer, texts) for texts in batches)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # a fork would inherit the locks of JAX's threads
    pool = futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,))

    def encode_many(batches):
        pending = collections.deque()
        try:
            for texts in batches:
                pending.append(pool.submit(_encode, texts))
                if len(pending) >= workers * CALLS_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process of the tokenizer ended, perhaps for lack of memory; run the same "
                "command to go on, with fewer --workers"
            ) from error

    try:
        yield encode_many
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_worker: dict[str, Any] = {}  # of a worker process: its tokenizer


def _start_worker(tokenizer: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the job stops us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each worker
    _worker["tokenizer"] = tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return _arrays(_worker["tokenizer"], texts)


def _arrays(tokenizer: Any, texts: Iterable[str]) -> list[np.ndarray]:
    return [np.asarray(ids, np.int32) for ids in encode_batch(tokenizer, list(texts))]
