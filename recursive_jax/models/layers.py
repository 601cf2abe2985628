"""Linear (with per-loop LoRA), norms and the gated MLP: the parts that look at `loop`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.few_rows import few_rows

ACTIVATION_FNS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}

# Projections that read the same rows, by the module they are in: name of the joint param, members.
JOINT = {"attention": ("qkv", ("q", "k", "v")), "mlp": ("gate_up", ("gate", "up"))}


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
    (paper §2.3). `decoder.split_layers` keeps `wt`, `lora_at` and `lora_bt` instead, those of
    `JOINT` in the module above.
    """

    cfg: DecoderConfig
    projection: str
    axes: tuple[str, str]  # logical axis names of (in, out)
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    data_shards: int = 1  # devices the batch is spread over: costs are per device
    init_scale: float = 0.02

    @nn.compact
    def __call__(
        self, x: jax.Array, loop: jax.Array, known: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        """`known`: this projection's part of `joint_parts`."""
        _, out_dim = self.cfg.projections[self.projection]
        lead = x.shape[:-1]
        if known is None and self.has_variable("params", "wt"):
            known = _split_parts(self.variables["params"], x, loop, self.dtype)
        if known is not None and jnp.ndim(loop):
            y, wide = known
            if self.cfg.rank(self.projection):
                bt = self.variables["params"]["lora_bt"].astype(self.dtype)
                y = y + few_rows(_masked(wide, loop, self.cfg.num_loops), bt)
        else:
            y = self._applied(x, loop, known)
        if self.use_bias:
            loops = self.cfg.vector_loops("bias")
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

    def _applied(self, x, loop, known):
        cfg, rank = self.cfg, self.cfg.rank(self.projection)
        in_dim, out_dim = cfg.projections[self.projection]
        # Two axes only: a weight gradient that contracts over both B and T is compiled, on the
        # CPU, into transposed copies of its operands.
        x = x.astype(self.dtype)
        if not jnp.ndim(loop):
            x = x.reshape(-1, in_dim)
        if known is None:
            weight = nn.with_logical_partitioning(
                nn.initializers.normal(self.init_scale), self.axes
            )
            w = self.param("w", weight, (in_dim, out_dim))
        else:
            w = known[0].T
        if not rank:
            return x @ w.astype(self.dtype)
        if known is None:
            start = nn.with_logical_partitioning(
                nn.initializers.normal(in_dim**-0.5), ("loop", self.axes[0], "rank")
            )
            a = self.param("lora_a", start, (cfg.num_loops, in_dim, rank))
            b_axes = nn.with_logical_partitioning(
                nn.initializers.zeros, ("loop", "rank", self.axes[1])
            )
            b = self.param("lora_b", b_axes, (cfg.num_loops, rank, out_dim))
        else:
            a = known[1].reshape(cfg.num_loops, rank, in_dim).swapaxes(1, 2)
            b = self.variables["params"]["lora_bt"].T.reshape(cfg.num_loops, rank, out_dim)
        form = lora_form(jnp.ndim(loop), x.size // in_dim // self.data_shards, in_dim, out_dim)
        return apply_lora(x, w, a, b, loop, form, self.dtype)


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
        wide_a = jnp.moveaxis(a, 0, 1).reshape(-1, a.shape[0] * a.shape[2]).astype(dtype)
        wide_b = b.reshape(-1, b.shape[-1]).astype(dtype)
        return y + _masked(x @ wide_a, loop, a.shape[0]) @ wide_b


def _masked(wide, loop, num_loops: int):
    """x @ a of all loops, `[B, ..., L·R]`: zeros but for the loop `[B]` that runs."""
    rank = wide.shape[-1] // num_loops
    mask = jnp.repeat(jax.nn.one_hot(loop, num_loops, dtype=wide.dtype), rank, axis=-1)
    return wide * mask.reshape(*mask.shape[:-1], *(1,) * (wide.ndim - mask.ndim), mask.shape[-1])


def joint_parts(module: nn.Module, room: str, x: jax.Array, loop: jax.Array) -> dict[str, tuple]:
    """What `Linear` takes of the projections in `JOINT[room]`; {} where they are apart.

    `decoder.split_layers` joins them as a param of the module they belong to.
    """
    name, projections = JOINT[room]
    if not module.has_variable("params", name):
        return {}
    cfg, parts = module.cfg, []
    whole = _split_parts(module.get_variable("params", name), x, loop, module.dtype)
    for array, width in zip(
        whole,
        (lambda p: cfg.projections[p][1], lambda p: cfg.num_loops * cfg.rank(p)),
        strict=True,
    ):
        ends = np.cumsum([width(p) for p in projections])
        parts.append(jnp.split(array, ends[:-1], axis=-1 if jnp.ndim(loop) else 0))
    return dict(zip(projections, zip(*parts, strict=True), strict=True))


def _split_parts(params, x, loop, dtype):
    """Of weights that `decoder.split_layers` made, for lanes: `x @ w`, and `x @ a` of all loops.

    With one loop for all, the weights `[out, in]` and `[L·R, in]` themselves: the form of the LoRA
    is then `lora_form`'s to choose.
    """
    wt = params["wt"]
    lora_at = params.get("lora_at", jnp.zeros((0, wt.shape[1]), dtype))
    if not jnp.ndim(loop):
        return wt, lora_at
    x = x.astype(dtype)
    with jax.named_scope("split"):
        return few_rows(x, wt.astype(dtype)), few_rows(x, lora_at.astype(dtype))


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
        joint = joint_parts(self, "mlp", x, loop)
        up = linear("up", ("embed", "mlp"))(x, loop, joint.get("up"))
        if cfg.gated_mlp:
            hidden = act(linear("gate", ("embed", "mlp"))(x, loop, joint.get("gate"))) * up
        else:
            hidden = act(up)
        hidden = nn.with_logical_constraint(hidden, ("batch", "seq", "mlp"))
        return linear("down", ("mlp", "embed"), 0.02 * (2 * cfg.depth) ** -0.5)(hidden, loop)
