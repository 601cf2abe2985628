"""Linear (with per-loop LoRA), norms and the gated MLP: the parts that look at `loop`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from recursive_jax.cpu.matmul import Lora, by_kernel, few_rows, takes
from recursive_jax.models.config import DecoderConfig

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
    `JOINT` in the module above; or `lora_wt_N [out, in]`, the product of loop N, where that is
    smaller than its factors.
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
        self,
        x: jax.Array,
        loop: jax.Array,
        known: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """`known`: this projection's part of `joint_parts`."""
        _, out_dim = self.cfg.projections[self.projection]
        lead = x.shape[:-1]
        params = self.variables.get("params", {})
        if known is None and "wt" in params:
            loras = [params.get("lora_bt")]
            (known,) = _split_parts(self, [self.projection], params, loras, x, loop)
        y = known if known is not None and jnp.ndim(loop) else self._applied(x, loop, known)
        for n in range(self.cfg.num_loops):
            if (delta := params.get(f"lora_wt_{n}")) is not None:
                mine = (jnp.asarray(loop) == n).reshape(-1, *(1,) * (x.ndim - 1))
                # rows of zeros cost nothing, and a loop that no row is at reads nothing
                rows = jnp.where(mine, x, jnp.zeros_like(x)).astype(self.dtype)
                y = y + few_rows(rows, delta.astype(self.dtype)).reshape(y.shape)
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
        if not rank or (known is not None and not known[1].size):
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


def joint_parts(
    module: nn.Module, room: str, x: jax.Array, loop: jax.Array, asked: Mapping[str, int] = {}
) -> dict[str, Any]:
    """What `Linear` takes of the projections in `JOINT[room]`; {} where they are apart.

    `decoder.split_layers` joins them as a param of the module they belong to. `asked`: of how many
    lanes, the first ones, a projection is asked for, if not of all.
    """
    name, projections = JOINT[room]
    params = module.variables.get("params", {})
    if name not in params:
        return {}
    loras = [params.get(projection, {}).get("lora_bt") for projection in projections]
    parts = _split_parts(module, projections, params[name], loras, x, loop, asked)
    return dict(zip(projections, parts, strict=True))


def _split_parts(module, projections, params, bts, x, loop, asked: Mapping[str, int] = {}):
    """Of projections that `decoder.split_layers` joined: for lanes what they give, LoRA included.

    With one loop for all, their weights `[out, in]` and `[L·R, in]`: the form of the LoRA is then
    `lora_form`'s to choose.
    """
    cfg, dtype, wt = module.cfg, module.dtype, params["wt"]
    at = params.get("lora_at", jnp.zeros((0, wt.shape[1]), dtype))
    widths = [cfg.projections[p][1] for p in projections]
    ends, ranks = np.cumsum(widths), [0 if bt is None else bt.shape[1] for bt in bts]
    split_ranks = functools.partial(jnp.split, indices_or_sections=np.cumsum(ranks)[:-1])
    if not jnp.ndim(loop):
        return list(zip(jnp.split(wt, ends[:-1]), split_ranks(at), strict=True))
    x, wt, at = (array.astype(dtype) for array in (x, wt, at))
    bts = [jnp.zeros((n, 0)) if bt is None else bt for n, bt in zip(widths, bts, strict=True)]
    bts = [bt.astype(dtype) for bt in bts]
    lanes = [asked.get(projection, len(x)) for projection in projections]
    with jax.named_scope("split"):
        rows, times = x.reshape(-1, x.shape[-1]), x[0, ..., 0].size
        if takes(rows, wt, dtype):
            members = [(width, count * times) for width, count in zip(widths, lanes, strict=True)]
            lora = Lora(jnp.repeat(loop, times), cfg.num_loops, at, bts) if any(ranks) else None
            y = by_kernel(rows, wt, members, lora).reshape(*x.shape[:-1], -1)
            return [part[:n] for part, n in zip(jnp.split(y, ends[:-1], -1), lanes, strict=True)]
        parts = []
        wides = split_ranks(few_rows(x, at), axis=-1) if any(ranks) else [None] * len(widths)
        for y, wide, bt, n in zip(
            jnp.split(few_rows(x, wt), ends[:-1], -1), wides, bts, lanes, strict=True
        ):
            y = y[:n]
            if bt.size:
                y = y + few_rows(_masked(wide[:n], loop[:n], cfg.num_loops), bt)
            parts.append(y)
        return parts


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
