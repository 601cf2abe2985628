"""Ticks of depth-wise decoding on the device: pure functions of arrays, many requests, one block.

A tick is one pass of the block over all lanes, each at its own loop (paper §2.4), and at most one
chunk of one prompt. The cache is carried from tick to tick and never enters a branch; the
vocabulary head runs in one (`exits`), on the few lanes that may bring a token.

A token runs in a lane of its slot. After some loop its *successor* is known (early exit, or the
last loop), and starts in the next tick whose gate is open. Where keys and values of deeper loops
must be exact, the token goes on through them beside its successors: a slot then has one lane for
every loop, and the token at position p is in lane p mod num_loops, which is free by then. A token
is *committed* when its successor is known; in lossless decoding only after the last loop, where the
successor may turn out to be another one: then the lanes started from the wrong one are dropped.

Axes: S slots, P lanes of a slot, B = S·P lanes, C chunk length, D embed, V vocab, L loops, W stop
ids, T ticks, N cache length, O numbers of `Orders`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.decoding.exit_measures import Measure, Recorded
from recursive_jax.decoding.head import Exits
from recursive_jax.decoding.lanes import Layout
from recursive_jax.decoding.requests import Sampling
from recursive_jax.decoding.sampling import SamplingParams
from recursive_jax.decoding.state import (
    NO_TOKEN,
    Changes,
    Chunks,
    Exited,
    Found,
    Lanes,
    Orders,
    Settings,
    Slots,
    State,
)
from recursive_jax.models.attention import Missing
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.kv_cache import Cache


@dataclasses.dataclass(frozen=True)
class Ticks:
    """The decode loop of one engine; `run` is what gets compiled.

    Attributes:
      measure: decides who leaves early; None: nobody.
      missing_kv: 'complete', 'propagate' or 'copy', see `engine.Engine`.
      lossless: commit after the last loop.
      depthwise: False: slots start their tokens together.
    """

    model: Decoder
    num_slots: int
    context_length: int
    chunk_length: int
    num_stop: int
    measure: Measure | None
    missing_kv: str
    lossless: bool
    depthwise: bool

    @property
    def num_loops(self) -> int:
        return self.model.cfg.num_loops

    @property
    def can_exit(self) -> bool:
        """Whether a token's successor may start before the token has run all loops."""
        return self.measure is not None and self.measure.can_exit and self.num_loops > 1

    @property
    def completes(self) -> bool:
        """Whether tokens that left go on through the loops they lack."""
        return self.can_exit and self.missing_kv == "complete"

    @property
    def lanes_per_slot(self) -> int:
        return self.num_loops if self.completes else 1

    @property
    def period(self) -> int:
        """Tokens and prompts start at ticks that are a multiple of it."""
        return self.num_loops if self.depthwise and not self.can_exit else 1

    @property
    def head_sizes(self) -> list[int]:
        """Numbers of rows that the head runs on."""
        return self._exits.sizes

    @functools.cached_property
    def _layout(self) -> Layout:
        return Layout(self.num_slots, self.lanes_per_slot)

    @functools.cached_property
    def _exits(self) -> Exits:
        return Exits(self.model, self._layout, self.measure, self.can_exit, self.lossless)

    # Empty state and orders, on the host.

    def state(self, shards: int = 1) -> State:
        num_slots = self.num_slots * shards
        num_lanes = num_slots * self.lanes_per_slot
        dim, dtype = self.model.cfg.embed_dim, self.model.dtype
        ints = lambda n, fill=0: np.full(n, fill, np.int32)  # noqa: E731
        guesses = self.num_loops if self._exits.reads_logits else 0
        return State(
            lanes=Lanes(
                x=np.zeros((num_lanes, dim), dtype),
                loop=ints(num_lanes, self.num_loops),
                position=ints(num_lanes),
                successor=ints(num_lanes, NO_TOKEN),
                exit_loops=ints(num_lanes),
                guesses=ints((num_lanes, guesses), NO_TOKEN),
            ),
            slots=Slots.empty(num_slots),
            exited=Exited(
                np.zeros((num_slots, dim), dtype), ints(num_slots, self.num_loops), ints(num_slots)
            ),
            text=ints((num_slots, self.context_length)),
            chunk=np.zeros((shards * self.chunk_length, dim), dtype),
        )

    def orders(self, shards: int = 1) -> Orders:
        num_slots, loops = self.num_slots * shards, self.num_loops
        ints = lambda *shape, fill=0: np.full((num_slots, *shape), fill, np.int32)  # noqa: E731
        recorded = self.context_length if isinstance(self.measure, Recorded) else 0
        settings = Settings(
            sampling=SamplingParams.stack([Sampling()] * num_slots),
            seeds=np.zeros(num_slots, np.uint32),
            stop=ints(self.num_stop, fill=NO_TOKEN),
            first=ints(),
            last=ints(),
            min_loops=ints(fill=1),
            max_loops=ints(fill=loops),
            thresholds=np.zeros((num_slots, loops), np.float32),
            recorded=ints(recorded),
        )
        none, text = np.zeros(num_slots, bool), ints(self.context_length)
        return Orders(settings, Changes(none, Slots.empty(num_slots), text))

    # On the device.

    def run(
        self,
        params: Any,
        cache: Cache,
        state: State,
        orders: jax.Array,
        fresh: jax.Array,
        first_tick: jax.Array,
        num_ticks: jax.Array,
        until_free: jax.Array,
        chunks: Chunks | None,
    ) -> tuple[Cache, State, jax.Array, jax.Array]:
        """Up to `num_ticks` ticks: fewer when nothing is left to do.

        Args:
          orders: int32 [S, O], packed.
          fresh: bool [], their changes are not done yet.
          first_tick: int32 [], its number; matters only when `period` > 1.
          until_free: bool [], also stop after a tick in which a request ended.
          chunks: one for each of the ticks; None compiles to a tick without prompt work.

        Returns:
          cache, state, what was found (packed, int32 [F, T, S]), and int32 [1], how many ticks ran.
        """

        orders = self.orders().unpack(orders)
        settings = orders.settings

        def goes_on(carry):
            i, freed, _, state, _ = carry
            working = jnp.any(state.slots.waiting) | jnp.any(state.lanes.loop < self.num_loops)
            working |= chunks is not None
            return (i < num_ticks) & working & ~(until_free & freed)

        def tick(carry):
            i, _, cache, state, found = carry
            gate_tick = (first_tick + i) % self.period == 0
            chunk = None if chunks is None else jax.tree.map(lambda a: a[i], chunks)
            cache, state, now = self._tick(params, cache, state, settings, gate_tick, chunk)
            return i + 1, jnp.any(now.finished), cache, state, found.at[:, i].set(now.pack())

        state, found = self._change(state, orders.changes, fresh), Found.nothing(self.num_slots)
        start = (jnp.int32(0), jnp.bool_(False), cache, state, found)
        count, _, cache, state, found = jax.lax.while_loop(goes_on, tick, start)
        return cache, state, found, count[None]

    def _change(self, state: State, changes: Changes, fresh) -> State:
        reset = changes.reset & fresh
        exited = jnp.where(reset, self.num_loops, state.exited.loops)
        idle = jnp.where(self._layout.of_lanes(reset), self.num_loops, state.lanes.loop)
        return state.replace(
            lanes=state.lanes.replace(loop=idle),
            slots=jax.tree.map(lambda n, o: jnp.where(reset, n, o), changes.slots, state.slots),
            exited=state.exited.replace(loops=exited),
            text=jnp.where(reset[:, None], changes.text, state.text),
        )

    def _tick(self, params, cache, state, settings, gate_tick, chunk):
        """One tick; `gate_tick`: its number allows tokens to start."""
        state = self._start(params, state, gate_tick)
        lanes, slots = state.lanes, state.slots
        active = lanes.loop < self.num_loops
        newest = active & (lanes.position == self._layout.of_lanes(slots.position))
        x, chunk_x, cache = self._pass(params, cache, state, active, chunk)
        look = self._exits.what_to_see(settings, lanes, x)
        seen, leaves, looked = self._exits.look(
            params, settings, look, state.text, lanes, active, newest
        )
        guesses = self._exits.remember(lanes, seen, looked)

        loops = look.loops
        following = lanes.position + 1  # where the successor stands
        stops = jnp.any(seen.token[:, None] == self._layout.of_lanes(settings.stop), axis=1)
        ends = stops | (following >= self._layout.of_lanes(settings.last))
        commits = active & (loops == self.num_loops) if self.lossless else leaves
        over = commits & (ends | jnp.isnan(seen.logprob))
        corrects = commits & ~over & (lanes.successor != seen.token)
        # Nothing starts from a drafted token that would end the answer: if it is right, it does.
        slots = self._hand_on(slots, leaves & ~commits & ~ends, seen.token, following)
        slots = self._hand_on(slots, corrects, seen.token, following)
        ended = self._layout.any(over)
        slots = slots.replace(waiting=slots.waiting & ~ended)

        # Lanes started from a wrong token; only lossless decoding has lanes beyond a commit.
        wrong = self._layout.pick(corrects, following)
        wrong = jnp.where(self._layout.any(corrects), wrong, jnp.int32(2**30))
        dropped = active & (lanes.position >= self._layout.of_lanes(wrong))
        goes_on = active & ~dropped & ~self._layout.of_lanes(ended) & (~leaves | self.completes)
        cache, exited = self._left_early(cache, state.exited, lanes, x, leaves & ~over, loops)
        exit_loops = jnp.where(lanes.successor == seen.token, lanes.exit_loops, loops)
        if not self.can_exit and self._exits.reads_logits:  # the oracle's answer
            exit_loops = 1 + jnp.argmax(guesses == seen.guess[:, None], axis=1).astype(jnp.int32)
        committed, ran = self._layout.any(commits), self._layout.any(newest)
        now = Found(
            token=jnp.where(committed, self._layout.pick(commits, seen.token), NO_TOKEN),
            logprob=self._layout.pick(commits, seen.logprob),
            exit_loops=self._layout.pick(commits, exit_loops),
            newest=jnp.where(ran, self._layout.pick(newest, lanes.loop), -1),
            exited=ran & slots.waiting,
            finished=ended,
            tainted=self._layout.any(active & ~jnp.all(jnp.isfinite(x), axis=1)),
            busy=self._layout.count(active),
            head_rows=self._layout.count(looked),
            drafted=self._layout.count(commits & (lanes.successor != NO_TOKEN)),
            dropped=self._layout.count(dropped),
        )
        written = jnp.where(leaves | commits, following, self.context_length)
        state = state.replace(
            lanes=Lanes(
                x=x,
                loop=jnp.where(goes_on, loops, self.num_loops),
                position=lanes.position,
                successor=jnp.where(leaves, seen.token, lanes.successor),
                exit_loops=jnp.where(leaves, loops, lanes.exit_loops),
                guesses=guesses,
            ),
            slots=slots,
            exited=exited,
            text=state.text.at[self._layout.slot_of, written].set(seen.token, mode="drop"),
        )
        if chunk is not None:
            here = jnp.arange(self.num_slots) == chunk.slot
            bad = ~jnp.all(jnp.isfinite(chunk_x)) & (chunk.length > 0)
            now = now.replace(tainted=now.tainted | (bad & here))
            slots = slots.replace(waiting=slots.waiting | (chunk.ends_prompt & here))
            state = state.replace(slots=slots, chunk=chunk_x)
        return cache, state, now

    def _start(self, params, state: State, gate_tick) -> State:
        """Waiting tokens take their lanes when the gate is open (the rule of `scheduler`)."""
        lanes, slots = state.lanes, state.slots
        gate = gate_tick
        if not self.depthwise:
            midway = (lanes.loop > 0) & (lanes.loop < self.num_loops)
            gate &= ~jnp.any(midway & (lanes.position == self._layout.of_lanes(slots.position)))
        starting = slots.waiting & gate
        embedded = self._apply(params, slots.token[:, None], method="embed")[:, 0]
        position = self._layout.of_lanes(slots.position)
        here = self._layout.lane_of_slot == position % self.lanes_per_slot
        here &= self._layout.of_lanes(starting)
        return state.replace(
            lanes=Lanes(
                x=jnp.where(here[:, None], self._layout.of_lanes(embedded), lanes.x),
                loop=jnp.where(here, 0, lanes.loop),
                position=jnp.where(here, position, lanes.position),
                successor=jnp.where(here, NO_TOKEN, lanes.successor),
                exit_loops=lanes.exit_loops,
                guesses=jnp.where(here[:, None], NO_TOKEN, lanes.guesses),
            ),
            slots=slots.replace(waiting=slots.waiting & ~starting),
        )

    def _pass(self, params, cache, state: State, active, chunk: Chunks | None):
        """The block over all lanes, the chunk, and the keys and values that exited tokens lack.

        Returns:
          [B, D], [C, D] (None without a chunk; it waits in `state.chunk` for its next loop), cache.
        """
        lanes, exited, missing = state.lanes, state.exited, None
        # Idle rows are zeros: on a CPU `few_rows` leaves those out. The baseline runs its batch as
        # one, as batches of sequences are: tokens that wait for others are multiplied as well.
        waiting = self._layout.of_lanes(state.slots.waiting)
        running = active if self.depthwise else active | waiting
        only = lambda mask, x: jnp.where(mask[:, None], x, jnp.zeros_like(x))  # noqa: E731
        # Idle rows write beyond the cache, each elsewhere: scatters assume unique rows.
        beyond = cache.length + self._layout.lane_of_slot
        rows = (
            only(running, lanes.x),
            jnp.minimum(lanes.loop, self.num_loops - 1),
            jnp.where(active, lanes.position, beyond),
            self._layout.slot_of,
        )
        beyond = cache.length + self.lanes_per_slot
        if self.can_exit and self.missing_kv == "propagate":
            deeper = jnp.arange(1, self.num_loops, dtype=jnp.int32)
            lacks = deeper[:, None] >= exited.loops[None]  # [L - 1, S]
            positions = jnp.where(lacks, exited.position[None], beyond)
            repeated = (self.num_loops - 1, 1)
            missing = Missing(
                x=only(lacks.reshape(-1), jnp.tile(exited.x, repeated))[:, None],
                loop=jnp.repeat(deeper, self.num_slots),
                positions=positions.reshape(-1, 1),
                slots=jnp.tile(jnp.arange(self.num_slots), self.num_loops - 1),
            )
        if chunk is not None:
            rows = jax.tree.map(
                lambda a, b: jnp.concatenate([a, b]),
                rows,
                self._chunk_rows(params, state, chunk, beyond + 1),
            )
        x, loop, positions, slots = rows
        x, cache = self._apply(
            params,
            x[:, None],
            loop,
            positions[:, None],
            cache=cache,
            slots=slots,
            missing=missing,
            together=0 if chunk is None else self.chunk_length,
            method="run_loop",
        )
        x, num_lanes = x[:, 0], self._layout.num_lanes
        return x[:num_lanes], None if chunk is None else x[num_lanes:], cache

    def _chunk_rows(self, params, state: State, chunk: Chunks, beyond: int):
        """The tokens of a chunk as lanes: x, loop, position and slot of each."""
        columns = jnp.arange(self.chunk_length, dtype=jnp.int32)
        rows = chunk.start + columns
        tokens = state.text[chunk.slot, jnp.minimum(rows, self.context_length - 1)]
        embedded = self._apply(params, tokens[:, None], method="embed")[:, 0]
        x = jnp.where(chunk.loop == 0, embedded, state.chunk)
        return (
            jnp.where((columns < chunk.length)[:, None], x, jnp.zeros_like(x)),
            jnp.full_like(columns, chunk.loop),
            jnp.where(columns < chunk.length, rows, beyond + columns),
            jnp.full_like(columns, chunk.slot),
        )

    def _left_early(self, cache, exited: Exited, lanes: Lanes, x, leaves, loops):
        """See to the keys and values of tokens that leave and go no further."""
        if not self.can_exit or self.completes:
            return cache, exited
        if self.missing_kv == "copy":
            at = jnp.where(leaves, lanes.position, cache.length)
            return cache.copy_deeper(loops, self._layout.slot_of, at), exited
        left = jnp.where(leaves, loops, self.num_loops)  # a lane is a slot here
        return cache, Exited(x, left, lanes.position)

    def _apply(self, params, *arguments, **options):
        return self.model.apply({"params": params}, *arguments, **options)

    def _hand_on(self, slots: Slots, mask, token, position) -> Slots:
        """A new newest token in the slots of the lanes in `mask`."""
        pick = self._layout.pick
        new = Slots(pick(mask, token), pick(mask, position), self._layout.any(mask))
        return jax.tree.map(lambda n, o: jnp.where(new.waiting, n, o), new, slots)
