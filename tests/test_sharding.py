"""Meshes change where numbers live and nothing else: eight fake devices against one."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from recursive_jax import sharding
from recursive_jax.evaluation.perplexity import perplexity
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params, logical_axes
from recursive_jax.trainer import Trainer, teacher_shardings
from recursive_jax.training.data import Batch
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig, make_optimizer
from recursive_jax.training.setup import TrainSetup

TEACHER = DecoderConfig(
    "llama", 64, 32, 48, num_heads=8, num_kv_heads=2, head_dim=8, num_layers=4, tied_head=False,
    qkv_bias=True,
)  # fmt: skip
STUDENT = TEACHER.replace(num_layers=2, num_loops=2, norms="per_loop", lora_ranks={"q": 4, "up": 4})
BATCH, LENGTH, STEPS = 8, 16, 3
WARNING = "Involuntary full rematerialization"


def test_mesh_sizes():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = sharding.make_mesh(1, 2, -1)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 4}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert sharding.data_shards(mesh) == 2
    assert sharding.data_shards(sharding.make_mesh(4, 2, 1)) == 8
    two = sharding.make_mesh(devices=jax.devices()[3:5])
    assert list(two.devices.flat) == jax.devices()[3:5]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "mesh .*'data': 3.* does not divide the 8 devices"),
        ((-1, 3, 1), "does not divide the 8 devices"),
        ((2, 2, 1), "uses 4 of 8 devices; set one of the sizes to -1"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 1, 1), "sizes are positive"),
        ((-2, 1, 1), "sizes are positive"),
        ((16, 1, 1), "does not divide the 8 devices"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def flat(tree):
    return {"/".join(k.key for k in p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def specs(cfg, mesh):
    tree = sharding.shardings(logical_axes(cfg), mesh, sharding.rules_for(mesh, cfg))
    return {path: s.spec for path, s in flat(tree).items()}


def test_rules_by_hand():
    """Every kind of parameter, written out: embed over fsdp, the wide axes over tensor."""
    got = specs(STUDENT, sharding.make_mesh(2, 2, 2))
    expected = {
        "embedding": P("tensor", "fsdp"),  # [V, D]
        "head": P("fsdp", "tensor"),  # [D, V]
        "final_norm/scale": P(None),
        "block/pre_attention_norm/scale": P(None, None, None),  # [layer, loop, D]
        "block/attention/q/w": P(None, "fsdp", "tensor"),  # [layer, in, out]
        "block/attention/q/lora_a": P(None, None, "fsdp", None),  # [layer, loop, in, R]
        # [layer, loop, R, out]
        "block/attention/q/lora_b": P(None, None, None, ("tensor", "fsdp")),
        "block/attention/q/b": P(None, None, "tensor"),  # [layer, loop, out]
        "block/attention/k/w": P(None, "fsdp", "tensor"),
        "block/attention/k/b": P(None, None, "tensor"),
        "block/attention/o/w": P(None, "tensor", "fsdp"),
        "block/mlp/up/w": P(None, "fsdp", "tensor"),
        "block/mlp/up/lora_a": P(None, None, "fsdp", None),
        "block/mlp/down/w": P(None, "tensor", "fsdp"),
    }
    assert {path: got[path] for path in expected} == expected
    abstract = flat(abstract_params(STUDENT))
    assert set(got) == set(abstract)
    assert all(len(got[path]) == abstract[path].ndim for path in got)


def test_what_does_not_divide_is_replicated_and_said(caplog):
    mesh = sharding.make_mesh(1, 2, 4)
    with caplog.at_level(logging.WARNING):
        got = specs(STUDENT, mesh)
    assert "kv_heads=2 is not divisible by mesh axis tensor=4: replicated" in caplog.text
    assert len(caplog.records) == 1
    assert got["block/attention/k/w"] == P(None, "fsdp", None)
    assert got["block/attention/q/w"] == P(None, "fsdp", "tensor")
    odd = sharding.rules_for(mesh, STUDENT.replace(vocab_size=65, mlp_dim=50, embed_dim=33))
    assert {name for name, axis in odd if axis is None} >= {"vocab", "mlp", "embed", "kv_heads"}
    assert dict(odd)["heads"] == "tensor" and dict(odd)["batch"] == ("data", "fsdp")


@functools.cache
def host_params(cfg):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        normal = 0.2 * rng.standard_normal(leaf.shape)
        return normal.astype(np.float32) + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def host_batch(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (BATCH, LENGTH + 1)).astype(np.int32)
    one = np.ones((BATCH, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), one.shape)
    weights = (rng.random(one.shape) < 0.8).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, one)


def train(mesh):
    """A few steps as the train job takes them, with averaged weights.

    In two micro-batches, where the mesh spreads the rows over few enough devices.

    Returns losses `[step, 4]`, nll by exit, the state, where it should be, the compiled text.
    """
    options = dict(remat_policy="full", data_shards=sharding.data_shards(mesh))
    student, teacher = Decoder(STUDENT, **options), Decoder(TEACHER, **options)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 10)
    objective = Objective(exit_coefficient=0.1)
    # room for the logits of three positions: the head works in chunks
    accumulate = 2 if 1 < sharding.data_shards(mesh) <= BATCH // 2 else 1
    setup = TrainSetup(
        student, tx, objective, teacher, accumulate=accumulate, ema_decay=0.75,
        logits_bytes=3 * 4 * BATCH * 64 * 3,
    )  # fmt: skip
    places = teacher_shardings(TEACHER, mesh)
    trainer = Trainer(setup, mesh, sharding.put_global(host_params(TEACHER), places))
    trainer.start(sharding.put_global(host_params(STUDENT), trainer.param_shardings))
    text, losses = trainer.lower(BATCH, LENGTH).compile().as_text(), []
    for n in range(STEPS):
        metrics = trainer.step(host_batch(n))
        losses.append([float(metrics[k]) for k in ("loss", "kd", "ce_exit_1", "grad_norm")])
    with trainer.use():
        tokens = np.random.default_rng(9).integers(0, 64, (12, LENGTH)).astype(np.int32)

        def put(batch):
            return sharding.put_global(batch, sharding.batch_sharding(mesh))

        scored = np.ones(tokens.shape, bool)
        params = trainer.state.params
        measured = perplexity(student, params, tokens, scored, BATCH, all_loops=True, put=put)
    return np.asarray(losses), measured["nll_exits"], trainer.state, trainer.shardings, text


@functools.cache
def one_device():
    return train(sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 1, 1), id="data"),
        pytest.param((1, 8, 1), id="fsdp", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), id="all"),
        pytest.param((1, 2, 4), id="kv_heads_replicated"),
    ],
)
def test_any_mesh_trains_like_one_device(sizes, capfd):
    losses, nll, state, places, text = train(sharding.make_mesh(*sizes))
    expected, expected_nll, expected_state, _, _ = one_device()
    assert WARNING not in capfd.readouterr().err
    if sizes == (8, 1, 1):
        # every device works on its own rows from embedding to head, then gradients are summed
        assert "all-reduce" in text
        assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    np.testing.assert_allclose(nll, expected_nll, rtol=2e-5)
    assert expected[-1, 0] < 0.99 * expected[0, 0], "something was learnt"

    # parameters and both moments lie where the rules say, an eighth or a quarter of them each
    device_bytes = total = 0
    for (path, x), s in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(places), strict=True
    ):
        assert x.sharding.is_equivalent_to(s, x.ndim), path
        assert x.addressable_shards[0].data.shape == s.shard_shape(x.shape), path
        if x.ndim > 1:
            total += x.nbytes
            device_bytes += x.addressable_shards[0].data.nbytes
    by = sizes[1] * sizes[2]
    assert device_bytes < 1.25 * total / by + 0.1 * total * (by > 1)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 3 and x.shape[-1] == 48]
    assert len(moments) == 4  # gate and up, first and second
    assert {m.sharding.spec for m in moments} == {P(None, "fsdp", "tensor")}
    for got, want in ((state.params, expected_state.params), (state.ema, expected_state.ema)):
        for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-4)  # 2 % of an Adam step
    assert expected_state.ema is not None


def test_the_warning_would_be_seen(capfd):
    """XLA writes it to the process's stderr; here is a program that makes it do so."""
    mesh = sharding.make_mesh(2, 2, 2)

    def awkward(x):
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data", ("fsdp", "tensor"))))
        x = jnp.sin(x).reshape(4, 6, 8)
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, P(None, ("tensor",), "data"))
        )

    jax.jit(awkward).lower(jnp.zeros((8, 24))).compile()
    assert WARNING in capfd.readouterr().err


