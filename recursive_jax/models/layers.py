"""Linear (with per-loop LoRA), norms and the MLP: the parts of a layer that depend on the loop."""

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

# Logical axes of the factors of a LoRA, by that of the weight. A weight has an embed axis beside
# these, which is split over devices. A factor has not, so that its wide axis is split further.
LORA_AXES = {"mlp": "lora_mlp", "heads": "lora_heads", "kv_heads": "lora_kv_heads"}


def at_loop(table: jax.Array, loop: jax.Array, ndim: int) -> jax.Array:
    """Row `loop` of `table [L, F]`, shaped to broadcast against an activation of `ndim` axes.

    `loop` scalar gives `[F]`; `loop [R]` gives `[R, 1, ..., F]`.
    """
    rows = table[loop]
    if jnp.ndim(loop) == 0:
        return rows
    return rows.reshape(rows.shape[0], *(1,) * (ndim - 2), rows.shape[-1])


def lora_form(loop_ndim: int, tokens: int, in_dim: int, out_dim: int) -> str:
    """How a LoRA is applied, chosen by shape: 'rows', 'merged' or 'per_token'.

    With one loop for all tokens, merging `w + a @ b` costs 2·in·out·R and the per-token form
    2·tokens·R·(in + out): the rank cancels. Rows at different loops use one wide adapter of rank
    L·R whose middle is masked: gathering weights per row is far slower.
    """
    if loop_ndim:
        return "rows"
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
        # Two axes only: XLA:CPU compiles a weight gradient that contracts over both B and T into
        # transposed copies of its operands.
        lead, x = x.shape[:-1], x.astype(self.dtype).reshape(-1, in_dim)
        w = self._param("w", nn.initializers.normal(self.init_scale), self.axes, (in_dim, out_dim))
        if rank:
            lora_in, lora_out = (LORA_AXES.get(axis, axis) for axis in self.axes)
            a_axes, b_axes = ("loop", lora_in, "rank"), ("loop", "rank", lora_out)
            a_start = nn.initializers.normal(in_dim**-0.5)
            a = self._param("lora_a", a_start, a_axes, (cfg.num_loops, in_dim, rank))
            b = self._param("lora_b", nn.initializers.zeros, b_axes, (cfg.num_loops, rank, out_dim))
            form = lora_form(jnp.ndim(loop), len(x) // self.data_shards, in_dim, out_dim)
            y = apply_lora(x, w, a, b, loop, form, self.dtype)
        else:
            y = x @ w.astype(self.dtype)
        if self.use_bias:
            y = y + self._bias(out_dim, loop, y.ndim).astype(self.dtype)
        return y.reshape(*lead, out_dim)

    def _bias(self, out_dim: int, loop: jax.Array, ndim: int) -> jax.Array:
        loops = self.cfg.vector_loops("bias")
        axes = (("loop",) if loops else ()) + (self.axes[1],)
        shape = ((loops,) if loops else ()) + (out_dim,)
        bias = self._param("b", nn.initializers.zeros, axes, shape)
        bias = at_loop(bias, loop, ndim) if loops else bias
        return bias.reshape((1,) * (ndim - bias.ndim) + bias.shape)

    def _param(self, name, start, axes, shape):
        return self.param(name, nn.with_logical_partitioning(start, axes), shape)


def apply_lora(x, w, a, b, loop, form: str, dtype) -> jax.Array:
    """`x @ (w + a[loop] @ b[loop])` in one of the three forms of `lora_form`; all are equal."""
    with jax.named_scope("lora"):
        if form == "merged":
            # A batch axis of one: the remat policy "dots" keeps products without batch axes. A
            # delta as large as the weight, per loop and layer, must not be kept.
            factors = a[loop][None].astype(dtype), b[loop][None].astype(dtype)
            delta = jax.lax.dot_general(*factors, (((2,), (1,)), ((0,), (0,))))[0]
            merged = checkpoint_name((w + delta.astype(w.dtype)).astype(dtype), "merged_weight")
            return x @ merged
        y = x @ w.astype(dtype)
        if form == "per_token":
            return y + (x @ a[loop].astype(dtype)) @ b[loop].astype(dtype)
        wide_a = jnp.moveaxis(a, 0, 1).reshape(-1, a.shape[0] * a.shape[2]).astype(dtype)
        wide_b = b.reshape(-1, b.shape[-1]).astype(dtype)
        return y + mask_loops(x @ wide_a, loop, a.shape[0]) @ wide_b


def mask_loops(wide: jax.Array, loop: jax.Array, num_loops: int) -> jax.Array:
    """`x @ a` of all loops, `[R, L·rank]`, with zeros except for the loop `[R]` of each row."""
    rank = wide.shape[-1] // num_loops
    return wide * jnp.repeat(jax.nn.one_hot(loop, num_loops, dtype=wide.dtype), rank, axis=-1)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, in float32; `loops` > 0 adds a row per loop."""

    cfg: DecoderConfig
    loops: int = 0
    axis: str = "embed_vector"  # logical name of the normalised axis
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, loop: jax.Array | int = 0) -> jax.Array:
        start = nn.initializers.zeros if self.cfg.norm_offset else nn.initializers.ones
        scale = self._vector("scale", start, x, loop)
        bias = None
        if self.cfg.norm == "layer":
            bias = self._vector("bias", nn.initializers.zeros, x, loop)
        return normalise(x, scale, bias, self.cfg).astype(self.dtype)

    def _vector(self, name, init, x, loop):
        names = (("loop",) if self.loops else ()) + (self.axis,)
        shape = ((self.loops,) if self.loops else ()) + (x.shape[-1],)
        table = self.param(name, nn.with_logical_partitioning(init, names), shape)
        return at_loop(table, loop, x.ndim) if self.loops else table


def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, cfg: DecoderConfig
) -> jax.Array:
    """RMSNorm or LayerNorm of x over its last axis, float32; scale and bias `[..., F]`."""
    x = x.astype(jnp.float32)
    if cfg.norm == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + cfg.norm_eps)
    x = x * (_leading(scale, x.ndim) + cfg.norm_offset)
    return x if bias is None else x + _leading(bias, x.ndim)


def _leading(vector: jax.Array, ndim: int) -> jax.Array:
    """The vector in float32, with axes of one in front."""
    return vector.astype(jnp.float32).reshape((1,) * (ndim - vector.ndim) + vector.shape)


class Mlp(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` when not gated."""

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    data_shards: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, loop: jax.Array) -> jax.Array:
        cfg, act = self.cfg, ACTIVATION_FNS[self.cfg.activation]
        hidden = self._linear("up", ("embed", "mlp"))(x, loop)
        if cfg.gated_mlp:
            hidden = act(self._linear("gate", ("embed", "mlp"))(x, loop)) * hidden
        else:
            hidden = act(hidden)
        axes = ("batch", "seq")[: hidden.ndim - 1]
        hidden = nn.with_logical_constraint(hidden, (*axes, "mlp"))
        return self._linear("down", ("mlp", "embed"), 0.02 * (2 * cfg.depth) ** -0.5)(hidden, loop)

    def _linear(self, name, axes, scale=0.02):
        cfg = self.cfg
        return Linear(cfg, name, axes, cfg.mlp_bias, self.dtype, self.data_shards, scale, name=name)
