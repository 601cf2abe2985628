"""Causal grouped-query attention with rope, windows, softcap, packed segments and a KV cache.

Axes: B batch or lane, T query length, S key length, N query heads, K kv heads, G = N/K, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from recursive_jax.cpu import cache as cpu_cache
from recursive_jax.models import tpu
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.kv_cache import Cache
from recursive_jax.models.layers import Linear, Norm, joint_parts

# Finite, so that a row whose keys are all masked (padding) gives numbers, not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@struct.dataclass
class Missing:
    """Tokens that left early: M rows of K and V that deeper loops lack, computed beside the lanes.

    The state with which a token left stands in for the ones that it never had: every layer
    projects it as it would project its own input. These rows ask nothing and change no state.
    """

    x: jax.Array  # [M, 1, D], the state with which the token left
    loop: jax.Array  # int32 [M], a loop that it did not run
    positions: jax.Array  # int32 [M, 1]; >= cache length: nothing is missing
    slots: jax.Array  # int32 [M]


@struct.dataclass
class Context:
    """What every layer of a pass shares. With `missing`, B counts its rows too, after the lanes.

    The last `together` of the lanes are neighbours in one slot, at one loop: keys and values are
    read once for all of them.
    """

    positions: jax.Array  # int32 [B, T]
    segment_ids: jax.Array | None  # int32 [B, T]; tokens see their own segment only
    slots: jax.Array | None  # int32 [B], cache slot of each lane; None without a cache
    cos: jax.Array  # f32 [kind, B, T, rotary_dim / 2]
    sin: jax.Array
    missing: Missing | None = None
    together: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class LayerTables:
    """What differs between layers, scanned beside the weights."""

    index: jax.Array  # int32 [], layer within the block
    window: jax.Array | None  # int32 [loop], 0 = unlimited; None when no layer is limited
    rope: jax.Array | None  # int32 [loop], rope kind; None when there is one kind


class Attention(nn.Module):
    """`x [B, T, D] -> [B, T, D]`, and the cache with this layer's rows written.

    The last rows of x and loop may be `context.missing`: they have keys and values but no queries,
    and are not in the result. `attends` is `Decoder`'s.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    data_shards: int = 1
    attends: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        loop: jax.Array,
        context: Context,
        tables: LayerTables,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.cfg
        batch, length = x.shape[:2]
        row_loop = loop
        if context.missing is not None:
            batch -= context.missing.loop.shape[0]
            loop = loop[:batch]
        joint = joint_parts(self, "attention", x, row_loop, {"q": batch})
        q = self._heads("q", "heads", x, loop, joint)
        k = self._heads("k", "kv_heads", x, row_loop, joint)
        v = self._heads("v", "kv_heads", x, row_loop, joint)
        if cfg.qk_norm:
            loops = cfg.vector_loops("qk_norm")
            q = Norm(cfg, loops, "head_dim", self.dtype, name="q_norm")(q, loop)
            k = Norm(cfg, loops, "head_dim", self.dtype, name="k_norm")(k, row_loop)
        cos, sin = _rope_rows(context, tables, row_loop)
        q, k = rotate(q, cos[:batch], sin[:batch]), rotate(k, cos, sin)

        if cache is None:
            positions = context.positions
            window = None if tables.window is None else tables.window[loop]
            mask = attention_mask(positions, positions, context.segment_ids, window)
            with jax.named_scope("attend"):
                y = attend(q, k, v, mask, cfg.attention_scale, cfg.attn_softcap)
        else:
            y, cache = self._attend_cached(q, k, v, row_loop, context, tables, cache)
        y = nn.with_logical_constraint(y.reshape(batch, length, -1), ("batch", "seq", "heads"))
        return self._linear("o", ("heads", "embed"), cfg.o_bias, 0.02 * (2 * cfg.depth) ** -0.5)(
            y, loop
        ), cache

    def _attend_cached(self, q, k, v, loop, context: Context, tables: LayerTables, cache: Cache):
        """New rows k, v `[B + M, T, K, H]` go into the cache, then q `[B, T, N, H]` sees its slot.

        Returns:
          `[B, T, N, H]`, cache.
        """
        cfg, batch, positions = self.cfg, len(q), context.positions
        lanes, at = batch - context.together, (loop, tables.index, context.slots)
        how = cfg.attention_scale, cfg.attn_softcap
        by_lane = bool(jnp.ndim(loop))
        one_each = by_lane and q.shape[1] == 1
        of_lanes = loop[:lanes] if by_lane else loop
        window_of = lambda loops: None if tables.window is None else tables.window[loops]  # noqa: E731

        def see(queries, loops, slots, places):
            where = loops, tables.index, slots
            if self.attends == "paged" and by_lane and queries.shape[1] == 1:
                return tpu.attend(cfg, queries[:, 0], cache, *where, places[:, 0])[:, None]
            return attend_cached(queries, cache, where, places, window_of(loops), *how)

        with jax.named_scope("attend"):
            if self.attends == "few_queries" and one_each:
                rows = q[:lanes], k, v, cache, at, positions, window_of(of_lanes)
                y, cache = cpu_cache.attend(*rows, *how)
            else:
                cache = cache.write(k, v, *at, positions)
                y = see(q[:lanes], of_lanes, context.slots[:lanes], positions[:lanes])
            if context.together:
                # a row of its own to a row of all
                chunk, one = np.s_[lanes:batch], np.s_[lanes : lanes + 1]
                place = loop[one], context.slots[one], positions[chunk].T
                y = jnp.concatenate([y, see(q[chunk].swapaxes(0, 1), *place).swapaxes(0, 1)])
        return y, cache

    def _heads(self, name, axis, x, loop, joint):
        """A projection of as many rows of x as `loop` has, by head: `[B, T, heads, H]`."""
        x = x[: loop.shape[0]] if jnp.ndim(loop) else x
        y = self._linear(name, ("embed", axis), self.cfg.qkv_bias)(x, loop, joint.get(name))
        return y.reshape(*x.shape[:2], -1, self.cfg.head_dim)

    def _linear(self, name, axes, bias, scale=0.02):
        return Linear(self.cfg, name, axes, bias, self.dtype, self.data_shards, scale, name=name)


