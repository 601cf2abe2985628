"""Parameters of a decoder: the table of their kinds, shapes and axes, how they start, their counts.

The module's own init defines the parameters. `leaves` reads it once per config, without allocating
anything. Tying, weight decay, counts, shardings and name tables take kinds and shapes from here.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder

HEAD_PARAMS = ("embedding", "head", "final_norm")

# Kind of a parameter by its own name. The scale and bias of a norm have the kind of their norm.
# The kinds of a block's vectors are those of `DecoderConfig.vector_loops`.
KINDS = {
    "embedding": "embedding",
    "head": "head",
    "w": "weight",
    "lora_a": "lora_a",
    "lora_b": "lora_b",
    "b": "bias",
    "pre_attention_norm": "pre_norm",
    "pre_mlp_norm": "pre_norm",
    "post_attention_norm": "post_norm",
    "post_mlp_norm": "post_norm",
    "q_norm": "qk_norm",
    "k_norm": "qk_norm",
    "final_norm": "final_norm",
    "prefix": "prefix",
    "prefix_gate": "prefix_gate",
}
LORA = ("lora_a", "lora_b")
MATRICES = ("embedding", "head", "weight", *LORA)
COUNT_GROUPS = {  # kind -> group of `parameter_counts`; every other kind is a vector
    "weight": "shared",
    "lora_a": "lora",
    "lora_b": "lora",
    "prefix": "prefix",
    "embedding": "embedding",
    "head": "embedding",
}


class Leaf(NamedTuple):
    """One parameter.

    Attributes:
      path: its names from the root, such as 'block/attention/q/w'.
      kind: a value of `KINDS`.
      projection: the projection of a weight, LoRA factor or bias, such as 'q'; else None.
      shape: `[layer, ...]` in the block, with a loop axis after the layer axis where `axes` has it.
      axes: a logical axis name per dimension.
    """

    path: str
    kind: str
    projection: str | None
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def in_block(self) -> bool:
        """Whether it belongs to the shared block: its first axis is the layer."""
        return self.axes[0] == "layer"

    def sibling(self, name: str) -> str:
        """The path of another parameter of the same module."""
        return f"{self.path.rpartition('/')[0]}/{name}"


@functools.lru_cache(maxsize=64)
def leaves(cfg: DecoderConfig) -> Mapping[str, Leaf]:
    """Every parameter of `cfg`, by path, in the order of a sorted tree."""
    boxed = jax.eval_shape(lambda: _init_boxed(cfg, jax.random.key(0)))
    table = {}
    for keys, box in flatten_dict(boxed).items():
        projection = keys[-2] if len(keys) > 1 and keys[-2] in cfg.projections else None
        leaf = Leaf("/".join(keys), _kind(keys), projection, box.value.shape, box.names)
        table[leaf.path] = leaf
    return types.MappingProxyType(table)


def kinds(params: Mapping[str, Any]) -> Any:
    """The kind of every leaf of nested params, as a tree of the same structure.

    Raises:
      KeyError: a leaf is no parameter of a `Decoder`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _kind([entry.key for entry in path]), params
    )


def _kind(keys: Sequence[str]) -> str:
    return KINDS[keys[-1] if keys[-1] in KINDS else keys[-2]]


def head_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the params that `Decoder.unembed` reads."""
    return {name: params[name] for name in HEAD_PARAMS if name in params}


def init_params(cfg: DecoderConfig, key: jax.Array) -> dict[str, Any]:
    """Random f32 params of `cfg`, to train from scratch."""
    return nn.meta.unbox(_init_boxed(cfg, key))


def abstract_params(cfg: DecoderConfig) -> dict[str, Any]:
    """Shapes and dtypes of the params; nothing is allocated."""
    return _nested(
        {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in leaves(cfg).items()}
    )


def logical_axes(cfg: DecoderConfig) -> dict[str, Any]:
    """A PartitionSpec of logical axis names for every parameter; `sharding` maps them to a mesh."""
    return _nested({path: PartitionSpec(*leaf.axes) for path, leaf in leaves(cfg).items()})


def parameter_counts(params: Mapping[str, Any]) -> dict[str, int]:
    """Numbers stored, by group; works on arrays and on abstract shapes.

    shared: the block's projection matrices (the paper's N-emb); lora; prefix; vectors: norms,
    biases and gates; embedding: token embedding and untied head; total.
    """
    counts = dict.fromkeys(("shared", "lora", "prefix", "vectors", "embedding", "total"), 0)
    kind_and_leaf = zip(jax.tree.leaves(kinds(params)), jax.tree.leaves(params), strict=True)
    for kind, leaf in kind_and_leaf:
        size = math.prod(leaf.shape)
        counts[COUNT_GROUPS.get(kind, "vectors")] += size
        counts["total"] += size
    return counts


def _init_boxed(cfg: DecoderConfig, key: jax.Array):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(cfg).init(key, tokens, tokens)["params"]


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict(dict(flat), sep="/")
