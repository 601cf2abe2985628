"""What the decode engine needs of a model, and of a model's key/value cache.

Two models implement it: `scanned.ScannedModel` (XLA on any device, a paged cache on TPUs) and
`cpu.decoder.CpuModel` (kernels for one CPU). `decode_model` chooses between the two.

Axes: R rows of a pass, M backfill rows, N query heads, K kv heads, H head_dim, D embed, V vocab.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from recursive_jax.models.config import DecoderConfig


@struct.dataclass
class Backfill:
    """Keys and values of the loops that exited tokens skipped. M rows without queries.

    The state with which a token left replaces the states it never had: every layer projects it as
    it would project its own input. Backfill rows change no state.
    """

    x: jax.Array  # [M, D], the state with which the token left
    loop: jax.Array  # int32 [M], a loop that the token did not run
    position: jax.Array  # int32 [M]; >= cache.length: idle, writes nothing
    slot: jax.Array  # int32 [M]


@struct.dataclass
class Rows:
    """The rows of one pass: decode lanes first, then the tokens of at most one prompt."""

    loop: jax.Array  # int32 [R]
    position: jax.Array  # int32 [R]; >= cache.length: idle, writes nothing
    slot: jax.Array  # int32 [R]
    # The last `prompt` rows are consecutive tokens of one slot at one loop.
    prompt: int = struct.field(pytree_node=False, default=0)

    def with_backfill(self, backfill: Backfill | None) -> Rows:
        """Return these rows with the backfill rows after them: all rows with keys and values."""
        if backfill is None:
            return self
        return self.replace(
            loop=jnp.concatenate([self.loop, backfill.loop]),
            position=jnp.concatenate([self.position, backfill.position]),
            slot=jnp.concatenate([self.slot, backfill.slot]),
        )


class Cache(Protocol):
    """Keys and values of every loop, layer and slot. A pytree; row index == position."""

    AXES: dict[str, tuple[str, ...]]  # axes of each array; loop, layer and slot come first
    length: int  # rows of a slot

    @classmethod
    def unsupported(cls, cfg: DecoderConfig, dtype: Any, length: int) -> str | None:
        """Why this cache cannot serve a model, in words, or None if it can."""

    def check_slots(self, x: jax.Array, rows: Rows) -> jax.Array:
        """x `[R, D]` with NaN in rows of slots that are not there; ValueError outside of jit."""

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rows: Rows,
        layer: jax.Array,
        window: jax.Array | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[jax.Array, Cache]:
        """Write k and v, then return the attention of q over its slots, and the cache.

        Args:
          q: `[R, N, H]`, the queries of the first R of `rows`; the last `rows.prompt` of them are
            the prompt's.
          k, v: `[R + M, K, H]`, one for each of `rows`.
          rows: R + M rows.
          layer: int32 `[]`, layer of the block.
          window: int32 `[R]`, 0 = unlimited; None when no row is limited.

        Returns:
          `[R, N, H]`, and the cache with the new rows.
        """

    def copy_deeper(self, loops, slots, positions) -> Cache:
        """Copy the newest rows of tokens that left after `loops [S]` loops to all later loops."""

    def wipe(self, slot: jax.Array) -> Cache:
        """Fill one slot with zeros."""


class DecodeModel(Protocol):
    """A model that decodes. Hashable: it is a static argument of jitted functions."""

    cfg: DecoderConfig
    dtype: Any  # of states and of the cache
    attention: str  # how rows attend, for the start-up table

    def prepare(self, params: Any, donate: bool = False) -> Any:
        """Return params in the layout that the other methods take. Call it once, outside of jit.

        The given arrays are neither deleted nor changed; the result may contain some of them. A job
        that needs them no longer sets `donate`: arrays are then deleted as they are replaced, and
        the weights are in memory once.
        """

    def new_cache(self, num_slots: int, length: int) -> Cache:
        """Return an empty cache of `num_slots` slots with at least `length` rows each."""

    def embed(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Token embeddings: int `[R]` -> `[R, D]`."""

    def run_block(
        self,
        params: Any,
        x: jax.Array,
        rows: Rows,
        cache: Cache,
        backfill: Backfill | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Run the block once over x `[R, D]`, every row at its own loop.

        Backfill is written in the same pass, so that the weights are read once.

        Returns:
          `[R, D]` and the cache. Rows of slots that the cache does not have are NaN.

        Raises:
          ValueError: there are such rows, and the slots are known before the pass is compiled.
        """

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        """Final norm, head and softcap: `[R, D]` -> f32 `[R, V]`."""

    def top1(self, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Most likely token, its logit and the logsumexp of logits f32 `[R, V]`, each `[R]`.

        The token is the first of several equal ones; it is the last id where a logit is NaN.
        """
