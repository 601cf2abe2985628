"""The scanned `Decoder` as a `DecodeModel`: XLA on every device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax.models.decoder import Decoder
from recursive_jax.models.interface import Backfill, Rows
from recursive_jax.models.kv_cache import KVCache
from recursive_jax.models.parameters import head_params


@dataclasses.dataclass(frozen=True)
class ScannedModel:
    """Implements `interface.DecodeModel`.

    Attributes:
      decoder: the network.
      cache_class: how keys and values are stored, and how rows attend to them.
      block_length: the most cache rows that are read at once; None: the cache's own.
      attention: how rows attend, in words.
    """

    decoder: Decoder
    cache_class: type = KVCache
    block_length: int | None = None
    attention: str = "XLA"

    @property
    def cfg(self):
        return self.decoder.cfg

    @property
    def dtype(self):
        return self.decoder.dtype

    def prepare(self, params: Any, donate: bool = False) -> Any:
        del donate  # the arrays are used as they are
        return params

    def new_cache(self, num_slots: int, length: int):
        return self.cache_class.zeros(self.cfg, num_slots, length, self.dtype, self.block_length)

    def embed(self, params: Any, tokens: jax.Array) -> jax.Array:
        return self.decoder.apply({"params": params}, tokens, method="embed")

    def run_block(self, params: Any, x, rows: Rows, cache, backfill: Backfill | None = None):
        x = cache.check_slots(x, rows.with_backfill(backfill))
        return self.decoder.apply({"params": params}, x, rows, cache, backfill, method="run_block")

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        return self.decoder.apply({"params": head_params(params)}, x, method="unembed")

    def top1(self, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return top1(logits)


def top1(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`DecodeModel.top1` by XLA.

    Two reductions that a CPU vectorises; `jnp.argmax` is compiled into a scalar loop.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    return first_of(logits, top), top[:, 0], jax.nn.logsumexp(logits, axis=-1)


def first_of(x: jax.Array, value: jax.Array) -> jax.Array:
    """The first id where x `[R, V]` is `value [R, 1]`, or the last of all ids: int32 `[R]`."""
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == value, ids, x.shape[-1] - 1), axis=-1)