def test_constraints_on_activations_are_at_work():
    """Outside `sharding.use` they silently do nothing."""
    mesh = sharding.make_mesh(2, 2, 2)
    tokens = jnp.zeros((8, 4), jnp.int32)

    def forward(params):
        return Decoder(STUDENT).apply({"params": params}, tokens, tokens)

    params = abstract_params(STUDENT)
    assert "sharding_constraint" not in str(jax.make_jaxpr(forward)(params))
    with sharding.use(mesh, sharding.rules_for(mesh, STUDENT)):
        jaxpr = str(jax.make_jaxpr(forward)(params))
    assert "sharding_constraint" in jaxpr and "('data', 'fsdp')" in jaxpr


def test_arrays_and_batches_reach_the_mesh_whole():
    mesh = sharding.make_mesh(2, 2, 2)
    x = np.arange(48.0, dtype=np.float32).reshape(8, 6)
    placed = sharding.put_global({"x": x}, {"x": NamedSharding(mesh, P("fsdp", "tensor"))})["x"]
    assert placed.addressable_shards[0].data.shape == (4, 3)
    np.testing.assert_array_equal(placed, x)
    batch = host_batch(0)
    placed = sharding.put_local_batch(batch, mesh)
    assert placed.tokens.addressable_shards[0].data.shape == (2, LENGTH)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


