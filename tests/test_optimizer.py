"""Optimizers, rates by parameter and schedules by name, against optax or numpy on single leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params, leaves
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.contract import RunContract
from recursive_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer

MODEL = DecoderConfig(
    "llama", 160, 16, 24, num_heads=4, num_kv_heads=2, head_dim=4, num_layers=2, num_loops=2,
    tied_head=False, norms="per_loop", lora_ranks={"q": 3, "down": 4},
)  # fmt: skip
RATE, DECAY, CLIP, STEPS = 1e-2, 0.1, 0.5, 3


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, abstract_params(MODEL))


def run(**changes):
    """(params before, gradients, params after, state) of some steps at a constant rate."""
    settings = dict(learning_rate=RATE, warmup_steps=0, schedule="constant", weight_decay=DECAY)
    tx = make_optimizer(OptimizerConfig(**{**settings, "clip_norm": 0.0, **changes}), 9)
    before, grads = tree(0), [tree(n) for n in range(1, STEPS + 1)]

    @jax.jit
    def steps(params):
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    return (before, grads, *steps(before))


def leaf(params, path):
    return functools.reduce(lambda node, name: node[name], path.split("/"), params)


def by_optax(tx, path, before, grads, index=()):
    """One leaf, or a part of it, by an optimizer of optax alone."""
    x = leaf(before, path)[index]
    state = tx.init(x)
    for g in grads:
        updates, state = tx.update(leaf(g, path)[index], state, x)
        x = x + updates
    return x


def assert_leaf(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


WEIGHT, LORA, VECTOR = (
    "block/mlp/up/w", "block/attention/q/lora_a", "block/pre_mlp_norm/scale",
)  # fmt: skip


class TestNames:
    @pytest.mark.parametrize("moments", ["float32", "bfloat16"])
    @pytest.mark.parametrize(
        "name, reference",
        [
            ("adamw", lambda decay, dtype: optax.adamw(
                RATE, 0.9, 0.95, 1e-8, weight_decay=decay, mu_dtype=dtype)),
            ("lion", lambda decay, dtype: optax.lion(RATE, 0.9, 0.95, dtype, decay)),
        ],
    )  # fmt: skip
    def test_elementwise(self, name, reference, moments):
        before, grads, after, state = run(name=name, mu_dtype=moments)
        for path, decay in ((WEIGHT, DECAY), (LORA, 0.0), ("embedding", 0.0), (VECTOR, 0.0)):
            assert_leaf(leaf(after, path), by_optax(reference(decay, moments), path, before, grads))
        firsts = [x for p, x in jax.tree_util.tree_leaves_with_path(state)
                  if ".mu" in jax.tree_util.keystr(p)]  # fmt: skip
        assert len(firsts) == len(leaves(MODEL)) and {x.dtype.name for x in firsts} == {moments}

    def test_adafactor(self):
        before, grads, after, state = run(name="adafactor")
        for path, decay in ((WEIGHT, DECAY), ("head", DECAY), (VECTOR, 0.0)):
            own = optax.chain(
                optax.adafactor(None, multiply_by_parameter_scale=False),
                optax.scale(-1),
                optax.add_decayed_weights(decay),
                optax.scale(-RATE),
            )
            assert_leaf(leaf(after, path), by_optax(own, path, before, grads))
        assert sum(x.size for x in jax.tree.leaves(state)) < 1.2 * sum(
            x.size for x in jax.tree.leaves(before)
        )

    def test_adafactor_factors_what_is_large(self):
        params = {"head": jnp.ones((256, 512)), "final_norm": {"scale": jnp.ones(256)}}
        state = make_optimizer(OptimizerConfig(name="adafactor"), 9).init(params)
        assert sum(x.size for x in jax.tree.leaves(state)) < 1100

    def test_muon_takes_each_matrix_of_layers_and_loops_by_itself(self):
        before, grads, after, _ = run(name="muon", weight_decay=0.0, b1=0.95)
        muon = contrib.muon(RATE, beta=0.95, consistent_rms=0.2)  # of one 2-D matrix
        for path, index in ((WEIGHT, (1,)), (LORA, (0, 1)), (LORA, (1, 0))):
            want = by_optax(muon, path, before, grads, index)
            np.testing.assert_allclose(leaf(after, path)[index], want, rtol=1e-4, atol=2e-5)
        adam = optax.adam(RATE, 0.95, 0.95, 1e-8)
        for path in ("embedding", "head", VECTOR):
            assert_leaf(leaf(after, path), by_optax(adam, path, before, grads))

    def test_muon_s_steps_are_the_size_of_adam_s(self):
        def size(name):
            before, _, after, _ = run(name=name, weight_decay=0.0)
            change = np.asarray(leaf(after, WEIGHT) - leaf(before, WEIGHT))
            return np.sqrt((change**2).mean())

        assert 0.1 < size("muon") / size("adamw") < 1


class TestRates:
    def test_factors_and_freezing(self):
        rates = "embedding=0 head=0 block/.*/lora_[ab]=2 block/mlp/.*=0.5 .*=1"
        before, grads, after, state = run(rates=rates, clip_norm=CLIP)
        plain, _ = tree(0), None
        for path in ("embedding", "head"):
            np.testing.assert_array_equal(leaf(after, path), leaf(plain, path))
        moving = {p: x for p, x in leaves(MODEL).items() if p not in ("embedding", "head")}
        arrays = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
        assert arrays == 2 * sum(np.prod(x.shape) for x in moving.values()), "no moments if frozen"

        def clipped(g):  # by the norm of what moves
            norm = np.sqrt(sum(np.sum(np.square(leaf(g, p))) for p in moving))
            return jax.tree.map(lambda x: x * min(1, CLIP / norm), g)

        grads = [clipped(g) for g in grads]
        for path, factor, decay in ((LORA, 2, 0), (WEIGHT, 0.5, DECAY), (VECTOR, 1, 0)):
            adam = optax.adamw(factor * RATE, 0.9, 0.95, 1e-8, weight_decay=decay)
            assert_leaf(leaf(after, path), by_optax(adam, path, before, grads))

    def test_rates_work_with_every_optimizer_and_the_rate_of_loras(self):
        for name in ("adafactor", "lion", "muon"):
            before, _, after, _ = run(rates="block/mlp/.*=0 .*=1", name=name, lora_lr_scale=0.0)
            changed = {
                path: bool(np.any(leaf(after, path) != leaf(before, path)))
                for path in leaves(MODEL)
            }
            for path, change in changed.items():
                assert change == (not path.startswith("block/mlp/") and "lora" not in path), path

    @pytest.mark.parametrize(
        "rates, message",
        [
            ("block/.*=1", "no pattern for the parameter embedding; end it with .*=1"),
            ("embeding=0 .*=1", "the pattern embeding decides for no parameter: none matches"),
            (".*=1 head=0", "the pattern head decides for no parameter: .* an earlier"),
            (".*=0", "freezes every parameter"),
            ("q/w=1 .*=1", "q/w decides for no parameter"),
        ],
    )
    def test_patterns_must_cover_all_and_all_must_count(self, rates, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig().with_changes(rates=rates).check_fits(MODEL)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"rates": "head"}, "'head' cannot be read .*; write it as 'PATTERN=FACTOR"),
            ({"rates": "head=-1"}, "'head=-1' cannot be read .a factor is a number of at least 0"),
            ({"rates": "(=1"}, r"'\(=1' cannot be read .*unterminated"),
            ({"name": "adam"}, "name='adam'; expected one of adamw, adafactor, lion, muon"),
            ({"schedule": "linear"}, "schedule='linear'; expected one of cosine, wsd, constant"),
            ({"mu_dtype": "float16"}, "mu_dtype='float16'; expected one of float32, bfloat16"),
            ({"name": "adafactor", "mu_dtype": "bfloat16"}, "has no first moments"),
            ({"decay_share": 0.0}, "decay_share must be in .0, 1., got 0.0"),
        ],
    )
    def test_settings_that_make_no_sense(self, changes, message):
        with pytest.raises(ValueError, match=message):
            OptimizerConfig(**changes)

    def test_a_run_goes_on_with_its_own_optimizer_only(self):
        def contract(**changes):
            return RunContract.of(TrainConfig().with_changes(**changes), "t", np.zeros((1, 2)))

        older = contract().to_json()
        del older["optimizer"]
        contract(schedule="wsd").check(older, "run")
        for changes in ({"optimizer.name": "lion"}, {"mu_dtype": "bfloat16"}, {"rates": ".*=1"}):
            with pytest.raises(ValueError, match="optimizer was adamw; now optimizer is"):
                contract(**changes).check(older, "run")


class TestSchedules:
    @pytest.mark.parametrize(
        "schedule, expected",
        [
            ("cosine", {0: 0, 2: 0.5, 4: 1, 14: 0.55, 24: 0.1, 99: 0.1}),
            ("wsd", {0: 0, 2: 0.5, 4: 1, 14: 1, 18: 1, 21: 0.55, 24: 0.1, 99: 0.1}),
            ("constant", {0: 0, 2: 0.5, 4: 1, 14: 1, 24: 1, 99: 1}),
        ],
    )
    def test_values_at_named_steps(self, schedule, expected):
        cfg = OptimizerConfig(
            learning_rate=1.0, warmup_steps=4, schedule=schedule, decay_share=0.25
        )
        rate = learning_rate_schedule(cfg, num_steps=24)
        for step, value in expected.items():
            np.testing.assert_allclose(rate(step), value, rtol=1e-6, err_msg=str(step))

    @pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
    def test_short_runs(self, schedule):
        cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=9, schedule=schedule)
        assert learning_rate_schedule(cfg, 1)(0) == 1.0, "a single step is not a warm-up"
        rates = [float(learning_rate_schedule(cfg, 5)(n)) for n in range(6)]
        assert rates[0] == 0 and max(rates) == 1.0 and min(rates) >= 0
