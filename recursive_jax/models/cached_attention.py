"""Attention of queries over the rows of a cache, by XLA.

Axes: B lanes, T queries of a lane, N query heads, K kv heads, G = N/K, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recursive_jax.models.attention import (
    MASKED,
    attend_transposed,
    attention_mask,
    attention_scores,
    by_kv_head,
    by_position,
)


def attend_cached(
    q, cache, loop, layer, slot, position, window, scale: float, softcap: float | None
) -> jax.Array:
    """`attention.attend` over the rows of a cache.

    A cache of one block is read whole, in one masked pass (`attend_whole`); a longer one block by
    block (`attend_blocks`).

    Args:
      q: `[B, T, N, H]`.
      cache: a `kv_cache.ArrayCache`.
      loop, slot: int32 `[B]`; layer: int32 `[]`.
      position: int32 `[B, T]`; >= the cache's length: idle, and zero in the result.
      window: int32 `[B]`, 0 = unlimited; None when no lane is limited.
    """
    if cache.length == cache.block_length:
        return attend_whole(q, cache, loop, layer, slot, position, window, scale, softcap)
    return attend_blocks(q, cache, loop, layer, slot, position, window, scale, softcap)


def attend_whole(q, cache, loop, layer, slot, position, window, scale, softcap) -> jax.Array:
    """`attend_cached` of a cache of one block: the slot's rows are read at once and masked."""
    k, v, _ = cache.read(loop, layer, slot, jnp.zeros_like(slot))
    keys = jnp.arange(cache.length, dtype=jnp.int32)[None]
    mask = attention_mask(position, keys, None, window)
    y = attend_transposed(q, k, v, mask, scale, softcap)
    return jnp.where((position < cache.length)[:, :, None, None], y, jnp.zeros_like(y))


def attend_blocks(q, cache, loop, layer, slot, position, window, scale, softcap) -> jax.Array:
    """`attend_cached` block by block, as flash attention does (Dao et al. 2022).

    The blocks of a lane reach from the first row in its window to its last query. The blocks of all
    lanes form one queue, and every pass takes as many blocks as there are lanes. The cost therefore
    follows the total length of the texts, however it is spread over the lanes.
    """
    size, num_lanes = cache.block_length, q.shape[0]
    grouped = by_kv_head(q, cache.num_kv_heads)
    at = jnp.where(position < cache.length, position, -1)
    last, first = jnp.max(at, axis=1), jnp.zeros_like(slot)
    if window is not None:
        start = jnp.where(at >= 0, at, cache.length) - window[:, None] + 1
        first = jnp.where(window > 0, jnp.maximum(jnp.min(start, axis=1), 0), 0)
    first = first // size
    count = jnp.where(last >= 0, last // size + 1 - first, 0)
    ends = jnp.cumsum(count)
    lanes = jnp.arange(num_lanes, dtype=jnp.int32)

    def one_pass(i, carry):
        most, total, y, broken = carry
        place = i * num_lanes + lanes  # in the queue
        lane = jnp.sum(place[:, None] >= ends[None], axis=1)
        owns = lanes[:, None] == lane[None]  # [B, B], lane a owns block b; no lane owns spare ones
        there, lane = lane < num_lanes, jnp.minimum(lane, num_lanes - 1)
        block = jnp.where(there, first[lane] + place - ends[lane] + count[lane], 0)
        k, v, start = cache.read(loop[lane], layer, slot[lane], block)
        keys = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        mask = (
            attention_mask(position[lane], keys, None, None if window is None else window[lane])
            & (keys >= block[:, None] * size)[:, None]
        )
        scores = attention_scores(grouped[lane], k, mask, scale, softcap)
        top = jnp.max(scores, axis=-1)  # [B, K, G·T]
        weights = jnp.exp(scores - top[..., None])
        sums = jnp.sum(weights, axis=-1)
        part = jnp.matmul(
            (weights / sums[..., None]).astype(q.dtype),
            v.astype(q.dtype),
            preferred_element_type=jnp.float32,
        )
        # Blocks are combined by a product, where zero times NaN is NaN: a lane with NaN is marked
        # as broken and left out, so that it does not spoil the others.
        good = jnp.all(jnp.isfinite(part), axis=(1, 2, 3)) & jnp.all(jnp.isfinite(top), axis=(1, 2))
        broken |= jnp.any(owns & ~good[None], axis=1)
        owns, good = owns & good[None], (there & good)[:, None, None]
        tops = jnp.where(owns[..., None, None], top[None], MASKED)
        new_most = jnp.maximum(most, jnp.max(tops, axis=1))
        # `part` is an average, as in `attend`: a single block is rounded as there.
        share = jnp.where(good, jnp.exp(top - new_most[lane]) * sums, 0.0)
        kept = jnp.exp(most - new_most)
        more, more_y = (
            jnp.einsum("ab,b...->a...", owns.astype(x.dtype), x, precision="highest")
            for x in (share, jnp.where(good[..., None], share[..., None] * part, 0.0))
        )
        return new_most, total * kept + more, y * kept[..., None] + more_y, broken

    zeros = jnp.zeros(grouped.shape[:-1], jnp.float32)  # [B, K, G·T]
    start = zeros + MASKED, zeros, jnp.zeros(grouped.shape, jnp.float32), jnp.zeros_like(lanes) > 0
    passes = (ends[-1] + num_lanes - 1) // num_lanes
    _, total, y, broken = jax.lax.fori_loop(0, passes, one_pass, start)
    y = jnp.where(broken[:, None, None, None], jnp.nan, y / jnp.maximum(total, 1e-30)[..., None])
    return by_position(y.astype(q.dtype), q.shape)
