"""Ticks of depth-wise decoding on the device: pure functions of arrays, many requests, one block.

A tick is one pass of the block over all lanes, each at its own loop (paper §2.4), and at most one
chunk of one prompt. The cache is carried from tick to tick and never enters a branch. The head
runs in a branch (`head`), on the few lanes that need it.

A token runs in a lane of its slot. After some loop its *successor* is known (early exit, or the
last loop). The successor starts in the next tick whose gate is open. Where keys and values of
deeper loops must be exact, the token continues through them beside its successors. A slot then has
one lane per loop, and the token at position p runs in lane p mod num_loops, which is free by then.
A token is *committed* when its successor is known. In lossless decoding it is committed only after
the last loop, where another successor may be chosen: then the lanes started from the wrong one are
dropped.

Axes: S slots, P lanes of a slot, B = S·P lanes, C chunk length, D embed, V vocab, L loops, W stop
ids, T ticks, N cache length, O numbers of `StepInputs`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.exit_measures import Recorded
from recursive_jax.decoding.head import ExitHead
from recursive_jax.decoding.lanes import LaneMap
from recursive_jax.decoding.requests import Sampling
from recursive_jax.decoding.sampling import SamplingParams
from recursive_jax.decoding.state import (
    NO_TOKEN,
    Chunks,
    Lanes,
    PendingBackfill,
    Slots,
    SlotSettings,
    SlotUpdates,
    State,
    StepInputs,
    TickOutputs,
)
from recursive_jax.models.interface import Backfill, Cache, DecodeModel, Rows

NEVER = 2**30  # a position that no token has


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
    """The decode loop of one engine; `run` is compiled.

    Attributes:
      config: as `EngineConfig.for_model` returns it, with the slots of one shard and without
        thresholds, which are inputs.
    """

    model: DecodeModel
    config: EngineConfig

    @property
    def num_slots(self) -> int:
        return self.config.num_slots

    @property
    def num_loops(self) -> int:
        return self.model.cfg.num_loops

    @property
    def can_exit(self) -> bool:
        """Whether a token's successor may start before the token has run all loops."""
        return self.config.measure is not None and self.config.measure.can_exit

    @property
    def completes(self) -> bool:
        """Whether tokens that left continue through their remaining loops."""
        return self.can_exit and self.config.missing_kv == "complete"

    @property
    def propagates(self) -> bool:
        """Whether the keys and values that exited tokens lack are made from their last state."""
        return self.can_exit and self.config.missing_kv == "propagate"

    @property
    def lanes_per_slot(self) -> int:
        return self.num_loops if self.completes else 1

    @property
    def period(self) -> int:
        """Tokens and prompts start at ticks that are a multiple of it."""
        return self.num_loops if self.config.depthwise and not self.can_exit else 1

    @property
    def head_sizes(self) -> list[int]:
        """Numbers of rows that the head is compiled for."""
        return self._head.sizes

    @functools.cached_property
    def _map(self) -> LaneMap:
        return LaneMap(self.num_slots, self.lanes_per_slot)

    @functools.cached_property
    def _head(self) -> ExitHead:
        config = self.config
        return ExitHead(self.model, self._map, config.measure, self.can_exit, config.lossless)

    # Empty state and inputs, on the host.

    def state(self, shards: int = 1) -> State:
        num_slots = self.num_slots * shards
        num_lanes = num_slots * self.lanes_per_slot
        dim, dtype = self.model.cfg.embed_dim, self.model.dtype
        guesses = self.num_loops if self._head.reads_logits else 0
        return State(
            lanes=Lanes(
                x=np.zeros((num_lanes, dim), dtype),
                loop=_ints(num_lanes, fill=self.num_loops),
                position=_ints(num_lanes),
                successor=_ints(num_lanes, fill=NO_TOKEN),
                exit_loops=_ints(num_lanes),
                guesses=_ints(num_lanes, guesses, fill=NO_TOKEN),
            ),
            slots=Slots.empty(num_slots),
            pending=PendingBackfill(
                x=np.zeros((num_slots, dim), dtype),
                loops=_ints(num_slots, fill=self.num_loops),
                position=_ints(num_slots),
            ),
            text=_ints(num_slots, self.config.context_length),
            chunk=np.zeros((shards * self.config.chunk_length, dim), dtype),
        )

    def inputs(self, shards: int = 1) -> StepInputs:
        num_slots, length = self.num_slots * shards, self.config.context_length
        recorded = length if isinstance(self.config.measure, Recorded) else 0
        settings = SlotSettings(
            sampling=SamplingParams.stack([Sampling()] * num_slots),
            seeds=np.zeros(num_slots, np.uint32),
            stop=_ints(num_slots, self.config.num_stop, fill=NO_TOKEN),
            first=_ints(num_slots),
            last=_ints(num_slots),
            min_loops=_ints(num_slots, fill=1),
            max_loops=_ints(num_slots, fill=self.num_loops),
            thresholds=np.zeros((num_slots, self.num_loops), np.float32),
            recorded=_ints(num_slots, recorded),
        )
        none, text = np.zeros(num_slots, bool), _ints(num_slots, length)
        return StepInputs(settings, SlotUpdates(none, Slots.empty(num_slots), text))

    # On the device.

    def run(
        self,
        params: Any,
        cache: Cache,
        state: State,
        inputs: jax.Array,
        fresh: jax.Array,
        first_tick: jax.Array,
        num_ticks: jax.Array,
        until_free: jax.Array,
        chunks: Chunks | None,
    ) -> tuple[Cache, State, jax.Array, jax.Array]:
        """Up to `num_ticks` ticks: fewer when nothing is left to do.

        Args:
          inputs: int32 [S, O], packed `StepInputs`.
          fresh: bool [], their updates have not been applied yet.
          first_tick: int32 [], its number; matters only when `period` > 1.
          until_free: bool [], also stop after a tick in which a request ended.
          chunks: one for each of the ticks; None compiles to a tick without prompt work.

        Returns:
          cache, state, packed outputs int32 [F, T, S], and int32 [1], how many ticks ran.
        """
        inputs = self.inputs().unpack(inputs)
        settings = inputs.settings

        def has_work(carry):
            i, freed, _, state, _ = carry
            working = jnp.any(state.slots.waiting) | jnp.any(state.lanes.loop < self.num_loops)
            working |= chunks is not None
            return (i < num_ticks) & working & ~(until_free & freed)

        def tick(carry):
            i, _, cache, state, outputs = carry
            gate_tick = (first_tick + i) % self.period == 0
            chunk = None if chunks is None else jax.tree.map(lambda a: a[i], chunks)
            cache, state, now = self._tick(params, cache, state, settings, gate_tick, chunk)
            return i + 1, jnp.any(now.finished), cache, state, outputs.at[:, i].set(now.pack())

        state = self._update_slots(state, inputs.updates, fresh)
        nothing = TickOutputs.nothing(self.num_slots)
        start = (jnp.int32(0), jnp.bool_(False), cache, state, nothing)
        count, _, cache, state, outputs = jax.lax.while_loop(has_work, tick, start)
        return cache, state, outputs, count[None]

    def _update_slots(self, state: State, updates: SlotUpdates, fresh) -> State:
        reset = updates.reset & fresh
        pending = jnp.where(reset, self.num_loops, state.pending.loops)
        loop = jnp.where(self._map.to_lanes(reset), self.num_loops, state.lanes.loop)
        return state.replace(
            lanes=state.lanes.replace(loop=loop),
            slots=_where(reset, updates.slots, state.slots),
            pending=state.pending.replace(loops=pending),
            text=jnp.where(reset[:, None], updates.text, state.text),
        )

    def _tick(self, params, cache, state: State, settings: SlotSettings, gate_tick, chunk):
        """One tick; `gate_tick`: its number allows tokens to start."""
        to_lanes = self._map.to_lanes
        state = self._start(params, state, gate_tick)
        lanes, slots = state.lanes, state.slots
        active = lanes.loop < self.num_loops
        newest = active & (lanes.position == to_lanes(slots.position))
        x, chunk_x, cache = self._pass(params, cache, state, active, chunk)
        inputs = self._head.exit_inputs(settings, lanes, x)
        head, leaves, needs_head = self._head.decide(
            params, settings, inputs, state.text, lanes, active, newest
        )
        guesses = self._head.record_guess(lanes, head, needs_head)

        loops = inputs.loops
        following = lanes.position + 1  # the successor's position
        stops = jnp.any(head.token[:, None] == to_lanes(settings.stop), axis=1)
        ends = stops | (following >= to_lanes(settings.last))
        commits = active & (loops == self.num_loops) if self.config.lossless else leaves
        over = commits & (ends | jnp.isnan(head.logprob))
        corrects = commits & ~over & (lanes.successor != head.token)
        # Nothing starts from a drafted token that would end the answer: it may be the last one.
        slots = self._next_token(slots, leaves & ~commits & ~ends, head.token, following)
        slots = self._next_token(slots, corrects, head.token, following)
        ended = self._map.any(over)
        slots = slots.replace(waiting=slots.waiting & ~ended)

        # Lanes started from a wrong token; only lossless decoding has lanes beyond a commit.
        wrong = self._map.pick(corrects, following)
        wrong = jnp.where(self._map.any(corrects), wrong, jnp.int32(NEVER))
        dropped = active & (lanes.position >= to_lanes(wrong))
        continues = active & ~dropped & ~to_lanes(ended) & (~leaves | self.completes)
        cache, pending = self._fill_skipped(cache, state.pending, lanes, x, leaves & ~over, loops)
        exit_loops = jnp.where(lanes.successor == head.token, lanes.exit_loops, loops)
        if not self.can_exit and self._head.reads_logits:  # the oracle's answer
            agrees = guesses == head.guess[:, None]
            exit_loops = 1 + jnp.argmax(agrees, axis=1).astype(jnp.int32)
        committed, ran = self._map.any(commits), self._map.any(newest)
        outputs = TickOutputs(
            token=jnp.where(committed, self._map.pick(commits, head.token), NO_TOKEN),
            logprob=self._map.pick(commits, head.logprob),
            exit_loops=self._map.pick(commits, exit_loops),
            newest=jnp.where(ran, self._map.pick(newest, lanes.loop), -1),
            exited=ran & slots.waiting,
            finished=ended,
            tainted=self._map.any(active & ~jnp.all(jnp.isfinite(x), axis=1)),
            busy=self._map.count(active),
            head_rows=self._map.count(needs_head),
            drafted=self._map.count(commits & (lanes.successor != NO_TOKEN)),
            dropped=self._map.count(dropped),
        )
        written = jnp.where(leaves | commits, following, self.config.context_length)
        text = state.text.at[self._map.slot_of_lane, written].set(head.token, mode="drop")
        state = state.replace(
            lanes=Lanes(
                x=x,
                loop=jnp.where(continues, loops, self.num_loops),
                position=lanes.position,
                successor=jnp.where(leaves, head.token, lanes.successor),
                exit_loops=jnp.where(leaves, loops, lanes.exit_loops),
                guesses=guesses,
            ),
            slots=slots,
            pending=pending,
            text=text,
        )
        if chunk is not None:
            here = jnp.arange(self.num_slots) == chunk.slot
            bad = ~jnp.all(jnp.isfinite(chunk_x)) & (chunk.length > 0)
            outputs = outputs.replace(tainted=outputs.tainted | (bad & here))
            slots = slots.replace(waiting=slots.waiting | (chunk.ends_prompt & here))
            state = state.replace(slots=slots, chunk=chunk_x)
        return cache, state, outputs

    def _start(self, params, state: State, gate_tick) -> State:
        """Put waiting tokens into their lanes when the gate is open (the rule of `scheduler`)."""
        lanes, slots = state.lanes, state.slots
        position = self._map.to_lanes(slots.position)
        gate = gate_tick
        if not self.config.depthwise:
            midway = (lanes.loop > 0) & (lanes.loop < self.num_loops)
            gate &= ~jnp.any(midway & (lanes.position == position))
        starting = slots.waiting & gate
        embedded = self.model.embed(params, slots.token)
        here = self._map.lane_within_slot == position % self.lanes_per_slot
        here &= self._map.to_lanes(starting)
        return state.replace(
            lanes=Lanes(
                x=jnp.where(here[:, None], self._map.to_lanes(embedded), lanes.x),
                loop=jnp.where(here, 0, lanes.loop),
                position=jnp.where(here, position, lanes.position),
                successor=jnp.where(here, NO_TOKEN, lanes.successor),
                exit_loops=lanes.exit_loops,
                guesses=jnp.where(here[:, None], NO_TOKEN, lanes.guesses),
            ),
            slots=slots.replace(waiting=slots.waiting & ~starting),
        )

    def _pass(self, params, cache: Cache, state: State, active, chunk: Chunks | None):
        """The block over all lanes, the chunk, and the backfill of exited tokens.

        Returns:
          [B, D], [C, D] (None without a chunk; it waits in `state.chunk` for its next loop), cache.
        """
        lanes = state.lanes
        # Idle rows are zero: the CPU's kernel skips them. The sequence-wise baseline runs its batch
        # as one, as batches of sequences are run: tokens that wait for others are multiplied too.
        waiting = self._map.to_lanes(state.slots.waiting)
        running = active if self.config.depthwise else active | waiting
        # Idle rows write beyond the cache, each at another row: scatters need unique rows.
        beyond = cache.length + self._map.lane_within_slot
        x = _zero_unless(running, lanes.x)
        rows = Rows(
            loop=jnp.minimum(lanes.loop, self.num_loops - 1),
            position=jnp.where(active, lanes.position, beyond),
            slot=self._map.slot_of_lane,
        )
        beyond = cache.length + self.lanes_per_slot
        backfill = self._backfill(state.pending, beyond) if self.propagates else None
        if chunk is not None:
            chunk_x, chunk_rows = self._chunk_rows(params, state, chunk, beyond + 1)
            x = jnp.concatenate([x, chunk_x])
            rows = Rows(
                loop=jnp.concatenate([rows.loop, chunk_rows.loop]),
                position=jnp.concatenate([rows.position, chunk_rows.position]),
                slot=jnp.concatenate([rows.slot, chunk_rows.slot]),
                prompt=self.config.chunk_length,
            )
        x, cache = self.model.run_block(params, x, rows, cache, backfill)
        num_lanes = self._map.num_lanes
        return x[:num_lanes], None if chunk is None else x[num_lanes:], cache

    def _backfill(self, pending: PendingBackfill, beyond: int) -> Backfill:
        """The loops that tokens skipped which left in the last tick, M = (L - 1)·S rows."""
        deeper = jnp.arange(1, self.num_loops, dtype=jnp.int32)
        lacks = deeper[:, None] >= pending.loops[None]  # [L - 1, S]
        position = jnp.where(lacks, pending.position[None], beyond)
        repeated = jnp.tile(pending.x, (self.num_loops - 1, 1))
        return Backfill(
            x=_zero_unless(lacks.reshape(-1), repeated),
            loop=jnp.repeat(deeper, self.num_slots),
            position=position.reshape(-1),
            slot=jnp.tile(jnp.arange(self.num_slots), self.num_loops - 1),
        )

    def _chunk_rows(self, params, state: State, chunk: Chunks, beyond: int):
        """The tokens of a chunk: their states [C, D] and rows."""
        columns = jnp.arange(self.config.chunk_length, dtype=jnp.int32)
        position = chunk.start + columns
        last = self.config.context_length - 1
        tokens = state.text[chunk.slot, jnp.minimum(position, last)]
        embedded = self.model.embed(params, tokens)
        x = jnp.where(chunk.loop == 0, embedded, state.chunk)
        there = columns < chunk.length
        rows = Rows(
            loop=jnp.full_like(columns, chunk.loop),
            position=jnp.where(there, position, beyond + columns),
            slot=jnp.full_like(columns, chunk.slot),
        )
        return _zero_unless(there, x), rows

    def _fill_skipped(self, cache: Cache, pending: PendingBackfill, lanes: Lanes, x, leaves, loops):
        """Provide keys and values of the loops that leaving tokens skip, by `missing_kv`."""
        if not self.can_exit or self.completes:
            return cache, pending
        if self.config.missing_kv == "copy":
            at = jnp.where(leaves, lanes.position, cache.length)
            return cache.copy_deeper(loops, self._map.slot_of_lane, at), pending
        left = jnp.where(leaves, loops, self.num_loops)  # one lane per slot here
        return cache, PendingBackfill(x, left, lanes.position)

    def _next_token(self, slots: Slots, mask, token, position) -> Slots:
        """Slots of the lanes in `mask` get a new newest token."""
        pick = self._map.pick
        new = Slots(pick(mask, token), pick(mask, position), self._map.any(mask))
        return _where(new.waiting, new, slots)


def _ints(*shape: int, fill: int = 0) -> np.ndarray:
    return np.full(shape, fill, np.int32)


def _zero_unless(mask, x):
    """x [n, D] with zeros in the rows outside of `mask`, bool [n]."""
    return jnp.where(mask[:, None], x, jnp.zeros_like(x))


def _where(mask, new, old):
    """Trees of arrays [S], element by element."""
    return jax.tree.map(lambda n, o: jnp.where(mask, n, o), new, old)
