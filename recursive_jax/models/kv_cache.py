"""Keys and values of every loop: carried through the scans and updated in place."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from recursive_jax.models.cached_attention import attend_cached
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.interface import Rows


class ArrayCache(abc.ABC):
    """What all layouts share; implements `interface.Cache`.

    Row index == position, so the causal mask also hides stale rows of a reused slot. A write at a
    position >= length is dropped: that is how padding and idle rows are masked. Carry the cache
    (never as scan input/output, never through a branching `cond`): it is then updated in place.

    Attributes:
      AXES: names of the axes of its arrays; loop, layer and slot come first.
      BLOCK: the most rows that are read at once, unless `zeros` is given another number.
    """

    AXES: ClassVar[dict[str, tuple[str, ...]]]
    BLOCK: ClassVar[int]

    @classmethod
    def unsupported(cls, cfg: DecoderConfig, dtype: Any, length: int) -> str | None:
        """Why this cache cannot serve the model, in words, or None if it can."""
        return None

    @classmethod
    def zeros(
        cls,
        cfg: DecoderConfig,
        num_slots: int,
        length: int,
        dtype=jnp.float32,
        block_length: int | None = None,
    ):
        """An empty cache of `num_slots` slots with `length` rows each, or a few more."""
        most = block_length or cls.BLOCK
        blocks = -(-length // most)
        rows = -(-length // blocks)
        sizes = {
            "loop": cfg.num_loops,
            "layer": cfg.num_layers,
            "slot": num_slots,
            "length": length,
            "block": blocks,
            # whole vector registers of a CPU, unless one block holds all rows
            "row": rows if blocks == 1 else min(-(-rows // 8) * 8, most),
            "kv_heads": cfg.num_kv_heads,
            "pair": 2,
            "head_dim": cfg.head_dim,
        }
        return cls(
            **{
                name: jnp.zeros(tuple(sizes[axis] for axis in axes), dtype)
                for name, axes in cls.AXES.items()
            }
        )

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

    def check_slots(self, x: jax.Array, rows: Rows) -> jax.Array:
        """States x `[R, D]` of a pass, NaN in the rows of slots that this cache does not have.

        An index beyond an array is clamped: such a row would read the keys of another slot.

        Args:
          rows: the R rows of x, and perhaps backfill rows.

        Raises:
          ValueError: instead of NaN, where the slots are known before the pass is compiled.
        """
        if not isinstance(rows.slot, jax.core.Tracer):
            beyond = [slot for slot in np.unique(rows.slot) if not 0 <= slot < self.num_slots]
            if beyond:
                raise ValueError(
                    f"rows of slot {beyond[-1]} and a cache of {self.num_slots} slots; expected "
                    f"slots in 0 … {self.num_slots - 1}"
                )
            return x
        slot = rows.slot[: len(x)]
        there = (slot >= 0) & (slot < self.num_slots)
        return jnp.where(there[:, None], x, jnp.full_like(x, jnp.nan))

    def attend(self, q, k, v, rows: Rows, layer, window, scale, softcap):
        """Write k and v, then attend; see `interface.Cache`."""
        cache = self.write(k, v, rows.loop, layer, rows.slot, rows.position)
        return cache.look(q, rows, layer, window, scale, softcap), cache

    def look(self, q, rows: Rows, layer, window, scale, softcap) -> jax.Array:
        """Attention of q `[R, N, H]` over what the cache holds -> `[R, N, H]`.

        Every decode lane reads its own slot. The prompt's rows share theirs, which is read once.
        """
        how = {"layer": layer, "scale": scale, "softcap": softcap}
        lanes = len(q) - rows.prompt
        parts = []
        if lanes:
            limits = None if window is None else window[:lanes]
            y = self.look_one_each(
                q[:lanes], loop=rows.loop[:lanes], slot=rows.slot[:lanes],
                position=rows.position[:lanes], window=limits, **how,
            )  # fmt: skip
            parts.append(y)
        if rows.prompt:
            first = slice(lanes, lanes + 1)
            y = attend_cached(
                q[None, lanes:], self, loop=rows.loop[first], slot=rows.slot[first],
                position=rows.position[None, lanes : len(q)],
                window=None if window is None else window[first], **how,
            )  # fmt: skip
            parts.append(y[0])
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    def look_one_each(self, q, *, loop, layer, slot, position, window, scale, softcap):
        """Attention of decode lanes: q `[B, N, H]`, the rest `[B]` -> `[B, N, H]`."""
        y = attend_cached(
            q[:, None], self, loop, layer, slot, position[:, None], window, scale, softcap
        )
        return y[:, 0]

    def write(self, k, v, loop, layer, slot, position):
        """Store k, v `[R, K, H]` at rows `(loop, layer, slot, position)`, each int32 `[R]` or `[]`.

        Positions must not be negative (a negative index would wrap).
        """
        loop, layer, slot, position = jnp.broadcast_arrays(loop, layer, slot, position)
        new = self._arrays_of(k, v)

        def written(name, array):
            row = self._row(name, loop, layer, slot, position)
            values = new[name].astype(array.dtype)
            return array.at[row].set(values, mode="drop", unique_indices=True)

        return self._updated(written)

    @abc.abstractmethod
    def read(self, loop, layer, slot, block) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One block of rows per lane; loop, slot and block are `[B]`, all in range.

        Returns:
          k `[B, K, H, R]`, v `[B, K, R, H]`, and the position `[B]` of the first of the R rows: the
          last block may begin with rows of the block before.
        """

    def copy_deeper(self, loops, slots, positions):
        """Copy the newest rows of tokens that left after `loops [S]` loops to all later loops.

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
        """Fill one slot with zeros. Elementwise, so that the slot may be on any shard."""
        here = jnp.arange(self.num_slots) == slot

        def wiped(name, array):
            return jnp.where(here.reshape(1, 1, -1, *(1,) * (array.ndim - 3)), 0, array)

        return self._updated(wiped)

    @abc.abstractmethod
    def _arrays_of(self, k, v) -> dict[str, jax.Array]:
        """k and v as this layout stores them, by array, after one axis for rows."""

    @abc.abstractmethod
    def _row(self, name: str, loop, layer, slot, position) -> tuple:
        """Index of rows in an array."""

    def _updated(self, update):
        return self.replace(**{name: update(name, getattr(self, name)) for name in self.AXES})

    def _size(self, axis: str) -> int:
        name, axes = next(iter(self.AXES.items()))
        return getattr(self, name).shape[axes.index(axis)]


@struct.dataclass
class KVCache(ArrayCache):
    """Keys transposed, as the products of attention read them; a block of rows is contiguous.

    A CPU reads a contiguous block nearly twice as fast as rows that are a context apart.
    """

    keys: jax.Array
    values: jax.Array

    AXES = {
        "keys": ("loop", "layer", "slot", "block", "kv_heads", "head_dim", "row"),
        "values": ("loop", "layer", "slot", "block", "kv_heads", "row", "head_dim"),
    }
    BLOCK = 32  # rows: the CPU kernel's limit, and small enough for the L1 cache

    @property
    def length(self):
        return self._size("block") * self.block_length

    @property
    def block_length(self):
        return self._size("row")

    def read(self, loop, layer, slot, block):
        def one(array, loop, slot, block):
            start = (loop, layer, slot, block, 0, 0, 0)
            sizes = (1, 1, 1, 1, *array.shape[4:])
            return jax.lax.dynamic_slice(array, start, sizes)[0, 0, 0, 0]

        of_lanes = jax.vmap(one, in_axes=(None, 0, 0, 0))
        k, v = (of_lanes(array, loop, slot, block) for array in (self.keys, self.values))
        return k, v, block * self.block_length

    def _row(self, name, loop, layer, slot, position):
        block, row = position // self.block_length, position % self.block_length
        heads = (slice(None),) * (self.AXES[name].index("row") - 4)
        return (loop, layer, slot, block, *heads, row)

    def _arrays_of(self, k, v):
        return {"keys": k, "values": v}


@struct.dataclass
class RowCache(ArrayCache):
    """Row after row, K and V of a head side by side: the layout of the TPU's kernel (`tpu`)."""

    rows: jax.Array

    AXES = {"rows": ("loop", "layer", "slot", "length", "kv_heads", "pair", "head_dim")}
    BLOCK = 512  # as the kernel

    @property
    def length(self):
        return self._size("length")

    @property
    def block_length(self):
        return min(self.BLOCK, self.length)

    def read(self, loop, layer, slot, block):
        size = self.block_length
        start = jnp.minimum(block * size, self.length - size)
        # The rows that are read keep the order of the cache. Otherwise a TPU's compiler gives the
        # whole cache the order that the products of attention prefer, a copy in every layer.
        as_stored = Layout(major_to_minor=tuple(range(self.rows.ndim)))

        def one(loop, slot, start):
            sizes = (1, 1, 1, size, *self.rows.shape[4:])
            rows = jax.lax.dynamic_slice(self.rows, (loop, layer, slot, start, 0, 0, 0), sizes)
            return with_layout_constraint(rows, as_stored)[0, 0, 0]

        # One by one: a TPU's gather of pieces this large goes through all of the cache.
        rows = jnp.stack([one(loop[i], slot[i], start[i]) for i in range(slot.shape[0])])
        k, v = rows[..., 0, :].transpose(0, 2, 3, 1), rows[..., 1, :].transpose(0, 2, 1, 3)
        return k, v, start

    def _row(self, name, loop, layer, slot, position):
        return loop, layer, slot, position

    def _arrays_of(self, k, v):
        return {"rows": jnp.stack([k, v], axis=2)}
