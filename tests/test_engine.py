"""The engine against one request at a time, under random loads."""

import dataclasses
import functools
import itertools
import os
import pathlib
import re

import jax
import numpy as np
import pytest
import slow_reference
from decode_models import make_engine, scanned

from recursive_jax.analysis.simulation import Recording, replay
from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.exit_measures import (
    Cosine,
    Margin,
    Recorded,
    Stable,
    Static,
    TopProbability,
    make_measure,
)
from recursive_jax.decoding.requests import Completion, Request, Sampling
from recursive_jax.decoding.scheduler import Scheduler
from recursive_jax.decoding.session import Session, generate
from recursive_jax.decoding.thresholds import Thresholds
from recursive_jax.models.config import DecoderConfig, Rope
from recursive_jax.models.kv_cache import KVCache
from recursive_jax.models.parameters import abstract_params, init_params

CONTEXT = 40
RELAXED = DecoderConfig(
    family="llama", vocab_size=61, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2,
    head_dim=8, num_layers=2, num_loops=2, norms="per_loop", max_length=CONTEXT,
    lora_ranks=dict(q=3, k=2, v=3, o=2, gate=3, up=4, down=2),
)  # fmt: skip
TIED = RELAXED.replace(num_loops=3, norms="tied", lora_ranks=())
# Windows far shorter than the texts, other ones in the other loop, and everything per loop.
GEMMA = DecoderConfig(
    family="gemma3", vocab_size=67, embed_dim=32, mlp_dim=24, num_heads=4, num_kv_heads=1,
    head_dim=8, num_layers=2, num_loops=2, norm_offset=1.0, post_norms=True, qk_norm=True,
    activation="gelu_tanh", windows=(3, 0, 0, 5), rope_of_depth=(1, 0, 0, 1),
    ropes=(Rope(theta=1e4), Rope(theta=100.0)), attn_softcap=3.0, final_softcap=9.0,
    embed_scale=4.0, norms="per_loop", lora_ranks=dict(q=2, k=3, v=2, o=3, gate=3, up=4, down=2),
    max_length=CONTEXT,
)  # fmt: skip
NEOX = DecoderConfig(
    family="gpt_neox", vocab_size=59, embed_dim=32, mlp_dim=24, num_heads=2, num_kv_heads=2,
    head_dim=8, num_layers=2, num_loops=3, norm="layer", parallel_residual=True,
    activation="gelu", gated_mlp=False, qkv_bias=True, o_bias=True, mlp_bias=True,
    rotary_fraction=0.5, tied_head=False, norms="per_loop", lora_ranks=dict(k=2, v=2, down=3),
    max_length=CONTEXT,
)  # fmt: skip
CONFIGS = {"relaxed": RELAXED, "tied": TIED, "gemma": GEMMA, "neox": NEOX}


