"""Parameters of a decoder: how they start, their shapes, their logical axes, their counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder

HEAD_PARAMS = ("embedding", "head", "head_t", "final_norm")


def head_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the params `Decoder.unembed` reads."""
    return {name: params[name] for name in HEAD_PARAMS if name in params}


def init_params(cfg: DecoderConfig, key: jax.Array) -> dict[str, Any]:
    """Random f32 params of `cfg` (from-scratch training and shapes)."""
    return nn.meta.unbox(_init_boxed(cfg, key))


def abstract_params(cfg: DecoderConfig) -> dict[str, Any]:
    """Shapes and dtypes of the params, nothing allocated."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def logical_axes(cfg: DecoderConfig) -> dict[str, Any]:
    """A PartitionSpec of logical axis names for every parameter; `sharding` maps them to a mesh."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _init_boxed(cfg, jax.random.key(0))))


def _init_boxed(cfg: DecoderConfig, key: jax.Array):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(cfg).init(key, tokens, tokens)["params"]


def parameter_counts(params: Mapping[str, Any]) -> dict[str, int]:
    """Numbers stored, by group; works on arrays and on abstract shapes.

    shared: the block's projection matrices (the paper's N-emb); lora; vectors: norms and biases;
    embedding: token embedding and untied head; total.
    """
    counts = dict.fromkeys(("shared", "lora", "vectors", "embedding", "total"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [p.key for p in path]
        if keys[0] in ("embedding", "head", "head_t"):
            group = "embedding"
        elif keys[-1] in ("w", "wt"):
            group = "shared"
        elif keys[-1].startswith("lora_"):
            group = "lora"
        else:
            group = "vectors"
        size = 1
        for n in leaf.shape:
            size *= n
        counts[group] += size
        counts["total"] += size
    return counts
