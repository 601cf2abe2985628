"""Models of real size by shapes only: parameter table, and the train step traced and sharded."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from recursive_jax import sharding
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params, logical_axes, parameter_counts
from recursive_jax.training.data import Batch
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig, make_optimizer
from recursive_jax.training.step import init_state, make_train_step
from recursive_jax.weights import hf_config, tying

MODELS = {"gemma_2b": "1.07", "tinyllama_1_1b": "0.53", "pythia_1b": "0.44"}


@pytest.mark.parametrize("name", MODELS)
def test_train_step_of_full_size_models_traces_with_shardings(name):
    source = hf_config.preset(name)
    cfg = tying.tied_config(source, num_loops=2, lora_ranks=64)
    counts = parameter_counts(abstract_params(cfg))
    # the relaxed sizes the paper prints, rank 64 (Table G.2), layers only
    assert f"{(counts['shared'] + counts['lora']) / 1e9:.2f}" == MODELS[name]

    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    rules = sharding.rules_for(mesh, cfg)
    tx = make_optimizer(OptimizerConfig(), 100)
    abstract = jax.eval_shape(lambda p: init_state(p, tx), abstract_params(cfg))
    params = sharding.shardings(logical_axes(cfg), mesh, rules)
    state = sharding.state_shardings(abstract, params, mesh)
    batch = jax.tree.map(
        lambda dtype: jax.ShapeDtypeStruct((8, 256), dtype, sharding=sharding.batch_sharding(mesh)),
        Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32),
    )
    options = dict(dtype=jnp.bfloat16, remat_policy="dots", data_shards=4)
    step = make_train_step(Decoder(cfg, **options), tx, Objective(), Decoder(source, **options))

    def sharded(state, batch, teacher):
        with nn.logical_axis_rules(rules):
            return step(state, batch, teacher)

    teacher = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
        abstract_params(source),
        sharding.shardings(logical_axes(source), mesh, sharding.rules_for(mesh, source)),
    )
    arguments = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, state
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(sharded, donate_argnums=0, out_shardings=(state, None)).lower(
            arguments, batch, teacher
        )
    # the constraints on activations reached the program: heads and mlp over tensor, rows over fsdp
    constraints = [line for line in lowered.as_text().splitlines() if "sharding_constraint" in line]
    rows = [line for line in constraints if '"data", "fsdp"' in line]
    assert rows and any('"tensor"' in line for line in rows), constraints[:3]
    # moments are sharded like their parameter, so memory per device falls with the mesh

    def gate(tree):
        return tree["block"]["mlp"]["up"]["w"]

    moments = next(s for s in state.opt_state if hasattr(s, "mu"))
    assert gate(moments.mu) == gate(params) == gate(state.params)
    assert gate(params).spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
