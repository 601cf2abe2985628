"""Log-probabilities of prompt tokens: a prompt pass of its own, with a chunked head.

Axes: T tokens, C tokens of a chunk, L loops, K most likely tokens, D embed, V vocab.
"""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.interface import DecodeModel, Rows

CHUNKS = (32, 128, 512)  # tokens of a pass; a program is compiled for each that is needed
HEAD_ROWS = 32  # whose logits exist at a time: a head may have 262k columns


def _chunk_size(count: int) -> int:
    return next((c for c in CHUNKS if c >= count), CHUNKS[-1])


class Scores(NamedTuple):
    """Of every token but the first, and of the one that would follow the last.

    Attributes:
      logprobs: nats, of tokens 1, 2, … of the prompt.
      top: for positions 1, 2, … and the one after the prompt: `(token, log-probability)` of the
        most likely tokens, the likeliest first.
    """

    logprobs: list[float]
    top: list[list[tuple[int, float]]]


class PromptPass(abc.ABC):
    """Runs prompts through all loops.

    Args:
      model: of the engine.
      params: returns the weights, as `DecodeModel.prepare` returns them.
      context_length: tokens of a prompt, at most.
      precision: a context in which programs are compiled.
    """

    def __init__(
        self,
        model: DecodeModel,
        params: Callable[[], Any],
        context_length: int,
        precision: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        self._model, self._params, self._length = model, params, context_length
        self._precision = precision
        self._cache: Any = None
        self._compiled: dict[int, Any] = {}
        self._lock = threading.Lock()

    def prepare(self, count: int) -> None:
        """Compile what a prompt of so many tokens needs; on any thread."""
        size = _chunk_size(count)
        with self._lock:
            if size in self._compiled:
                return
            cache = jax.eval_shape(lambda: self._model.new_cache(1, self._length))
            ids, number = jax.ShapeDtypeStruct((size,), np.int32), np.int32(0)
            run = jax.jit(self._chunk, donate_argnums=1)
            with self._precision():
                lowered = run.lower(self._params(), cache, ids, ids, number, number)
                self._compiled[size] = lowered.compile()

    def _over(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """What `_chunk` returns beside the cache, of all chunks in one; on one thread only."""
        self.prepare(len(tokens))
        ids = np.asarray(tokens, np.int32)
        targets = np.append(ids[1:], 0).astype(np.int32)
        size = _chunk_size(len(ids))
        if self._cache is None:
            self._cache = self._model.new_cache(1, self._length)
        parts = []
        for start in range(0, len(ids), size):
            count = min(size, len(ids) - start)
            chunk = [np.pad(x[start : start + count], (0, size - count)) for x in (ids, targets)]
            where = np.int32(start), np.int32(count)
            cache, self._cache = self._cache, None  # donated
            self._cache, *found = self._compiled[size](self._params(), cache, *chunk, *where)
            parts.append([np.asarray(x)[:count] for x in found])
        return list(map(np.concatenate, zip(*parts, strict=True)))

    @abc.abstractmethod
    def _chunk(self, params, cache, tokens, targets, start, count):
        """Run one chunk; returns the cache and arrays `[C, …]`."""

    def _states(self, params, cache, tokens, start, count):
        """Run one chunk through all loops; returns the cache and the states `[L, C, D]`."""
        model, columns = self._model, jnp.arange(len(tokens), dtype=jnp.int32)
        # Padding writes beyond the cache, each token at another row: scatters need unique rows.
        position = jnp.where(columns < count, start + columns, cache.length + columns)
        zeros = jnp.zeros_like(columns)

        def loop(carry, number):
            x, cache = carry
            rows = Rows(zeros + number, position, zeros, prompt=len(tokens))
            x, cache = model.run_block(params, x, rows, cache)
            return (x, cache), x

        loops = jnp.arange(model.cfg.num_loops, dtype=jnp.int32)
        (_, cache), states = jax.lax.scan(loop, (model.embed(params, tokens), cache), loops)
        return cache, states


class Scorer(PromptPass):
    """Scores prompts at full depth.

    Args:
      num_top: most likely tokens of each position.
      others: as of `PromptPass`.
    """

    def __init__(self, *args: Any, num_top: int, **others: Any):
        super().__init__(*args, **others)
        self._num_top = max(num_top, 1)

    def __call__(self, tokens: Sequence[int]) -> Scores:
        """The scores of a prompt; on one thread only."""
        logprobs, top, top_logprobs = self._over(tokens)
        pairs = [
            list(zip(*row, strict=True))
            for row in zip(top.tolist(), top_logprobs.tolist(), strict=True)
        ]
        return Scores(logprobs[:-1].tolist(), pairs)

    def _chunk(self, params, cache, tokens, targets, start, count):
        """Run one chunk through all loops.

        Returns:
          the cache; log-probabilities of the targets f32 [C]; the most likely tokens int32 [C, K]
          and their log-probabilities f32 [C, K].
        """
        cache, states = self._states(params, cache, tokens, start, count)
        x = states[-1]

        def head(part):
            states, wanted = part
            logits = self._model.logits(params, states)
            log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            top, ids = jax.lax.top_k(logits, self._num_top)
            own = jnp.take_along_axis(logits, wanted[:, None], axis=-1)
            return (own - log_sum)[:, 0], ids, top - log_sum

        rows = min(HEAD_ROWS, len(tokens))
        split = (x.reshape(-1, rows, x.shape[-1]), targets.reshape(-1, rows))
        found = jax.lax.map(head, split)
        return cache, *jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)


class LoopScorer(PromptPass):
    """Scores prompts after every loop."""

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities of tokens 1, 2, …, f32 `[T - 1, L]`; on one thread only."""
        return self._over(tokens)[0][:-1]

    def _chunk(self, params, cache, tokens, targets, start, count):
        """Run one chunk; returns the cache, and log-probabilities of the targets f32 `[C, L]`."""
        cache, states = self._states(params, cache, tokens, start, count)

        def head(part):
            x, wanted = part
            logits = self._model.logits(params, x)
            own = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
            return own - jax.nn.logsumexp(logits, axis=-1)

        rows = min(HEAD_ROWS, len(tokens))
        wanted = jnp.broadcast_to(targets, states.shape[:2])
        split = states.reshape(-1, rows, states.shape[-1]), wanted.reshape(-1, rows)
        return cache, jax.lax.map(head, split).reshape(wanted.shape).T
