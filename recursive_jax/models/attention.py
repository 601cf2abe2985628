"""Causal grouped-query attention with rope, windows, softcap, packed segments and a KV cache.

Axes: B batch, T query length, R rows of a decoding pass, M backfill rows, S key length, N query
heads, K kv heads, G = N/K, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from recursive_jax.models.batch_attention import BLOCKS, cudnn, distinct_windows, splash
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.interface import Backfill, Cache, Rows
from recursive_jax.models.layers import Linear, Norm

# Finite, so that a row whose keys are all masked (padding) gives numbers, not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
COMMON = -1  # segment id of tokens that every segment of the row sees


@struct.dataclass
class Context:
    """What every layer of a pass shares. A pass has either a batch `[B, T]` or cached rows."""

    cos: jax.Array  # f32 [kind, B, T, rotary_dim / 2], or [kind, R + M, rotary_dim / 2]
    sin: jax.Array
    positions: jax.Array | None = None  # int32 [B, T]; None with a cache
    segment_ids: jax.Array | None = None  # int32 [B, T]; tokens see their own segment only
    rows: Rows | None = None  # R + M rows with new keys and values; None without a cache
    backfill: Backfill | None = None  # the last M of them


@struct.dataclass
class LayerTables:
    """What differs between layers, scanned beside the weights."""

    index: jax.Array  # int32 [], layer within the block
    window: jax.Array | None  # int32 [loop], 0 = unlimited; None when no layer is limited
    rope: jax.Array | None  # int32 [loop], rope kind; None when there is one kind


class Attention(nn.Module):
    """`x [B, T, D] -> [B, T, D]` at one loop, or with a cache `x [R + M, D] -> [R, D]`.

    Backfill rows have keys and values but no queries, and are not in the result.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    data_shards: int = 1
    kernel: str = "xla"  # one of batch_attention.KERNELS; with a cache, the cache attends

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        loop: jax.Array,
        context: Context,
        tables: LayerTables,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        """Return the layer's attention and the cache; `loop` is `[]`, or `[R + M]` with a cache."""
        cfg = self.cfg
        queries = len(x) - (0 if context.backfill is None else len(context.backfill.x))
        query_loop = loop[:queries] if jnp.ndim(loop) else loop
        q_proj, k_proj, v_proj = (
            self._linear(name, ("embed", axis), cfg.qkv_bias)
            for name, axis in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
        )
        q_norm, k_norm = self._head_norm("q_norm"), self._head_norm("k_norm")

        def keys_and_values(x, loop):
            return k_norm(self._by_head(k_proj(x, loop)), loop), self._by_head(v_proj(x, loop))

        unrotated = q_norm(self._by_head(q_proj(x[:queries], query_loop)), query_loop)
        k, v = keys_and_values(x, loop)
        cos, sin = rope_rows(context.cos, context.sin, tables.rope, loop)
        q, k = rotate(unrotated, cos[:queries], sin[:queries]), rotate(k, cos, sin)

        window = None if tables.window is None else tables.window[query_loop]
        scale, softcap = cfg.attention_scale, cfg.attn_softcap
        with jax.named_scope("attend"):
            if cache is None:
                y = self._attend_batch(q, k, v, context, window)
            else:
                y, cache = cache.attend(q, k, v, context.rows, tables.index, window, scale, softcap)
        if cfg.prefix_length:
            y = y + self._attend_to_prefix(unrotated, query_loop, keys_and_values)
        y = y.reshape(*y.shape[:-2], -1)
        y = nn.with_logical_constraint(y, (*("batch", "seq")[: y.ndim - 1], "heads"))
        o_scale = 0.02 * (2 * cfg.depth) ** -0.5
        return self._linear("o", ("heads", "embed"), cfg.o_bias, o_scale)(y, query_loop), cache

    def _attend_batch(self, q, k, v, context, window):
        cfg = self.cfg
        scale, softcap = cfg.attention_scale, cfg.attn_softcap
        if self.kernel == "splash" and q.shape[1] % BLOCKS[-1] == 0:
            windows = distinct_windows(cfg)
            return splash(q, k, v, context.segment_ids, window, windows, scale, softcap)
        positions = context.positions
        mask = attention_mask(positions, positions, context.segment_ids, window)
        if self.kernel == "cudnn" and q.shape[1] % 2 == 0:
            return cudnn(q, k, v, mask, scale)
        return attend(q, k, v, mask, scale, softcap)

    def _attend_to_prefix(self, q, loop, keys_and_values):
        """Gated attention to the learnable vectors of this layer and loop, of all queries to all.

        The vectors have no positions, so that queries are not rotated either. Their softmax is
        their own, and its result is multiplied by a gate per head that starts at 0 (the adapter of
        arXiv 2303.16199): a model with new vectors is the model without them.

        Args:
          q: `[B, T, N, H]` before rope, or `[R, N, H]` with a cache.
          loop: of the queries, `[]` or `[R]`.
          keys_and_values: (vectors `[S, D]`, loop) -> keys without rope, values: `[S, K, H]`.
        """
        cfg = self.cfg
        shape = cfg.num_loops, cfg.prefix_length, cfg.embed_dim
        start, axes = nn.initializers.normal(1.0), ("loop", "prefix", "embed")
        prefix = self.param("prefix", nn.with_logical_partitioning(start, axes), shape)
        start, axes = nn.initializers.zeros, ("loop", "gate")
        shape = cfg.num_loops, cfg.num_heads
        gate = self.param("prefix_gate", nn.with_logical_partitioning(start, axes), shape)
        gate = gate[loop].astype(self.dtype)[..., None]
        if jnp.ndim(loop):  # rows at different loops: a batch of one query each
            loops = jnp.repeat(jnp.arange(cfg.num_loops, dtype=jnp.int32), cfg.prefix_length)
            parts = keys_and_values(prefix.reshape(-1, cfg.embed_dim), loops)
            k, v = (x.reshape(cfg.num_loops, -1, *x.shape[1:])[loop] for x in parts)
            q = q[:, None]
        else:
            k, v = (x[None] for x in keys_and_values(prefix[loop], loop))
        everything = jnp.ones((1, q.shape[1], cfg.prefix_length), bool)
        y = attend(q, k, v, everything, cfg.attention_scale, cfg.attn_softcap)
        y = y[:, 0] if jnp.ndim(loop) else y
        return gate.reshape((1,) * (y.ndim - gate.ndim) + gate.shape) * y

    def _head_norm(self, name):
        """(heads `[..., H]`, loop) -> heads; without a norm, as they are."""
        loops = self.cfg.vector_loops("qk_norm")
        if not self.cfg.qk_norm:
            return lambda heads, loop: heads
        return Norm(self.cfg, loops, "head_dim", self.dtype, name=name)

    def _by_head(self, y):
        """`[..., heads · H] -> [..., heads, H]`."""
        return y.reshape(*y.shape[:-1], -1, self.cfg.head_dim)

    def _linear(self, name, axes, bias, scale=0.02):
        return Linear(self.cfg, name, axes, bias, self.dtype, self.data_shards, scale, name=name)


