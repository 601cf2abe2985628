"""Weights gathered once a step: the gradient is that of plain jit, and no loop moves weights."""

import functools

import jax
import numpy as np
import pytest

from recursive_jax import device_memory, sharding
from recursive_jax.analysis.collectives import collectives
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params, head_params, logical_axes
from recursive_jax.trainer import Trainer, teacher_shardings
from recursive_jax.training.data import Batch
from recursive_jax.training.draws import Draws
from recursive_jax.training.gathered import Gather
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig, make_optimizer
from recursive_jax.training.setup import TrainSetup

TEACHER = DecoderConfig(
    "llama", 64, 32, 48, num_heads=8, num_kv_heads=2, head_dim=8, num_layers=6, tied_head=False,
    o_bias=True,
)  # fmt: skip
RANKS = {"q": 4, "up": 4, "down": 4}
DENSE = TEACHER.replace(num_layers=2, num_loops=3, norms="per_loop")
STUDENT = DENSE.replace(lora_ranks=RANKS)
ROWS, LENGTH = 16, 16


@functools.cache
def params(cfg):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        normal = 0.1 * rng.standard_normal(leaf.shape)
        return normal.astype(np.float32) + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def packed_batch(num_draws=0):
    """Two documents a row, uneven numbers of scored tokens, padding in the last row."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 64, (ROWS, LENGTH + 1)).astype(np.int32)
    column = np.arange(LENGTH, dtype=np.int32)
    segments = np.where(column < 6, 1, 2).astype(np.int32) * np.ones((ROWS, 1), np.int32)
    segments[-1, -5:] = 0
    positions = np.broadcast_to(np.where(column < 6, column, column - 6), segments.shape)
    weights = (rng.random(segments.shape) < np.linspace(0.2, 1, ROWS)[:, None]) * (segments > 0)
    taught = None
    if num_draws:
        ids = rng.integers(0, 64, (ROWS, LENGTH, num_draws)).astype(np.int32)
        taught = Draws(ids, np.ones(ids.shape, np.uint8), np.ones(segments.shape, np.float32))
    return Batch(
        tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32), positions.copy(), segments,
        taught,
    )  # fmt: skip


def gather_of(mesh, cfg, teacher=None, **options):
    rules = sharding.rules_for(mesh, cfg)
    places = sharding.shardings(logical_axes(cfg), mesh, rules)
    head = None if teacher is None else head_params(teacher_shardings(teacher, mesh))
    return Gather(mesh, rules, places, head, **options)


def gradients(setup, mesh, loops):
    """Gradient and sums of a setup, with everything where it belongs."""
    student, teacher = setup.model.cfg, setup.teacher and setup.teacher.cfg
    rules = sharding.rules_for(mesh, student)
    places = sharding.shardings(logical_axes(student), mesh, rules)
    p = sharding.put_global(params(student), places)
    t = teacher and sharding.put_global(params(teacher), teacher_shardings(teacher, mesh))
    with sharding.use(mesh, rules):
        batch = sharding.put_local_batch(packed_batch(setup.draws), mesh)
        run = jax.jit(setup.gradient_sum, static_argnames="loops", out_shardings=(places, None))
        return jax.tree.map(np.asarray, run(p, batch, t, loops=loops))


DRAWS = 5
CASES = {  # student, objective, loops
    "all": (STUDENT.replace(prefix_length=3), Objective(exit_coefficient=0.3, exit_kd=0.5), None),
    "dense, fewer loops": (DENSE, Objective(kd=0.0), 2),
    "draws": (DENSE, Objective(ce=0.5, kd=1.0), None),  # from the teacher, in its place
}


@functools.cache
def plain(case):
    cfg, objective, loops = CASES[case]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return gradients(setup_of(cfg, objective, **replaced(case)), mesh, loops)


def replaced(case):
    return {"draws": DRAWS} if case == "draws" else {}


def setup_of(cfg, objective, tx=None, **options):
    teacher = Decoder(TEACHER) if objective.kd and not options.get("draws") else None
    # room for the logits of five positions: the loss works in chunks
    return TrainSetup(
        Decoder(cfg, remat_policy="full"), tx, objective, teacher, logits_bytes=5 * 4 * 64 * 4,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "sizes", "accumulate", "options"),
    [
        ("all", (1, 8, 1), 2, {"rings": (2, 4)}),
        ("all", (2, 4, 1), 2, {"reduce_each": True}),
        ("all", (2, 2, 2), 1, {}),
        ("dense, fewer loops", (8, 1, 1), 1, {}),
        ("draws", (2, 4, 1), 2, {}),
    ],
    ids=["rings", "reduced by micro-batch", "tensor", "data", "draws"],
)
def test_gradients_are_those_of_one_device(case, sizes, accumulate, options):
    cfg, objective, loops = CASES[case]
    mesh = sharding.make_mesh(*sizes)
    teacher = TEACHER if objective.kd and not replaced(case) else None
    gather = gather_of(mesh, cfg, teacher, **options)
    setup = setup_of(cfg, objective, accumulate=accumulate, gather=gather, **replaced(case))
    (grads, sums), (expected, expected_sums) = gradients(setup, mesh, loops), plain(case)
    assert set(sums) == set(expected_sums)
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)
    differences = jax.tree.map(lambda got, want: got - want, grads, expected)
    assert norm(differences) < 1e-6 * norm(expected)
    for (path, want), d in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(differences), strict=True
    ):
        assert norm(d) < 5e-6 * norm(want), f"{path}: rounding of float32 alone is less"


def norm(tree):
    return sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)) ** 0.5


def moved(loops, accumulate, gather):
    """(times outside of loops, times inside) by kind, of collectives that move a weight's bytes."""
    source = DecoderConfig("gemma", 512, 64, 256, num_heads=4, num_kv_heads=2, head_dim=16,
                           num_layers=3 * loops)  # fmt: skip
    cfg = source.replace(
        num_layers=3, num_loops=loops, lora_ranks=dict.fromkeys(source.projections, 8)
    )
    mesh = sharding.make_mesh(1, 8, 1)
    setup = setup_of(
        cfg, Objective(kd=0.0), tx=make_optimizer(OptimizerConfig(), 9), accumulate=accumulate,
        gather=gather_of(mesh, cfg) if gather else None,
    )  # fmt: skip
    text = Trainer(setup, mesh).lower(16, 16).compile().as_text()
    found = {}
    for c in collectives(text, mesh.size):
        if c.whole >= 4 * 8 * 32 * 3 * loops:  # of the smallest matrix
            outside, inside = found.get(c.kind, (0, 0))
            more = (0, c.times) if c.trips else (c.arrays, 0)
            found[c.kind] = outside + more[0], inside + more[1]
    return found


