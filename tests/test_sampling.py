"""Sampling against a plain numpy reference, and the laws its noise has to keep."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from scipy.special import log_softmax, softmax

from recursive_jax.cpu import build
from recursive_jax.cpu import top1 as cpu_top1
from recursive_jax.decoding.requests import Sampling
from recursive_jax.decoding.sampling import (
    History,
    SamplingParams,
    filter_logits,
    gumbel_noise,
    sample,
    scale,
)
from recursive_jax.models import scanned

VOCAB = 37
BY_KERNEL_OR_XLA = pytest.mark.parametrize(
    "top1", [cpu_top1.top1, scanned.top1], ids=["kernel", "XLA"]
)
MIXED = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.3, top_k=5),
    Sampling(temperature=2.0, top_p=0.7),
    Sampling(temperature=0.9, min_p=0.2),
    Sampling(temperature=1.3, top_k=9, top_p=0.6, min_p=0.05),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=10 * VOCAB, top_p=1.0),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(top_k=3, top_p=0.5),
]


@pytest.fixture
def kernel():
    if not any(map(shutil.which, ["c++", "g++", "clang++"])):
        pytest.skip("no C++ compiler on this machine")
    assert build.has("Top1")


def kept_by_sorting(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """bool [V], the textbook way: sort, cumulate, cut; then whatever ties with the last kept."""
    x = logits.astype(np.float64) / (s.temperature or 1.0)
    keep = np.ones(len(x), bool)

    def smallest_set(weights, target):
        order = np.argsort(-x, kind="stable")
        cumulated = np.cumsum(np.where(keep, weights, 0)[order])
        count = np.searchsorted(cumulated, target) + 1
        return keep & (x >= x[order[min(count, len(x)) - 1]])

    if s.top_k:
        keep = smallest_set(np.ones(len(x)), s.top_k)
    if s.top_p < 1:
        keep = smallest_set(softmax(np.where(keep, x, -np.inf)), s.top_p)
    if s.min_p:
        probabilities = softmax(x)
        keep &= probabilities >= s.min_p * probabilities.max() * (1 - 1e-6)
    return keep


def filtered(logits, params: SamplingParams):
    return filter_logits(scale(logits, params, logits.max(axis=-1, keepdims=True)), params)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_filters_keep_what_sorting_keeps(ties):
    rng = np.random.default_rng(ties)
    run = jax.jit(filtered)
    removed = 0
    for _ in range(10):
        logits = rng.normal(size=(len(MIXED), VOCAB)).astype(np.float32) * 3
        if ties:
            logits = np.round(logits)
        got = np.asarray(run(logits, SamplingParams.stack(MIXED)))
        for row, scores, s in zip(logits, got, MIXED, strict=True):
            keep = kept_by_sorting(row, s)
            np.testing.assert_array_equal(np.isfinite(scores), keep, err_msg=str(s))
            scaled = (row - row.max()) / (s.temperature or 1.0)
            np.testing.assert_allclose(scores[keep], scaled[keep], rtol=1e-5, atol=1e-6)
            removed += (~keep).sum()
    assert removed > VOCAB * len(MIXED)


def test_filters_with_removed_tokens_and_the_ends_of_float32():
    """-inf stays out, a negative and a positive extreme do not upset the order of the bits."""
    logits = np.array([[-np.inf, -1e30, 0.0, 3.0, 2.9, -np.inf]], np.float32)

    def keep(s):
        return np.isfinite(filtered(logits, SamplingParams.stack([s])))[0]

    np.testing.assert_array_equal(keep(Sampling(1.0, top_k=2)), [0, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(keep(Sampling(1.0, top_k=4)), [0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(keep(Sampling(1.0, top_k=5)), [0, 1, 1, 1, 1, 0])


def test_the_smallest_temperatures_are_greedy_not_nan():
    logits = np.random.default_rng(0).normal(size=(2, VOCAB)).astype(np.float32) * 50
    params = SamplingParams.stack([Sampling(1e-30), Sampling(1e-4)])
    tokens, logprobs = sample(logits, params, np.uint32([1, 2]), np.int32([3, 4]))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5), Sampling(1.5, top_k=3), Sampling(1.0, top_p=0.8)],
    ids=str,
)
def test_frequencies_follow_the_probabilities(sampling):
    """Over many positions of one seed: chi-square against softmax(filtered / temperature)."""
    draws = 20_000
    logits = np.array([1.0, 0.0, -0.5, 2.0, 0.3], np.float32)
    params = jax.tree.map(lambda x: np.repeat(x, draws), SamplingParams.stack([sampling]))
    tokens, _ = jax.jit(sample)(
        np.tile(logits, (draws, 1)), params, np.full(draws, 7, np.uint32), np.arange(draws)
    )
    kept = kept_by_sorting(logits, sampling)
    expected = softmax(np.where(kept, logits.astype(np.float64) / sampling.temperature, -np.inf))
    counts = np.bincount(np.asarray(tokens), minlength=len(logits))
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], draws * expected[kept]).pvalue > 1e-3


def test_noise_is_a_function_of_seed_and_position_alone():
    seeds = np.array([5, 5, 6, 5, 2**32 - 1], np.uint32)
    positions = np.array([0, 1, 0, 0, 2**30], np.int32)
    noise = np.asarray(gumbel_noise(seeds, positions, VOCAB))
    np.testing.assert_array_equal(noise[0], noise[3])
    for i, j in [(0, 1), (0, 2), (1, 2), (0, 4)]:
        assert np.abs(noise[i] - noise[j]).max() > 0.1
    alone = gumbel_noise(seeds[2:3], positions[2:3], VOCAB)
    np.testing.assert_array_equal(noise[2], alone[0])
    many = np.asarray(gumbel_noise(np.zeros(2000, np.uint32), np.arange(2000), VOCAB)).ravel()
    assert stats.kstest(many, "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize("vocab_size", [1, 7, 49152])
def test_noise_is_that_of_jax(vocab_size):
    seeds, positions = np.array([5, 2**32 - 1], np.uint32), np.array([0, 2**30], np.int32)
    noise = np.asarray(jax.jit(gumbel_noise, static_argnums=2)(seeds, positions, vocab_size))
    with jax.threefry_partitionable(True):
        for mine, seed, position in zip(noise, seeds, positions, strict=True):
            key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
            np.testing.assert_array_equal(mine, jax.random.gumbel(key, (vocab_size,)))


@BY_KERNEL_OR_XLA
@pytest.mark.parametrize("mixed", [MIXED, MIXED[:2] * 4], ids=["filters", "no filters"])
def test_greedy_and_sampled_rows_share_a_batch(mixed, top1):
    logits = np.random.default_rng(1).normal(size=(len(mixed), VOCAB)).astype(np.float32)
    seeds = np.arange(len(mixed), dtype=np.uint32)
    positions = np.full(len(mixed), 11, np.int32)
    run = jax.jit(functools.partial(sample, top1=top1))
    tokens, logprobs = run(logits, SamplingParams.stack(mixed), seeds, positions)
    noise = np.asarray(gumbel_noise(seeds, positions, VOCAB))
    for i, s in enumerate(mixed):
        if s.temperature == 0:
            expected = logits[i].argmax()
        else:
            scores = np.where(kept_by_sorting(logits[i], s), logits[i] / s.temperature, -np.inf)
            expected = (scores + noise[i]).argmax()
        assert tokens[i] == expected, s
        # of the model itself: neither temperature nor filters change a log-probability
        np.testing.assert_allclose(logprobs[i], log_softmax(logits[i])[expected], atol=1e-5)
    assert (np.asarray(tokens) != logits.argmax(-1)).any()


@BY_KERNEL_OR_XLA
def test_a_row_alone_is_as_among_others(top1):
    """Whatever way its batch mates make the batch go."""
    rows = [*MIXED, Sampling(1.0, repetition_penalty=1.7), Sampling(frequency_penalty=0.9)]
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(len(rows), VOCAB)).astype(np.float32)
    text = rng.integers(0, VOCAB, (len(rows), 12)).astype(np.int32)
    seeds, where = np.arange(len(rows), dtype=np.uint32), np.full(len(rows), 12, np.int32)
    history = History(text, np.full(len(rows), 5, np.int32))
    run = jax.jit(functools.partial(sample, top1=top1))
    tokens, logprobs = run(logits, SamplingParams.stack(rows), seeds, where, history)
    for i, mine in enumerate(rows):
        of = slice(i, i + 1)
        alone = run(
            logits[of],
            SamplingParams.stack([mine]),
            seeds[of],
            where[of],
            jax.tree.map(lambda a, of=of: a[of], history),
        )
        assert alone[0] == tokens[of], mine
        np.testing.assert_allclose(alone[1], logprobs[of], atol=1e-6)


@BY_KERNEL_OR_XLA
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=3)])
def test_logits_that_are_no_numbers_are_told_by_their_log_probability(sampling, top1):
    logits = np.zeros((4, VOCAB), np.float32)
    logits[1, 4], logits[2, 4], logits[3, 1:] = np.nan, np.inf, -np.inf
    params = SamplingParams.stack([sampling] * 4)
    where = np.zeros(4, np.uint32), np.zeros(4, np.int32)
    _, logprobs = sample(logits, params, *where, top1=top1)
    np.testing.assert_array_equal(np.isnan(logprobs), [False, True, True, False])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("vocab_size", [1, 7, 8, 32, 61, 20_003])
def test_the_kernel_finds_the_most_likely_tokens(vocab_size):
    """By threads or not, with and without a rest; the first of several; NaN and infinities."""
    logits = 20 * np.random.default_rng(0).normal(size=(7, vocab_size)).astype(np.float32)
    logits[1] = np.round(logits[1] / 20)  # ties
    logits[2, -1] = logits[2].max() + 1
    logits[3, vocab_size // 2] = np.nan
    logits[4, :-1], logits[5, -1], logits[6] = -np.inf, np.inf, -np.inf
    first, top, log_sum = jax.jit(cpu_top1.top1)(logits)
    np.testing.assert_array_equal(top, logits.max(axis=-1))
    expected = logits.argmax(axis=-1)
    expected[3] = vocab_size - 1
    np.testing.assert_array_equal(first, expected)
    exact = special.logsumexp(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(log_sum, exact, rtol=1e-6, atol=1e-6)
    alone = [cpu_top1.top1(logits[i : i + 1])[2][0] for i in range(7)]
    np.testing.assert_array_equal(alone, log_sum)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_impossible_sampling_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=f"{named}=.*(expected|keeps no)"):
        Sampling(**options)


def test_sampling_costs_no_sort():
    """A sort of a large vocabulary takes longer than a layer; the compiled program has none."""
    params = SamplingParams.stack([Sampling(1.0, top_k=4, top_p=0.5)])
    arguments = jnp.zeros((1, 64)), params, np.zeros(1, np.uint32), np.zeros(1, np.int32)
    text = jax.jit(sample).lower(*arguments).as_text()
    assert "stablehlo.while" in text
    assert "stablehlo.sort" not in text and "top_k" not in text.replace("params.top_k", "")
