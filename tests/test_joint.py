"""The joint fit of shared weight and LoRAs, against brute force and its laws."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights import joint, low_rank, rank_budget
from recursive_jax.weights.tie_config import break_even_rank

IN, OUT = 7, 5


def moment(rng, n, blocks=1, spread=2.0):
    """A random second moment `[blocks, m, m]` with eigenvalues over two decades and more."""
    m = n // blocks
    x = rng.normal(size=(blocks, 4 * m, m)) * np.exp(spread * rng.normal(size=(blocks, 1, m)))
    return np.einsum("bti,btj->bij", x, x) / (4 * m)


def problem(loops, seed=0, in_dim=IN, out_dim=OUT, in_blocks=1, spread=2.0):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(in_dim, out_dim)).astype(np.float32) for _ in range(loops)]
    metrics = [
        joint.Metric(
            joint.Moment.of(moment(rng, in_dim, in_blocks, spread)),
            joint.Moment.of(moment(rng, out_dim, 1, spread)),
        )
        for _ in range(loops)
    ]
    return weights, metrics


def full(moment):
    """The whole matrix of a block-diagonal moment."""
    return np.array(scipy.linalg.block_diag(*moment.blocks))


def error_of(weights, metrics, base, factors):
    """The objective, written out."""
    total = 0.0
    for n, (w, m) in enumerate(zip(weights, metrics, strict=True)):
        e = np.float64(base) - w + (np.float64(factors[n][0]) @ factors[n][1] if factors else 0)
        total += np.trace(full(m.inputs) @ e @ full(m.outputs) @ e.T)
    return total


def fit(weights, metrics, rank, **options):
    options = {"dtype": np.float64} | options
    return joint.fit(weights, metrics, rank, np.random.default_rng(0), **options)


@pytest.mark.parametrize("loops, rank, blocks", [(2, 2, 1), (3, 1, 1), (4, 2, 1), (2, 1, 3)])
def test_no_sweep_raises_the_objective(loops, rank, blocks):
    weights, metrics = problem(loops, in_dim=9, in_blocks=blocks)
    found = fit(weights, metrics, rank, max_sweeps=30, gain=1e-9)
    assert len(found.objective) > 5
    for before, after in itertools.pairwise(found.objective):
        assert after <= before * (1 + 1e-9)
    assert found.objective[-1] < 0.9 * found.objective[0]
    # At most the reported error: the shared weight is solved once more after the last sweep.
    error = error_of(weights, metrics, found.base, found.factors)
    assert 0.9 * found.objective[-1] < error <= found.objective[-1] * (1 + 1e-4)
    assert found.residual == pytest.approx(error_of(weights, metrics, found.base, []), rel=1e-4)


@pytest.mark.parametrize("loops", [2, 3])
def test_rank_zero_is_least_squares(loops):
    """The shared weight alone, against one dense linear solve."""
    weights, metrics = problem(loops, seed=1)
    left, right = np.zeros((IN * OUT, IN * OUT)), np.zeros(IN * OUT)
    for w, m in zip(weights, metrics, strict=True):
        kron = np.kron(full(m.inputs), full(m.outputs))
        left, right = left + kron, right + kron @ np.float64(w).ravel()
    found = fit(weights, metrics, 0, gain=1e-14)
    np.testing.assert_allclose(
        found.base.ravel(), np.linalg.solve(left, right), rtol=1e-4, atol=1e-4
    )
    assert found.factors == []
    assert not np.allclose(found.base, low_rank.mean(weights), atol=0.1), "the metric matters"


@pytest.mark.parametrize("loops, rank", [(2, 1), (3, 1)])
def test_no_worse_than_a_general_optimiser(loops, rank):
    """L-BFGS over all numbers at once, from several starts."""
    weights, metrics = problem(loops, seed=2, spread=0.5)
    ours = fit(weights, metrics, rank, max_sweeps=300, gain=1e-7)
    sizes = [IN * OUT] + [IN * rank, rank * OUT] * loops
    moments = [(full(m.inputs), full(m.outputs)) for m in metrics]

    def loss(flat):
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        base, total, grads = parts[0].reshape(IN, OUT), 0.0, [np.zeros((IN, OUT))]
        for n, w in enumerate(weights):
            a, b = parts[1 + 2 * n].reshape(IN, rank), parts[2 + 2 * n].reshape(rank, OUT)
            e = base + a @ b - w
            g = 2 * moments[n][0] @ e @ moments[n][1]
            total += (g * e).sum() / 2
            grads[0] = grads[0] + g
            grads += [g @ b.T, a.T @ g]
        return total, np.concatenate([x.ravel() for x in grads])

    best = min(
        scipy.optimize.minimize(
            loss, np.random.default_rng(s).normal(size=sum(sizes)), jac=True, method="L-BFGS-B",
            options={"maxiter": 3000, "maxfun": 5000},
        ).fun
        for s in range(4)
    )  # fmt: skip
    assert ours.objective[-1] <= 1.02 * best


def test_in_the_plain_metric_two_loops_are_split():
    rng = np.random.default_rng(3)
    weights = [rng.normal(size=(24, 16)).astype(np.float32) for _ in range(2)]
    plain = [joint.Metric.plain(24, 16)] * 2
    found = fit(weights, plain, 3)
    base, factors = low_rank.split_spectrum(weights, 3, rng)
    assert found.objective[-1] == pytest.approx(error_of(weights, plain, base, factors), rel=1e-5)
    np.testing.assert_allclose(found.base, base, atol=1e-5)
    for ours, theirs in zip(found.factors, factors, strict=True):
        np.testing.assert_allclose(ours[0] @ ours[1], theirs[0] @ theirs[1], atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("loops", [2, 3])
def test_full_rank_is_the_source(loops, shape):
    weights, metrics = problem(loops, seed=4, in_dim=shape[0], out_dim=shape[1])
    found = fit(weights, metrics, 5)
    assert found.objective[-1] == 0
    for w, (a, b) in zip(weights, found.factors, strict=True):
        np.testing.assert_allclose(found.base + a @ b, w, atol=2e-6)


def test_one_loop_and_equal_loops_are_the_source():
    (weight,), metrics = problem(1)
    for weights in ([weight], [weight] * 3):
        found = fit(weights, metrics * len(weights), 2)
        np.testing.assert_array_equal(found.base, weight)
        assert len(found.factors) == len(weights)
        for a, b in found.factors:  # trainable, and without effect
            assert a.any() and not b.any()


def test_the_factors_have_the_form_of_an_svd():
    weights, metrics = problem(2, seed=5)
    for a, b in fit(weights, metrics, 3).factors:
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a.T @ a, np.eye(3), atol=1e-5)
        norms = np.linalg.norm(b, axis=1)
        assert (np.diff(norms) < 0).all()
        np.testing.assert_allclose(b @ b.T, np.diag(norms**2), atol=1e-4 * norms[0] ** 2)


@pytest.mark.parametrize("loops, rank, blocks", [(2, 4, 1), (3, 4, 2), (3, 0, 1)])
def test_a_search_in_float32_ends_where_one_in_float64_does(loops, rank, blocks):
    weights, metrics = problem(loops, seed=9, in_dim=24, out_dim=32, in_blocks=blocks)
    single, double = (fit(weights, metrics, rank, dtype=t) for t in (np.float32, np.float64))
    assert single.objective[-1] == pytest.approx(double.objective[-1], rel=2e-3)
    error = error_of(weights, metrics, single.base, single.factors)
    assert single.objective[-1] == pytest.approx(error, rel=1e-3)
    for a, b in zip(single.factors, double.factors, strict=True):
        assert a[0].dtype == b[0].dtype == np.float32


@pytest.mark.parametrize("loops, rank", [(2, 2), (3, 2), (2, 0)])
def test_a_rotation_of_the_inputs_changes_nothing(loops, rank):
    """x' = x Q and W' = Qᵀ W are the same function, so the fit is the same function too."""
    weights, _ = problem(loops, seed=6)
    rng = np.random.default_rng(7)
    raw = [(moment(rng, IN), moment(rng, OUT)) for _ in weights]
    q = np.linalg.qr(rng.normal(size=(IN, IN)))[0]

    def products(turn):
        metrics = [
            joint.Metric(joint.Moment.of(turn.T @ c @ turn), joint.Moment.of(g)) for c, g in raw
        ]
        found = fit([turn.T @ np.float64(w) for w in weights], metrics, rank)
        loras = [np.float64(a) @ b for a, b in found.factors] or [0.0] * loops
        return [turn @ (found.base + lora) for lora in loras]

    for one, other in zip(products(np.eye(IN)), products(q), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_moment_in_blocks_is_the_matrix_of_these_blocks():
    rng = np.random.default_rng(8)
    blocks = joint.Moment.of(moment(rng, 9, 3))
    x = rng.normal(size=(9, 4))
    whole = full(blocks)
    np.testing.assert_allclose(blocks @ x, whole @ x)
    np.testing.assert_allclose(blocks.inverse(x), np.linalg.solve(whole, x))
    np.testing.assert_allclose(np.square(blocks.weigh(x)).sum(), np.trace(x.T @ whole @ x))
    np.testing.assert_allclose(blocks.unweigh(blocks.weigh(x)), x)


@pytest.mark.parametrize("shape", [(7, 5), (4, 9)])
def test_gains_are_what_the_fit_removes(shape):
    """Two loops in one metric: each rank of both LoRAs removes what `gains` says, to the end."""
    weights, metrics = problem(2, seed=5, in_dim=shape[0], out_dim=shape[1], spread=0.3)
    metrics = [metrics[0], metrics[0]]
    gains = rank_budget.gains(weights, metrics)
    assert gains.shape == (min(shape),)
    start = fit(weights, metrics, 0).objective[0]
    for rank in range(1, min(shape) + 1):
        left = start - gains[:rank].sum()
        assert fit(weights, metrics, rank, max_sweeps=50, gain=1e-9).objective[-1] == pytest.approx(
            left, abs=1e-5 * start
        )


def test_gains_of_three_loops_are_those_of_the_first_step():
    weights, metrics = problem(3, seed=6)
    gains = rank_budget.gains(weights, metrics)
    base = fit(weights, metrics, 0).base
    parts = [
        joint.low_rank_step(w - np.float64(base), m, 2)
        for w, m in zip(weights, metrics, strict=True)
    ]
    before = error_of(weights, metrics, base, [])
    assert gains.sum() == pytest.approx(before, rel=1e-5)
    assert gains[:2].sum() == pytest.approx(before - sum(e for *_, e in parts), rel=1e-5)


def test_a_budget_is_dealt_as_by_trying_all():
    cfg = DecoderConfig(
        "llama", vocab_size=32, embed_dim=8, mlp_dim=12, num_heads=2, num_kv_heads=1, head_dim=4,
        num_layers=2, num_loops=2, gated_mlp=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    sizes = cfg.projections
    found = {n: np.sort(rng.exponential(size=min(s)))[::-1] for n, s in sizes.items()}
    whole = cfg.depth * sum(a * b for a, b in sizes.values())
    ranks, used = rank_budget.deal(cfg, found, 0.4)
    limits = {n: int(break_even_rank(*s, 2)) for n, s in sizes.items()}
    cost = {n: cfg.depth * sum(s) for n, s in sizes.items()}
    assert used == sum(cost[n] * r for n, r in ranks.items()) <= 0.4 * whole
    assert used > 0.4 * whole - max(cost.values())
    best = max(
        sum(found[n][:r].sum() for n, r in zip(sizes, choice, strict=True))
        for choice in itertools.product(*(range(limits[n] + 1) for n in sizes))
        if sum(cost[n] * r for n, r in zip(sizes, choice, strict=True)) <= used
    )
    assert sum(found[n][:r].sum() for n, r in ranks.items()) == pytest.approx(best)
    everything, _ = rank_budget.deal(cfg, found, 0.99)
    assert everything == limits  # beyond, untying is as small, and exact
