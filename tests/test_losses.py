"""Losses against numpy and scipy, and the chunked head against plain autodiff (paper check 16)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from recursive_jax.models.chunked_head import chunk_length, chunked_sum, cross_entropy
from recursive_jax.training.losses import KD_LOSSES, Objective, divergence, token_losses

EXITS, BATCH, LENGTH, WIDTH, VOCAB = 3, 2, 10, 8, 37
# Everything here is compiled to be run once, so XLA's backend need not optimise it.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def reference(student, teacher, kind):
    """A divergence in float64 from scipy's own definitions, temperature 1."""
    p, q = (scipy.special.softmax(np.float64(x), axis=-1) for x in (teacher, student))
    if kind == "forward_kl":
        return scipy.stats.entropy(p, q, axis=-1)
    if kind == "reverse_kl":
        return scipy.stats.entropy(q, p, axis=-1)
    if kind == "jsd":
        return scipy.special.rel_entr(p, (p + q) / 2).sum(-1) / 2 + (
            scipy.special.rel_entr(q, (p + q) / 2).sum(-1) / 2
        )
    return np.abs(p - q).sum(-1) / 2


def test_cross_entropy_is_minus_log_probability():
    logits = normal(4, 5, VOCAB, scale=3)
    targets = np.random.default_rng(1).integers(0, VOCAB, (4, 5)).astype(np.int32)
    log_p = scipy.special.log_softmax(np.float64(logits), axis=-1)
    expected = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-5)
    gradient = quick(jax.grad(lambda x: cross_entropy(x, targets).sum()))(logits)
    one_hot = np.eye(VOCAB)[targets]
    np.testing.assert_allclose(gradient, np.exp(log_p) - one_hot, atol=1e-6)


@pytest.mark.parametrize("kind", KD_LOSSES)
def test_divergences_are_scipys(kind):
    student, teacher = normal(6, VOCAB, scale=3), normal(6, VOCAB, seed=1, scale=3)
    got = divergence(jnp.asarray(student), jnp.asarray(teacher), kind)
    np.testing.assert_allclose(got, reference(student, teacher, kind), rtol=1e-5)
    hot = divergence(jnp.asarray(student), jnp.asarray(teacher), kind, temperature=2.5)
    expected = reference(student / 2.5, teacher / 2.5, kind) * 2.5**2
    np.testing.assert_allclose(hot, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KD_LOSSES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_check_16_divergences_vanish_exactly_for_equals_and_are_bounded(kind, seed, scale):
    student, teacher = normal(VOCAB, seed=seed, scale=scale), normal(VOCAB, seed=~seed & 0xFFFF)
    distance = _divergence(kind)
    value = float(distance(student, teacher))
    assert value > 1e-4, "different distributions are apart"
    upper = {"jsd": np.log(2), "tvd": 1.0}.get(kind, np.inf)
    assert value <= upper * (1 + 1e-6)
    # adding a constant to the logits changes no distribution
    assert abs(float(distance(student, student + 3))) < 1e-5


@functools.cache
def _divergence(kind):
    return quick(functools.partial(divergence, kind=kind))


@pytest.mark.parametrize("kind", ["jsd", "tvd"])
def test_check_16_bounds_are_reached_by_disjoint_distributions(kind):
    student, teacher = jnp.asarray([100.0, 0.0]), jnp.asarray([0.0, 100.0])
    bound = {"jsd": np.log(2), "tvd": 1.0}[kind]
    np.testing.assert_allclose(divergence(student, teacher, kind), bound, rtol=1e-6)


def test_check_16_forward_kl_has_the_gradient_of_cross_entropy_to_the_teacher():
    student, teacher = jnp.asarray(normal(5, VOCAB)), jnp.asarray(normal(5, VOCAB, seed=1))

    def soft_cross_entropy(x):
        return -(jax.nn.softmax(teacher) * jax.nn.log_softmax(x)).sum()

    got = quick(jax.grad(lambda x: divergence(x, teacher).sum()))(student)
    np.testing.assert_allclose(got, quick(jax.grad(soft_cross_entropy))(student), atol=1e-6)
    assert np.abs(got).max() > 0.01


@pytest.mark.parametrize("kind", KD_LOSSES)
def test_divergence_gradients_by_finite_differences(kind):
    student, teacher = normal(VOCAB, scale=2), normal(VOCAB, seed=1, scale=2)
    gradient = quick(jax.grad(lambda x: divergence(x, teacher, kind)))(student)
    step = 1e-5
    for i in range(0, VOCAB, 9):
        change = np.zeros(VOCAB)
        change[i] = step
        slope = (
            reference(student + change, teacher, kind) - reference(student - change, teacher, kind)
        ) / (2 * step)
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KD_LOSSES)
def test_check_16_no_gradient_reaches_the_teacher(kind):
    student, teacher = jnp.asarray(normal(5, VOCAB)), jnp.asarray(normal(5, VOCAB, seed=1))

    def distance(student, teacher):
        return divergence(student, teacher, kind, temperature=2.0).sum()

    to_student, to_teacher = quick(jax.grad(distance, argnums=(0, 1)))(student, teacher)
    assert not np.any(to_teacher)
    assert np.abs(to_student).max() > 1e-3


