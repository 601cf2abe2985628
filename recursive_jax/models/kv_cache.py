"""Keys and values of every loop: carried through the scans and updated in place."""

from __future__ import annotations

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from recursive_jax.models.config import DecoderConfig


class Cache(abc.ABC):
    """What the two layouts share: `KVCache`, `RowCache`.

    Row index == position, so the causal mask also hides stale rows of a reused slot. A write at a
    position >= length is dropped: that is how padding and idle lanes are masked. Carry the cache
    (never as scan input/output, never through a branching `cond`): it is then updated in place.

    `AXES` names the axes of its arrays; loop, layer and slot come first. `BLOCK` is how many rows
    are best read at once, `block_length` how many are.
    """

    AXES: ClassVar[dict[str, tuple[str, ...]]]
    BLOCK: ClassVar[int]

    @classmethod
    def zeros(cls, cfg: DecoderConfig, num_slots: int, length: int, dtype=jnp.float32):
        """An empty cache of `num_slots` requests of up to `length` tokens each, or some more."""
        blocks = -(-length // cls.BLOCK)
        rows = -(-length // blocks)
        sizes = {
            "loop": cfg.num_loops,
            "layer": cfg.num_layers,
            "slot": num_slots,
            "length": length,
            "block": blocks,
            # whole vectors of a CPU, unless one block holds all
            "row": rows if blocks == 1 else min(-(-rows // 8) * 8, cls.BLOCK),
            "kv_heads": cfg.num_kv_heads,
            "pair": 2,
            "head_dim": cfg.head_dim,
        }
        shape = lambda axes: tuple(sizes[axis] for axis in axes)  # noqa: E731
        return cls(**{name: jnp.zeros(shape(axes), dtype) for name, axes in cls.AXES.items()})

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Rows of a slot."""

    @property
    @abc.abstractmethod
    def block_length(self) -> int:
        """Rows that `read` reads."""

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
    def read(self, loop, layer, slots, block) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The rows of a block of every slot, at `loop`; slots, loop and block are `[B]`.

        k `[B, K, H, R]`, v `[B, K, R, H]`, and the position `[B]` of the first of the R rows: the
        last block may begin with rows of the one before. All indices must be in range.
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

    @abc.abstractmethod
    def _row(self, name: str, loop, layer, slot, position) -> tuple:
        """Index of rows in an array."""

    def _updated(self, update):
        return self.replace(**{name: update(name, getattr(self, name)) for name in self.AXES})

    def _size(self, axis: str) -> int:
        name, axes = next(iter(self.AXES.items()))
        return getattr(self, name).shape[axes.index(axis)]


@struct.dataclass
class KVCache(Cache):
    """As the products of attention read them: keys transposed, and what is read at once together.

    A block of a slot is one piece of memory: a CPU reads it nearly twice as fast as pieces of it
    that are a context apart.
    """

    keys: jax.Array
    values: jax.Array

    AXES = {
        "keys": ("loop", "layer", "slot", "block", "kv_heads", "head_dim", "row"),
        "values": ("loop", "layer", "slot", "block", "kv_heads", "row", "head_dim"),
    }
    BLOCK = (
        32  # the most decode_attention.cc takes: little is read in vain, and stays in a CPU's cache
    )

    @property
    def length(self):
        return self._size("block") * self.block_length

    @property
    def block_length(self):
        return self._size("row")

    def read(self, loop, layer, slots, block):
        def one(array, loop, slot, block):
            at, whole = (loop, layer, slot, block), array.shape[4:]
            return jax.lax.dynamic_slice(array, (*at, 0, 0, 0), (1, 1, 1, 1, *whole))[0, 0, 0, 0]

        of_lanes = jax.vmap(one, in_axes=(None, 0, 0, 0))
        k, v = (of_lanes(array, loop, slots, block) for array in (self.keys, self.values))
        return k, v, block * self.block_length

    def _row(self, name, loop, layer, slot, position):
        block, row = position // self.block_length, position % self.block_length
        heads = (slice(None),) * (self.AXES[name].index("row") - 4)
        return (loop, layer, slot, block, *heads, row)

    def _arrays_of(self, k, v):
        return {"keys": k, "values": v}


@struct.dataclass
class RowCache(Cache):
    """Row after row, K and V of a head side by side: what the TPU's kernel takes (`paged`)."""

    rows: jax.Array

    AXES = {"rows": ("loop", "layer", "slot", "length", "kv_heads", "pair", "head_dim")}
    BLOCK = 512  # as the kernel

    @property
    def length(self):
        return self._size("length")

    @property
    def block_length(self):
        return min(self.BLOCK, self.length)

    def read(self, loop, layer, slots, block):
        size = self.block_length
        start = jnp.minimum(block * size, self.length - size)
        # What is read keeps the order of the cache: that which the products of attention would
        # rather have, a TPU's compiler asks of the whole cache, and copies it in every layer.
        as_stored = Layout(major_to_minor=tuple(range(self.rows.ndim)))

        def one(loop, slot, start):
            sizes = (1, 1, 1, size, *self.rows.shape[4:])
            at = loop, layer, slot, start, 0, 0, 0
            rows = jax.lax.dynamic_slice(self.rows, at, sizes)
            return with_layout_constraint(rows, as_stored)[0, 0, 0]

        # One by one: a TPU's gather of pieces this large goes through all of the cache.
        rows = jnp.stack([one(loop[i], slots[i], start[i]) for i in range(slots.shape[0])])
        k, v = rows[..., 0, :].transpose(0, 2, 3, 1), rows[..., 1, :].transpose(0, 2, 1, 3)
        return k, v, start

    def _row(self, name, loop, layer, slot, position):
        return loop, layer, slot, position

    def _arrays_of(self, k, v):
        return {"rows": jnp.stack([k, v], axis=3)}
