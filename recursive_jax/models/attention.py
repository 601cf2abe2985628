"""Causal grouped-query attention with rope, windows, softcap, packed segments and a KV cache.

Axes: B batch or lane, T query length, S key length, N query heads, K kv heads, G = N/K, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from recursive_jax.models import paged
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.kv_cache import KVCache
from recursive_jax.models.layers import Linear, Norm

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

    def after(self, x: jax.Array, loop: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`x [B, 1, D]`, `loop [B]` of the lanes with these rows behind them."""
        return jnp.concatenate([x, self.x]), jnp.concatenate([loop, self.loop])


@struct.dataclass
class Context:
    """What every layer of a pass shares. With `missing`, B counts its rows too, after the lanes."""

    positions: jax.Array  # int32 [B, T]
    segment_ids: jax.Array | None  # int32 [B, T]; tokens see their own segment only
    slots: jax.Array | None  # int32 [B], cache slot of each lane; None without a cache
    cos: jax.Array  # f32 [kind, B, T, rotary_dim / 2]
    sin: jax.Array
    missing: Missing | None = None


@struct.dataclass
class LayerTables:
    """What differs between layers, scanned beside the weights."""

    index: jax.Array  # int32 [], layer within the block
    window: jax.Array | None  # int32 [loop], 0 = unlimited; None when no layer is limited
    rope: jax.Array | None  # int32 [loop], rope kind; None when there is one kind


class Attention(nn.Module):
    """`x [B, T, D] -> [B, T, D]`, and the cache with this layer's rows written.

    The last rows of x and loop may be `context.missing`: they have keys and values but no queries,
    and are not in the result. `paged`: lanes attend through the kernel of `models.paged`.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    data_shards: int = 1
    paged: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        loop: jax.Array,
        context: Context,
        tables: LayerTables,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        cfg = self.cfg
        batch, length = x.shape[:2]
        row_loop = loop
        if context.missing is not None:
            batch -= context.missing.loop.shape[0]
            loop = loop[:batch]
        q = self._heads("q", "heads", x[:batch], loop)
        k = self._heads("k", "kv_heads", x, row_loop)
        v = self._heads("v", "kv_heads", x, row_loop)
        if cfg.qk_norm:
            loops = cfg.vector_loops("qk_norm")
            q = Norm(cfg, loops, "head_dim", self.dtype, name="q_norm")(q, loop)
            k = Norm(cfg, loops, "head_dim", self.dtype, name="k_norm")(k, row_loop)
        cos, sin = _rope_rows(context, tables, row_loop)
        q, k = rotate(q, cos[:batch], sin[:batch]), rotate(k, cos, sin)

        positions = context.positions[:batch]
        if cache is not None:
            cache = cache.write(k, v, row_loop, tables.index, context.slots, context.positions)
        if self.paged and cache is not None and length == 1 and jnp.ndim(loop):
            with jax.named_scope("attend"):
                rows = loop, tables.index, context.slots[:batch], positions[:, 0]
                y = paged.attend(cfg, q[:, 0], cache, *rows)[:, None]
        else:
            key_positions = positions
            if cache is not None:
                k, v = cache.read(loop, tables.index, context.slots[:batch])
                key_positions = jnp.arange(cache.length, dtype=jnp.int32)[None]
            window = None if tables.window is None else tables.window[loop]
            mask = attention_mask(positions, key_positions, context.segment_ids, window)
            with jax.named_scope("attend"):
                y = attend(q, k, v, mask, cfg.attention_scale, cfg.attn_softcap)
        y = nn.with_logical_constraint(y.reshape(batch, length, -1), ("batch", "seq", "heads"))
        return self._linear("o", ("heads", "embed"), cfg.o_bias, 0.02 * (2 * cfg.depth) ** -0.5)(
            y, loop
        ), cache

    def _heads(self, name, axis, x, loop):
        """A projection of x, split into heads: `[B, T, heads, H]`."""
        y = self._linear(name, ("embed", axis), self.cfg.qkv_bias)(x, loop)
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
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    # Batch and kv heads lead, the G query heads of a kv head stand in one matrix: both products
    # are then plain batched matmuls, and only q, k, v and y are transposed, never the scores.
    q = q.reshape(batch, length, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, num_kv_heads, -1, head_dim)  # [B, K, G·T, H]
    k = k.astype(q.dtype).transpose(0, 2, 3, 1)  # [B, K, H, S]
    v = v.astype(q.dtype).transpose(0, 2, 1, 3)  # [B, K, S, H]
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    scores = scores.reshape(batch, num_kv_heads, -1, length, k.shape[-1])
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    y = weights.reshape(batch, num_kv_heads, -1, k.shape[-1]) @ v  # [B, K, G·T, H]
    y = y.reshape(batch, num_heads, length, head_dim)
    return y.transpose(0, 2, 1, 3)
