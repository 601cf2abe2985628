"""Keys and values of every loop: one array, carried through the scans and updated in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from recursive_jax.models.config import DecoderConfig


@struct.dataclass
class KVCache:
    """`rows [loop, layer, slot, length, kv_heads, 2, head_dim]`, K and V interleaved.

    Row index == position, so the causal mask also hides stale rows of a reused slot. A write at a
    position >= length is dropped: that is how padding and idle lanes are masked. Carry the cache
    (never as scan input/output, never through a branching `cond`): it is then updated in place.
    """

    rows: jax.Array

    @classmethod
    def zeros(cls, cfg: DecoderConfig, num_slots: int, length: int, dtype=jnp.float32) -> KVCache:
        """An empty cache of `num_slots` requests of up to `length` tokens each."""
        shape = (cfg.num_loops, cfg.num_layers, num_slots, length, cfg.num_kv_heads, 2)
        return cls(rows=jnp.zeros((*shape, cfg.head_dim), dtype))

    @property
    def length(self) -> int:
        return self.rows.shape[3]

    @property
    def num_slots(self) -> int:
        return self.rows.shape[2]

    def write(self, k, v, loop, layer, slots, positions) -> KVCache:
        """Store k, v `[B, T, K, H]` at rows `(loop, layer, slots [B], positions [B, T])`.

        `loop` is a scalar or `[B]`. Positions must not be negative (a negative index would wrap).
        """
        new = jnp.stack([k, v], axis=3).astype(self.rows.dtype)  # [B, T, K, 2, H]
        loop = jnp.reshape(loop, (-1, 1))
        index = jnp.broadcast_arrays(loop, layer, slots[:, None], positions)
        return self.replace(
            rows=self.rows.at[tuple(index)].set(new, mode="drop", unique_indices=True)
        )

    def read(self, loop, layer, slots) -> tuple[jax.Array, jax.Array]:
        """All rows of the given slots `[B]` at `loop` (scalar or `[B]`): k, v `[B, S, K, H]`."""
        loop, slots = jnp.broadcast_arrays(loop, slots)

        def gathered(rows):
            return rows[loop, layer, slots]  # [B, S, K, 2, H]

        def sliced(rows):  # a TPU's gather of pieces this large goes through all of the cache
            at = [(loop[i], layer, slots[i], 0, 0, 0, 0) for i in range(slots.shape[0])]
            sizes = (1, 1, 1, *rows.shape[3:])
            return jnp.concatenate([jax.lax.dynamic_slice(rows, i, sizes)[0, 0] for i in at])

        rows = jax.lax.platform_dependent(self.rows, tpu=sliced, default=gathered)
        return rows[..., 0, :], rows[..., 1, :]

    def copy_deeper(self, loops, slots, positions) -> KVCache:
        """Tokens that left after `loops [S]` loops: their newest rows, again for every later loop.

        `slots` and `positions` are int32 `[S]`; a position >= length copies nothing.
        """
        # the two indices around the slice of layers put it second: [S, layer, K, 2, H]
        rows, newest = self.rows, self.rows[loops - 1, :, slots, positions]
        for loop in range(1, rows.shape[0]):
            at = jnp.where(loop >= loops, positions, self.length)
            rows = rows.at[loop, :, slots, at].set(newest, mode="drop", unique_indices=True)
        return self.replace(rows=rows)