def objective_data(seed=0):
    rng = np.random.default_rng(seed)
    logits = normal(EXITS, BATCH, LENGTH, VOCAB, seed=seed, scale=2)
    teacher = normal(BATCH, LENGTH, VOCAB, seed=seed + 1, scale=2)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    weights = (rng.random((BATCH, LENGTH)) < 0.7).astype(np.float32)
    return logits, targets, weights, teacher


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(kd=0.0, exit_coefficient=0.1),
        Objective(ce=0.0, kd=0.5, kd_loss="tvd"),
        Objective(ce=0.7, kd=0.3, kd_loss="jsd", exit_coefficient=0.1, exit_kd=2.0),
        Objective(exit_coefficient=0.3, exit_kd=0.5, temperature=1.7, kd_loss="reverse_kl"),
        Objective(exit_loss="weighted", kd=0.0),
        Objective(exit_loss="weighted", ce=0.7, kd=0.3, exit_kd=2.0, kd_loss="jsd"),
    ],
)
def test_objective_is_the_documented_sum(objective):
    """The formula of `Objective`, term by term in numpy float64."""
    logits, targets, weights, teacher = objective_data()
    teacher = teacher if objective.kd else None
    loss, parts = quick(functools.partial(token_losses, objective))(
        logits, targets, weights, teacher
    )

    def ce(x):
        log_p = scipy.special.log_softmax(np.float64(x), axis=-1)
        return -np.sum(weights * np.take_along_axis(log_p, targets[..., None], -1)[..., 0])

    def kd(x, t):
        temperature = objective.temperature
        value = reference(x / temperature, t / temperature, objective.kd_loss)
        return np.sum(weights * value) * temperature**2

    c = objective.exit_coefficient
    alpha = [1 / 6, 2 / 6, 3 / 6] if objective.exit_loss == "weighted" else [c, c, 1.0]
    expected = alpha[2] * objective.ce * ce(logits[-1])
    if teacher is not None:
        expected += alpha[2] * objective.kd * kd(logits[-1], teacher)
        np.testing.assert_allclose(parts["kd"], kd(logits[-1], teacher), rtol=1e-5)
    for weight, exit_logits in zip(alpha, logits[:-1], strict=False):
        expected += weight * ce(exit_logits)
        self_kd = objective.exit_kd and kd(exit_logits, logits[-1])
        expected += weight * objective.exit_kd * self_kd
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(parts["ce"], [ce(x) for x in logits], rtol=1e-5)
    correct = [(weights * (x.argmax(-1) == targets)).sum() for x in logits]
    np.testing.assert_allclose(parts["correct"], correct)


@pytest.mark.parametrize("exits", [1, 2, 3, 7])
def test_weighted_exits_grow_with_depth_and_sum_to_one(exits):
    alpha = Objective(exit_loss="weighted").exit_weights(exits)
    np.testing.assert_allclose(np.divide(alpha, alpha[0]), range(1, exits + 1))
    assert sum(alpha) == pytest.approx(1)


def test_check_16_self_distillation_does_not_move_the_final_logits():
    logits, targets, weights, _ = objective_data()
    with_kd = Objective(kd=0.0, exit_coefficient=0.1, exit_kd=1.0)
    without = dataclasses.replace(with_kd, exit_kd=0.0)
    gradients = [
        quick(jax.grad(lambda x, o=o: token_losses(o, x, targets, weights, None)[0]))(logits)
        for o in (with_kd, without)
    ]
    np.testing.assert_array_equal(gradients[0][-1], gradients[1][-1])
    assert np.abs(gradients[0][:-1] - gradients[1][:-1]).max() > 1e-3


def test_unscored_positions_count_for_nothing():
    logits, targets, weights, teacher = objective_data()
    objective = Objective(exit_coefficient=0.1, exit_kd=1.0)
    loss = quick(functools.partial(token_losses, objective))
    other = np.where(weights[..., None] == 0, 9.0, logits)
    before, _ = loss(logits, targets, weights, teacher)
    after, _ = loss(other, np.where(weights == 0, 5, targets), weights, teacher)
    np.testing.assert_allclose(before, after, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd_loss": "wasserstein"}, "kd_loss='wasserstein'; expected one of .*forward_kl"),
        ({"ce": -1.0}, "objective.ce must be >= 0, got -1.0"),
        ({"temperature": 0.0}, "objective.temperature must be > 0"),
        ({"ce": 0.0, "kd": 0.0}, "objective.ce and objective.kd are both 0"),
        ({"exit_kd": 1.0}, "objective.exit_kd=1.0 .*exit_coefficient"),
        ({"exit_loss": "even"}, "objective.exit_loss='even'; expected one of aggressive, weighted"),
        ({"exit_loss": "weighted", "exit_coefficient": 0.1}, "exit_coefficient=0.1 beside exit_l"),
    ],
)
def test_objectives_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        Objective(**changes)
    with pytest.raises(ValueError, match="unknown divergence 'l2'"):
        divergence(jnp.zeros(3), jnp.zeros(3), "l2")