def rope_tables(cfg: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin of every rope kind: f32 `[kind, B, T, rotary_dim / 2]`.

    Angles are computed in float32 whatever the compute dtype: bf16 angles are wrong past
    position 256.
    """
    frequencies = jnp.asarray(cfg.rope_frequencies())  # [kind, rotary_dim / 2]
    angles = positions[None, :, :, None].astype(jnp.float32) * frequencies[:, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _rope_rows(context: Context, tables: LayerTables, loop) -> tuple[jax.Array, jax.Array]:
    """cos, sin `[B, T, rotary_dim / 2]` of the kind this (layer, loop) uses."""
    if tables.rope is None:
        return context.cos[0], context.sin[0]
    kind = tables.rope[loop]
    if jnp.ndim(kind) == 0:
        return context.cos[kind], context.sin[kind]
    lanes = jnp.arange(kind.shape[0])
    return context.cos[kind, lanes], context.sin[kind, lanes]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first `2 * cos.shape[-1]` dimensions of x `[B, T, N, H]` (half-split layout)."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rest = [x[..., 2 * half :]] if x.shape[-1] > 2 * half else []
    return jnp.concatenate([r.astype(x.dtype) for r in rotated] + rest, axis=-1)


def attention_mask(query_positions, key_positions, segment_ids, window) -> jax.Array:
    """bool `[B, T, S]`: key not ahead of the query, within its window and in its segment.

    `window` is None, a scalar or `[B]`; 0 means unlimited. Packed documents restart their
    positions, and `segment_ids` (None with a cache) keeps them apart.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = distance >= 0
    if window is not None:
        window = jnp.reshape(window, (-1, 1, 1))
        mask &= (distance < window) | (window == 0)
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return mask


def attend(q, k, v, mask, scale: float, softcap: float | None) -> jax.Array:
    """Softmax attention, scores and softmax in float32.

    q `[B, T, N, H]`, k and v `[B, S, K, H]`, mask `[B, T, S]` -> `[B, T, N, H]`.
    """
    by_head, k, v = _by_kv_head(q, k.shape[2]), k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    weights = jax.nn.softmax(_scores(by_head, k, mask, scale, softcap), axis=-1)
    return _by_position(weights.astype(q.dtype) @ v.astype(q.dtype), q.shape)


def attend_cached(
    q, cache: Cache, where, positions, window, scale: float, softcap: float | None
) -> jax.Array:
    """`attend` over the rows of a cache, block by block.

    The blocks of a lane reach from the first row that its window still holds to its last query.
    Those of all lanes stand in one queue, and each pass takes as many as there are lanes: what it
    costs is the text there is, however it is spread over the lanes. Queries at positions >= the
    cache's length are idle.

    Args:
      q: `[B, T, N, H]`.
      where: loop (scalar or `[B]`), layer, slots `[B]` of the rows.
      positions: `[B, T]`.
      window: as `attention_mask`.
    """
    size, num_lanes = cache.block_length, q.shape[0]
    by_head = _by_kv_head(q, cache.num_kv_heads)
    loop, layer, slots = where
    positions, slots = jnp.asarray(positions), jnp.asarray(slots)
    loop = jnp.broadcast_to(loop, slots.shape)
    window = None if window is None else jnp.broadcast_to(window, slots.shape)
    at = jnp.where(positions < cache.length, positions, -1)
    last, first = jnp.max(at, axis=1), jnp.zeros_like(slots)
    if window is not None:
        start = jnp.where(at >= 0, at, cache.length) - window[:, None] + 1
        first = jnp.where(window > 0, jnp.maximum(jnp.min(start, axis=1), 0), 0)
    first = first // size
    count = jnp.where(last >= 0, last // size + 1 - first, 0)
    ends = jnp.cumsum(count)
    lanes = jnp.arange(num_lanes, dtype=jnp.int32)

    def some(i, carry):
        most, total, y, broken = carry
        place = i * num_lanes + lanes  # in the queue
        lane = jnp.sum(place[:, None] >= ends[None], axis=1)
        mine = lanes[:, None] == lane[None]  # [B, B]: whose pieces; those beyond are nobody's
        there, lane = lane < num_lanes, jnp.minimum(lane, num_lanes - 1)
        block = jnp.where(there, first[lane] + place - ends[lane] + count[lane], 0)
        k, v, start = cache.read(loop[lane], layer, slots[lane], block)
        keys = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        mask = (
            attention_mask(positions[lane], keys, None, None if window is None else window[lane])
            & (keys >= block[:, None] * size)[:, None]
        )
        scores = _scores(by_head[lane], k, mask, scale, softcap)
        top = jnp.max(scores, axis=-1)  # [B, K, G·T]
        weights = jnp.exp(scores - top[..., None])
        sums = jnp.sum(weights, axis=-1)
        seen = (weights / sums[..., None]).astype(q.dtype), v.astype(q.dtype)
        part = jnp.matmul(*seen, preferred_element_type=jnp.float32)
        # Pieces meet in a product, where zero times NaN is NaN: a lane must not break the others.
        good = jnp.all(jnp.isfinite(part), axis=(1, 2, 3)) & jnp.all(jnp.isfinite(top), axis=(1, 2))
        broken |= jnp.any(mine & ~good[None], axis=1)
        mine, good = mine & good[None], (there & good)[:, None, None]
        tops = jnp.where(mine[..., None, None], top[None], MASKED)
        new_most = jnp.maximum(most, jnp.max(tops, axis=1))
        # `part` is an average, as of `attend`: a single piece is rounded as there
        share = jnp.where(good, jnp.exp(top - new_most[lane]) * sums, 0.0)
        pieces = share, jnp.where(good[..., None], share[..., None] * part, 0.0)
        kept = jnp.exp(most - new_most)
        more, more_y = (
            jnp.einsum("ab,b...->a...", mine.astype(x.dtype), x, precision="highest")
            for x in pieces
        )
        return new_most, total * kept + more, y * kept[..., None] + more_y, broken

    zeros = jnp.zeros(by_head.shape[:-1], jnp.float32)  # [B, K, G·T]
    start = zeros + MASKED, zeros, jnp.zeros(by_head.shape, jnp.float32), jnp.zeros_like(lanes) > 0
    passes = (ends[-1] + num_lanes - 1) // num_lanes
    _, total, y, broken = jax.lax.fori_loop(0, passes, some, start)
    y = jnp.where(broken[:, None, None, None], jnp.nan, y / jnp.maximum(total, 1e-30)[..., None])
    return _by_position(y.astype(q.dtype), q.shape)


# Batch and kv heads lead, and the G query heads of a kv head stand in one matrix: both products
# are then plain batched matmuls, and only q, k, v and y are transposed, never the scores.


def _by_kv_head(q, num_kv_heads: int):
    """[B, T, N, H] -> [B, K, G·T, H]."""
    batch, length, _, head_dim = q.shape
    q = q.reshape(batch, length, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    return q.reshape(batch, num_kv_heads, -1, head_dim)


def _by_position(y, shape):
    """[B, K, G·T, H] -> shape [B, T, N, H]."""
    batch, length, num_heads, head_dim = shape
    return y.reshape(batch, num_heads, length, head_dim).transpose(0, 2, 1, 3)


def _scores(q, k, mask, scale: float, softcap: float | None):
    """q `[B, K, G·T, H]`, k `[B, K, H, S]`, mask `[B, T, S]` -> f32 `[B, K, G·T, S]`."""
    scores = jnp.matmul(q, k.astype(q.dtype), preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    by_query = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_query, MASKED).reshape(scores.shape)
