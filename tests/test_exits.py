"""Early exits on a text: every loop's answers, the engine's own exits, and calibrated bounds."""

import dataclasses
import json

import commands
import numpy as np
import pytest
from decode_models import scanned
from evaluated import make_model
from test_engine import CONTEXT, GEMMA, NEOX, RELAXED, TIED, engine_of, params_of

from recursive_jax.decoding.exit_measures import Cosine, Margin, Stable, TopProbability
from recursive_jax.decoding.requests import Request
from recursive_jax.decoding.session import generate
from recursive_jax.evaluation import exits, risk
from recursive_jax.model import load
from recursive_jax.models import flops
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder


def windows_of(cfg, count=5, length=CONTEXT, seed=0):
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (count, length), np.int32)
    scored = np.ones(tokens.shape, bool)
    scored[:, 0] = scored[1, 20:] = False  # a short window
    return tokens, scored


def logits_after(cfg, loops, tokens):
    """f32 [B, T, V]: the head on the state after so many loops, no exits involved."""
    model, params = Decoder(cfg), params_of(cfg)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    x = model.apply({"params": params}, tokens, positions, loops=loops)
    return np.asarray(model.apply({"params": params}, x, method="unembed"))


@pytest.mark.parametrize("cfg", [TIED, GEMMA], ids=["tied", "gemma"])
def test_a_trace_is_the_answer_of_every_loop(cfg, monkeypatch):
    tokens, scored = windows_of(cfg)
    monkeypatch.setattr(exits, "HEAD_BYTES", 4 * 2 * cfg.vocab_size * 2 * 7)  # 7 positions
    found = exits.trace(Decoder(cfg), params_of(cfg), tokens, scored, TopProbability(), 2)
    marks = scored[:, 1:]
    for loop in range(cfg.num_loops):
        logits = logits_after(cfg, loop + 1, tokens)[:, :-1][marks].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found.score[:, loop], p.max(axis=1), atol=1e-5)
        np.testing.assert_array_equal(found.guess[:, loop], p.argmax(axis=1))
        expected = -np.log(p[np.arange(len(p)), found.target])
        np.testing.assert_allclose(found.nll[:, loop], expected, atol=2e-4)
    np.testing.assert_array_equal(found.target, tokens[:, 1:][marks])
    np.testing.assert_array_equal(found.window, np.nonzero(marks)[0])
    assert found.first.sum() == len(tokens)


@pytest.mark.parametrize("measure", [Cosine(), Margin(), Stable()], ids=lambda m: m.name)
def test_measures_see_the_same_in_a_pass_and_token_by_token(measure):
    tokens, scored = windows_of(TIED)
    found = exits.trace(Decoder(TIED), params_of(TIED), tokens, scored, measure, 5)
    middle = [halfway(found.score[:, loop]) for loop in range(2)]
    expected = found.outcome(found.exit_loops(middle))
    assert len(set(expected.exit_loops)) == 3 or measure.name == "stable"
    outcome = walk(TIED, measure, middle, "complete", 3)
    np.testing.assert_array_equal(outcome.exit_loops, expected.exit_loops)
    np.testing.assert_array_equal(outcome.guess, expected.guess)
    np.testing.assert_allclose(outcome.nll, expected.nll, atol=2e-4)