def test_each_weight_is_gathered_once_and_reduced_once():
    """However many loops, chunks of the loss and micro-batches there are."""
    leaves = 1 + 3 * 7  # embedding; w, lora_a and lora_b of seven projections
    for loops, accumulate in ((1, 1), (2, 1), (3, 2)):
        got = moved(loops, accumulate, gather=True)
        assert got == {"all-gather": (leaves, 0), "reduce-scatter": (leaves, 0)}, (loops, got)
    (_, gathers), (_, reduced) = (
        moved(2, 1, gather=False)[k] for k in ("all-gather", "all-reduce")
    )
    assert gathers > leaves and reduced > leaves, "without it, loops move weights"


def test_memory_chooses_how_to_gather(monkeypatch):
    """Once a step while whole weights fit; then with sharded sums; then layer by layer."""
    mesh = sharding.make_mesh(1, 8, 1)
    setup = setup_of(STUDENT, Objective(), make_optimizer(OptimizerConfig(), 9), accumulate=2)
    sizes = {
        way: device_memory.step_bytes(setup, mesh, ROWS, LENGTH, way)
        for way in ("step", "micro", "layer")
    }
    totals = {way: sum(s.values()) for way, s in sizes.items()}
    assert totals["step"] > totals["micro"] > totals["layer"]

    def chosen(limit, asked="auto"):
        monkeypatch.setattr(device_memory, "device_bytes", lambda device: limit)
        gather = device_memory.plan(setup, mesh, ROWS, LENGTH, asked).setup.gather
        return gather and ("micro" if gather.reduce_each else "step")

    room = {way: total / device_memory.FILLED + 1 for way, total in totals.items()}
    assert chosen(None) == chosen(room["step"]) == "step"
    assert chosen(room["micro"]) == "micro"
    assert chosen(room["layer"]) is None and chosen(None, "layer") is None
    assert chosen(1, "step") == "micro"
    held = trainer_bytes(setup, mesh)
    assert sizes["step"]["params"] + sizes["step"]["optimizer"] == held


def trainer_bytes(setup, mesh):
    """Bytes of a device's parts of params and optimizer, as arrays have them."""
    trainer = Trainer(setup, mesh)
    trainer.start(sharding.put_global(params(setup.model.cfg), trainer.param_shardings))
    state = trainer.state.params, trainer.state.opt_state
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
