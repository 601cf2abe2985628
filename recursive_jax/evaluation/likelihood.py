"""Log-likelihoods of continuations after every loop of a model.

Continuations of one context share a row: `[context, first, second, ...]`. They do not see each
other, and each goes on at the position where the context ends. The context is computed once.

Rows are padded to few lengths, so that few programs are compiled. Logits exist for a chunk of the
continuations' positions only: a head may have 262k columns.

Axes: E exits (loops executed), B rows, T positions of a row, C predicted positions, D embed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.attention import COMMON
from recursive_jax.models.chunked_head import chunk_length, cross_entropy
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import head_params

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context and of its continuation
FULL_ROWS = 512  # positions of a row up to which a call has all rows of a batch
NOTHING = -2  # segment id of padding


class Score(NamedTuple):
    """One continuation.

    Attributes:
      loglikelihood: nats, by loops executed.
      greedy: whether every token of it is the likeliest one, by loops executed.
    """

    loglikelihood: tuple[float, ...]
    greedy: tuple[bool, ...]


@dataclasses.dataclass
class Row:
    """A context with some of its continuations.

    Attributes:
      tokens, positions, segments: of the row, equally long.
      where: positions whose next token is predicted; `targets` are these tokens.
      owners: number of the pair that each prediction belongs to.
    """

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    where: list[int] = dataclasses.field(default_factory=list)
    targets: list[int] = dataclasses.field(default_factory=list)
    owners: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def of_context(cls, context: Sequence[int]) -> Row:
        length = len(context)
        return cls(list(context), list(range(length)), [COMMON] * length)

    def add(self, number: int, context_length: int, continuation: Sequence[int]) -> None:
        """Append a continuation; its last token is predicted only, and needs no position."""
        start, inputs = len(self.tokens), list(continuation[:-1])
        self.where += [context_length - 1, *range(start, start + len(inputs))]
        self.targets += continuation
        self.owners += [number] * len(continuation)
        self.tokens += inputs
        self.positions += range(context_length, context_length + len(inputs))
        self.segments += [number + 1] * len(inputs)


class Likelihoods:
    """Scores of (context, continuation) pairs under a model.

    Args:
      model: decoder of the params.
      params: nested, on the devices that compute.
      max_length: longest context with continuation that the model is given, less one. A longer
        context is cut from the left.
      batch_size: rows per call of the model; fewer where rows are long.
      all_loops: score after every loop, not only the last one.
      put: host batch -> device batch, in the sharding of the caller.
      replicated: sharding of the results; None on one device.
      use: a context in which the model runs, such as `sharding.use` of its mesh.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        max_length: int,
        batch_size: int = 8,
        all_loops: bool = False,
        put: Callable[[Any], Any] = jax.device_put,
        replicated: Any = None,
        use: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        self._params, self._put, self._use = params, put, use
        self._max_length, self._batch_size, self._shards = max_length, batch_size, model.data_shards
        self._states, self._score = _states(model, all_loops), _scorer(model, replicated)
        self.num_exits = model.cfg.num_loops if all_loops else 1

    def __call__(self, pairs: Sequence[Pair]) -> Iterator[tuple[float, dict[int, Score]]]:
        """(share of the work that is done, scores by number of the pair) of each batch.

        Raises:
          ValueError: a context or a continuation is empty, or a continuation is too long.
        """
        batches = list(self._batches(make_rows(pairs, self._max_length)))
        total, done = sum(rows * length for _, rows, length in batches), 0
        for batch, rows, length in batches:
            with self._use():
                scores = self._run(batch, rows, length)
            done += rows * length
            yield done / total, scores

    def _batches(self, rows: list[Row]) -> Iterator[tuple[list[Row], int, int]]:
        """(rows, rows of the padded batch, their padded length); the longest first."""
        by_length: dict[int, list[Row]] = {}
        for row in rows:
            by_length.setdefault(padded_length(len(row.tokens)), []).append(row)
        for length in sorted(by_length, reverse=True):
            same = sorted(by_length[length], key=lambda row: -len(row.where))
            size = max(1, self._batch_size * FULL_ROWS // max(length, FULL_ROWS))
            size = -(-size // self._shards) * self._shards
            for start in range(0, len(same), size):
                yield same[start : start + size], size, length

    def _run(self, batch: list[Row], rows: int, length: int) -> dict[int, Score]:
        """The scores of one batch, which is padded to `[rows, length]`."""
        most = max(len(row.where) for row in batch)
        predicted = 4 ** -(-(most - 1).bit_length() // 2)  # 1, 4, 16, 64, ...
        tokens, positions, segments = (np.zeros((rows, length), np.int32) for _ in range(3))
        where, targets = (np.zeros((rows, predicted), np.int32) for _ in range(2))
        segments += NOTHING
        for n, row in enumerate(batch):
            tokens[n, : len(row.tokens)] = row.tokens
            positions[n, : len(row.tokens)] = row.positions
            segments[n, : len(row.tokens)] = row.segments
            where[n, : len(row.where)] = row.where
            targets[n, : len(row.where)] = row.targets
        inputs = self._put((tokens, positions, segments, where, targets))
        hidden = self._states(self._params, *inputs[:3])
        found = self._score(head_params(self._params), hidden, *inputs[3:])
        logprobs, likeliest = (np.asarray(x) for x in found)  # [E, B, C]
        sums: dict[int, Any] = {}
        right: dict[int, Any] = {}
        for n, row in enumerate(batch):
            for c, number in enumerate(row.owners):
                sums[number] = sums.get(number, 0.0) + logprobs[:, n, c].astype(np.float64)
                right[number] = right.get(number, True) & likeliest[:, n, c]
        return {n: Score(tuple(sums[n].tolist()), tuple(right[n].tolist())) for n in sums}


def make_rows(pairs: Sequence[Pair], max_length: int) -> list[Row]:
    """Rows that hold all pairs, each once.

    Raises:
      ValueError: a context or a continuation is empty, or a continuation is too long.
    """
    rows: list[Row] = []
    by_context: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            empty = "continuation" if context else "context"
            raise ValueError(f"the {empty} of pair {number} has no tokens; expected at least one")
        if len(continuation) > max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, the model's context holds "
                f"{max_length}; shorten it or raise context_length"
            )
        key = tuple(context)[-(max_length + 1 - len(continuation)) :]
        row = by_context.get(key)
        if row is None or len(row.tokens) + len(continuation) - 1 > max(FULL_ROWS, len(key)):
            row = by_context[key] = Row.of_context(key)
            rows.append(row)
        row.add(number, len(key), continuation)
    return rows


def padded_length(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is no smaller."""
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


@functools.lru_cache(maxsize=8)
def _states(model: Decoder, all_loops: bool):
    """Jitted `(params, tokens, positions, segments [B, T]) -> hidden states [E, B, T, D]`."""

    @jax.jit
    def run(params, tokens, positions, segments):
        hidden = model.apply({"params": params}, tokens, positions, segments, all_loops=all_loops)
        return hidden if all_loops else hidden[None]

    return run


@functools.lru_cache(maxsize=8)
def _scorer(model: Decoder, replicated: Any):
    """Jitted; returns log-probabilities of targets, f32 `[E, B, C]`, and whether likeliest, bool.

    Its arguments: params of the head; hidden `[E, B, T, D]`; where, targets int `[B, C]`. It is not
    one program with `_states`, which takes longer to compile and does not depend on C.
    """

    @functools.partial(jax.jit, out_shardings=replicated)
    def score(head, hidden, where, targets):
        hidden = jnp.take_along_axis(hidden, where[None, :, :, None], axis=2)  # [E, B, C, D]
        exits, rows, predicted = hidden.shape[:3]
        chunk = chunk_length(
            -(-rows // model.data_shards), predicted, model.cfg.vocab_size, exits, 256 << 20
        )
        chunk = 1 << (chunk.bit_length() - 1)  # a power of two divides `predicted`, one of four

        def split(x, axis):
            x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        def run(args):
            states, wanted = args  # [E, B, c, D], [B, c]
            out = []
            for x in states:
                logits = model.apply({"params": head}, x, method="unembed")
                out.append((-cross_entropy(logits, wanted), logits.argmax(-1) == wanted))
            return tuple(jnp.stack(x) for x in zip(*out, strict=True))

        found = jax.lax.map(run, (split(hidden, 2), split(targets, 1)))  # [n, E, B, c]
        return tuple(jnp.moveaxis(x, 0, 2).reshape(exits, rows, predicted) for x in found)

    return score
