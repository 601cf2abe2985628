"""A cache whose decode lanes attend by the TPU's ragged paged attention kernel.

A (loop, layer, slot) row of the cache, cut into pages, is a sequence of the kernel: every lane
lists its pages, and nothing is gathered. Kernel: `jax.experimental.pallas.ops.tpu`.

Axes: B lanes, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import PartitionSpec

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.kv_cache import RowCache

PAGE_LENGTHS = (128, 64, 32, 16)  # cache rows of a page; fewer make more copies than they save
BLOCK_LENGTH = 512  # cache rows the kernel holds at once
QUERIES_PER_BLOCK = 16
LANE_WIDTH = 128  # of a TPU's vector registers


@struct.dataclass
class PagedCache(RowCache):
    """Decode lanes attend by the kernel; a prompt's rows by XLA, as in `RowCache`."""

    # The kernel's window is static: the one of all layers, 0 = unlimited.
    window: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def zeros(cls, cfg: DecoderConfig, *sizes, **options):
        window = cfg.windows[0] if cfg.windows else 0
        return super().zeros(cfg, *sizes, **options).replace(window=window)

    @classmethod
    def unsupported(
        cls, cfg: DecoderConfig, dtype: Any, length: int, head_shards: int = 1
    ) -> str | None:
        """Why the kernel cannot serve this model, in words, or None if it can.

        Args:
          dtype: of the cache.
          length: rows of a slot.
          head_shards: devices that the heads are split over.
        """
        name, packing = np.dtype(dtype).name, 4 // np.dtype(dtype).itemsize  # per 32-bit word
        kv_heads = cfg.num_kv_heads
        if kv_heads % head_shards == 0:
            kv_heads //= head_shards
        elif kv_heads > 1:
            return f"{cfg.num_kv_heads} kv heads do not divide over {head_shards} devices"
        if cfg.num_heads % head_shards:
            return f"{cfg.num_heads} heads do not divide over {head_shards} devices"
        if cfg.windows and len(set(cfg.windows)) > 1:
            return "its window is static, this model's layers have different ones"
        if name not in ("bfloat16", "float32"):
            return f"it does not take {name}"
        if cfg.head_dim % LANE_WIDTH:
            return f"head_dim={cfg.head_dim} is not a multiple of {LANE_WIDTH}"
        tiles = 2 * kv_heads // packing
        if 2 * kv_heads % packing or not (tiles in (1, 2, 4, 8) or tiles % 8 == 0):
            return f"it does not take {kv_heads} kv heads in {name}"
        if cfg.head_dim > LANE_WIDTH and kv_heads > 1:
            # On the device our [K, 2, H] is then not its [2·K, H]: the cache would be copied.
            return f"{kv_heads} kv heads of head_dim={cfg.head_dim} lie otherwise in its pages"
        if length % PAGE_LENGTHS[-1]:
            return f"context_length={length} is not a multiple of {PAGE_LENGTHS[-1]}"
        return None

    def look_one_each(self, q, *, loop, layer, slot, position, window, scale, softcap):
        """Attention of q `[B, N, H]` -> `[B, N, H]`; the rest is `[B]`.

        The compiler does not partition a kernel, so heads are split here, by the axis rules.
        """
        del window  # the static one

        def run(q, rows, loop, layer, slot, position):
            from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library

            pages = pages_of(RowCache(rows), loop, layer, slot, position)
            most, page = pages.page_indices.shape[1], pages.kv_pages.shape[1]
            return library.ragged_paged_attention(
                q,
                *pages,
                sm_scale=scale,
                soft_cap=softcap,
                sliding_window=self.window or None,
                num_kv_pages_per_block=min(max(BLOCK_LENGTH // page, 1), most),
                num_queries_per_block=min(QUERIES_PER_BLOCK, q.shape[0]),
            )

        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.auto_axes:
            return run(q, self.rows, loop, layer, slot, position)
        # one by one: a spec names a mesh axis once
        heads, kv_heads = (nn.logical_to_mesh_axes((name,))[0] for name in ("heads", "kv_heads"))
        whole = PartitionSpec()
        return jax.shard_map(
            run,
            in_specs=(
                PartitionSpec(None, heads),
                PartitionSpec(None, None, None, None, kv_heads),
                *[whole] * 4,
            ),
            out_specs=PartitionSpec(None, heads),
            axis_names=set(mesh.auto_axes),
            check_vma=False,
        )(q, self.rows, loop, layer, slot, position)


class Pages(NamedTuple):
    """The kernel's view of the cache and of one query per lane."""

    kv_pages: jax.Array  # [pages, page length, 2·K, H], K and V interleaved
    kv_lens: jax.Array  # int32 [B], rows that a lane sees
    page_indices: jax.Array  # int32 [B, pages of a row]
    cu_q_lens: jax.Array  # int32 [B + 1], where each lane's queries begin
    num_seqs: jax.Array  # int32 [1]


def pages_of(cache: RowCache, loop, layer, slot, position) -> Pages:
    """The rows `(loop [B], layer [], slot [B])` up to `position [B]` in the kernel's terms.

    An idle lane, at a position beyond the cache, sees one row of whatever is there.
    """
    num_layers, num_slots, length, kv_heads, _, head_dim = cache.rows.shape[1:]
    page = next(n for n in PAGE_LENGTHS if length % n == 0)
    row = (loop * num_layers + layer) * num_slots + slot
    columns = jnp.arange(length // page, dtype=jnp.int32)
    return Pages(
        kv_pages=cache.rows.reshape(-1, page, 2 * kv_heads, head_dim),
        kv_lens=jnp.where(position < length, position + 1, 1),
        page_indices=row[:, None] * (length // page) + columns[None],
        cu_q_lens=jnp.arange(slot.shape[0] + 1, dtype=jnp.int32),
        num_seqs=jnp.full(1, slot.shape[0], jnp.int32),
    )
