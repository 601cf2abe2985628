"""Parameters in the order in which one CPU reads them.

Every layer has arrays of its own: XLA:CPU copies a layer's weights out of a stack, and does not
copy arrays. Projections that read the same rows are one matrix, and weights are `[out, in]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict

from recursive_jax.cpu.matmul import LoraMatrix
from recursive_jax.models.config import DecoderConfig


@struct.dataclass
class NormParams:
    scale: jax.Array  # [F], or [L, F] where it is per loop
    bias: jax.Array | None = None  # of a LayerNorm


@struct.dataclass
class LayerParams:
    pre_attention_norm: NormParams
    pre_mlp_norm: NormParams
    post_attention_norm: NormParams | None
    post_mlp_norm: NormParams | None
    q_norm: NormParams | None
    k_norm: NormParams | None
    qkv: LoraMatrix
    o: LoraMatrix
    gate_up: LoraMatrix  # without a gate: up alone
    down: LoraMatrix


@struct.dataclass
class CpuParams:
    embedding: jax.Array  # [V, D]
    head: jax.Array | None  # [V, D]; None when it is the embedding
    final_norm: NormParams
    layers: tuple[LayerParams, ...]


def arrange(params: Mapping[str, Any], cfg: DecoderConfig, dtype: Any, donate=False) -> CpuParams:
    """Params of `Decoder` as `CpuParams`; matrices and biases in `dtype`.

    With `donate` the stacks and an untied head are deleted one after the other, as they are
    replaced. Only one stack is then in memory twice.
    """
    block = _Block(params["block"], cfg, dtype, donate)
    gate_up = ("gate", "up") if cfg.gated_mlp else ("up",)
    parts = {
        "qkv": block.matrices("attention", ("q", "k", "v")),
        "o": block.matrices("attention", ("o",)),
        "gate_up": block.matrices("mlp", gate_up),
        "down": block.matrices("mlp", ("down",)),
    }
    for name in ("pre_attention_norm", "pre_mlp_norm", "post_attention_norm", "post_mlp_norm"):
        parts[name] = block.norms(name)
    for name in ("q_norm", "k_norm"):
        parts[name] = block.norms("attention", name)
    layers = [
        LayerParams(**{name: layers[i] for name, layers in parts.items()})
        for i in range(cfg.num_layers)
    ]
    head = None
    if not cfg.tied_head:
        head = jnp.asarray(params["head"].T, dtype)
        if donate:
            jax.block_until_ready(head)
            params["head"].delete()
    embedding, final_norm = jnp.asarray(params["embedding"]), NormParams(**params["final_norm"])
    return CpuParams(embedding, head, final_norm, tuple(layers))


class _Block:
    """The stacks of a block, taken apart layer by layer."""

    def __init__(self, block: Mapping[str, Any], cfg: DecoderConfig, dtype: Any, donate: bool):
        self._stacks, self._cfg = flatten_dict(block), cfg
        self._dtype, self._donate = dtype, donate

    def norms(self, *path: str) -> list[NormParams | None]:
        if (*path, "scale") not in self._stacks:
            return [None] * self._cfg.num_layers
        scales, biases = self._layers(*path, "scale"), self._layers(*path, "bias")
        return [NormParams(*vectors) for vectors in zip(scales, biases, strict=True)]

    def matrices(self, module: str, projections: Sequence[str]) -> list[LoraMatrix]:
        """One matrix per layer that joins these projections."""
        num_layers = self._cfg.num_layers

        def by_layer(columns):
            """A list by projection of lists by layer, the other way around."""
            return [tuple(column[i] for column in columns) for i in range(num_layers)]

        weights = by_layer([self._layers(module, p, "w", turn=_transposed) for p in projections])
        weights = [jnp.concatenate(parts) if len(parts) > 1 else parts[0] for parts in weights]
        deltas = by_layer([self._deltas(module, p) for p in projections])
        a, b = ([self._factors(module, p, name) for p in projections] for name in ("a", "b"))
        a, b = by_layer(a), by_layer(b)
        biases = by_layer([self._layers(module, p, "b") for p in projections])
        return [
            LoraMatrix(
                w=weights[i],
                a=jnp.concatenate(a[i]) if sum(map(len, a[i])) else None,
                b=b[i],
                delta=deltas[i],
                bias=biases[i],
                num_loops=self._cfg.num_loops,
            )
            for i in range(num_layers)
        ]

    def _deltas(self, module: str, projection: str) -> list[tuple]:
        """The products of LoRA factors that are larger than their product; zero ones are None."""
        in_dim, out_dim = self._cfg.projections[projection]
        if self._cfg.rank(projection) * (in_dim + out_dim) <= in_dim * out_dim:
            return [()] * self._cfg.num_layers

        def product(a, b):
            delta = (a @ b).T.astype(self._dtype)
            return delta if jnp.any(delta) else None

        a, b = (self._stacks.pop((module, projection, f"lora_{name}")) for name in "ab")
        a, b = jnp.asarray(a), jnp.asarray(b)
        loops = range(self._cfg.num_loops)
        deltas = [
            tuple(product(a[i, n], b[i, n]) for n in loops) for i in range(self._cfg.num_layers)
        ]
        jax.block_until_ready(deltas)
        if self._donate:
            a.delete(), b.delete()
        return deltas

    def _factors(self, module: str, projection: str, name: str) -> list[jax.Array]:
        """`a [L·R, in]` or `b [out, L·R]` of every layer; no columns where there are no factors."""
        path = (module, projection, f"lora_{name}")
        if path in self._stacks:
            return self._layers(*path, turn=_wide_a if name == "a" else _wide_b)
        in_dim, out_dim = self._cfg.projections[projection]
        shape = (0, in_dim) if name == "a" else (out_dim, 0)
        return [jnp.zeros(shape, self._dtype)] * self._cfg.num_layers

    def _layers(self, *path: str, turn=None) -> list[jax.Array | None]:
        """Every layer's part of a stack; None for each where there is no such stack."""
        stack = self._stacks.pop(path, None)
        if stack is None:
            return [None] * self._cfg.num_layers
        is_norm = path[-2].endswith("_norm")  # norms are computed in float32
        layers = [jnp.asarray(stack[i]) for i in range(self._cfg.num_layers)]
        if turn is not None:
            layers = [turn(layer) for layer in layers]
        if not is_norm:
            layers = [layer.astype(self._dtype) for layer in layers]
        jax.block_until_ready(layers)
        if self._donate:
            stack.delete()
        return layers


def _transposed(w):  # [in, out] -> [out, in]
    return w.T


def _wide_a(a):  # [L, in, R] -> [L·R, in]
    return a.swapaxes(1, 2).reshape(-1, a.shape[1])


def _wide_b(b):  # [L, R, out] -> [out, L·R]
    return b.reshape(-1, b.shape[2]).T
