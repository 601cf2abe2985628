"""Batched, KV-cached decoding in lock step: all rows run all loops of every token together.

The exact reference of every faster engine, and what `generate` runs when nothing exits early. Two
kinds of executables, compiled before the first token and never again: prefill of a chunk of prompt
(one per chunk length) and decode of up to `MAX_STEPS` tokens per round trip to the host.

Axes: B rows of the batch (row i is slot i of the cache), C chunk length, D embed, V vocab.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recursive_jax.decoding.requests import Event, Request, Sampling, not_numbers
from recursive_jax.decoding.sampling import SamplingParams, sample
from recursive_jax.models.decoder import Decoder, head_params
from recursive_jax.models.kv_cache import KVCache

MAX_STEPS = 16  # tokens decoded per round trip to the host
# Prompt tokens run at once: enough to keep the arithmetic units busy, few enough for the scores.
PREFILL_TOKENS = 2048
CHUNK_LENGTHS = tuple(2**i for i in range(4, 10))  # of a row; each is one executable
NO_TOKEN = -1
CACHE_AXES = PartitionSpec("loop", "layer", "batch", None, "kv_heads", None, "head_dim")


@struct.dataclass
class Rows:
    """Where every row stands."""

    token: jax.Array  # int32 [B], the newest token, not run yet
    position: jax.Array  # int32 [B], where that token stands
    left: jax.Array  # int32 [B], tokens it may still bring; 0: finished or idle


@struct.dataclass
class Settings:
    """What every row was asked for; constant while a batch runs."""

    sampling: SamplingParams
    seeds: jax.Array  # uint32 [B]
    stop: jax.Array  # int32 [B, W], filled up with NO_TOKEN


@struct.dataclass
class Found:
    """New tokens on their way to the host; NO_TOKEN where a row brought none."""

    tokens: jax.Array  # int32 [n, B]
    logprobs: jax.Array  # f32 [n, B]


class Lockstep:
    """Runs batches of up to `num_rows` requests.

    Args:
      model: its dtype is also the cache's.
      params: on their devices.
      num_rows: B; on a mesh a multiple of the devices that share the batch.
      context_length: S, cache rows of a request: prompt and answer together fit into it.
      num_stop: W, the most stop ids any request has.
      mesh: the mesh `params` are sharded on; None for one device.
      rules: logical axis rules of that mesh.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        num_rows: int,
        context_length: int,
        num_stop: int = 4,
        mesh: Mesh | None = None,
        rules: Sequence[tuple[str, Any]] = (),
    ):
        self.model, self.params = model, params
        self.num_rows, self.context_length, self.num_stop = num_rows, context_length, num_stop
        self._mesh, self._rules = mesh, rules
        self._everywhere = cache_placed = None
        if mesh is not None:
            self._everywhere = NamedSharding(mesh, PartitionSpec())
            cache_placed = nn.logical_to_mesh_sharding(CACHE_AXES, mesh, rules)
        # The cache is donated, so updated in place; the rest is a few bytes per row.
        placed = (cache_placed, self._everywhere, self._everywhere)
        options = {"donate_argnums": 1, "out_shardings": placed}
        self._prefill = jax.jit(self._prefill_chunk, **options)
        self._decode = jax.jit(self._decode_steps, **options)
        self._new_cache = jax.jit(
            lambda: KVCache.zeros(model.cfg, num_rows, context_length, model.dtype),
            out_shardings=cache_placed,
        )
        self._cache: KVCache | None = self._new_cache()
        self._executables: dict[str | int, Any] = {}  # 'decode', and by chunk length

    def compile(self, longest_prompts: Sequence[int]) -> None:
        """Make what batches need whose longest prompts have these lengths in tokens."""
        if self._cache is None:  # lost with a call that failed
            self._cache = self._new_cache()
        rows, settings, _ = self._start([])

        def compiled(function, *arguments):
            with self._context():
                arguments = self._put((rows, settings, *arguments))
                return function.lower(self.params, self._cache, *arguments).compile()

        for length in {self.chunk_length(n) for n in longest_prompts} - set(self._executables):
            tokens = np.zeros((self.num_rows, length), np.int32)
            self._executables[length] = compiled(self._prefill, tokens, rows.position, np.int32(0))
        if "decode" not in self._executables:
            self._executables["decode"] = compiled(self._decode, np.int32(MAX_STEPS))

    def chunk_length(self, longest_prompt: int) -> int:
        """Columns of a prefill chunk: the smallest that takes the prompt at once, or the cap."""
        cap = max(PREFILL_TOKENS // self.num_rows, CHUNK_LENGTHS[0])
        allowed = [n for n in CHUNK_LENGTHS if n <= cap]
        return next((n for n in allowed if n >= longest_prompt), allowed[-1])

    @property
    def cache_bytes(self) -> int:
        return self._cache.rows.nbytes

    def memory(self) -> dict[str | int, Any]:
        """The compiler's memory analysis of every executable, by 'decode' or chunk length."""
        return {name: e.memory_analysis() for name, e in self._executables.items()}

    def run(self, requests: Sequence[Request], max_steps: int = MAX_STEPS) -> Iterator[Event]:
        """Answer up to `num_rows` requests.

        Yields:
          for each request the events of its tokens as they come back from the device: the first
          token, then at most `max_steps` at once. The last one has a `finish_reason`.

        Raises:
          ValueError: too many requests, or one that does not fit.
        """
        if not 1 <= max_steps <= MAX_STEPS:
            raise ValueError(f"max_steps={max_steps}; expected 1..{MAX_STEPS}")
        if not 1 <= len(requests) <= self.num_rows:
            raise ValueError(f"{len(requests)} requests; expected 1..{self.num_rows}")
        for request in requests:
            request.check_fits(self.context_length)
            if request.sampling.penalises:
                raise ValueError(
                    f"request {request.id!r} has penalties; lock step has none, use the engine"
                )
            if len(request.stop) > self.num_stop:
                raise ValueError(
                    f"request {request.id!r} has {len(request.stop)} stop ids; "
                    f"this batch was made for {self.num_stop}"
                )
        rows, settings, prompts = self._start(requests)
        self.compile([prompts.shape[1]])
        inbox = _Inbox(requests, self.model.cfg.num_loops)
        chunk, last = self.chunk_length(prompts.shape[1]), rows.position
        for start in range(0, prompts.shape[1], chunk):
            tokens = prompts[:, start : start + chunk]
            tokens = np.pad(tokens, ((0, 0), (0, chunk - tokens.shape[1])))
            rows, found = self._call(chunk, rows, settings, tokens, last, np.int32(start))
            yield from inbox.take(found)
        while inbox.open:
            rows, found = self._call("decode", rows, settings, np.int32(max_steps))
            yield from inbox.take(found)
        if inbox.poisoned:
            # The mask gives stale rows a weight of zero, but zero times NaN is NaN.
            self._cache = None  # first, so that there are never two
            self._cache = self._new_cache()

    def _start(self, requests: Sequence[Request]) -> tuple[Rows, Settings, np.ndarray]:
        """State before prefill, settings, prompts `[B, longest]`; spare rows are idle."""
        spare = self.num_rows - len(requests)
        column = lambda values, fill: np.asarray([*values, *[fill] * spare], np.int32)  # noqa: E731
        rows = Rows(
            token=np.zeros(self.num_rows, np.int32),
            position=column([len(r.tokens) - 1 for r in requests], -1),
            left=column([r.max_new_tokens for r in requests], 0),
        )
        stop = np.full((self.num_rows, self.num_stop), NO_TOKEN, np.int32)
        longest = max((len(r.tokens) for r in requests), default=1)
        prompts = np.zeros((self.num_rows, longest), np.int32)
        for i, request in enumerate(requests):
            stop[i, : len(request.stop)] = request.stop
            prompts[i, : len(request.tokens)] = request.tokens
        sampling = [r.sampling for r in requests] + [Sampling()] * spare
        seeds = np.asarray([s.seed for s in sampling], np.uint32)
        return rows, Settings(SamplingParams.stack(sampling), seeds, stop), prompts

    def _call(self, name: str | int, *arguments) -> tuple[Rows, Found]:
        cache, self._cache = self._cache, None  # donated: gone, even when the call fails
        executable = self._executables[name]
        self._cache, rows, found = executable(self.params, cache, *self._put(arguments))
        return rows, jax.device_get(found)

    def _put(self, arguments):
        """The same on all devices of the mesh, as the executables expect it."""
        if self._mesh is None:
            return arguments
        return jax.device_put(arguments, self._everywhere)

    def _context(self):
        if self._mesh is None:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(jax.set_mesh(self._mesh))
        stack.enter_context(nn.logical_axis_rules(self._rules))
        return stack

    # On the device.

    def _prefill_chunk(self, params, cache, rows, settings, tokens, last, start):
        """Columns `start + [0, C)` of the prompts; rows whose prompt ends here bring a token.

        tokens int32 `[B, C]`; last int32 `[B]`, position of each prompt's last token.
        """
        columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = start + columns
        # Padding stands at rows the cache does not have: its writes are dropped.
        positions = jnp.where(positions <= last[:, None], positions, cache.length + columns)
        hidden, cache = self.model.apply({"params": params}, tokens, positions, cache=cache)
        ends_here = (last >= start) & (last < start + tokens.shape[1])
        at = jnp.clip(last - start, 0, tokens.shape[1] - 1)
        hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
        rows, token, logprob = self._next(params, hidden, rows, settings, ends_here)
        return cache, rows, Found(token[None], logprob[None])

    def _decode_steps(self, params, cache, rows, settings, steps):
        """Up to `steps` tokens of every row, fewer when all rows finish before."""

        def step(carry):
            i, cache, rows, found = carry
            active = rows.left > 0
            positions = jnp.where(active, rows.position, cache.length)
            hidden, cache = self.model.apply(
                {"params": params}, rows.token[:, None], positions[:, None], cache=cache
            )
            rows, token, logprob = self._next(params, hidden[:, 0], rows, settings, active)
            found = Found(found.tokens.at[i].set(token), found.logprobs.at[i].set(logprob))
            return i + 1, cache, rows, found

        shape = (MAX_STEPS, rows.token.shape[0])
        found = Found(jnp.full(shape, NO_TOKEN, jnp.int32), jnp.zeros(shape, jnp.float32))
        _, cache, rows, found = jax.lax.while_loop(
            lambda carry: (carry[0] < steps) & jnp.any(carry[2].left > 0),
            step,
            (jnp.int32(0), cache, rows, found),
        )
        return cache, rows, found

    def _next(self, params, hidden, rows, settings, active):
        """Sample behind hidden `[B, D]`: rows moved on where `active`, token and log-prob `[B]`."""
        logits = self.model.apply({"params": head_params(params)}, hidden, method="unembed")
        position = rows.position + 1
        token, logprob = sample(logits, settings.sampling, settings.seeds, position)
        over = jnp.any(token[:, None] == settings.stop, axis=1) | jnp.isnan(logprob)
        left = jnp.where(over, 0, rows.left - 1)
        moved = Rows(token=token, position=position, left=left)
        rows = jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, rows)
        return rows, jnp.where(active, token, NO_TOKEN), logprob


