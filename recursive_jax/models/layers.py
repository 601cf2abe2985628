"""Linear (with per-loop LoRA), norms and the gated MLP: the parts that look at `loop`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from recursive_jax.models.config import DecoderConfig

ACTIVATION_FNS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}


def at_loop(table: jax.Array, loop: jax.Array, ndim: int) -> jax.Array:
    """Row `loop` of `table [L, F]`, shaped to broadcast against an activation of `ndim` axes.

    `loop` scalar gives `[F]`; `loop [B]` gives `[B, 1, ..., F]`.
    """
    rows = table[loop]
    if jnp.ndim(loop) == 0:
        return rows
    return rows.reshape(rows.shape[0], *(1,) * (ndim - 2), rows.shape[-1])


def lora_form(loop_ndim: int, tokens: int, in_dim: int, out_dim: int) -> str:
    """How a LoRA is applied, chosen by shape in this one place: 'lanes', 'merged' or 'per_token'.

    With one loop for all tokens, merging `w + a @ b` costs 2·in·out·R and the per-token form
    2·tokens·R·(in + out): the rank cancels. Lanes at different loops use one wide adapter of rank
    L·R whose middle is masked: gathering weights per lane is far slower.
    """
    if loop_ndim:
        return "lanes"
    return "merged" if tokens * (in_dim + out_dim) > in_dim * out_dim else "per_token"


class Linear(nn.Module):
    """`x [..., in] -> [..., out]`: weight `w [in, out]`, LoRA `a [L, in, R]` and `b [L, R, out]`.

    The effective weight of a loop is `w + a[loop] @ b[loop]`: LoRA has no scaling factor
    (paper §2.3).
    """

    cfg: DecoderConfig
    projection: str
    axes: tuple[str, str]  # logical axis names of (in, out)
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    data_shards: int = 1  # devices the batch is spread over: costs are per device
    init_scale: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array, loop: jax.Array) -> jax.Array:
        cfg, rank = self.cfg, self.cfg.rank(self.projection)
        in_dim, out_dim = cfg.projections[self.projection]
        w = self.param(
            "w",
            nn.with_logical_partitioning(nn.initializers.normal(self.init_scale), self.axes),
            (in_dim, out_dim),
        )
        # Two axes only: a weight gradient that contracts over both B and T is compiled, on the
        # CPU, into transposed copies of its operands.
        lead, x = x.shape[:-1], x.astype(self.dtype)
        if not jnp.ndim(loop):
            x = x.reshape(-1, in_dim)
        if rank:
            a = self.param(
                "lora_a",
                nn.with_logical_partitioning(
                    nn.initializers.normal(in_dim**-0.5), ("loop", self.axes[0], "rank")
                ),
                (cfg.num_loops, in_dim, rank),
            )
            b = self.param(
                "lora_b",
                nn.with_logical_partitioning(nn.initializers.zeros, ("loop", "rank", self.axes[1])),
                (cfg.num_loops, rank, out_dim),
            )
            tokens = x.size // in_dim // self.data_shards
            y = apply_lora(
                x, w, a, b, loop, lora_form(jnp.ndim(loop), tokens, in_dim, out_dim), self.dtype
            )
        else:
            y = x @ w.astype(self.dtype)
        if self.use_bias:
            loops = cfg.vector_loops("bias")
            bias = self.param(
                "b",
                nn.with_logical_partitioning(
                    nn.initializers.zeros, (("loop",) if loops else ()) + (self.axes[1],)
                ),
                ((loops,) if loops else ()) + (out_dim,),
            )
            bias = at_loop(bias, loop, y.ndim) if loops else bias
            bias = bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
            y = y + bias.astype(self.dtype)
        return y.reshape(*lead, out_dim)


def apply_lora(x, w, a, b, loop, form: str, dtype) -> jax.Array:
    """`x @ (w + a[loop] @ b[loop])` in one of the three forms of `lora_form`; all are equal."""
    with jax.named_scope("lora"):
        if form == "merged":
            # A batch axis of one: remat policies that keep products ("dots") keep those without
            # batch axes, and a delta as large as the weight, per loop and layer, is none to keep.
            factors = a[loop][None].astype(dtype), b[loop][None].astype(dtype)
            delta = jax.lax.dot_general(*factors, (((2,), (1,)), ((0,), (0,))))[0]
            merged = checkpoint_name((w + delta.astype(w.dtype)).astype(dtype), "merged_weight")
            return x @ merged
        y = x @ w.astype(dtype)
        if form == "per_token":
            return y + (x @ a[loop].astype(dtype)) @ b[loop].astype(dtype)
        num_loops, _, rank = a.shape
        wide_a = jnp.moveaxis(a, 0, 1).reshape(-1, num_loops * rank).astype(dtype)
        wide_b = b.reshape(num_loops * rank, -1).astype(dtype)
        mask = jnp.repeat(jax.nn.one_hot(loop, num_loops, dtype=dtype), rank, axis=-1)
        mask = mask.reshape(mask.shape[0], *(1,) * (x.ndim - 2), mask.shape[-1])
        return y + ((x @ wide_a) * mask) @ wide_b


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, in float32; `loops` > 0 adds a row per loop."""

    cfg: DecoderConfig
    loops: int = 0
    axis: str = "embed_vector"  # logical name of the normalised axis
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, loop: jax.Array | int = 0) -> jax.Array:
        kind, offset = self.cfg.norm, self.cfg.norm_offset
        start = nn.initializers.zeros if offset else nn.initializers.ones
        x = x.astype(jnp.float32)
        if kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.cfg.norm_eps)
        x = x * (self._vector("scale", start, x, loop) + offset)
        if kind == "layer":
            x = x + self._vector("bias", nn.initializers.zeros, x, loop)
        return x.astype(self.dtype)

    def _vector(self, name, init, x, loop):
        names = (("loop",) if self.loops else ()) + (self.axis,)
        shape = ((self.loops,) if self.loops else ()) + (x.shape[-1],)
        table = self.param(name, nn.with_logical_partitioning(init, names), shape)
        table = table.astype(jnp.float32)
        vector = at_loop(table, loop, x.ndim) if self.loops else table
        return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


class Mlp(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` when not gated."""

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    data_shards: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, loop: jax.Array) -> jax.Array:
        cfg = self.cfg
        linear = lambda name, axes, scale=0.02: Linear(  # noqa: E731
            cfg,
            name,
            axes,
            cfg.mlp_bias,
            self.dtype,
            self.data_shards,
            scale,
            name=name,
        )
        act = ACTIVATION_FNS[cfg.activation]
        up = linear("up", ("embed", "mlp"))(x, loop)
        if cfg.gated_mlp:
            hidden = act(linear("gate", ("embed", "mlp"))(x, loop)) * up
        else:
            hidden = act(up)
        hidden = nn.with_logical_constraint(hidden, ("batch", "seq", "mlp"))
        return linear("down", ("mlp", "embed"), 0.02 * (2 * cfg.depth) ** -0.5)(hidden, loop)