def halfway(score):
    """A threshold near the median, in the widest gap there: rounding cannot decide."""
    score = np.sort(score.astype(np.float64))
    near = np.arange(len(score) * 2 // 5, len(score) * 3 // 5)
    at = near[np.argmax(score[near + 1] - score[near])]
    return float((score[at] + score[at + 1]) / 2)


def walk(cfg, measure, thresholds, missing_kv, batch_size, windows=None):
    windows = windows or windows_of(cfg)
    return exits.walk(
        scanned(cfg), params_of(cfg), *windows, measure, thresholds, missing_kv, batch_size
    )


@pytest.mark.parametrize(
    ("cfg", "missing_kv"),
    [(RELAXED, "copy"), (NEOX, "propagate"), (GEMMA, "propagate")],
    ids=["relaxed", "neox", "gemma"],
)
def test_a_walk_over_the_engine_s_answers_leaves_where_they_left(cfg, missing_kv):
    """The keys and values that exited tokens leave behind are the engine's, policy by policy."""
    measure, prompts = TopProbability(), (5, 17, 40)
    rows = windows_of(cfg)
    score = exits.trace(Decoder(cfg), params_of(cfg), *rows, measure, 5).score[:, 0]
    threshold = halfway(score)
    engine = engine_of(cfg, measure=TopProbability(threshold), missing_kv=missing_kv)
    requests = [Request(token, (token,), CONTEXT - 1, logprobs=True) for token in prompts]
    answers = generate(engine, requests)
    assert {1, cfg.num_loops} <= {loops for a in answers for loops in a.exit_loops}
    tokens = np.array([[p, *a.tokens] for p, a in zip(prompts, answers, strict=True)], np.int32)
    scored = np.ones(tokens.shape, bool)
    scored[:, 0] = False
    for batch_size in (1, 3):
        outcome = walk(cfg, measure, threshold, missing_kv, batch_size, (tokens, scored))
        np.testing.assert_array_equal(outcome.guess, tokens[:, 1:].ravel())
        np.testing.assert_array_equal(outcome.exit_loops, sum((a.exit_loops for a in answers), []))
        logprobs = sum((list(a.logprobs) for a in answers), [])
        np.testing.assert_allclose(-outcome.nll, logprobs, atol=2e-4)


def test_exits_follow_thresholds():
    score = np.array([[0.2, 0.9, 0], [0.8, 0.1, 0], [0.1, 0.1, 0], [0.9, 0.9, 0]], np.float32)
    first = np.array([False, False, False, True])
    guess = np.array([[1, 2, 2], [3, 3, 3], [1, 2, 4], [0, 0, 0]], np.int32)
    nll = np.arange(12, dtype=np.float32).reshape(4, 3)
    target = np.array([2, 0, 1, 0], np.int32)
    found = exits.Trace(score, guess, nll, target, np.zeros(4, np.int32), first)
    assert found.exit_loops(0.5).tolist() == [2, 1, 3, 3]
    assert found.exit_loops((0.8, 0.05)).tolist() == [2, 2, 2, 3]
    assert found.exit_loops(0.9).tolist() == [3, 3, 3, 3], "above, not at"
    assert found.oracle_loops().tolist() == [2, 1, 3, 1]
    outcome = found.outcome(np.array([2, 1, 3, 3]))
    assert outcome.nll.tolist() == [1, 3, 8, 11] and outcome.guess.tolist() == [2, 3, 4, 0]
    assert exits.qualities(found, outcome) == {
        "nll": 23 / 4, "accuracy": 0.5, "agreement": 1.0, "mean_loops": 9 / 4,
        "depth": [0.25, 0.25, 0.5],
    }  # fmt: skip


def test_flops_are_two_for_every_weight_that_a_token_meets():
    cfg = DecoderConfig(
        "llama", vocab_size=100, embed_dim=8, mlp_dim=12, num_heads=2, num_kv_heads=1, head_dim=4,
        num_layers=3, num_loops=2, lora_ranks=dict(k=2, up=1),
    )  # fmt: skip
    attention, mlp = 8 * 8 + 2 * 8 * 4 + 8 * 8, 3 * 8 * 12
    lora_k, lora_up = 2 * (8 + 4), 8 + 12
    cost = flops.TokenFlops.of(cfg, context=10)
    seen = 4 * 2 * 4 * 10  # scores and sums: two products of 8 numbers for each token seen
    assert cost.loop == 3 * (2 * (attention + mlp + lora_k + lora_up) + seen)
    assert cost.projected == 3 * 2 * (2 * 8 * 4 + lora_k)
    assert cost.head == 2 * 8 * 100
    left = np.array([1, 2, 2, 2])
    assert cost.per_token(left, 2, True, "propagate") == (
        1.75 * cost.loop + 0.25 * cost.projected + 1.75 * cost.head
    )
    assert cost.per_token(left, 2, False, "complete") == 2 * cost.loop + cost.head
    assert cost.per_token(left, 2, False, "copy") == 1.75 * cost.loop + cost.head
    windowed = cfg.replace(family="gemma3", windows=(4, 0, 0, 0, 0, 0))
    assert flops.TokenFlops.of(windowed, 10).loop == cost.loop - seen * 6 / 10 / 2


def test_a_bet_is_right_as_often_as_it_says():
    """Losses whose mean is the bound are called smaller in no more than 10 of 100 texts."""
    rng, bound = np.random.default_rng(0), 0.1
    draws = [rng.beta(0.5, 4.5, 100) for _ in range(2000)]  # mean 0.1
    share = np.mean([risk.betting_p_value(x, bound) <= 0.1 for x in draws])
    assert share <= 0.1
    naive = np.mean([x.mean() <= bound for x in draws])
    assert naive > 0.4, "the mean of the sample keeps a bound half of the time"
    small = np.mean([risk.betting_p_value(x / 2, bound) <= 0.1 for x in draws])
    assert small > 0.9, "and a mean of half the bound is found out"


def test_the_wealth_of_the_bet_is_that_of_a_loop():
    losses, bound = np.array([0.0, 0.2, 1.0, 0.1, 0.0, 0.0]), 0.3
    wealth, best, variance, spent, total = 1.0, 1.0, 0.25, 0.0, 0.0
    for i, loss in enumerate(losses, 1):
        wealth *= 1 - min(1, (2 * np.log(20) / (6 * variance)) ** 0.5) * (loss - bound)
        best = max(best, wealth)
        total += loss
        spent += (loss - (0.5 + total) / (1 + i)) ** 2
        variance = (0.25 + spent) / (1 + i)
    assert risk.betting_p_value(losses, bound) == pytest.approx(1 / best, rel=1e-12)
    assert risk.betting_p_value(np.ones(50), 0.3) == 1.0
    with pytest.raises(ValueError, match="outside"):
        risk.betting_p_value(np.array([0.1, 1.5]), 0.3)


def random_trace(count=4000, num_windows=100, seed=0):
    """Three loops; the surer an earlier loop is, the more often it agrees with the last one."""
    rng = np.random.default_rng(seed)
    score = rng.random((count, 3), np.float32)
    agrees = rng.random((count, 2)) < score[:, :2] ** 0.2
    guess = np.stack(
        [np.where(agrees[:, 0], 7, 1), np.where(agrees[:, 1], 7, 2), np.full(count, 7)], 1
    )
    nll = np.where(guess == 7, 1.0, 1.5).astype(np.float32)
    window = np.sort(rng.integers(0, num_windows, count)).astype(np.int32)
    return exits.Trace(score, guess, nll, guess[:, 2], window, np.zeros(count, bool))


@pytest.mark.parametrize("kind", risk.RISKS)
def test_the_test_ends_at_the_first_candidate_it_cannot_accept(kind):
    found = random_trace(16_000, 400)
    chosen = np.arange(400) % 3 == 0
    candidates = risk.path(found, chosen)
    tested = found.take(~chosen)

    def try_out(thresholds):
        outcome = tested.outcome(tested.exit_loops(thresholds))
        return risk.window_losses(tested, outcome, kind), float(outcome.exit_loops.mean())

    accepted, tried = risk.learn_then_test(candidates, try_out, 0.05, 0.9)
    assert [c.thresholds for c in tried] == candidates[: len(tried)]
    assert 1 < len(tried) < len(candidates) and accepted == tried[-2]
    assert all(c.p_value <= 0.1 for c in tried[:-1]) and tried[-1].p_value > 0.1
    assert accepted.risk < 0.05 and accepted.mean_loops < 3
    depth = [c.mean_loops for c in tried]
    assert depth == sorted(depth, reverse=True), "from careful to bold"
    assert risk.learn_then_test(candidates, try_out, 0.0, 0.9)[0] is None


def test_candidates_bound_the_share_that_differs_after_every_loop():
    found = random_trace()
    for share, thresholds in zip(
        risk.CANDIDATES, risk.path(found, np.ones(100, bool)), strict=True
    ):
        for loop, threshold in enumerate(thresholds):
            leaves = found.score[:, loop] > threshold
            differs = (found.guess[leaves, loop] != 7).mean() if leaves.any() else 0
            assert differs <= share + 1e-9
            if share == 1.0:
                assert leaves.all()
    short = dataclasses.replace(found, first=np.ones(4000, bool))  # nothing to learn from
    assert all(t == (np.inf, np.inf) for t in risk.path(short, np.ones(100, bool)))


def test_losses_are_those_of_tokens_whatever_their_window():
    """Windows of 4 and 2 tokens; a first token cannot leave, so it does not count."""
    found = random_trace(8, 2)
    found = dataclasses.replace(
        found, window=np.array([0, 0, 0, 0, 0, 2, 2, 2], np.int32),
        first=np.array([True, False, False, False, False, True, False, False]),
    )  # fmt: skip
    rise = np.float32([9, 0.1, 0.1, 0.2, 0.2, 9, -1, -1])
    outcome = exits.Outcome(
        np.ones(8, np.int32), found.nll[:, 2] + rise, np.array([1, 7, 1, 7, 7, 1, 1, 1], np.int32)
    )
    losses = risk.window_losses(found, outcome, "disagreement")
    assert (losses.sums.tolist(), losses.counts.tolist()) == ([1, 2], [4, 2])
    assert losses.risk == 0.5
    # bound + (sum - bound * count) / 4
    unit = np.array([0.3 + (1 - 0.3 * 4) / 4, 0.3 + (2 - 0.3 * 2) / 4])
    assert losses.p_value(0.3) == risk.betting_p_value(unit, 0.3)
    losses = risk.window_losses(found, outcome, "perplexity")
    np.testing.assert_allclose(losses.sums, [0.6, 0], 1e-5)
    assert losses.risk == pytest.approx(np.expm1(0.1), rel=1e-5)
    far = dataclasses.replace(outcome, nll=found.nll[:, 2] + 9)
    assert (risk.window_losses(found, far, "perplexity").sums == [4, 2]).all(), "1 nat per token"


@pytest.mark.parametrize("kind", risk.RISKS)
def test_short_windows_do_not_loosen_the_bound(kind):
    """Short windows agree always, long ones never: by window the risk is 5%, by token 34%."""
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(400) < 0.05, 100, 10)
    window = np.repeat(np.arange(400), lengths).astype(np.int32)
    count, differs = len(window), lengths[window] == 100
    nothing = np.zeros((count, 2), np.float32)
    found = exits.Trace(
        nothing, nothing.astype(np.int32), nothing, nothing[:, 0].astype(np.int32), window,
        np.zeros(count, bool),
    )  # fmt: skip
    outcome = exits.Outcome(
        np.ones(count, np.int32), np.where(differs, 0.5, 0).astype(np.float32),
        differs.astype(np.int32),
    )  # fmt: skip
    losses = risk.window_losses(found, outcome, kind)
    assert losses.risk > 0.15 and losses.p_value(0.1) > 0.9