class Chip:
    """A TPU that is only described."""

    platform, core_on_chip, process_index = "tpu", 0, 0

    def __init__(self, x, y, slice_index=0, kind="TPU v5 lite"):
        self.coords, self.slice_index, self.device_kind = (x, y, 0), slice_index, kind
        self.id = (slice_index, x, y)

    def __repr__(self):
        return str(self.id)


def slices(count, width=4, height=2):
    """Chips of some slices, in an order that is not that of the network."""
    chips = [Chip(x, y, s) for s in range(count) for x in range(width) for y in range(height)]
    return [chips[i] for i in np.random.default_rng(0).permutation(len(chips))]


def test_fsdp_walks_the_rings_of_a_slice():
    mesh = sharding.make_mesh(fsdp=0, devices=slices(1))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert [d.coords[:2] for d in mesh.devices.flat] == [(x, y) for x in range(4) for y in range(2)]
    assert sharding.rings(mesh) == (4, 2)
    assert sharding.rings(sharding.make_mesh(4, 2, 1, devices=slices(1))) == (2,)
    assert sharding.rings(sharding.make_mesh(fsdp=8)) == (8,), "CPUs have no places"


def test_slices_are_along_data():
    for sizes in ((-1, 0, 1), (-1, 4, 1), (4, 0, 2)):
        mesh = sharding.make_mesh(*sizes, devices=slices(2))
        per_slice = mesh.devices.reshape(2, -1)
        assert [{d.slice_index for d in part} for part in per_slice] == [{0}, {1}], sizes
    with pytest.raises(ValueError, match="data must be a multiple of 2 slices"):
        sharding.make_mesh(1, 16, 1, devices=slices(2))
    assert dict(sharding.make_mesh(fsdp=0).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
