"""Models of real size by shapes only: parameter table, and the train step traced and sharded."""

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from recursive_jax import sharding
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params, parameter_counts
from recursive_jax.trainer import Trainer
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig, make_optimizer
from recursive_jax.training.setup import TrainSetup
from recursive_jax.weights import hf_config
from recursive_jax.weights.tie_config import TieConfig, tied_config

MODELS = {"gemma_2b": "1.07", "tinyllama_1_1b": "0.53", "pythia_1b": "0.44"}


@pytest.mark.parametrize("name", MODELS)
def test_train_step_of_full_size_models_traces_with_shardings(name):
    source = hf_config.preset(name)
    cfg = tied_config(source, TieConfig(2, lora_rank=64))
    counts = parameter_counts(abstract_params(cfg))
    # the relaxed sizes the paper prints, rank 64 (Table G.2), layers only
    assert f"{(counts['shared'] + counts['lora']) / 1e9:.2f}" == MODELS[name]

    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    options = dict(dtype=jnp.bfloat16, remat_policy="dots", data_shards=4)
    student, teacher = Decoder(cfg, **options), Decoder(source, **options)
    tx = make_optimizer(OptimizerConfig(), 100)
    trainer = Trainer(TrainSetup(student, tx, Objective(), teacher), mesh)
    lowered = trainer.lower(8, 256)
    # the constraints on activations reached the program: heads and mlp over tensor, rows over fsdp
    constraints = [line for line in lowered.as_text().splitlines() if "sharding_constraint" in line]
    rows = [line for line in constraints if '"data", "fsdp"' in line]
    assert rows and any('"tensor"' in line for line in rows), constraints[:3]
    # moments are sharded like their parameter, so memory per device falls with the mesh

    def gate(tree):
        return tree["block"]["mlp"]["up"]["w"]

    moments = next(s for s in trainer.shardings.opt_state if hasattr(s, "mu"))
    assert gate(moments.mu) == gate(trainer.param_shardings) == gate(trainer.shardings.params)
    assert gate(trainer.param_shardings).spec == PartitionSpec(None, "fsdp", "tensor")
