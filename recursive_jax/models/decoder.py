"""One decoder for every family: a block of layers, scanned, run `num_loops` times, scanned.

Axes: B batch or lane, T query length, S cache length, D embed, F mlp, N query heads, K kv heads,
G = N/K, H head_dim, V vocab, R rank, L loop.

`loop` is a coordinate, like position: a scalar in training, prefill and lock-step decoding, or
`int32 [B]` when lanes run different loops of the block in one pass (depth-wise batching). Only the
linear layers, the per-loop vectors and the KV cache look at it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from recursive_jax.cpu.matmul import few_rows
from recursive_jax.models.attention import Attention, Context, LayerTables, Missing, rope_tables
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.kv_cache import Cache
from recursive_jax.models.layers import JOINT, Mlp, Norm

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
    """One transformer layer: `(x [B, T, D], cache) -> (x, cache)`."""

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    data_shards: int = 1
    attends: str = "xla"

    @nn.compact
    def __call__(self, carry, loop, context: Context, tables: LayerTables):
        cfg = self.cfg
        x, cache = carry
        missing = context.missing
        pre = lambda name: Norm(  # noqa: E731
            cfg, cfg.vector_loops("pre_norm"), dtype=self.dtype, name=name
        )
        post = lambda name, y: (  # noqa: E731
            Norm(cfg, cfg.vector_loops("post_norm"), dtype=self.dtype, name=name)(y, loop)
            if cfg.post_norms
            else y
        )
        attention = Attention(cfg, self.dtype, self.data_shards, self.attends, name="attention")
        mlp = Mlp(cfg, self.dtype, self.data_shards, name="mlp")

        with jax.named_scope("attention"):
            norm = pre("pre_attention_norm")
            rows, row_loop = norm(x, loop), loop
            if missing is not None:  # by itself: all but scale and bias is the same in every layer
                rows = jnp.concatenate([rows, norm(missing.x, missing.loop)])
                row_loop = jnp.concatenate([loop, missing.loop])
            y, cache = attention(rows, row_loop, context, tables, cache)
            y = post("post_attention_norm", y)
        with jax.named_scope("mlp"):
            if cfg.parallel_residual:
                x = x + y + post("post_mlp_norm", mlp(pre("pre_mlp_norm")(x, loop), loop))
            else:
                x = x + y
                x = x + post("post_mlp_norm", mlp(pre("pre_mlp_norm")(x, loop), loop))
        x = nn.with_logical_constraint(x, ("batch", "seq", "embed_activation"))
        return (x, cache), None


class Decoder(nn.Module):
    """The model. `cfg.num_loops == 1` is a vanilla transformer (source, teacher).

    Attributes:
      cfg: what it is.
      dtype: compute dtype; norms, softmax, rope and logits are float32 in any case.
      remat_policy: one of `REMAT_CHOICES`.
      data_shards: devices the batch is spread over (only LoRA's cheapest form depends on it).
      unroll_layers: how many layers of the scan are unrolled; trades compile time for speed.
      scan_layers: False: every layer has params of its own, as `split_layers` makes them (`init`
        does not), which products then read where they are. A CPU's copy theirs out of a stack; a
        TPU's do not.
      attends: how lanes attend to a cache: 'xla', or through the kernel 'paged' (on a TPU) or
        'few_queries' (on one CPU), whose module must not refuse `cfg`.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    remat_policy: str = "none"
    data_shards: int = 1
    unroll_layers: int = 1
    scan_layers: bool = True
    attends: str = "xla"

    @property
    def on_one_device(self) -> bool:
        """Params are as `split_layers` makes them."""
        return not self.scan_layers

    def setup(self):
        cfg = self.cfg
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed")),
            (cfg.vocab_size, cfg.embed_dim),
        )
        if not cfg.tied_head:
            axes, start = ("embed", "vocab"), nn.initializers.normal(0.02)
            shape = cfg.embed_dim, cfg.vocab_size
            if not self.scan_layers:
                axes, shape = axes[::-1], shape[::-1]
            head = nn.with_logical_partitioning(start, axes)
            self.head = self.param("head" if self.scan_layers else "head_t", head, shape)
        self.final_norm = Norm(cfg, dtype=self.dtype)
        layer = Layer
        if self.remat_policy != "none":
            # prevent_cse is for unrolled code; inside a scan it only costs memory
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat_policy], prevent_cse=False)
        if not self.scan_layers:
            parts = (cfg, self.dtype, self.data_shards, self.attends)
            self.layers = [layer(*parts) for _ in range(cfg.num_layers)]
            return
        self.block = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=cfg.num_layers,
            unroll=self.unroll_layers,
            metadata_params={nn.PARTITION_NAME: "layer"},
        )(cfg, self.dtype, self.data_shards, self.attends)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        slots: jax.Array | None = None,
        all_loops: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Run all loops.

        Args:
          tokens: int `[B, T]`.
          positions: int `[B, T]`; with a cache they are also its rows, and one that is
            >= cache length writes nothing (padding).
          segment_ids: int `[B, T]` of packed documents; not with a cache.
          cache: keys and values so far, or None to attend within `tokens` only.
          slots: int `[B]`, the cache slot of each row; None means row i is slot i.
          all_loops: also return the hidden state after every loop.

        Returns:
          hidden `[B, T, D]`, or `[L, B, T, D]` with `all_loops`, before the final norm (give it
          to `unembed`), and the updated cache.
        """
        x = self.embed(tokens)
        context = self._context(positions, segment_ids, cache, slots)
        if self.is_initializing():  # one loop makes all parameters, the head makes the rest
            x, cache = self._run(x, jnp.int32(0), context, cache)
            self.unembed(x)
            return x, cache

        def body(decoder, carry, loop):
            x, cache = decoder._run(carry[0], loop, context, carry[1])
            return (x, cache), (x if all_loops else None)

        loops = jnp.arange(self.cfg.num_loops, dtype=jnp.int32)
        scan = nn.scan(
            body,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=self.cfg.num_loops,
        )
        (x, cache), per_loop = scan(self, (x, cache), loops)
        return (per_loop if all_loops else x), cache

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token embeddings `[B, T, D]`, scaled as the family does."""
        # whole rows are looked up, where their tokens lie; else XLA moves them by replicating
        table = nn.with_logical_constraint(self.embedding, ("vocab", "embed_activation"))
        x = jnp.take(table, tokens, axis=0).astype(self.dtype)
        if self.cfg.embed_scale != 1.0:
            x = x * jnp.asarray(self.cfg.embed_scale, self.dtype)
        return nn.with_logical_constraint(x, ("batch", "seq", "embed_activation"))

    def run_loop(
        self,
        x: jax.Array,
        loop: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        slots: jax.Array | None = None,
        missing: Missing | None = None,
        together: int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """One pass of the block over x `[B, T, D]`, at `loop` (scalar, or `[B]`: one per lane).

        What else there is to do is done in the same pass, so that the weights are read once. It
        needs a cache, a loop per lane, slots and T = 1:

        `missing`: keys and values that early exits left out, written into the cache.
        `together`: so many of the last lanes are tokens of one prompt, at one loop.
        """
        if missing is not None:
            positions = jnp.concatenate([positions, missing.positions])
            slots = jnp.concatenate([slots, missing.slots])
        context = self._context(positions, segment_ids, cache, slots)
        return self._run(x, loop, context.replace(missing=missing, together=together), cache)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Final norm, head and softcap, the same at every exit.

        x `[B, D]` or `[B, T, D]` -> f32 `[B, V]` or `[B, T, V]`. Exits come one by one: folding
        their axis into the batch would put the whole batch on every device.
        """
        with jax.named_scope("unembed"):
            lead, axes = x.shape[:-1], ("batch", "seq")[: x.ndim - 1]
            x = nn.with_logical_constraint(self.final_norm(x), (*axes, "embed_activation"))
            x = x.reshape(-1, x.shape[-1])
            head = self.embedding if self.cfg.tied_head else self.head
            if not self.scan_layers:
                logits = few_rows(x, head.astype(self.dtype), jnp.float32)
            else:
                head = head.T if self.cfg.tied_head else head
                head = nn.with_logical_constraint(head, ("embed_activation", "vocab"))
                logits = jnp.matmul(x, head.astype(self.dtype), preferred_element_type=jnp.float32)
            if self.cfg.final_softcap is not None:
                logits = jnp.tanh(logits / self.cfg.final_softcap) * self.cfg.final_softcap
            return nn.with_logical_constraint(logits.reshape(*lead, -1), (*axes, "vocab"))

    def _context(self, positions, segment_ids, cache, slots) -> Context:
        if cache is not None:
            if segment_ids is not None:
                raise ValueError("segment_ids are for packed training text, not for a cache")
            if slots is None:
                slots = jnp.arange(positions.shape[0], dtype=jnp.int32)
        cos, sin = rope_tables(self.cfg, positions)
        return Context(positions, segment_ids, slots, cos, sin)

    def _run(self, x, loop, context, cache):
        cfg = self.cfg
        table = lambda t: None if t is None else jnp.asarray(t)  # noqa: E731
        tables = LayerTables(
            index=np.arange(cfg.num_layers, dtype=np.int32),
            window=table(cfg.window_table()),
            rope=table(cfg.rope_table()),
        )
        carry = x, cache
        if self.scan_layers:
            return self.block(carry, loop, context, tables)[0]
        cos, sin = _once((context.cos, context.sin), jnp.any(context.positions >= 0))
        context = context.replace(cos=cos, sin=sin)
        for i, layer in enumerate(self.layers):
            mine = jax.tree.map(lambda table, i=i: table[i], tables)
            carry, _ = layer(carry, loop, context, mine)
        return carry


def _once(x, true: jax.Array):
    """x, computed here and not again in every layer: XLA's CPU compiler takes cosines for cheap.

    It drops barriers before it fuses, but does not fuse into a loop. `true`: what it cannot know.
    """
    return jax.lax.fori_loop(
        0, true.astype(jnp.int32), lambda *_: x, jax.tree.map(jnp.zeros_like, x)
    )


def split_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Params for `Decoder(scan_layers=False)` on one device.

    Weights lie as a CPU multiplies few rows by them fastest (`few_rows`): `wt [out, in]`,
    LoRA of all loops as `lora_at [L·R, in]` and `lora_bt [out, L·R]`, and those that read the same
    rows as one matrix (`layers.JOINT`). A LoRA whose product is smaller than its factors becomes
    the products `lora_wt_N [out, in]` of the loops N where it is not zero. An untied head becomes
    `head_t [V, D]`. Deletes the stacks and that head, so weights are there once.
    """
    stacks = flatten_dict(params["block"])
    layers: list[dict] = [{} for _ in range(next(iter(stacks.values())).shape[0])]
    turned = {
        "w": ("wt", lambda w: w.T),
        "lora_a": ("lora_at", lambda a: a.swapaxes(1, 2).reshape(-1, a.shape[1])),
        "lora_b": ("lora_bt", lambda b: b.reshape(-1, b.shape[2]).T),
    }

    def put(room, name, *paths):
        name, turn = turned.get(name, (name, lambda vector: vector))
        parts = []
        for path in paths:  # one stack after the other, so that only one is there twice
            stack = stacks.pop(path)
            parts.append([turn(stack[i]) for i in range(len(layers))])
            jax.block_until_ready(parts[-1])
            stack.delete()
        for layer, *mine in zip(layers, *parts, strict=True):
            layer[(*room, name)] = jnp.concatenate(mine) if len(mine) > 1 else mine[0]

    for room, projection in [path[:2] for path in stacks if path[-1] == "lora_a"]:
        a, b = (stacks[room, projection, name] for name in ("lora_a", "lora_b"))
        _, num_loops, inputs, rank = a.shape
        outputs = b.shape[3]
        if rank * (inputs + outputs) > inputs * outputs:
            del stacks[room, projection, "lora_a"], stacks[room, projection, "lora_b"]
            for i, n in itertools.product(range(len(layers)), range(num_loops)):
                delta = (a[i, n] @ b[i, n]).T
                if jnp.any(delta):
                    layers[i][room, projection, f"lora_wt_{n}"] = delta
            a.delete(), b.delete()
    for room, (joint, projections) in JOINT.items():
        joins = all((room, projection, "w") in stacks for projection in projections)
        for name in ("w", "lora_a"):
            paths = [(room, projection, name) for projection in projections]
            there = [path for path in paths if path in stacks and joins]
            if there:
                put((room, joint), name, *there)
    for path in list(stacks):
        put(path[:-1], path[-1], path)
    split = {f"layers_{i}": unflatten_dict(layer) for i, layer in enumerate(layers)}
    outer = {name: value for name, value in params.items() if name != "block"}
    if "head" in outer:
        head = outer.pop("head")
        outer["head_t"] = head.T
        head.delete()
    return outer | split
