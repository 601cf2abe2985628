"""The decoder of `models`, layer by layer for one CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax.cpu import build
from recursive_jax.cpu.cache import cache_class
from recursive_jax.cpu.matmul import matmul, skinny_matmul
from recursive_jax.cpu.params import CpuParams, LayerParams, NormParams, arrange
from recursive_jax.cpu.top1 import top1
from recursive_jax.models.attention import LayerTables, rope_rows, rope_tables, rotate
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import layer_tables, softcap_logits
from recursive_jax.models.interface import Backfill, Rows
from recursive_jax.models.layers import ACTIVATION_FNS, at_loop, normalise


@dataclasses.dataclass(frozen=True)
class CpuModel:
    """Implements `models.interface.DecodeModel`; equal to `ScannedModel` up to rounding.

    Compiling takes longer than for the scanned model: every layer is spelled out.
    """

    cfg: DecoderConfig
    dtype: Any = jnp.float32

    def __post_init__(self):
        self.cfg.check_decodes()
        if self.cfg.prefix_length:
            raise ValueError("CpuModel has no prefixes; decode with models.scanned.ScannedModel")

    @property
    def attention(self) -> str:
        return cache_class(self.cfg, self.dtype)[1]

    def prepare(self, params: Mapping[str, Any], donate: bool = False) -> CpuParams:
        prepared = arrange(params, self.cfg, self.dtype, donate)
        build.use_huge_pages(jax.tree.leaves(prepared))
        return prepared

    def new_cache(self, num_slots: int, length: int):
        return cache_class(self.cfg, self.dtype)[0].zeros(self.cfg, num_slots, length, self.dtype)

    def embed(self, params: CpuParams, tokens: jax.Array) -> jax.Array:
        x = jnp.take(params.embedding, tokens, axis=0).astype(self.dtype)
        return x if self.cfg.embed_scale == 1.0 else x * jnp.asarray(self.cfg.embed_scale, x.dtype)

    def run_block(self, params: CpuParams, x, rows: Rows, cache, backfill: Backfill | None = None):
        cached = rows.with_backfill(backfill)
        x = cache.check_slots(x, cached)
        rope = rope_tables(self.cfg, cached.position)
        rope = _computed_once(rope, jnp.any(cached.position >= 0))
        tables = layer_tables(self.cfg)
        for i, layer in enumerate(params.layers):
            mine = jax.tree.map(lambda table, i=i: table[i], tables)
            x, cache = self._layer(layer, x, rows.loop, cached, backfill, rope, mine, cache)
        return x, cache

    def logits(self, params: CpuParams, x: jax.Array) -> jax.Array:
        head = params.embedding if params.head is None else params.head
        x = self._norm(params.final_norm, x, None)
        return softcap_logits(skinny_matmul(x, head.astype(self.dtype), jnp.float32), self.cfg)

    def top1(self, logits: jax.Array):
        return top1(logits)

    def _layer(
        self, layer: LayerParams, x, loop, cached: Rows, backfill, rope, tables: LayerTables, cache
    ):
        """One layer: x `[R, D]` -> `[R, D]`, and the cache with the R + M rows of `cached`."""
        cfg, queries = self.cfg, len(x)
        normed = self._norm(layer.pre_attention_norm, x, loop)
        if backfill is not None:
            # Normed by itself: XLA then computes all but the scale once for all layers.
            skipped = self._norm(layer.pre_attention_norm, backfill.x, backfill.loop)
            normed = jnp.concatenate([normed, skipped])
        asked = (queries, len(normed), len(normed))
        q, k, v = (
            y.reshape(len(y), -1, cfg.head_dim)
            for y in matmul(normed, layer.qkv, cached.loop, rows_asked=asked)
        )
        if cfg.qk_norm:
            q, k = self._norm(layer.q_norm, q, loop), self._norm(layer.k_norm, k, cached.loop)
        cos, sin = rope_rows(*rope, tables.rope, cached.loop)
        q, k = rotate(q, cos[:queries], sin[:queries]), rotate(k, cos, sin)
        window = None if tables.window is None else tables.window[loop]
        y, cache = cache.attend(
            q, k, v, cached, tables.index, window, cfg.attention_scale, cfg.attn_softcap
        )
        (y,) = matmul(y.reshape(queries, -1), layer.o, loop)
        y = self._post_norm(layer.post_attention_norm, y, loop)
        if not cfg.parallel_residual:
            x = x + y
        hidden = matmul(self._norm(layer.pre_mlp_norm, x, loop), layer.gate_up, loop)
        act = ACTIVATION_FNS[cfg.activation]
        hidden = act(hidden[0]) * hidden[1] if cfg.gated_mlp else act(hidden[0])
        (out,) = matmul(hidden, layer.down, loop)
        out = self._post_norm(layer.post_mlp_norm, out, loop)
        return (x + y + out if cfg.parallel_residual else x + out), cache

    def _norm(self, params: NormParams, x, loop) -> jax.Array:
        def vector(table):
            return at_loop(table, loop, x.ndim) if table is not None and table.ndim == 2 else table

        scale, bias = vector(params.scale), vector(params.bias)
        return normalise(x, scale, bias, self.cfg).astype(self.dtype)

    def _post_norm(self, params: NormParams | None, y, loop) -> jax.Array:
        return y if params is None else self._norm(params, y, loop)


def _computed_once(x, true: jax.Array):
    """x, computed here once for all layers.

    XLA:CPU recomputes cos and sin in every layer's fusion. A one-trip loop with a runtime bound
    prevents that: XLA drops barriers before it fuses, but does not fuse into a loop.

    Args:
      true: bool `[]`, always true, and unknown to the compiler.
    """
    return jax.lax.fori_loop(
        0, true.astype(jnp.int32), lambda *_: x, jax.tree.map(jnp.zeros_like, x)
    )
