"""How long the parts of a tick take when each runs alone, and the throughput they allow.

The bound of an engine: if nothing but the block, the head and the embedding took time, and no lane
were ever idle, `slots` tokens would need `E[loops]` ticks, in each of which `slots / E[loops]`
tokens leave:

    tokens/s = slots / (E[loops] · (t_tick + t_head(slots / E[loops])) + t_embed)
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.requests import Sampling
from recursive_jax.decoding.sampling import SamplingParams, sample
from recursive_jax.models.interface import Backfill, Cache, DecodeModel, Rows

REPEATS = 7  # runs, of which the median counts
SECONDS = 0.05  # the least time of a run, so that the host's share is small
GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds, medians, on the device without the way to the host; texts are half the context long.

    Attributes:
      tick: one pass of the block over all lanes of the engine, at the loops of its ticks.
      tick_of_slots: the same with one lane per slot, which is `tick` unless tokens complete; then
        that of full depth, all lanes at one loop.
      embed: embedding one token of every slot.
      head: final norm, vocabulary head and the choice of a token, by rows; ascending.
      chunk: what a whole chunk of a prompt adds to a tick.
      fill: what the keys and values that exited tokens lack add to a tick; 0 unless they are
        propagated.
    """

    tick: float
    tick_of_slots: float
    embed: float
    head: tuple[tuple[int, float], ...]
    chunk: float = 0.0
    fill: float = 0.0

    def head_of(self, rows: float) -> float:
        """Linear between the measured numbers of rows."""
        return float(np.interp(rows, *zip(*self.head, strict=True)))

    def bound(self, num_slots: int, mean_loops: float) -> float:
        """Tokens per second at best, see above."""
        in_ticks = mean_loops * (self.tick + self.head_of(num_slots / mean_loops))
        return num_slots / (in_ticks + self.embed)

    def lossless_gain(
        self, num_slots: int, num_loops: int, ticks_per_token: float, head_rows: float
    ) -> float:
        """Speed of lossless decoding over full depth: a token's time there over that here.

        Args:
          ticks_per_token: of a slot.
          head_rows: lanes that run the head in a tick, on average.
        """
        full = num_loops * self.tick_of_slots + self.head_of(num_slots)
        return full / (ticks_per_token * (self.tick + self.head_of(head_rows)))

    def to_json(self) -> dict[str, Any]:
        seconds = dataclasses.asdict(self)
        return seconds | {"head": {str(rows): t for rows, t in self.head}}


