"""The loop curriculum: steps that run fewer loops of the block than the model has."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import STUDENT, TEACHER, make_batch, make_params

from recursive_jax import sharding
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import leaves
from recursive_jax.trainer import Trainer
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.contract import RunContract
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig, make_optimizer
from recursive_jax.training.setup import TrainSetup
from recursive_jax.weights import names

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CFG = STUDENT.replace(windows=(3, 0, 2, 5, 0, 4))


def make_setup(cfg, objective):
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), num_steps=9)
    return TrainSetup(Decoder(cfg), tx, objective, Decoder(TEACHER), accumulate=2, ema_decay=0.5)


def first_loops(path, x, loops):
    axes = leaves(CFG)[path].axes
    return x[:, :loops] if "loop" in axes else x


@pytest.mark.parametrize(
    "loops, exits", [(1, {"exit_coefficient": 0.3}), (2, {"exit_loss": "weighted"})]
)
def test_a_step_of_few_loops_is_that_of_the_model_cut_to_them(loops, exits):
    """With windows that differ by loop, micro-batches, averaged weights and losses of exits."""
    objective = Objective(**exits)
    cut = CFG.replace(num_loops=loops, windows=CFG.windows[: 2 * loops])
    params = names.flat(make_params(CFG))
    of_cut = names.nested({path: first_loops(path, x, loops) for path, x in params.items()})
    results = []
    for cfg, start, run in ((CFG, make_params(CFG), loops), (cut, of_cut, None)):
        setup = make_setup(cfg, objective)
        step = quick(functools.partial(setup.step, loops=run))
        state, metrics = step(setup.init(start), make_batch(), make_params(TEACHER))
        results.append((names.flat(state.params), names.flat(state.ema), metrics))
    (whole, whole_ema, metrics), (expected, expected_ema, expected_metrics) = results
    assert metrics.pop("loops") == loops
    unused = [f"grad_norm_lora_loop_{loop}" for loop in range(loops + 1, CFG.num_loops + 1)]
    assert [float(metrics.pop(name)) for name in unused] == [0.0] * len(unused)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    for path, x in expected.items():
        np.testing.assert_allclose(first_loops(path, whole[path], loops), x, atol=1e-6)
        np.testing.assert_allclose(first_loops(path, whole_ema[path], loops), expected_ema[path],
                                   atol=1e-6)  # fmt: skip
    q = "block/attention/q/lora_b"
    assert np.abs(whole[q][:, :loops] - params[q][:, :loops]).min(axis=(0, 2, 3)).all()
    np.testing.assert_array_equal(whole[q][:, loops:], params[q][:, loops:])


def test_all_loops_are_the_plain_step_bitwise():
    setup = TrainSetup(Decoder(CFG), make_optimizer(OptimizerConfig(), 9), Objective(kd=0.0))
    state = setup.init(jax.tree.map(jnp.array, make_params(CFG)))
    plain, _ = quick(setup.step)(state, make_batch())
    same, _ = quick(functools.partial(setup.step, loops=3))(state, make_batch())
    jax.tree.map(np.testing.assert_array_equal, same, plain)


def settings(kind, steps=20, **others):
    return TrainConfig(loop_curriculum=kind, tokens=steps * 8 * 512, **others)


def test_a_growing_number_of_loops():
    curriculum = settings("growing", loop_curriculum_share=0.3).curriculum(3)
    assert [curriculum.loops(n) for n in range(8)] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert curriculum.loops(19) == 3
    assert [settings("growing").curriculum(2).loops(n) for n in (0, 4, 5)] == [1, 1, 2]
    rounded = settings("growing", steps=100, loop_curriculum_share=0.07).curriculum(2)
    assert [rounded.loops(n) for n in (6, 7)] == [1, 2], "0.07 · 100 is rounded to more than 7"
    assert [settings("growing", steps=1).curriculum(3).loops(0)] == [1]


def test_a_random_number_of_loops_is_uniform_and_a_function_of_seed_and_step():
    draw = settings("random").curriculum(3).loops
    numbers = [draw(n) for n in range(900)]
    counts = collections.Counter(numbers)
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 250
    assert [draw(n) for n in reversed(range(900))] == numbers[::-1]
    other = settings("random", seed=1).curriculum(3).loops
    assert [other(n) for n in range(900)] != numbers


def test_a_resumed_run_draws_the_same_numbers():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    setup = TrainSetup(Decoder(CFG), make_optimizer(OptimizerConfig(), 9), Objective(kd=0.0))
    curriculum = settings("random", seed=6).curriculum(3)
    drawn = [curriculum.loops(n) for n in range(5)]
    assert drawn[:4] == [2, 1, 2, 1], "two programs do"

    def steps(trainer, numbers):
        return [trainer.step(make_batch(n)) for n in numbers]

    whole, first = (Trainer(setup, mesh, curriculum=curriculum) for _ in range(2))
    for trainer in (whole, first):
        trainer.start(make_params(CFG))
    ran = steps(whole, range(4))
    assert [int(m["loops"]) for m in ran] == drawn[:4]
    steps(first, range(2))
    second = Trainer(setup, mesh, curriculum=curriculum)
    second.resume(first.state.saved(), 2)
    resumed = steps(second, range(2, 4))
    for ours, theirs in zip(resumed, ran[2:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, second.state, whole.state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: settings("fixed"), "loop_curriculum='fixed'; expected one of none, random, growi"),
        (lambda: settings("growing", loop_curriculum_share=0.0), r"share must be in \(0, 1\], got"),
        (lambda: settings("random").curriculum(1), "loop_curriculum='random' runs fewer loops"),
    ],
)
def test_impossible_requests(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_run_goes_on_only_with_its_curriculum():
    tokens = np.zeros(1, np.int32)

    def contract(*args, **kwargs):
        return RunContract.of(settings(*args, **kwargs), tokens, tokens)

    contract("none").check({k: v for k, v in contract("none").to_json().items() if "loop" not in k},
                           "RUN")  # fmt: skip
    with pytest.raises(ValueError, match="loop curriculum was none; now loop curriculum is random"):
        contract("random").check(contract("none").to_json(), "RUN")
    half = contract("growing", loop_curriculum_share=0.5)
    with pytest.raises(ValueError, match="growing over 0.25 of the run; now .* over 0.5 of the ru"):
        half.check(contract("growing").to_json(), "RUN")