TEXT = "Return the list of names that are in the file. Raise ValueError if there are none.\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a checkpoint of two loops, one of one loop, and a text."""
    place = tmp_path_factory.mktemp("exits")
    (place / "text.txt").write_text(TEXT * 60)
    make_model().save(place / "model")
    make_model(num_loops=1).save(place / "source")
    return place


def evaluate(place, *flags, model="model"):
    return commands.run(
        "evaluate", f"--checkpoint={place / model}", f"--text={place / 'text.txt'}",
        "--dtype=float32", *flags,
    )  # fmt: skip


def test_the_job_measures_exits_as_the_model_does(place):
    pytest.importorskip("matplotlib")
    done = evaluate(
        place, "--exits", "--exit_threshold=0.02", "--missing_kv=propagate", "--text_tokens=90",
        "--context_length=32", "--source=none", f"--plots={place / 'plots'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "model" / "evaluation.json").read_text())["exits"]
    wanted = load(place / "model").exits(
        place / "text.txt", 90, 32, measure=TopProbability(0.02), missing_kv="propagate",
        dtype="float32", quiet=True,
    )  # fmt: skip
    assert found["by_threshold"][0]["depth"] == wanted["by_threshold"][0]["depth"]
    assert found["tokens"] == 90 and found["by_threshold"][0]["thresholds"] == [0.02]
    for row in (*found["loops"], found["oracle"]):
        assert sum(row["depth"]) == pytest.approx(1)
    assert found["loops"][1]["agreement"] == found["oracle"]["agreement"] == 1.0
    assert "".join(found["shown"]["pieces"]) in TEXT * 2 and len(found["shown"]["exit_loops"]) > 20
    assert "<svg" in (place / "plots" / "exits.svg").read_text()
    for words in ("all after loop 1", "top1 > 0.02", "oracle, teacher-forced", "loop gain"):
        assert words in done.stdout


def test_calibrated_thresholds_are_stored_with_the_weights_they_are_for(place):
    done = evaluate(
        place, "--calibrate=top1", "--bound=0.2", "--risk=perplexity", "--text_tokens=1500",
        "--context_length=16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    thresholds = load(place / "model").thresholds
    thresholds.check_current()
    assert thresholds.promise == (
        "perplexity rises by at most 20.00% on text like the calibration's, confidence 0.9"
    )
    assert thresholds.promise in done.stdout and "--exit_measure=calibrated" in done.stdout
    assert thresholds.record["p_value"] <= 0.1 and thresholds.record["windows"] > 80
    tried = [tuple(candidate["thresholds"]) for candidate in thresholds.record["tried"]]
    assert len(set(tried)) == len(tried) > 1, "each is tried once"
    other = dataclasses.replace(load(place / "model"), weights=make_model().weights)
    with pytest.raises(ValueError, match="missing_kv=complete, not with copy; calibrate again"):
        other.exits(place / "text.txt", 90, 32, missing_kv="copy", quiet=True)


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("source", ["--exits"], "has one loop, so no token can exit early"),
        ("source", ["--calibrate=top1"], "has one loop, so no token can exit early"),
        ("model", ["--calibrate=oracle"], "has no threshold; nothing to calibrate"),
        ("model", ["--calibrate=top1", "--bound=2"], "bound=2.0"),
        ("model", ["--calibrate=top1", "--text_tokens=50"], "windows, which prove nothing"),
        ("model", ["--calibrate=top1", "--limit=3"], "--limit beside --calibrate"),
        ("model", ["--limit=3"], "limit without tasks"),
        ("model", ["--exits", "--context_length=2"], "no token of the text may leave early"),
        ("model", ["--exits", "--exit_measure=static:1"], "the table shows every loop anyway"),
        ("model", ["--exit_measure=top1"], "--exit_measure without --exits"),
        ("model", ["--bound=0.1"], "--bound without --calibrate"),
    ],
)
def test_a_mistake_is_told_in_one_line(place, model, flags, said):
    done = evaluate(place, *flags, model=model)
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (place / "source" / "thresholds.json").exists()
