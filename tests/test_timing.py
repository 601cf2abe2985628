"""Times of the parts of a tick, and the bounds made of them."""

import functools

import jax
import numpy as np
import pytest
from decode_models import make_engine, scanned

from recursive_jax.analysis import timing
from recursive_jax.decoding.exit_measures import Static
from recursive_jax.decoding.requests import Request, Sampling
from recursive_jax.decoding.session import generate
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params
from recursive_jax.models.scanned import ScannedModel

CFG = DecoderConfig(
    family="llama", vocab_size=61, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2,
    head_dim=8, num_layers=2, num_loops=2, norms="per_loop", lora_ranks=dict(q=3, down=2),
    tied_head=False, max_length=32,
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)


@functools.cache
def twenty_slots(**options):
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(CFG))
    how = dict(measure=Static(1), missing_kv="propagate", chunk_length=4, **options)
    return make_engine(scanned(CFG), params, 20, 32, **how)


def test_bounds_by_hand():
    """Four slots at E = 2: 2 ticks of 10 ms, each with a head of 2 rows, 3 ms; embedding 1 ms."""
    times = timing.Times(0.010, 0.008, 0.001, ((1, 0.002), (4, 0.005), (8, 0.007)))
    assert times.head_of(2) == pytest.approx(0.003)
    assert times.bound(4, 2.0) == pytest.approx(4 / 0.027)
    # full depth 3 · 8 + 5 ms a token, here 1.5 ticks of 10 + 6 ms
    assert times.lossless_gain(4, 3, 1.5, 6.0) == pytest.approx(29 / 24)
    assert times.to_json()["head"] == {"1": 0.002, "4": 0.005, "8": 0.007}


class NoRoomForAHead(ScannedModel):
    def logits(self, params, x):
        raise MemoryError("no room for a head")


def test_an_engine_is_as_before_when_it_was_measured(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.002)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (rng.normal(size=leaf.shape) * 0.4).astype(np.float32)

    params = jax.device_put(jax.tree.map(draw, abstract_params(CFG)))
    engine = make_engine(scanned(CFG), params, 3, 32, measure=Static(1), chunk_length=4)
    requests = [Request(i, (i + 1, 5), 6) for i in range(4)]

    def answer():
        return [c.tokens for c in generate(engine, requests)]

    before = answer()
    times = timing.measure(engine)
    assert times.fill == 0 and 0 < times.embed and 0 < times.tick and 0 < times.tick_of_slots
    assert [rows for rows, _ in times.head] == [1, 2, 3] and all(t > 0 for _, t in times.head)
    assert times.bound(3, 1.5) > 0
    assert answer() == before

    whole, engine.model = engine.model, NoRoomForAHead(engine.model.decoder)
    with pytest.raises(MemoryError, match="no room"):
        timing.measure(engine)
    engine.model = whole
    assert engine.cache is not None and answer() == before

    # what a chunk adds is a difference of two times
    alone = {"embed": 1, ("lanes", 6): 5, ("lanes", 3): 3, "chunk": 7}
    watch = timing.Stopwatch(engine, Sampling(temperature=0.75))
    assert engine.cache is None, "the parts use the engine's cache"
    watch.seconds.update({name: [alone.get(name, 2)] for name in watch.passes})
    times = watch.times()
    watch.close()
    assert (times.tick, times.tick_of_slots, times.embed, times.chunk) == (5, 3, 1, 2)


def test_heads_are_timed_with_the_noise_of_their_sampling(monkeypatch):
    """Temperatures are arguments of the timed program, so the noise is really made."""
    seen = []
    stack = timing.SamplingParams.stack

    def spy(rows):
        seen.extend(rows)
        return stack(rows)

    monkeypatch.setattr(timing.SamplingParams, "stack", spy)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(CFG))
    engine = make_engine(scanned(CFG), params, 2, 32)
    seen.clear()
    timing.Stopwatch(engine, Sampling(temperature=0.75)).close()
    assert {row.temperature for row in seen[:3]} == {0.75}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(measure=Static(1), missing_kv="propagate"), [0, 0, 1]),
        (dict(measure=Static(1), missing_kv="propagate", depthwise=False), [0, 0, 0]),
        (dict(), [0, 0, 0]),
        (dict(measure=Static(1), lossless=True), [0, 0, 0]),  # of full depth: its own have six
    ],
)
def test_lanes_are_timed_at_the_loops_they_would_be_at(options, expected):
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(CFG))
    engine = make_engine(scanned(CFG), params, 3, 32, **options)
    watch = timing.Stopwatch(engine)
    lanes = watch.lane_rows(3)
    assert lanes.loop.tolist() == expected
    turns = len(lanes.position)
    assert turns == (1 if any(expected) else CFG.num_loops), "all lanes at each loop"
    assert all(count % CFG.num_loops == 0 for count in watch.passes.values())
    if engine.num_lanes == 6:
        assert watch.lane_rows(6).loop.tolist() == [0, 1] * 3
    watch.close()


@pytest.mark.parametrize(
    ("exit_loops", "expected"),
    [
        ({1: 8, 2: 2}, 17 * [0] + 3 * [1]),  # ten times loop 0, two times loop 1
        ({2: 5}, 10 * [0] + 10 * [1]),
        ({1: 3}, 20 * [0]),
        (None, 13 * [0] + 7 * [1]),
    ],
)
def test_the_loops_of_lanes_follow_from_the_exits(exit_loops, expected):
    watch = timing.Stopwatch(twenty_slots(), timing.GREEDY, exit_loops)
    assert watch.lane_rows(20).loop.tolist() == expected
    assert watch.lane_rows(20).position.tolist() == [20 * [16]], "as mixed in every pass"
    watch.close()


@pytest.mark.parametrize(
    ("exit_loops", "attending"),
    [({1: 8, 2: 2}, [20, 4]), ({2: 5}, [20, 20]), ({1: 3}, [20, 0]), (None, [20, 10])],
)
def test_tokens_that_wait_for_their_batch_attend_to_nothing(exit_loops, attending):
    engine = twenty_slots(depthwise=False)
    length = engine.cache.length
    watch = timing.Stopwatch(engine, timing.GREEDY, exit_loops)
    lanes, with_chunk = watch.lane_rows(20).position, watch.rows_with_chunk().position
    rows = [tuple(row) for row in lanes.tolist()]
    assert rows == [n * (16,) + (20 - n) * (length,) for n in attending]
    assert with_chunk[:, :20].tolist() == lanes.tolist()
    assert with_chunk[:, 20:].tolist() == [[0, 1, 2, 3]] * CFG.num_loops
    watch.close()
