"""A small checkpoint for tests: two steps of params and Adam's state."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params
from recursive_jax.text import load_tokenizer
from recursive_jax.training.optimizer import OptimizerConfig, make_optimizer
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import ASSETS

ROOT = pathlib.Path(__file__).resolve().parents[1]
CFG = DecoderConfig(
    "llama", 48, 16, 32, num_heads=4, num_kv_heads=2, head_dim=4, num_layers=2, num_loops=2,
    norms="per_loop", lora_ranks={"q": 2, "up": 3}, tied_head=False,
)  # fmt: skip
PROGRESS = {"data": {"next_index": 7}, "history": [{"step": 0, "nll": 3.25}]}


@functools.cache
def make_arrays():
    """Params and Adam's state, no two numbers alike."""
    params = abstract_params(CFG)
    opt_state = jax.eval_shape(make_optimizer(OptimizerConfig(), 9).init, params)
    arrays = {"params": params, "opt_state": opt_state}
    rng = np.random.default_rng(0)

    def fill(x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        return noise if x.dtype == np.float32 else np.asarray(5, x.dtype)

    return jax.tree.map(fill, arrays)


def abstract(arrays, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays, shardings
    )


def one_device(arrays):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return abstract(arrays, jax.tree.map(lambda _: device, arrays))


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def save_run(directory):
    """Make a checkpoint with steps 1 (numbers doubled) and 2."""
    checkpoint.create(directory, CFG, load_tokenizer(ASSETS / "tiny"), source="somewhere", n=[1])
    writer = checkpoint.Writer(directory, keep=2)
    for step, factor in ((0, 3), (1, 2), (2, 1)):
        arrays = jax.tree.map(lambda x, f=factor: jnp.asarray(x * f), make_arrays())
        writer.save(step, arrays["params"], arrays["opt_state"], PROGRESS)
    writer.close()


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
