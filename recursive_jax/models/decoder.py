"""One decoder for every family: a block of layers, scanned, run `num_loops` times, scanned.

In the order 'sequence' the scans change places: every layer runs `num_loops` times before the next.

Axes: B batch, T query length, R rows of a decoding pass, D embed, F mlp, N query heads, K kv heads,
H head_dim, V vocab, L loop.

`loop` is a coordinate, like position: a scalar in training, or `int32 [R]` when rows run different
loops of the block in one pass (depth-wise batching, paper §2.4). Only the linear layers, the
per-loop vectors and the KV cache depend on it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from recursive_jax.models.attention import Attention, Context, LayerTables, rope_tables
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.interface import Backfill, Cache, Rows
from recursive_jax.models.layers import Mlp, Norm

# Named remat policies: what the backward pass keeps instead of recomputing.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload_dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    # keeps everything except the LoRA-merged weights, which would be one copy per loop
    "save_all_but_merged": jax.checkpoint_policies.save_any_names_but_these("merged_weight"),
}
REMAT_CHOICES = ("none", *REMAT_POLICIES)


class Layer(nn.Module):
    """One layer: `(x, cache) -> (x, cache)`, with x `[B, T, D]`, or `[R, D]` with a cache."""

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    data_shards: int = 1
    attention: str = "xla"

    @nn.compact
    def __call__(self, carry, loop, context: Context, tables: LayerTables):
        cfg = self.cfg
        x, cache = carry
        attention = Attention(cfg, self.dtype, self.data_shards, self.attention, name="attention")
        mlp = Mlp(cfg, self.dtype, self.data_shards, name="mlp")

        with jax.named_scope("attention"):
            norm = self._norm("pre_attention_norm", "pre_norm")
            normed, row_loop = norm(x, loop), loop
            if (backfill := context.backfill) is not None:
                # Normed by itself: XLA then computes all but the scale once for all layers.
                normed = jnp.concatenate([normed, norm(backfill.x, backfill.loop)])
                row_loop = context.rows.loop
            y, cache = attention(normed, row_loop, context, tables, cache)
            y = self._post_norm("post_attention_norm", y, loop)
        if not cfg.parallel_residual:
            x = x + y
        with jax.named_scope("mlp"):
            out = mlp(self._norm("pre_mlp_norm", "pre_norm")(x, loop), loop)
            out = self._post_norm("post_mlp_norm", out, loop)
        x = x + y + out if cfg.parallel_residual else x + out
        return (_constrained(x, "embed_activation"), cache), None

    def run_reversed(self, *args):
        """As `__call__`; the scan over layers goes from the last layer to the first."""
        return self(*args)

    def run_all_loops(self, carry, loops: jax.Array, context: Context, tables: LayerTables):
        """The layer at all loops, int32 `[L]`, one after the other."""

        def body(layer, carry, loop):
            return layer(carry, loop, context, tables)

        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
        return scan(self, carry, loops)

    def _norm(self, name: str, kind: str) -> Norm:
        return Norm(self.cfg, self.cfg.vector_loops(kind), dtype=self.dtype, name=name)

    def _post_norm(self, name: str, y: jax.Array, loop: jax.Array) -> jax.Array:
        return self._norm(name, "post_norm")(y, loop) if self.cfg.post_norms else y


class Decoder(nn.Module):
    """The model. `cfg.num_loops == 1` is a vanilla transformer (source, teacher).

    Attributes:
      cfg: sizes and family.
      dtype: compute dtype; norms, softmax, rope and logits are float32 in any case.
      remat_policy: one of `REMAT_CHOICES`.
      data_shards: devices the batch is spread over (only LoRA's cheapest form depends on it).
      attention: of batches without a cache, one of `batch_attention.KERNELS`. Kernels need
        positions that rise within a segment, and know no `attention.COMMON`.
      unroll_layers: how many layers of the scan are unrolled; trades compile time for speed.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    remat_policy: str = "none"
    data_shards: int = 1
    unroll_layers: int = 1
    attention: str = "xla"

    def setup(self):
        cfg = self.cfg
        start = nn.initializers.normal(0.02)
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(start, ("vocab", "embed")),
            (cfg.vocab_size, cfg.embed_dim),
        )
        if not cfg.tied_head:
            self.head = self.param(
                "head",
                nn.with_logical_partitioning(start, ("embed", "vocab")),
                (cfg.embed_dim, cfg.vocab_size),
            )
        self.final_norm = Norm(cfg, dtype=self.dtype)
        layer = Layer
        if self.remat_policy != "none":
            # prevent_cse is for unrolled code; inside a scan it only costs memory
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat_policy], prevent_cse=False)
        scan = dict(
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=cfg.num_layers,
            unroll=self.unroll_layers,
            metadata_params={nn.PARTITION_NAME: "layer"},
        )
        methods = {"__call__": scan, "run_all_loops": scan}
        methods["run_reversed"] = scan | {"reverse": True}
        self.block = nn.scan(layer, methods=methods)(
            cfg, self.dtype, self.data_shards, self.attention
        )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        all_loops: bool = False,
        loops: int | None = None,
    ) -> jax.Array:
        """Run all loops, or the first `loops` of them.

        Args:
          tokens, positions: int `[B, T]`.
          segment_ids: int `[B, T]` of packed documents; `attention.COMMON` is seen by all.
          all_loops: return the hidden state after every loop.

        Returns:
          hidden `[B, T, D]`, or `[loops, B, T, D]` with `all_loops`, before the final norm (give it
          to `unembed`).
        """
        x = self.embed(tokens)
        if self.is_initializing():  # one loop makes all parameters, the head makes the rest
            x = self.run_loop(x, jnp.int32(0), positions, segment_ids)
            self.unembed(x)
            return x
        context = self._context(positions, segment_ids)
        if self.cfg.sharing != "cycle":
            if all_loops or loops is not None:
                self.cfg.check_cycle("the state after a loop")
            return self._run_other_order(x, context)
        loops = self.cfg.num_loops if loops is None else loops

        def body(decoder, x, loop):
            x, _ = decoder._run(x, loop, context, None)
            return x, (x if all_loops else None)

        scan = nn.scan(
            body,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=loops,
        )
        x, per_loop = scan(self, x, jnp.arange(loops, dtype=jnp.int32))
        return per_loop if all_loops else x

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token embeddings `[..., D]` of tokens `[B]` or `[B, T]`, scaled as the family does."""
        # Rows are gathered on the shard that holds them; otherwise XLA replicates the table.
        table = nn.with_logical_constraint(self.embedding, ("vocab", "embed_activation"))
        x = lookup(table, tokens).astype(self.dtype)
        if self.cfg.embed_scale != 1.0:
            x = x * jnp.asarray(self.cfg.embed_scale, self.dtype)
        return _constrained(x, "embed_activation")

    def run_loop(
        self,
        x: jax.Array,
        loop: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """One pass of the block over x `[B, T, D]` at `loop` (int32 `[]`) -> `[B, T, D]`."""
        return self._run(x, loop, self._context(positions, segment_ids), None)[0]

    def run_block(
        self, x: jax.Array, rows: Rows, cache: Cache, backfill: Backfill | None = None
    ) -> tuple[jax.Array, Cache]:
        """One pass of the block over cached rows; see `interface.DecodeModel.run_block`."""
        self.cfg.check_decodes()
        cached = rows.with_backfill(backfill)
        cos, sin = rope_tables(self.cfg, cached.position)
        context = Context(cos, sin, rows=cached, backfill=backfill)
        return self._run(x, rows.loop, context, cache)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Final norm, head and softcap, the same at every exit.

        x `[B, D]` or `[B, T, D]` -> f32 `[B, V]` or `[B, T, V]`. Exits come one by one: folding
        their axis into the batch would put the whole batch on every device.
        """
        with jax.named_scope("unembed"):
            lead = x.shape[:-1]
            x = _constrained(self.final_norm(x), "embed_activation").reshape(-1, x.shape[-1])
            head = self.embedding.T if self.cfg.tied_head else self.head
            head = nn.with_logical_constraint(head, ("embed_activation", "vocab"))
            logits = jnp.matmul(x, head.astype(self.dtype), preferred_element_type=jnp.float32)
            logits = softcap_logits(logits, self.cfg)
            return _constrained(logits.reshape(*lead, -1), "vocab")

    def _context(self, positions, segment_ids) -> Context:
        cos, sin = rope_tables(self.cfg, positions)
        return Context(cos, sin, positions, segment_ids)

    def _run_other_order(self, x: jax.Array, context: Context) -> jax.Array:
        """All loops in the order 'sequence' or 'cycle_rev'."""
        tables, num_loops = layer_tables(self.cfg), self.cfg.num_loops
        if self.cfg.sharing == "sequence":
            loops = jnp.arange(num_loops, dtype=jnp.int32)
            return self.block.run_all_loops((x, None), loops, context, tables)[0][0]
        for loop in range(num_loops):  # not scanned: a scan cannot reverse every second pass
            run = self.block.run_reversed if loop % 2 else self.block
            x = run((x, None), jnp.int32(loop), context, tables)[0][0]
        return x

    def _run(self, x, loop, context, cache):
        return self.block((x, cache), loop, context, layer_tables(self.cfg))[0]


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the table `[V, D]`; its gradient is summed in float32, whatever its dtype.

    A frequent token adds hundreds of gradients to one row: a bfloat16 sum would lose most of them.
    """
    shape, dtype = table.shape, table.dtype
    if dtype == jnp.float32:
        return jnp.take(table, tokens, axis=0)

    @jax.custom_vjp
    def rows(table, tokens):
        return jnp.take(table, tokens, axis=0)

    def pull(tokens, g):
        total = jnp.zeros(shape, jnp.float32).at[tokens].add(g.astype(jnp.float32))
        return total.astype(dtype), None

    rows.defvjp(lambda table, tokens: (rows(table, tokens), tokens), pull)
    return rows(table, tokens)


def layer_tables(cfg: DecoderConfig) -> LayerTables:
    """Index, windows and rope kinds of every layer of the block, stacked: `[layer, ...]`."""
    window, rope = cfg.window_table(), cfg.rope_table()
    return LayerTables(
        index=np.arange(cfg.num_layers, dtype=np.int32),
        window=None if window is None else jnp.asarray(window),
        rope=None if rope is None else jnp.asarray(rope),
    )


def softcap_logits(logits: jax.Array, cfg: DecoderConfig) -> jax.Array:
    if cfg.final_softcap is None:
        return logits
    return jnp.tanh(logits / cfg.final_softcap) * cfg.final_softcap


def _constrained(x: jax.Array, axis: str) -> jax.Array:
    """x `[B, F]` or `[B, T, F]` with logical axis names; `axis` is the last one's."""
    return nn.with_logical_constraint(x, (*("batch", "seq")[: x.ndim - 1], axis))