def rope_tables(cfg: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin of every rope kind: positions `[...]` -> f32 `[kind, ..., rotary_dim / 2]`.

    Angles are computed in float32 whatever the compute dtype: bf16 angles are wrong past
    position 256. Both tables are multiplied by the kind's `attention_factor`.
    """
    frequencies = jnp.asarray(cfg.rope_frequencies())  # [kind, rotary_dim / 2]
    frequencies = jnp.expand_dims(frequencies, range(1, 1 + positions.ndim))
    angles = positions[None, ..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factors = np.array([rope.attention_factor for rope in cfg.ropes_in_use()], np.float32)
    if (factors != 1).any():
        factors = factors.reshape(-1, *[1] * (angles.ndim - 1))
        cos, sin = cos * factors, sin * factors
    return cos, sin


def rope_rows(cos, sin, kinds: jax.Array | None, loop) -> tuple[jax.Array, jax.Array]:
    """cos, sin of the rope kind that a layer uses at `loop`.

    Args:
      cos, sin: `[kind, B, T, rotary_dim / 2]`; `[kind, R, rotary_dim / 2]` with `loop [R]`.
      kinds: int32 `[loop]`, the layer's `LayerTables.rope`.
    """
    if kinds is None:
        return cos[0], sin[0]
    kind = kinds[loop]
    if jnp.ndim(kind) == 0:
        return cos[kind], sin[kind]
    rows = jnp.arange(kind.shape[0])
    return cos[kind, rows], sin[kind, rows]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first `2 * cos.shape[-1]` dimensions of x `[..., N, H]` (half-split layout)."""
    half = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rest = [x[..., 2 * half :]] if x.shape[-1] > 2 * half else []
    return jnp.concatenate([r.astype(x.dtype) for r in rotated] + rest, axis=-1)


def attention_mask(query_positions, key_positions, segment_ids, window) -> jax.Array:
    """bool `[B, T, S]`: key not ahead of the query, within its window and in its segment.

    `window` is None, a scalar or `[B]`; 0 means unlimited. Packed documents restart their
    positions, and `segment_ids` (None with a cache) keeps them apart. All segments of a row see
    keys of segment `COMMON`: the context that several continuations share.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = distance >= 0
    if window is not None:
        window = jnp.reshape(window, (-1, 1, 1))
        mask &= (distance < window) | (window == 0)
    if segment_ids is not None:
        keys = segment_ids[:, None, :]
        mask &= (segment_ids[:, :, None] == keys) | (keys == COMMON)
    return mask


def attend(q, k, v, mask, scale: float, softcap: float | None) -> jax.Array:
    """Softmax attention, scores and softmax in float32.

    q `[B, T, N, H]`, k and v `[B, S, K, H]`, mask `[B, T, S]` -> `[B, T, N, H]`.
    """
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    return attend_transposed(q, k, v, mask, scale, softcap)


def attend_transposed(q, k, v, mask, scale: float, softcap: float | None) -> jax.Array:
    """`attend` with k `[B, K, H, S]` and v `[B, K, S, H]`."""
    scores = attention_scores(by_kv_head(q, k.shape[1]), k, mask, scale, softcap)
    weights = jax.nn.softmax(scores, axis=-1)
    return by_position(weights.astype(q.dtype) @ v.astype(q.dtype), q.shape)


# Batch and kv heads lead, and the G query heads of a kv head form one matrix. Both products are
# then plain batched matmuls, and only q, k, v and y are transposed, never the scores.


def by_kv_head(q, num_kv_heads: int):
    """[B, T, N, H] -> [B, K, G·T, H]."""
    batch, length, _, head_dim = q.shape
    q = q.reshape(batch, length, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    return q.reshape(batch, num_kv_heads, -1, head_dim)


def by_position(y, shape):
    """[B, K, G·T, H] -> shape [B, T, N, H]."""
    batch, length, num_heads, head_dim = shape
    return y.reshape(batch, num_heads, length, head_dim).transpose(0, 2, 1, 3)


def attention_scores(q, k, mask, scale: float, softcap: float | None):
    """q `[B, K, G·T, H]`, k `[B, K, H, S]`, mask `[B, T, S]` -> f32 `[B, K, G·T, S]`."""
    scores = jnp.matmul(q, k.astype(q.dtype), preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    by_query = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_query, MASKED).reshape(scores.shape)