# The chunked head


def head_loss(objective, head, hidden, data):
    """What the training step does with a chunk, without a decoder: norm-free linear heads."""
    logits = jnp.einsum("EBTD,DV->EBTV", hidden, head["w"])
    teacher = jnp.einsum("BTD,DV->BTV", data["teacher"], head["w"] * 0 + 1.5)
    return token_losses(objective, logits, data["targets"], data["weights"], teacher)


def head_problem(length=LENGTH):
    rng = np.random.default_rng(0)
    data = {
        "targets": jnp.asarray(rng.integers(0, VOCAB, (BATCH, length)), jnp.int32),
        "weights": jnp.asarray(rng.random((BATCH, length)) < 0.7, jnp.float32),
        "teacher": jnp.asarray(normal(BATCH, length, WIDTH, seed=3)),
    }
    head = {"w": jnp.asarray(normal(WIDTH, VOCAB, seed=4))}
    return head, jnp.asarray(normal(EXITS, BATCH, length, WIDTH, seed=5)), data


OBJECTIVE = Objective(kd=0.5, kd_loss="jsd", exit_coefficient=0.1, exit_kd=1.0)
HEAD_LOSS = functools.partial(head_loss, OBJECTIVE)


@pytest.mark.parametrize("chunk", [3, 5, 64])
def test_chunks_give_the_value_and_gradients_of_the_whole(chunk):
    """Chunk sizes that divide the length, that do not, and one that is longer."""
    head, hidden, data = head_problem()

    def scaled(fn):  # an outer factor: the backward rule must pass cotangents on
        def loss(head, hidden):
            total, sums = fn(head, hidden)
            return 0.25 * total, sums

        return quick(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    whole = scaled(lambda head, hidden: HEAD_LOSS(head, hidden, data))(head, hidden)
    chunked = scaled(lambda head, hidden: chunked_sum(HEAD_LOSS, head, hidden, data, chunk))(
        head, hidden
    )
    for got, expected in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    forward = quick(lambda: chunked_sum(HEAD_LOSS, head, hidden, data, chunk))
    without_gradient, sums = forward()
    np.testing.assert_allclose(0.25 * without_gradient, whole[0][0], rtol=1e-5)
    np.testing.assert_allclose(sums["ce"], whole[0][1]["ce"], rtol=1e-5)


def test_bf16_hidden_states_get_bf16_gradients_and_the_head_f32():
    head, hidden, data = head_problem()
    hidden = hidden.astype(jnp.bfloat16)

    def loss(head, hidden):
        return chunked_sum(HEAD_LOSS, head, hidden, data, 4)[0]

    to_head, to_hidden = quick(jax.grad(loss, argnums=(0, 1)))(head, hidden)
    assert to_hidden.dtype == jnp.bfloat16 and to_head["w"].dtype == jnp.float32
    whole = quick(jax.grad(lambda h: HEAD_LOSS(h, hidden.astype(jnp.float32), data)[0]))(head)
    np.testing.assert_allclose(to_head["w"], whole["w"], rtol=0.03, atol=0.03)


def largest_logits(fn, *args):
    """Most elements of an array whose last axis is the vocabulary, anywhere in a jaxpr."""
    largest = 0

    def visit(jaxpr):
        nonlocal largest
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                shape = getattr(variable.aval, "shape", ())
                if shape and shape[-1] == VOCAB and len(shape) > 2:
                    largest = max(largest, int(np.prod(shape)))
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(value):
                    visit(getattr(value, "jaxpr", value))

    visit(jax.make_jaxpr(fn)(*args).jaxpr)
    return largest


def _is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_logits_are_never_whole():
    head, hidden, data = head_problem(length=60)
    whole = EXITS * BATCH * 60 * VOCAB

    def step(chunk):
        def loss(head, hidden):
            return chunked_sum(HEAD_LOSS, head, hidden, data, chunk)[0]

        return jax.value_and_grad(loss, argnums=(0, 1))

    assert largest_logits(step(60), head, hidden) == whole, "the measure sees logits"
    assert largest_logits(step(4), head, hidden) == whole * 4 // 60
    # and neither does the compiled program hold them under another shape
    temporary = [
        quick(step(chunk)).lower(head, hidden).compile().memory_analysis().temp_size_in_bytes
        for chunk in (60, 4)
    ]
    assert temporary[0] > 4 * whole and temporary[1] < temporary[0] / 5


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(10**9, 100), (4 * 2 * 50 * 3 * 7, 7), (4 * 2 * 50 * 3 * 7 + 1, 7), (1, 1)],
)
def test_chunk_length_fits_its_budget(budget, expected):
    assert chunk_length(2, 100, 50, copies=3, budget_bytes=budget) == expected