@functools.cache
def params_of(cfg):
    """Random, nothing at its neutral value."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (rng.normal(size=leaf.shape) * 0.4).astype(np.float32)

    return jax.device_put(jax.tree.map(draw, abstract_params(cfg)))


# A few at a time: an engine is a thousand memory mappings, a process may have 65,530, and XLA's
# compiler dies without a word when there are no more.
@functools.lru_cache(maxsize=8)
def engine_of(cfg, num_slots=3, chunk_length=4, **options):
    options = {"num_slots": num_slots, "context_length": CONTEXT, **options}
    return make_engine(scanned(cfg), params_of(cfg), chunk_length=chunk_length, **options)


def requests_of(cfg, number, seed, recorded=False):
    """Prompts of 1 … 17 tokens, answers of 1 … 20, every third request sampled, half with top_k."""
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(number):
        prompt = rng.integers(0, cfg.vocab_size, rng.integers(1, 18)).tolist()
        count = int(rng.integers(1, 21))
        sampling = Sampling(temperature=0.7 * (i % 3 == 2), top_k=20 * (i % 2), seed=i)
        loops = rng.integers(1, cfg.num_loops + 1, count).tolist() if recorded else ()
        requests.append(Request(i, prompt, count, sampling=sampling, recorded_loops=loops))
    return requests


def serve(engine, requests, seed, cancel=()):
    """Submit at random moments, run random numbers of ticks at once; completions and ticks.

    Requests whose number is in `cancel` are cancelled at a random moment.
    """
    rng = np.random.default_rng(seed)
    session, waiting = Session(engine), list(requests)
    completions, ticks, planned = {}, [], []
    scheduler = session.scheduler
    record = scheduler.record

    def checked(exited, finished):
        planned.append(scheduler.lanes())
        record(exited, finished)

    scheduler.record = checked
    while waiting or not session.idle:
        for _ in range(rng.integers(0, 3)):
            if waiting:
                request = waiting.pop(0)
                completions[session.submit(request)] = Completion(request.id)
        for index in cancel:
            if index in completions and rng.random() < 0.15:
                session.cancel(index)
        events, ran = session.round(int(rng.integers(1, 9)))
        ticks += ran
        for event in events:
            completion = completions[event.index]
            assert completion.finish_reason is None, "an event after the last"
            completion.add(event)
    assert [tick.lanes for tick in ticks] == planned, "device and scheduler disagree"
    return [completions[i] for i in sorted(completions)], ticks


def as_recorded(request):
    return lambda look: look.loops >= request.recorded_loops[look.index]


def follows(cfg, ours, requests, leaves_of, policy="complete", params=None, context=CONTEXT):
    """Token for token what the slow reference says; a doubtful difference ends a comparison.

    Returns the loops executed, of all tokens.
    """
    loops, cut = [], 0
    for mine, request in zip(ours, requests, strict=True):
        expected = slow_reference.answer(
            cfg,
            params or params_of(cfg),
            request.tokens,
            request.max_new_tokens,
            context,
            leaves_of(request),
            policy,
            request.sampling,
            request.stop,
        )
        assert mine.finish_reason in ("length", "stop")
        kept = len(expected.tokens) - (mine.finish_reason == "stop")
        for i in range(kept):
            if (mine.tokens[i], mine.exit_loops[i]) != (expected.tokens[i], expected.exit_loops[i]):
                assert expected.doubts[i], (request.id, i, mine, expected)
                cut += 1
                break
            np.testing.assert_allclose(mine.logprobs[i], expected.logprobs[i], atol=2e-4)
        else:
            assert len(mine.tokens) == kept
        loops += mine.exit_loops
    assert cut <= 1e-4 * len(loops), f"{cut} of {len(loops)} tokens differ by rounding"
    return loops


@pytest.mark.parametrize("depthwise", [True, False], ids=["depth-wise", "sequence-wise"])
@pytest.mark.parametrize("name", ["relaxed", "tied"])
def test_full_depth_equals_one_request_at_a_time(name, depthwise):
    """Token for token: random arrivals, lengths, ticks per round trip, used slots."""
    cfg = CONFIGS[name]
    requests = requests_of(cfg, 12, seed=1)
    ours, ticks = serve(engine_of(cfg, depthwise=depthwise), requests, seed=2)
    loops = follows(cfg, ours, requests, lambda request: lambda look: False)
    assert set(loops) == {cfg.num_loops}
    # A token takes num_loops lanes-ticks and one row of the head.
    assert sum(tick.busy for tick in ticks) == len(loops) * cfg.num_loops
    assert sum(tick.head_rows for tick in ticks) == len(loops)


# What a skipped loop lacks is computed from the weights where it propagates, and copied or run as
# any loop is elsewhere: there one model of two loops and one of three will do.
EXITS = [(name, "propagate") for name in CONFIGS]
EXITS += [("gemma", "complete"), ("tied", "complete"), ("gemma", "copy"), ("neox", "copy")]
EXITS += [("relaxed", "sequence-wise"), ("neox", "sequence-wise")]


@pytest.mark.parametrize(("name", "policy"), EXITS)
def test_exits_equal_one_request_at_a_time(name, policy):
    """Random exits, the same in both; with them the keys and values that deeper loops see."""
    cfg, depthwise = CONFIGS[name], policy != "sequence-wise"
    policy = policy if depthwise else "propagate"
    num_slots = int(np.random.default_rng([len(name), len(policy), depthwise]).integers(1, 9))
    options = dict(measure=Recorded(), missing_kv=policy, depthwise=depthwise)
    engine = engine_of(cfg, num_slots, **options)
    requests = requests_of(cfg, 10, seed=3, recorded=True)
    ours, ticks = serve(engine, requests, seed=4)
    loops = follows(cfg, ours, requests, as_recorded, policy)
    assert set(loops) == set(range(1, cfg.num_loops + 1))
    passes = len(loops) * cfg.num_loops if policy == "complete" else sum(loops)
    assert sum(tick.head_rows for tick in ticks) == len(loops)
    # nothing completes behind an answer's last token
    assert passes - len(requests) * cfg.num_loops < sum(t.busy for t in ticks) <= passes


def by_measure(name, thresholds):
    """The score of an exit measure, in float64."""

    def softmax(logits):
        e = np.exp(logits.astype(np.float64) - logits.max())
        return np.sort(e / e.sum())

    def score(look):
        if name == "top1":
            return softmax(look.logits[-1])[-1]
        if name == "margin":
            return np.subtract(*softmax(look.logits[-1])[[-1, -2]])
        if name == "stable":
            return len({int(x.argmax()) for x in look.logits[-2:]}) == 1 < len(look.logits)
        a, b = look.before.astype(np.float64), look.after.astype(np.float64)
        return a @ b / np.sqrt((a @ a) * (b @ b))

    def leaves_of(request):
        def leaves(look):
            if look.loops >= (request.max_loops or np.inf):
                return True
            threshold = request.exit_threshold
            if threshold is None:
                threshold = thresholds[min(look.loops, len(thresholds)) - 1]
            if look.loops < request.min_loops:
                return False
            look.doubt |= abs(score(look) - threshold) < 1e-5
            return score(look) > threshold

        return leaves

    return leaves_of


@pytest.mark.parametrize(
    ("name", "thresholds", "policy"),
    [
        ("top1", (0.6, 0.3), "complete"),
        ("margin", (0.5, 0.2), "propagate"),
        ("stable", (0.5, 0.5), "complete"),
        ("cosine", (0.4, 0.6), "copy"),
    ],
)
def test_measures_decide_as_their_definitions(name, thresholds, policy):
    """With thresholds by loop, or by request, and with bounds on the loops of a request."""
    engine = engine_of(TIED, measure=make_measure(name), thresholds=thresholds, missing_kv=policy)
    low = dict(cosine=-1.0).get(name, 0.0)
    requests = [
        dataclasses.replace(request, max_new_tokens=10, **options)
        for request, options in zip(
            requests_of(TIED, 14, seed=5),
            [{}, {}, {}, {"min_loops": 2}, {"max_loops": 2}, {"exit_threshold": 1.0}]
            + [{"exit_threshold": low}, {"min_loops": 2, "max_loops": 2}]
            + [{"exit_threshold": x} for x in np.random.default_rng(0).uniform(low, 1, 6)],
            strict=True,
        )
    ]
    ours, ticks = serve(engine, requests, seed=6)
    loops = follows(TIED, ours, requests, by_measure(name, thresholds), policy)
    assert set(loops) == ({2, 3} if name == "stable" else {1, 2, 3})
    assert min(ours[3].exit_loops) >= 2
    assert max(ours[4].exit_loops[1:]) <= 2
    assert set(ours[5].exit_loops) == {3}, "nothing is above 1: full depth"
    assert set(ours[7].exit_loops[1:]) == {2}
    if not make_measure(name).needs_logits:
        assert sum(tick.head_rows for tick in ticks) == len(loops)


def test_the_oracle_runs_full_depth_and_tells_where_tokens_could_have_left():
    engine = engine_of(TIED, measure=make_measure("oracle"))
    requests = requests_of(TIED, 6, seed=7)
    ours, _ = serve(engine, requests, seed=8)
    guesses = {}

    def watch(request):
        def leaves(look):
            guesses[request.id, look.index] = [int(x.argmax()) for x in look.logits]
            return False

        return leaves

    told = [c.exit_loops for c in ours]
    full = [dataclasses.replace(c, exit_loops=[3] * len(c.tokens)) for c in ours]
    follows(TIED, full, requests, watch)
    for (index, i), guess in guesses.items():
        assert told[index][i] == (guess.index(guess[-1]) + 1 if i else 3)
    assert {1, 2, 3} == set(sum(told, []))


# What later loops add is small, so that drafts are often right.
AGREEING = TIED.replace(tied_head=False)


@functools.cache
def agreeing_params():
    params = jax.tree.map(np.asarray, params_of(AGREEING))
    for part, name in (("attention", "o"), ("mlp", "down")):
        params["block"][part][name]["w"] = params["block"][part][name]["w"] * 0.25
    return jax.device_put(params)


def agreement(cfg, params, request, draft_loop):
    """Full-depth answer, and for each token whether `draft_loop` loops choose the same one."""
    states, choices = [], []

    def watch(look):
        states.append(look.logits[-1])
        return False

    s = request.sampling
    expected = slow_reference.answer(
        cfg, params, request.tokens, request.max_new_tokens, CONTEXT, watch, "complete",
        s, request.stop,
    )  # fmt: skip
    for i in range(len(expected.tokens)):
        logits = states[i * cfg.num_loops + draft_loop - 1]
        token, _ = slow_reference.sample_one(
            logits, s, request.tokens, [*request.tokens, *expected.tokens[:i]]
        )
        choices.append(token == expected.tokens[i])
    return expected, choices


@pytest.mark.parametrize("draft_loop", [1, 2])
def test_lossless_equals_full_depth_in_the_ticks_of_its_law(draft_loop):
    """One slot: d ticks for a token whose draft is right, else L; the last one takes L.

    Greedy and sampled, answers that end by length and by a stop token.
    """
    cfg, params = AGREEING, agreeing_params()
    engine = make_engine(
        scanned(cfg), params, 1, CONTEXT, measure=Static(draft_loop), lossless=True, chunk_length=4
    )
    right = []
    for i in range(8):
        sampling = Sampling(temperature=0.8 * (i % 2), top_k=30, seed=i)
        request = Request(i, (3 * i + 1,), 24, sampling=sampling)
        if i >= 4:  # stop where full depth comes to
            tokens = agreement(cfg, params, request, 1)[0].tokens
            request = dataclasses.replace(request, stop=(tokens[5 + i], 60))
        expected, agreed = agreement(cfg, params, request, draft_loop)
        (ours,), ticks = serve(engine, [request], seed=i)
        assert not any(expected.doubts)
        stopped = expected.tokens[-1] in request.stop
        assert ours.finish_reason == ("stop" if stopped else "length")
        assert ours.tokens == expected.tokens[: len(expected.tokens) - stopped]
        np.testing.assert_allclose(ours.logprobs, expected.logprobs[: len(ours.tokens)], atol=2e-4)
        loops = [draft_loop if a else cfg.num_loops for a in agreed]
        assert ours.exit_loops == loops[: len(ours.tokens)]
        assert len(ticks) == sum(loops[:-1]) + cfg.num_loops
        assert sum(tick.drafted for tick in ticks) == len(agreed)
        right += agreed
    assert 0.3 < np.mean(right) < 0.97


LOSSLESS = [("relaxed", None, True), ("relaxed", None, False)]
LOSSLESS += [("gemma", None, True), ("neox", None, False)]
LOSSLESS += [("tied", "top1", True), ("tied", "cosine", True)]


@pytest.mark.parametrize(("name", "measure", "depthwise"), LOSSLESS)
def test_lossless_equals_full_depth_under_load(name, measure, depthwise):
    """Drafts after random loops (or a measure's), random arrivals, some cancelled."""
    cfg, recorded = CONFIGS[name], measure is None
    measure = Recorded() if recorded else make_measure(measure)
    thresholds = None if recorded else (0.1, 0.1)
    engine = engine_of(
        cfg, measure=measure, thresholds=thresholds, lossless=True, depthwise=depthwise
    )
    requests = requests_of(cfg, 12, seed=9, recorded=recorded)
    gone = {2, 5, 9}
    ours, ticks = serve(engine, requests, seed=10, cancel=gone)
    assert sum(tick.dropped for tick in ticks) > 0
    whole = [i for i, c in enumerate(ours) if c.finish_reason]
    assert set(range(12)) - set(whole) <= gone
    kept = [
        dataclasses.replace(ours[i], exit_loops=[cfg.num_loops] * len(ours[i].tokens))
        for i in whole
    ]
    follows(cfg, kept, [requests[i] for i in whole], lambda request: lambda look: False)


@pytest.mark.parametrize("lossless", [False, True], ids=["complete", "lossless"])
def test_penalties_follow_the_path_of_the_answer(lossless):
    """Prompt and answer count, drafts that were dropped do not."""
    engine = engine_of(RELAXED, measure=Recorded(), lossless=lossless)
    requests = []
    for i, request in enumerate(requests_of(RELAXED, 8, seed=20, recorded=True)):
        penalties = [
            {"repetition_penalty": 1.7},
            {"presence_penalty": 2.0},
            {"frequency_penalty": 1.5},
            {"repetition_penalty": 0.8, "presence_penalty": -1.0, "frequency_penalty": 0.5},
            {},
        ][i % 5]
        sampling = dataclasses.replace(request.sampling, **penalties)
        requests.append(dataclasses.replace(request, sampling=sampling))
    ours, _ = serve(engine, requests, seed=21)
    if lossless:
        for mine in ours:
            mine.exit_loops = [RELAXED.num_loops] * len(mine.tokens)
    leaves_of = (lambda _: lambda look: False) if lossless else as_recorded
    loops = follows(RELAXED, ours, requests, leaves_of)
    assert set(loops) == ({2} if lossless else {1, 2})


def test_cancelling_at_any_moment_changes_no_other_answer():
    for policy in ("complete", "propagate"):
        engine = engine_of(RELAXED, measure=Recorded(), missing_kv=policy)
        requests = requests_of(RELAXED, 14, seed=11, recorded=True)
        alone, _ = serve(engine, requests, seed=12)
        gone = set(range(0, 14, 2))
        ours, _ = serve(engine, requests, seed=13, cancel=gone)
        ended = [c.finish_reason is None for c in ours]
        assert 1 < sum(ended) and not any(e for i, e in enumerate(ended) if i not in gone)
        for mine, whole in zip(ours, alone, strict=True):
            assert mine.tokens == whole.tokens[: len(mine.tokens)]
            assert mine.finish_reason is None or len(mine.tokens) == len(whole.tokens)


def test_many_slots_compact_the_head_into_few_rows():
    """Sixteen slots: the head runs on 0, 8, 12, 14 or 16 rows; which is nobody's business."""
    engine = engine_of(RELAXED, num_slots=16, measure=Recorded(), missing_kv="propagate")
    requests = [  # prompts of one token keep all slots decoding
        dataclasses.replace(request, tokens=request.tokens[:1])
        for request in requests_of(RELAXED, 30, seed=22, recorded=True)
    ]
    session = Session(engine)
    ours = [Completion(session.submit(request)) for request in requests]
    ticks = []
    while not session.idle:
        events, ran = session.round()
        ticks += ran
        for event in events:
            ours[event.index].add(event)
    follows(RELAXED, ours, requests, as_recorded, "propagate")
    rows = {tick.head_rows for tick in ticks}
    bounds = itertools.pairwise((0, 1, 9, 13, 15, 17))
    assert all(rows & {*range(n, m)} for n, m in bounds), "every size"


@pytest.mark.parametrize("policy", ["complete", "propagate"])
def test_ticks_are_those_of_the_scheduler_fed_with_the_same_exits(policy):
    """No slot idles while a request waits, whatever the round trips to the host."""
    engine = engine_of(RELAXED, measure=Recorded(), missing_kv=policy)
    requests = requests_of(RELAXED, 14, seed=14, recorded=True)
    session, ours = Session(engine), []
    for request in requests:
        session.submit(request)
    while not session.idle:
        ours += session.round()[1]
    scheduler = Scheduler(3, RELAXED.num_loops, 4)
    recordings = [
        Recording([RELAXED.num_loops, *r.recorded_loops[1:]], len(r.tokens) - 1) for r in requests
    ]
    theirs = list(replay(scheduler, recordings))
    assert [sorted(t.lanes.values()) for t in ours] == [sorted(t.lanes.values()) for t in theirs]


def test_full_depth_needs_no_more_ticks_than_batching_by_tokens():
    """Equal requests, a full queue: num_loops ticks a token, the head once."""
    engine = engine_of(TIED)
    requests = [Request(i, (i + 1,), 7) for i in range(9)]
    session = Session(engine)
    for request in requests:
        session.submit(request)
    ticks = []
    while not session.idle:
        ticks += session.round()[1]
    assert len(ticks) == 3 * 7 * TIED.num_loops
    assert [t.head_rows for t in ticks] == [0, 0, 3] * 21
    stats = session.stats.to_json()
    assert stats == {
        "ticks": 63, "tokens": 63, "mean_loops": 3.0, "occupancy": 1.0, "head_rows": 63,
        "dropped": 0, "exit_loops": {"3": 63},
    }  # fmt: skip


@pytest.mark.parametrize("cpu_model", [False, True])
def test_other_requests_change_the_last_bits_only(cpu_model):
    """Alone, and among others whose prompts run beside it: what `requests` promises in float32.

    With chunks of 80 tokens and this size some log-probabilities have other last bits.
    """
    cfg = RELAXED.replace(embed_dim=128, mlp_dim=256, vocab_size=512, max_length=128)
    params = jax.tree.map(lambda x: x / 4, params_of(cfg))
    rng, requests = np.random.default_rng(30), []
    for i in range(8):
        prompt = rng.integers(0, cfg.vocab_size, rng.integers(1, 90)).tolist()
        sampling = Sampling(temperature=0.7 * (i % 3 == 2), seed=i)
        loops = rng.integers(1, 3, 12).tolist()
        requests.append(Request(i, prompt, 12, sampling=sampling, recorded_loops=loops))
    model = CpuModel(cfg) if cpu_model else scanned(cfg)
    engine = make_engine(
        model, model.prepare(params), 3, 128, chunk_length=80, measure=Recorded(),
        missing_kv="propagate",
    )  # fmt: skip
    alone = [generate(engine, [request])[0] for request in requests]
    together, _ = serve(engine, requests, seed=31)
    for one, other in zip(alone, together, strict=True):
        assert (one.tokens, one.exit_loops) == (other.tokens, other.exit_loops)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("cpu_model", [False, True])
def test_the_callers_params_are_only_read(cpu_model):
    """Neither deleted nor changed by preparing a model and decoding with it."""
    params = jax.tree.map(np.array, params_of(RELAXED))
    given = jax.device_put(params)
    model = CpuModel(RELAXED) if cpu_model else scanned(RELAXED)
    engine = make_engine(model, model.prepare(given), 2, CONTEXT, chunk_length=4)
    before = generate(engine, [Request(0, (1, 2, 3), 9)])
    assert before == generate(engine, [Request(0, (1, 2, 3), 9)])
    jax.tree.map(np.testing.assert_array_equal, given, params)


def test_slots_that_are_not_there():
    engine = engine_of(RELAXED)
    for slot in (-1, engine.num_slots, 0.5):
        with pytest.raises(ValueError, match=f"slot={slot}; expected an integer, at least 0 and"):
            engine.admit(slot, Request(0, (1,), 4))
        with pytest.raises(ValueError, match=f"slot={slot}; expected"):
            engine.release(slot)


def test_stop_tokens_end_an_answer():
    engine = engine_of(RELAXED, measure=Recorded(), missing_kv="complete")
    requests = requests_of(RELAXED, 8, seed=3, recorded=True)
    whole, _ = serve(engine, requests, seed=4)
    requests = [
        dataclasses.replace(r, stop=(c.tokens[len(c.tokens) // 2], 60))
        for r, c in zip(requests, whole, strict=True)
    ]
    ours, _ = serve(engine, requests, seed=5)
    follows(RELAXED, ours, requests, as_recorded)
    assert all(c.finish_reason == "stop" for c in ours)
    for mine, other, request in zip(ours, whole, requests, strict=True):
        assert mine.tokens == other.tokens[: len(mine.tokens)]
        assert other.tokens[len(mine.tokens)] in request.stop


@pytest.mark.parametrize("name", ["gemma", "neox"])
def test_the_cpu_model_and_blocks_of_the_cache_change_nothing(name, monkeypatch):
    """A CPU decodes a large model so."""
    cfg = CONFIGS[name]
    monkeypatch.setattr(KVCache, "BLOCK", 16)
    jax.clear_caches()
    model = CpuModel(cfg)
    engine = make_engine(
        model, model.prepare(params_of(cfg)), 3, CONTEXT, chunk_length=4, measure=Recorded(),
        missing_kv="propagate",
    )  # fmt: skip
    requests = requests_of(cfg, 6, seed=3, recorded=True)
    ours, _ = serve(engine, requests, seed=4)
    loops = set(range(1, cfg.num_loops + 1))
    assert set(follows(cfg, ours, requests, as_recorded, "propagate")) == loops
    jax.clear_caches()


def test_a_slot_with_nan_ends_alone_and_is_usable_again():
    """Token 5 has no embedding. Two slots: its neighbours, and who comes after it, see nothing."""
    params = jax.tree.map(np.asarray, params_of(NEOX))
    params["embedding"] = params["embedding"].copy()
    params["embedding"][5] = np.nan
    engine = engine_of(NEOX, num_slots=2, measure=Recorded(), missing_kv="propagate")
    good = [
        dataclasses.replace(r, tokens=[t + (t == 5) for t in r.tokens], stop=(5,))
        for r in requests_of(NEOX, 8, seed=15, recorded=True)
    ]
    healthy, _ = serve(engine, good, seed=16)
    requests = list(good)
    for at in (0, 3, 7, 9):
        bad = dataclasses.replace(good[1], id=f"bad {at}", tokens=(1, 5, 2, 3, 4, 6, 7))
        requests.insert(at, bad)
    engine.params, before = jax.device_put(params), engine.params
    try:
        ours, _ = serve(engine, requests, seed=17, cancel=(3,))
    finally:
        engine.params = before
    later, _ = serve(engine, good, seed=16)  # another session on the same cache
    assert [c.tokens for c in later] == [c.tokens for c in healthy]
    by_id = {c.id: c for c in ours}
    for at in (0, 7, 9):
        assert by_id[f"bad {at}"].finish_reason == "error"
        assert "not numbers" in by_id[f"bad {at}"].error
    for expected in healthy:
        assert by_id[expected.id].tokens == expected.tokens
        assert by_id[expected.id].finish_reason == expected.finish_reason


def test_nothing_compiles_after_warm_up():
    engine = engine_of(RELAXED, measure=Recorded(), missing_kv="propagate")
    engine.compile()
    count = []

    def listener(event, *_, **__):
        count.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        serve(engine, requests_of(RELAXED, 6, seed=18, recorded=True), seed=19, cancel=(3,))
        assert not [event for event in count if "compile" in event]
        jax.jit(lambda x: x * 3 + len(count))(np.float32(1))
        assert any("compile" in event for event in count), "the listener hears compilations"
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"missing_kv": "propagate"},
        {"missing_kv": "copy"},
        {"lossless": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("cpu_model", [False, True])
def test_the_cache_is_updated_in_place(options, cpu_model, caplog):
    """Bytes, by the compiler's account: the donated cache is the output, and not copied."""
    # as large a cache with few layers, since the CPU model compiles each
    layers, context = (4, 2048) if cpu_model else (16, 512)
    cfg = RELAXED.replace(num_layers=layers)
    model, params = scanned(cfg), abstract_params(cfg)
    if cpu_model:
        model = CpuModel(cfg)
        params = model.prepare(init_params(cfg, jax.random.key(0)))
    how = dict(measure=Static(1), chunk_length=16, **options)
    engine = make_engine(model, params, 8, context, **how)
    engine.compile()
    for name, memory in engine.memory().items():
        assert memory.alias_size_in_bytes >= engine.cache_bytes >= 16 << 20, name
        assert memory.temp_size_in_bytes < engine.cache_bytes / 4, name
    assert not caplog.records, "no warning of a copy"


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak")
def test_the_process_never_holds_a_second_cache():
    """By what the process holds at its peak; `in_place` above is by the compiler's account."""

    def held(name):
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", status)[1]) << 10

    cfg = RELAXED.replace(num_layers=8)
    engine = make_engine(scanned(cfg), params_of(cfg), 16, 4096, measure=Static(1), chunk_length=16)
    requests = [Request(i, (1, 2, 3), 40) for i in range(32)]
    generate(engine, requests[:1])  # all is compiled, and every page of the cache touched
    assert engine.cache_bytes >= 128 << 20
    before = held("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    generate(engine, requests)
    assert held("VmHWM") - before < engine.cache_bytes / 4


def test_bad_requests_end_with_a_reason_and_the_others_are_answered():
    engine = engine_of(TIED, measure=make_measure("top1"), thresholds=(0.6, 0.3))
    good = Request("good", np.asarray([1, 2, 3]), np.int64(4))
    bad = {
        "room for an answer": Request(0, (1,) * CONTEXT, 1),
        "do not fit": Request(1, (1,) * 30, CONTEXT),
        "stop ids": Request(2, (1,), 4, stop=range(9)),
        "stop id of": Request(7, (1,), 4, stop=("a", 2**40)),
        "token 61": Request(3, (61,), 4),
        "token 'a'; expected an integer": Request(8, (1, "a"), 4),
        "token 1.5; expected an integer": Request(9, (1.5,), 4),
        "sampling=None; expected a Sampling": Request(10, (1,), 4, sampling=None),
        "max_loops=4": Request(4, (1,), 4, max_loops=4),
        "min_loops=9": Request(5, (1,), 4, min_loops=9),
        "threshold of top1": Request(6, (1,), 4, exit_threshold=1.5),
    }
    completions = generate(engine, [*bad.values(), good])
    for words, completion in zip(bad, completions, strict=False):
        assert completion.finish_reason == "error" and words in completion.error
    assert completions[-1].finish_reason == "length" and len(completions[-1].tokens) == 4
    with pytest.raises(ValueError, match="runs all loops"):
        engine_of(TIED).check(Request(0, (1,), 4, max_loops=1))
    with pytest.raises(ValueError, match="runs all loops; make it with an exit measure"):
        engine_of(TIED, measure=Static(TIED.num_loops)).check(Request(0, (1,), 4, exit_threshold=1))
    with pytest.raises(ValueError, match="recorded_loops"):
        engine_of(RELAXED, measure=Recorded()).check(Request(0, (1,), 4, recorded_loops=(1, 2)))


def test_an_engine_that_failed_in_a_step_is_mended_by_reset(monkeypatch):
    engine, requests = engine_of(TIED), [Request(0, (1, 2, 3), 4)]
    before = generate(engine, requests)

    def fail(tree):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is ill")

    with monkeypatch.context() as patch, pytest.raises(jax.errors.JaxRuntimeError):
        patch.setattr(jax, "device_get", fail)
        generate(engine, requests)
    engine.reset()
    assert generate(engine, requests) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"missing_kv": "guess"}, "missing_kv"),
        ({"lossless": True}, "lossless"),
        ({"lossless": True, "measure": Static(1), "missing_kv": "copy"}, "lossless"),
        ({"thresholds": 0.5}, "without an exit measure"),
        ({"measure": make_measure("top1"), "thresholds": 1.5}, "top1"),
        ({"measure": Static(1), "thresholds": 0.5}, "takes no threshold"),
        ({"measure": make_measure("top1"), "thresholds": (0.1, 0.2, 0.3)}, "3 exit thresholds"),
        ({"chunk_length": 0}, "chunk_length"),
        ({"num_stop": -1}, "num_stop=-1; expected"),
        ({"chunk_length": "4"}, "chunk_length='4'; expected an integer"),
        ({"measure": "top1"}, "measure='top1'; expected one of decoding.exit_measures"),
        ({"measure": TopProbability(0.5), "thresholds": 0.4}, "thresholds=0.4 beside measure=Top"),
        ({"measure": make_measure("top1"), "thresholds": ("x",)}, "expected numbers"),
        ({"measure": Static(4)}, "static:4: the model has 3 loops"),
        ({"measure": Static(3), "lossless": True}, "a draft after loop 3 of 3 is no draft"),
        ({"depthwise": "no"}, "depthwise='no'; expected True or False"),
        ({"context_length": 1}, "context_length=1; expected an integer, at least 2"),
    ],
)
def test_an_engine_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_engine(
            scanned(TIED), params_of(TIED), **{"num_slots": 2, "context_length": 9} | options
        )


def test_what_a_model_cannot_do_is_refused():
    one = TIED.replace(num_loops=1)
    with pytest.raises(ValueError, match="this model has one loop only"):
        EngineConfig(measure=Static(1), lossless=True).for_model(one)
    with pytest.raises(ValueError, match="'stable' needs a model of at least 3 loops"):
        EngineConfig(measure=Stable()).for_model(RELAXED)
    with pytest.raises(ValueError, match="config=16; expected an EngineConfig"):
        Engine(scanned(TIED), params_of(TIED), 16)


def test_a_measure_brings_its_threshold():
    """It is a setting like any other, and no part of the compiled program."""
    config = EngineConfig(measure=TopProbability(0.9))
    assert config == EngineConfig(measure=TopProbability(), thresholds=0.9)
    assert config != EngineConfig(measure=TopProbability(0.8))
    assert (config.measure, config.thresholds) == (make_measure("top1"), (0.9,))
    assert EngineConfig(measure=Stable()).thresholds is None
    for bad in (lambda: Margin(1.5), lambda: Cosine(-2), lambda: TopProbability("high")):
        with pytest.raises(ValueError, match="exit threshold of"):
            bad()
    requests = requests_of(TIED, 6, seed=32)
    answers = {}
    for threshold in (0.05, 0.9):
        engine = make_engine(
            scanned(TIED), params_of(TIED), 3, CONTEXT, chunk_length=4,
            measure=TopProbability(threshold),
        )  # fmt: skip
        assert engine.thresholds == (threshold,)
        answers[threshold] = generate(engine, requests), engine.loop
    assert answers[0.05][1] == answers[0.9][1], "what is compiled is the same"
    assert answers[0.05][0] != answers[0.9][0]
    compiled = engine.executables["tick"]
    engine.thresholds = 0.05
    assert generate(engine, requests) == answers[0.05][0]
    assert engine.executables["tick"] is compiled
    with pytest.raises(ValueError, match="3 exit thresholds; expected one"):
        engine.thresholds = (0.1, 0.2, 0.3)


def test_an_engine_has_the_sizes_of_its_model():
    engine = Engine(scanned(TIED), params_of(TIED), EngineConfig(num_slots=2))
    assert engine.config.context_length == TIED.max_length == engine.config.chunk_length


def test_measures_and_thresholds_by_name(tmp_path):
    assert make_measure("static:2") == Static(2)
    for spec in ("static", "static:0", "static:x", "best"):
        with pytest.raises(ValueError, match="static"):
            make_measure(spec)
    assert Thresholds.load(tmp_path) is None
    thresholds = Thresholds("cosine", (0.9, 0.8), 0.01, "docstrings", "2026-01-02", 30, 7)
    thresholds.save(tmp_path)
    assert Thresholds.load(tmp_path) == thresholds
    path = tmp_path / Thresholds.FILE
    good = path.read_text()
    damaged = [good.replace("0.9", "1.9"), good.replace('"cosine"', "null")]
    for damage in ("{", "[]", "{}", "[" * 100_000, *damaged):
        path.write_text(damage)
        with pytest.raises(ValueError, match="calibrate again"):
            Thresholds.load(tmp_path)
