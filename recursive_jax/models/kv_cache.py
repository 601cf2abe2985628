"""Keys and values of every loop: carried through the scans and updated in place."""

from __future__ import annotations

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from recursive_jax.models.config import DecoderConfig


class Cache(abc.ABC):
    """What the two layouts share: `KVCache`, `RowCache`.

    Row index == position, so the causal mask also hides stale rows of a reused slot. A write at a
    position >= length is dropped: that is how padding and idle lanes are masked. Carry the cache
    (never as scan input/output, never through a branching `cond`): it is then updated in place.

    `AXES` names the axes of its arrays; loop, layer and slot come first. `BLOCK` is how many rows
    are best read at once.
    """

    AXES: ClassVar[dict[str, tuple[str, ...]]]
    BLOCK: ClassVar[int]

    @classmethod
    def zeros(cls, cfg: DecoderConfig, num_slots: int, length: int, dtype=jnp.float32):
        """An empty cache of `num_slots` requests of up to `length` tokens each."""
        sizes = {
            "loop": cfg.num_loops,
            "layer": cfg.num_layers,
            "slot": num_slots,
            "length": length,
            "kv_heads": cfg.num_kv_heads,
            "pair": 2,
            "head_dim": cfg.head_dim,
        }
        shape = lambda axes: tuple(sizes[axis] for axis in axes)  # noqa: E731
        return cls(**{name: jnp.zeros(shape(axes), dtype) for name, axes in cls.AXES.items()})

    @property
    def length(self) -> int:
        return self._size("length")

    @property
    def num_slots(self) -> int:
        return self._size("slot")

    @property
    def num_kv_heads(self) -> int:
        return self._size("kv_heads")

    def write(self, k, v, loop, layer, slots, positions):
        """Store k, v `[B, T, K, H]` at rows `(loop, layer, slots [B], positions [B, T])`.

        `loop` is a scalar or `[B]`. Positions must not be negative (a negative index would wrap).
        """
        loop = jnp.reshape(loop, (-1, 1))
        loop, layer, slots, positions = jnp.broadcast_arrays(loop, layer, slots[:, None], positions)
        rows = self._arrays_of(k, v)
        return self._updated(
            lambda name, array: array.at[self._row(name, loop, layer, slots, positions)].set(
                rows[name].astype(array.dtype), mode="drop", unique_indices=True
            )
        )

    @abc.abstractmethod
    def read(self, loop, layer, slots, start, size: int) -> tuple[jax.Array, jax.Array]:
        """Rows start … start + size - 1 of slots `[B]` at `loop` (scalar or `[B]`).

        k `[B, K, H, size]`, v `[B, K, size, H]`. All indices must be in range.
        """

    def copy_deeper(self, loops, slots, positions):
        """Tokens that left after `loops [S]` loops: their newest rows, again for every later loop.

        `slots` and `positions` are int32 `[S]`; a position >= length copies nothing.
        """
        layers = slice(None)

        def copied(name, array):
            # indices around slices: [S, layer, K, ...]
            newest = array[self._row(name, loops - 1, layers, slots, positions)]
            for loop in range(1, array.shape[0]):
                at = jnp.where(loop >= loops, positions, self.length)
                row = self._row(name, loop, layers, slots, at)
                array = array.at[row].set(newest, mode="drop", unique_indices=True)
            return array

        return self._updated(copied)

    def wipe(self, slot: jax.Array):
        """Zeros in one slot. Elementwise, so that it may be on any shard."""
        here = jnp.arange(self.num_slots) == slot

        def wiped(name, array):
            return jnp.where(here.reshape(1, 1, -1, *(1,) * (array.ndim - 3)), 0, array)

        return self._updated(wiped)

    @abc.abstractmethod
    def _arrays_of(self, k, v) -> dict[str, jax.Array]:
        """k and v as this layout stores them, by array, after two axes for rows."""

    def _row(self, name: str, loop, layer, slot, position) -> tuple:
        between = self.AXES[name].index("length") - 3
        return (loop, layer, slot, *(slice(None),) * between, position)

    def _updated(self, update):
        return self.replace(**{name: update(name, getattr(self, name)) for name in self.AXES})

    def _size(self, axis: str) -> int:
        name, axes = next(iter(self.AXES.items()))
        return getattr(self, name).shape[axes.index(axis)]


@struct.dataclass
class KVCache(Cache):
    """As the products of attention read them: keys transposed, heads before positions."""

    keys: jax.Array
    values: jax.Array

    AXES = {
        "keys": ("loop", "layer", "slot", "kv_heads", "head_dim", "length"),
        "values": ("loop", "layer", "slot", "kv_heads", "length", "head_dim"),
    }
    BLOCK = 64  # of all lanes together they stay in a CPU's cache

    def read(self, loop, layer, slots, start, size):
        loop, slots = jnp.broadcast_arrays(loop, slots)
        _, _, _, kv_heads, head_dim, _ = self.keys.shape

        def one(loop, slot):
            at = loop, layer, slot, 0
            k = (*at, 0, start), (1, 1, 1, kv_heads, head_dim, size)
            v = (*at, start, 0), (1, 1, 1, kv_heads, size, head_dim)
            slice_ = lambda array, where: jax.lax.dynamic_slice(array, *where)[0, 0, 0]  # noqa: E731
            return slice_(self.keys, k), slice_(self.values, v)

        return jax.vmap(one)(loop, slots)

    def _arrays_of(self, k, v):
        return {"keys": k, "values": v}


@struct.dataclass
class RowCache(Cache):
    """Row after row, K and V of a head side by side: what the TPU's kernel takes (`paged`)."""

    rows: jax.Array

    AXES = {"rows": ("loop", "layer", "slot", "length", "kv_heads", "pair", "head_dim")}
    BLOCK = 512  # as the kernel

    def read(self, loop, layer, slots, start, size):
        loop, slots = jnp.broadcast_arrays(loop, slots)

        def one(loop, slot):
            sizes = (1, 1, 1, size, *self.rows.shape[4:])
            at = loop, layer, slot, start, 0, 0, 0
            return jax.lax.dynamic_slice(self.rows, at, sizes)[0, 0, 0]

        # One by one: a TPU's gather of pieces this large goes through all of the cache.
        rows = jnp.stack([one(loop[i], slots[i]) for i in range(slots.shape[0])])
        return rows[..., 0, :].transpose(0, 2, 3, 1), rows[..., 1, :].transpose(0, 2, 1, 3)

    def _arrays_of(self, k, v):
        return {"rows": jnp.stack([k, v], axis=3)}