class Stopwatch:
    """Times the parts of an engine's tick, once, or repeatedly while other engines work.

    The engine forgets its requests and serves none until `close`: its cache is used, because two
    might not fit into memory. Its ticks need not be compiled.

    Args:
      sampling: how tokens are chosen; noise takes time as well.
      exit_loops: tokens by loops executed, from which the loops of the lanes follow; evenly spread
        if None.

    Attributes:
      seconds: of each run, by the name of the part: 'embed', 'chunk', 'filled', ('lanes', number),
        ('head', rows).
      passes: how often a run executes a part, by name.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling = GREEDY,
        exit_loops: Mapping[int, int] | None = None,
    ):
        self._engine, self._box = engine, [engine.lend_cache()]
        model, params, slots, box = engine.model, engine.params, engine.num_slots, self._box
        self._propagates = engine.loop.propagates
        some = {max(1, slots * n // 8) for n in (1, 2, 4, 6, 8)}
        self._rows = sorted((some | {*engine.loop.head_sizes}) - {0})
        self._mix = exit_loops or dict.fromkeys(range(1, engine.num_loops + 1), 1)
        calls: dict[Any, Callable[[int], Any]] = {"embed": _embed(model, params, slots)}
        self._calls, self.seconds = calls, collections.defaultdict[Any, list[float]](list)
        try:
            for lanes in sorted({engine.num_lanes, slots}):
                calls["lanes", lanes] = _block(model, params, box, self.lane_rows(lanes))
            if self._propagates:
                backfill = _backfill(model, slots)
                calls["filled"] = _block(model, params, box, self.lane_rows(slots), backfill)
            calls["chunk"] = _block(model, params, box, self.rows_with_chunk())
            for n in self._rows:
                calls["head", n] = _head(model, params, n, sampling)
            # so many passes that lanes are at every loop equally often
            counts = {name: _count(call) for name, call in calls.items()}
            loops = engine.num_loops
            self.passes = {name: -(-count // loops) * loops for name, count in counts.items()}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The engine is as if new."""
        self._box.clear()
        self._engine.reset()

    def run(self) -> None:
        """Time every part once more; takes about `SECONDS` for each, and a quarter to warm up."""
        for name, call in self._calls.items():
            call(-(-self.passes[name] // 4))  # after another program threads sleep
            start = time.perf_counter()
            call(self.passes[name])
            self.seconds[name].append((time.perf_counter() - start) / self.passes[name])

    def lane_rows(self, lanes: int) -> LaneRows:
        """Lanes at the loops and positions of a tick: those of a slot differ in both.

        With one lane per slot, loops are mixed where tokens leave at any time. In batches and at
        full depth all tokens leave together. All lanes are then at one loop and multiply by its
        LoRAs only; the next pass is at the next loop. Tokens that left their batch wait: they are
        multiplied, but attend to nothing, as idle lanes.
        """
        engine, loops, length = self._engine, self._engine.loop, self._box[0].length
        lane, per_slot = np.arange(lanes, dtype=np.int32), lanes // engine.num_slots
        loop, turns = lane % per_slot, engine.num_loops if per_slot == 1 else 1
        position = np.minimum(engine.config.context_length // 2 + loop, length - 1)
        if engine.num_lanes == engine.num_slots and loops.can_exit:
            ran = [sum(n for e, n in self._mix.items() if e > i) for i in range(engine.num_loops)]
            ran, middle = np.array(ran), (lane + 0.5) / lanes
            if engine.config.depthwise:
                loop, turns = np.searchsorted(np.cumsum(ran) / ran.sum(), middle), 1
            else:
                position = np.where(middle < ran[:, None] / ran[0], position, length)
        return LaneRows(
            loop=loop.astype(np.int32),
            position=np.broadcast_to(position, (turns, lanes)).astype(np.int32),
            slot=lane // per_slot,
        )

    def rows_with_chunk(self) -> LaneRows:
        """The lanes, and a chunk of a prompt after them."""
        lanes = self.lane_rows(self._engine.num_lanes)
        length = self._engine.config.chunk_length
        at, turns = np.arange(length, dtype=np.int32), len(lanes.position)
        return LaneRows(
            loop=np.concatenate([lanes.loop, 0 * at]),
            position=np.concatenate([lanes.position, np.tile(at, (turns, 1))], axis=1),
            slot=np.concatenate([lanes.slot, 0 * at]),
            prompt=length,
        )

    def times(self) -> Times:
        """Medians of all runs so far."""
        seconds = {name: statistics.median(runs) for name, runs in self.seconds.items()}
        lanes, slots = self._engine.num_lanes, self._engine.num_slots
        fill = seconds["filled"] - seconds["lanes", slots] if self._propagates else 0.0
        return Times(
            tick=seconds["lanes", lanes],
            tick_of_slots=seconds["lanes", slots],
            embed=seconds["embed"],
            head=tuple((n, seconds["head", n]) for n in self._rows),
            chunk=max(seconds["chunk"] - seconds["lanes", lanes], 0.0),
            fill=max(fill, 0.0),
        )


def measure(engine: Engine, exit_loops: Mapping[int, int] | None = None) -> Times:
    """Times of an engine's model, lanes and cache; takes a few seconds, on one device.

    The parts take turns, many times: when the machine is busy for a while, it is for all of them.
    The engine forgets its requests. `exit_loops`: as for `Stopwatch`.
    """
    watch = Stopwatch(engine, exit_loops=exit_loops)
    try:
        for _ in range(REPEATS):
            watch.run()
        return watch.times()
    finally:
        watch.close()


@dataclasses.dataclass(frozen=True)
class LaneRows:
    """The rows of passes that follow each other.

    Attributes:
      loop: int32 [R], of the first pass; one further in every next pass if there are several.
      position: int32 [pass, R].
      slot: int32 [R].
      prompt: as `Rows.prompt`.
    """

    loop: np.ndarray
    position: np.ndarray
    slot: np.ndarray
    prompt: int = 0


def _backfill(model: DecodeModel, slots: int) -> Backfill:
    deeper = np.arange(1, model.cfg.num_loops, dtype=np.int32)
    rows = len(deeper) * slots
    return Backfill(
        x=_noise(rows, model.cfg.embed_dim).astype(model.dtype),
        loop=np.repeat(deeper, slots),
        position=np.zeros(rows, np.int32),
        slot=np.tile(np.arange(slots, dtype=np.int32), len(deeper)),
    )


def _block(model: DecodeModel, params, box: list[Cache], lanes: LaneRows, backfill=None):
    """Passes of the block; the cache in `box` is donated and put back."""
    turns, count_rows = lanes.position.shape

    def passes(params, cache, count, x, backfill):
        def one(i, carry):
            x, cache = carry
            loop, position = lanes.loop + i % turns, jnp.asarray(lanes.position)[i % turns]
            rows = Rows(loop, position, jnp.asarray(lanes.slot), lanes.prompt)
            x, cache = model.run_block(params, x, rows, cache, backfill)
            return _unit(x), cache

        x, cache = jax.lax.fori_loop(0, count, one, (x, cache))
        return cache, x

    x = _noise(count_rows, model.cfg.embed_dim).astype(model.dtype)
    arguments = (params, box[0], np.int32(1), x, backfill)
    run = jax.jit(passes, donate_argnums=1).lower(*arguments).compile()

    def call(count):
        box[0], out = run(params, box[0], np.int32(count), x, backfill)
        jax.block_until_ready(out)

    return call


def _head(model: DecodeModel, params, rows: int, sampling: Sampling) -> Callable[[int], Any]:
    stacked = SamplingParams.stack([sampling] * rows)
    seeds, positions = np.zeros(rows, np.uint32), np.zeros(rows, np.int32)

    def heads(given, count, x):
        params, sampling = given  # as arguments: XLA would simplify constants

        def one(i, x):
            logits = model.logits(params, x)
            where = positions + i  # other noise in every pass
            _, logprob = sample(logits, sampling, seeds, where, top1=model.top1)
            return _unit(x + logprob[:, None].astype(x.dtype))  # each pass waits for the last

        return jax.lax.fori_loop(0, count, one, x)

    x = _noise(rows, model.cfg.embed_dim).astype(model.dtype)
    return _compiled(heads, (params, stacked), x)


def _embed(model: DecodeModel, params, slots: int) -> Callable[[int], Any]:
    def embeds(params, count, tokens):
        def one(_, tokens):
            x = model.embed(params, tokens)
            moved = jnp.sum(jnp.abs(x), axis=-1).astype(jnp.int32) + 1
            return (tokens + moved) % model.cfg.vocab_size

        return jax.lax.fori_loop(0, count, one, tokens)

    return _compiled(embeds, params, np.arange(slots, dtype=np.int32))


def _compiled(function: Callable, params, x) -> Callable[[int], Any]:
    run = jax.jit(function).lower(params, np.int32(1), x).compile()
    return lambda count: jax.block_until_ready(run(params, np.int32(count), x))


def _count(call: Callable[[int], Any]) -> int:
    """How many runs in a row take `SECONDS`."""
    call(1)
    count = 1
    while True:
        start = time.perf_counter()
        call(count)
        if (seconds := time.perf_counter() - start) > SECONDS:
            return count
        count = max(2 * count, min(int(count * SECONDS / seconds), 100 * count))


def _unit(x):
    """Keep the size of a state that passes through again and again."""
    scale = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-6)
    return (x / scale).astype(x.dtype)


def _noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
