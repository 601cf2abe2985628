"""Log-probabilities of prompt tokens: a prompt pass of its own, with a chunked head.

Axes: C tokens of a chunk, K most likely tokens, D embed, V vocab.
"""

from __future__ import annotations

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


class Scorer:
    """Scores prompts at full depth.

    Args:
      model: of the engine.
      params: returns the weights, as `DecodeModel.prepare` returns them.
      context_length: tokens of a prompt, at most.
      num_top: most likely tokens of each position.
      precision: a context in which programs are compiled.
    """

    def __init__(
        self,
        model: DecodeModel,
        params: Callable[[], Any],
        context_length: int,
        num_top: int,
        precision: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        self._model, self._params, self._length = model, params, context_length
        self._num_top, self._precision = max(num_top, 1), precision
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

    def __call__(self, tokens: Sequence[int]) -> Scores:
        """The scores of a prompt; on one thread only."""
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
        logprobs, top, top_logprobs = map(np.concatenate, zip(*parts, strict=True))
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
        model, columns = self._model, jnp.arange(len(tokens), dtype=jnp.int32)
        # Padding writes beyond the cache, each token at another row: scatters need unique rows.
        position = jnp.where(columns < count, start + columns, cache.length + columns)
        zeros = jnp.zeros_like(columns)

        def loop(carry, number):
            x, cache = carry
            rows = Rows(zeros + number, position, zeros, prompt=len(tokens))
            return model.run_block(params, x, rows, cache), None

        loops = jnp.arange(model.cfg.num_loops, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(loop, (model.embed(params, tokens), cache), loops)

        def head(part):
            states, wanted = part
            logits = model.logits(params, states)
            log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            top, ids = jax.lax.top_k(logits, self._num_top)
            own = jnp.take_along_axis(logits, wanted[:, None], axis=-1)
            return (own - log_sum)[:, 0], ids, top - log_sum

        rows = min(HEAD_ROWS, len(tokens))
        split = (x.reshape(-1, rows, x.shape[-1]), targets.reshape(-1, rows))
        found = jax.lax.map(head, split)
        return cache, *jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)
