"""The table of parameter leaves against the module's own init, and its users."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import traverse_util

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import (
    KINDS,
    abstract_params,
    init_params,
    kinds,
    leaves,
    logical_axes,
    parameter_counts,
)

SMALL = dict(
    vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, num_kv_heads=1, head_dim=4, num_layers=3
)
RECURSIVE = dict(num_loops=2, norms="per_loop", lora_ranks={"q": 2, "down": 3})
CONFIGS = {
    "llama": DecoderConfig("llama", **SMALL),
    "gemma3, per loop, LoRA": DecoderConfig(
        "gemma3", **SMALL, **RECURSIVE, norm_offset=1.0, post_norms=True, qk_norm=True
    ),
    "gpt_neox, untied head, per loop, LoRA": DecoderConfig(
        "gpt_neox",
        **{**SMALL, "num_kv_heads": 2},
        **RECURSIVE,
        norm="layer",
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tied_head=False,
        prefix_length=5,
    ),
    "qwen2, folded": DecoderConfig(
        "qwen2", **SMALL, **{**RECURSIVE, "norms": "folded"}, qkv_bias=True
    ),
}
every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


def boxed_init(cfg):
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = Decoder(cfg).init
    return jax.eval_shape(lambda: init(jax.random.key(0), tokens, tokens)["params"])


@every_config
def test_the_table_is_the_modules_own_init(cfg):
    boxed = boxed_init(cfg)
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    assert abstract_params(cfg) == shapes
    assert logical_axes(cfg) == nn.get_partition_spec(boxed)
    flat = traverse_util.flatten_dict(shapes, sep="/")
    assert list(leaves(cfg)) == list(flat)
    for path, leaf in leaves(cfg).items():
        assert (leaf.path, leaf.shape) == (path, flat[path].shape)
        assert len(leaf.axes) == len(leaf.shape)
        assert leaf.in_block == path.startswith("block/")


@every_config
def test_a_vector_has_a_loop_axis_where_the_config_gives_its_kind_one(cfg):
    vectors = {leaf.kind: leaf for leaf in leaves(cfg).values() if leaf.in_block}
    for kind in {"bias", "pre_norm", "post_norm", "qk_norm"} & set(vectors):
        assert ("loop" in vectors[kind].axes) == (cfg.vector_loops(kind) > 0), kind


@every_config
def test_projections_have_the_leaves_of_their_config(cfg):
    for kind in ("weight", "lora_a", "lora_b"):
        found = {leaf.projection for leaf in leaves(cfg).values() if leaf.kind == kind}
        expected = set(cfg.projections if kind == "weight" else dict(cfg.lora_ranks))
        assert found == expected
    for leaf in leaves(cfg).values():
        has_one = leaf.kind in ("weight", "lora_a", "lora_b", "bias")
        assert (leaf.projection is not None) == has_one, leaf.path
        if leaf.kind == "lora_a":
            assert leaves(cfg)[leaf.sibling("w")].projection == leaf.projection


def test_kinds_of_the_richest_models():
    found = {}
    for cfg in CONFIGS.values():
        found |= {path: leaf.kind for path, leaf in leaves(cfg).items()}
    assert set(found.values()) == set(KINDS.values()), "every kind occurs"
    examples = {
        "embedding": "embedding",
        "head": "head",
        "final_norm/scale": "final_norm",
        "final_norm/bias": "final_norm",
        "block/attention/q/w": "weight",
        "block/attention/q/b": "bias",
        "block/mlp/down/lora_a": "lora_a",
        "block/mlp/down/lora_b": "lora_b",
        "block/attention/k_norm/scale": "qk_norm",
        "block/pre_attention_norm/bias": "pre_norm",
        "block/post_mlp_norm/scale": "post_norm",
    }
    assert {path: found[path] for path in examples} == examples


@every_config
def test_kinds_of_a_tree_are_those_of_the_table(cfg):
    flat = traverse_util.flatten_dict(kinds(abstract_params(cfg)), sep="/")
    assert flat == {path: leaf.kind for path, leaf in leaves(cfg).items()}


def test_a_leaf_that_no_decoder_has_is_refused():
    with pytest.raises(KeyError):
        kinds({"block": {"mlp": {"up": {"wt": jnp.zeros(3)}}}})


def test_counts_by_hand():
    cfg = CONFIGS["gpt_neox, untied head, per loop, LoRA"]
    shared = 3 * (4 * 8 * 8 + 2 * 8 * 12)  # layers · (q, k, v, o + up, down)
    lora = 3 * 2 * (2 * (8 + 8) + 3 * (12 + 8))  # layers · loops · (q + down)
    norms = 3 * 2 * 2 * 2 * 8 + 2 * 8  # layers · loops · two norms · (scale, bias) + final
    biases = 3 * 2 * (5 * 8 + 12)  # layers · loops · (q, k, v, o, down + up)
    prefix, gates = 3 * 2 * 5 * 8, 3 * 2 * cfg.num_heads  # layers · loops
    expected = {"shared": shared, "lora": lora, "prefix": prefix}
    expected |= {"vectors": norms + biases + gates, "embedding": 2 * 11 * 8}
    expected["total"] = sum(expected.values())
    assert parameter_counts(abstract_params(cfg)) == expected