class _Inbox:
    """Turns what comes back from the device into events, and knows who is not finished."""

    def __init__(self, requests: Sequence[Request], num_loops: int):
        self._requests, self._num_loops = requests, num_loops
        self._counts = [0] * len(requests)
        self.open = set(range(len(requests)))
        self.poisoned = False

    def take(self, found: Found) -> Iterator[Event]:
        for index in sorted(self.open):
            arrived = found.tokens[:, index] != NO_TOKEN
            if arrived.any():
                yield self._event(
                    index,
                    found.tokens[arrived, index].tolist(),
                    found.logprobs[arrived, index].tolist(),
                )

    def _event(self, index: int, tokens: list[int], logprobs: list[float]) -> Event:
        request, reason, error = self._requests[index], None, None
        self._counts[index] += len(tokens)
        if math.isnan(logprobs[-1]):
            reason, self.poisoned = "error", True
            error = not_numbers(self._counts[index])
        elif tokens[-1] in request.stop:
            reason = "stop"
        if reason:
            tokens, logprobs = tokens[:-1], logprobs[:-1]
        elif self._counts[index] == request.max_new_tokens:
            reason = "length"
        if reason:
            self.open.remove(index)
        loops = (self._num_loops,) * len(tokens)
        return Event(index, tuple(tokens), loops, tuple(logprobs), reason, error)
