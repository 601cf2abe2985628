"""Log-probabilities of prompt tokens: a prompt pass of its own, with a chunked head.

Axes: C tokens of a chunk, K most likely tokens, D embed, V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.interface import DecodeModel, Rows

CHUNKS = (32, 128, 512)  # tokens of a pass; a program is compiled for each that is needed
HEAD_ROWS = 32  # whose logits exist at a time: a head may have 262k columns


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
      context_length: tokens of a prompt, at most.
      num_top: most likely tokens of each position.
    """

    def __init__(self, model: DecodeModel, context_length: int, num_top: int):
        self._model, self._length, self._num_top = model, context_length, max(num_top, 1)
        self._cache: Any = None
        self._run = jax.jit(self._chunk, donate_argnums=1)
        self._by_loop: dict[int, Callable] = {}  # compiled, by the size of chunks

    def __call__(self, params: Any, tokens: Sequence[int]) -> Scores:
        """The scores of a prompt; `params` as `DecodeModel.prepare` returns them."""
        logprobs, top, top_logprobs = self._over(tokens, functools.partial(self._run, params))
        pairs = [
            list(zip(*row, strict=True))
            for row in zip(top.tolist(), top_logprobs.tolist(), strict=True)
        ]
        return Scores(logprobs[:-1].tolist(), pairs)

    def compile_by_loop(self, params: Any, length: int) -> None:
        """Compile `by_loop` for prompts of so many tokens; for any thread."""
        size = _size(length)
        if size not in self._by_loop:
            cache = jax.eval_shape(lambda: self._model.new_cache(1, self._length))
            ids, number = jax.ShapeDtypeStruct((size,), jnp.int32), np.int32(0)
            run = jax.jit(self._chunk_by_loop, donate_argnums=1)
            self._by_loop[size] = run.lower(params, cache, ids, ids, number, number).compile()

    def by_loop(self, params: Any, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities of tokens 1, 2, … after every loop: f32 `[T - 1, num_loops]`.

        `compile_by_loop` comes first.
        """
        run = functools.partial(self._by_loop[_size(len(tokens))], params)
        return self._over(tokens, run)[0][:-1]

    def _over(self, tokens: Sequence[int], run: Callable) -> list[np.ndarray]:
        """What `run` returns beside the cache, of all chunks in one; one row for each token."""
        ids = np.asarray(tokens, np.int32)
        targets = np.append(ids[1:], 0).astype(np.int32)
        size = _size(len(ids))
        if self._cache is None:
            self._cache = self._model.new_cache(1, self._length)
        parts = []
        for start in range(0, len(ids), size):
            count = min(size, len(ids) - start)
            chunk = [np.pad(x[start : start + count], (0, size - count)) for x in (ids, targets)]
            cache, self._cache = self._cache, None  # donated
            self._cache, *found = run(cache, *chunk, np.int32(start), np.int32(count))
            parts.append([np.asarray(x)[:count] for x in found])
        return list(map(np.concatenate, zip(*parts, strict=True)))

    def _states(self, params, cache, tokens, start, count):
        """Run one chunk through all loops; returns the cache, and the states `[L, C, D]`."""
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

    def _chunk_by_loop(self, params, cache, tokens, targets, start, count):
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

    def _chunk(self, params, cache, tokens, targets, start, count):
        """Run one chunk.

        Returns:
          the cache; log-probabilities of the targets f32 [C]; the most likely tokens int32 [C, K]
          and their log-probabilities f32 [C, K].
        """
        model = self._model
        cache, states = self._states(params, cache, tokens, start, count)
        x = states[-1]

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


def _size(length: int) -> int:
    """Tokens of the chunks of a prompt."""
    return next((c for c in CHUNKS if c >= length), CHUNKS[-1])
