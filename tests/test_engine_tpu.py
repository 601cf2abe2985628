"""Ticks compiled ahead of time for TPUs that are not here: kernel, memory, collectives."""

import os
import re

import jax
import jax.numpy as jnp
import pytest
from decode_models import make_engine
from test_engine_mesh import collectives

from recursive_jax import sharding
from recursive_jax.decode_model import decode_model
from recursive_jax.decoding.donation import copies
from recursive_jax.decoding.exit_measures import TopProbability
from recursive_jax.models.parameters import abstract_params, logical_axes
from recursive_jax.weights import hf_config

SLOTS, CONTEXT = 16, 1024
LORA = {name: 64 for name in ("q", "k", "v", "o", "gate", "up", "down")}
GEMMA_2B, SMOLLM2 = (
    source.replace(num_layers=source.depth // 2, num_loops=2, norms="per_loop", lora_ranks=LORA)
    for source in (hf_config.preset("gemma_2b"), hf_config.preset("smollm2_135m"))
)
KERNEL = "ragged_paged_attention_kernel"


def described(topology, data, tensor):
    """A mesh of devices that need not exist."""
    pytest.importorskip("libtpu", reason="pip install recursive_jax[tpu] compiles for TPUs")
    from jax.experimental import topologies

    # libtpu would ask the cloud what machine this is, and let one process alone use it
    os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return sharding.make_mesh(data, 1, tensor, devices=list(devices)[: data * tensor])


def engine_for(cfg, mesh):
    rules = sharding.rules_for(mesh, cfg)
    where = sharding.shardings(logical_axes(cfg), mesh, rules)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
        abstract_params(cfg),
        where,
    )
    return make_engine(
        decode_model(cfg, jnp.bfloat16, mesh, CONTEXT),
        params,
        SLOTS,
        CONTEXT,
        measure=TopProbability(),
        missing_kv="propagate",
        mesh=mesh,
        rules=rules,
    )


@pytest.mark.parametrize(
    ("cfg", "topology", "data", "tensor"),
    [
        pytest.param(GEMMA_2B, "v6e:2x2", 2, 2, id="gemma_2b-v6e"),
        pytest.param(SMOLLM2, "v5e:2x2", 2, 1, id="smollm2-v5e", marks=pytest.mark.slow),
    ],
)
def test_ticks_compile_for_tpus_that_are_not_here(cfg, topology, data, tensor):
    engine = engine_for(cfg, described(topology, data, tensor))
    fits = cfg is GEMMA_2B
    assert engine.model.attention == (
        "ragged paged attention kernel"
        if fits
        else "XLA (ragged paged attention: head_dim=64 is not a multiple of 128)"
    )
    engine.compile()
    cache = engine.cache_bytes // data  # one kv head is on all devices of a shard
    for name in ("tick", "chunk"):
        text = engine.executables[name].as_text()
        calls = [
            line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line
        ]
        assert any(KERNEL in line for line in calls) == fits
        count, crossing = collectives(text, tensor)
        assert crossing == 0 and (count > 0) == (tensor > 1)
        assert copies(engine.executables[name], engine.cache) == []
        memory = engine.memory()[name]  # of one device
        assert memory.alias_size_in_bytes >= cache, "the cache is donated"
        # A head_dim of 64 fills half of what a TPU keeps for it.
        held = memory.alias_size_in_bytes
        assert held < cache * (1.02 if fits else 2.02)
        shape = ",".join(map(str, engine.cache.rows.sharding.shard_shape(engine.cache.rows.shape)))
        assert f"[{shape}]" in text and not re.search(rf"\[{shape}\]\S* copy\(", text)
        # Temporaries are weights on their way, in another order, not the cache.
        assert memory.temp_size_in_bytes < 0.8 * cache
