"""Ticks of depth-wise decoding on the device: pure functions of arrays, many requests, one block.

A tick is one pass of the block over all lanes, each at its own loop (paper §2.4), and at most one
chunk of one prompt. The cache is carried from tick to tick and never enters a branch; the
vocabulary head runs in one, on the few lanes that may bring a token.

A token runs in a lane of its slot. After some loop its *successor* is known (early exit, or the
last loop), and starts in the next tick whose gate is open. Where keys and values of deeper loops
must be exact, the token goes on through them beside its successors: a slot then has one lane for
every loop, and the token at position p is in lane p mod num_loops, which is free by then. A token
is *committed* when its successor is known; in lossless decoding only after the last loop, where the
successor may turn out to be another one: then the lanes started from the wrong one are dropped.

Axes: S slots, P lanes of a slot, B = S·P lanes, C chunk length, D embed, V vocab, L loops, W stop
ids, T ticks, N cache length.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.decoding.early_exit import Look, Measure
from recursive_jax.decoding.sampling import History, sample
from recursive_jax.decoding.state import (
    NO_TOKEN,
    Changes,
    Chunks,
    Exited,
    Found,
    Lanes,
    Seen,
    Settings,
    Slots,
    State,
)
from recursive_jax.models.attention import Missing
from recursive_jax.models.decoder import Decoder, head_params
from recursive_jax.models.kv_cache import KVCache

SMALL = 8  # rows of the head: fewer cost the same, reading its weights is what takes time


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
    def _reads_logits(self) -> bool:
        return self.measure is not None and self.measure.needs_logits

    # Empty state, on the host.

    def state(self, shards: int = 1) -> State:
        num_slots = self.num_slots * shards
        num_lanes = num_slots * self.lanes_per_slot
        dim, dtype = self.model.cfg.embed_dim, self.model.dtype
        ints = lambda n, fill=0: np.full(n, fill, np.int32)  # noqa: E731
        guesses = self.num_loops if self._reads_logits else 0
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

    # On the device.

    def run(
        self,
        params: Any,
        cache: KVCache,
        state: State,
        settings: Settings,
        changes: Changes,
        first_tick: jax.Array,
        num_ticks: jax.Array,
        until_free: jax.Array,
        chunks: Chunks | None,
    ) -> tuple[KVCache, State, Found, jax.Array]:
        """Up to `num_ticks` ticks: fewer when nothing is left to do.

        Args:
          first_tick: int32 [], its number; matters only when `period` > 1.
          until_free: bool [], also stop after a tick in which a request ended.
          chunks: one for each of the ticks; None compiles to a tick without prompt work.

        Returns:
          cache, state, what was found, and int32 [1], how many ticks ran.
        """

        def goes_on(carry):
            i, _, state, found = carry
            working = jnp.any(state.slots.waiting) | jnp.any(state.lanes.loop < self.num_loops)
            freed = (i > 0) & jnp.any(found.finished[i - 1])
            working |= chunks is not None
            return (i < num_ticks) & working & ~(until_free & freed)

        def tick(carry):
            i, cache, state, found = carry
            gate_tick = (first_tick + i) % self.period == 0
            chunk = None if chunks is None else jax.tree.map(lambda a: a[i], chunks)
            cache, state, now = self._tick(params, cache, state, settings, gate_tick, chunk)
            found = jax.tree.map(lambda all_, one: all_.at[i].set(one), found, now)
            return i + 1, cache, state, found

        start = (jnp.int32(0), cache, self._change(state, changes), Found.empty(self.num_slots))
        count, cache, state, found = jax.lax.while_loop(goes_on, tick, start)
        return cache, state, found, count[None]

    def _change(self, state: State, changes: Changes) -> State:
        reset = changes.reset
        exited = jnp.where(reset, self.num_loops, state.exited.loops)
        idle = jnp.where(self._of_lanes(reset), self.num_loops, state.lanes.loop)
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
        newest = active & (lanes.position == self._of_lanes(slots.position))
        x, cache = self._pass(params, cache, state, active)
        look = self._what_to_see(settings, lanes, x)
        seen, leaves, looked = self._look(params, settings, look, state.text, lanes, active, newest)
        guesses = self._remember(lanes, seen, looked)

        loops = look.loops
        following = lanes.position + 1  # where the successor stands
        stops = jnp.any(seen.token[:, None] == self._of_lanes(settings.stop), axis=1)
        ends = stops | (following >= self._of_lanes(settings.last))
        commits = active & (loops == self.num_loops) if self.lossless else leaves
        over = commits & (ends | jnp.isnan(seen.logprob))
        corrects = commits & ~over & (lanes.successor != seen.token)
        # Nothing starts from a drafted token that would end the answer: if it is right, it does.
        slots = self._hand_on(slots, leaves & ~commits & ~ends, seen.token, following)
        slots = self._hand_on(slots, corrects, seen.token, following)
        ended = self._any(over)
        slots = slots.replace(waiting=slots.waiting & ~ended)

        # Lanes started from a wrong token; only lossless decoding has lanes beyond a commit.
        wrong = jnp.where(self._any(corrects), self._pick(corrects, following), jnp.int32(2**30))
        dropped = active & (lanes.position >= self._of_lanes(wrong))
        goes_on = active & ~dropped & ~self._of_lanes(ended) & (~leaves | self.completes)
        cache, exited = self._left_early(cache, state.exited, lanes, x, leaves & ~over, loops)
        exit_loops = jnp.where(lanes.successor == seen.token, lanes.exit_loops, loops)
        if not self.can_exit and self._reads_logits:  # the oracle's answer
            exit_loops = 1 + jnp.argmax(guesses == seen.guess[:, None], axis=1).astype(jnp.int32)
        committed, ran = self._any(commits), self._any(newest)
        now = Found(
            token=jnp.where(committed, self._pick(commits, seen.token), NO_TOKEN),
            logprob=self._pick(commits, seen.logprob),
            exit_loops=self._pick(commits, exit_loops),
            newest=jnp.where(ran, self._pick(newest, lanes.loop), -1),
            exited=ran & slots.waiting,
            finished=ended,
            tainted=self._any(active & ~jnp.all(jnp.isfinite(x), axis=1)),
            busy=self._count(active),
            head_rows=self._count(looked),
            drafted=self._count(commits & (lanes.successor != NO_TOKEN)),
            dropped=self._count(dropped),
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
            text=state.text.at[self._slot_of, written].set(seen.token, mode="drop"),
        )
        if chunk is not None:
            cache, state = self._chunk(params, cache, state, chunk)
            bad = ~jnp.all(jnp.isfinite(state.chunk)) & (chunk.length > 0)
            here = jnp.arange(self.num_slots) == chunk.slot
            now = now.replace(tainted=now.tainted | (bad & here))
        return cache, state, now

    def _start(self, params, state: State, gate_tick) -> State:
        """Waiting tokens take their lanes when the gate is open (the rule of `scheduler`)."""
        lanes, slots = state.lanes, state.slots
        gate = gate_tick
        if not self.depthwise:
            midway = (lanes.loop > 0) & (lanes.loop < self.num_loops)
            gate &= ~jnp.any(midway & (lanes.position == self._of_lanes(slots.position)))
        starting = slots.waiting & gate
        embedded = self._apply(params, slots.token[:, None], method="embed")[:, 0]
        position = self._of_lanes(slots.position)
        here = self._of_lanes(starting) & (position % self.lanes_per_slot == self._lane_of_slot)
        return state.replace(
            lanes=Lanes(
                x=jnp.where(here[:, None], self._of_lanes(embedded), lanes.x),
                loop=jnp.where(here, 0, lanes.loop),
                position=jnp.where(here, position, lanes.position),
                successor=jnp.where(here, NO_TOKEN, lanes.successor),
                exit_loops=lanes.exit_loops,
                guesses=jnp.where(here[:, None], NO_TOKEN, lanes.guesses),
            ),
            slots=slots.replace(waiting=slots.waiting & ~starting),
        )

    def _pass(self, params, cache, state: State, active):
        """The block over all lanes, and the keys and values that exited tokens lack."""
        lanes, exited, missing = state.lanes, state.exited, None
        # Idle lanes write beyond the cache, each elsewhere: scatters assume unique rows.
        positions = jnp.where(active, lanes.position, self.context_length + self._lane_of_slot)
        if self.can_exit and self.missing_kv == "propagate":
            deeper = jnp.arange(1, self.num_loops, dtype=jnp.int32)
            lacks = deeper[:, None] >= exited.loops[None]  # [L - 1, S]
            rows = jnp.where(lacks, exited.position[None], self.context_length + 1)
            repeated = (self.num_loops - 1, 1)
            missing = Missing(
                x=jnp.tile(exited.x, repeated)[:, None],
                loop=jnp.repeat(deeper, self.num_slots),
                positions=rows.reshape(-1, 1),
                slots=jnp.tile(jnp.arange(self.num_slots), self.num_loops - 1),
            )
        x, cache = self._apply(
            params,
            lanes.x[:, None],
            jnp.minimum(lanes.loop, self.num_loops - 1),
            positions[:, None],
            cache=cache,
            slots=self._slot_of,
            missing=missing,
            method="run_loop",
        )
        return x[:, 0], cache

    def _what_to_see(self, settings, lanes: Lanes, x) -> Look:
        recorded = jnp.zeros_like(lanes.loop)
        if settings.recorded.shape[1]:
            recorded = settings.recorded[self._slot_of, lanes.position]
        return Look(lanes.loop + 1, lanes.x, x, recorded, guesses=lanes.guesses)

    def _look(self, params, settings, look: Look, text, lanes: Lanes, active, newest):
        """Who leaves, and what follows.

        Returns:
          seen; bool [B] whose successor is now known; bool [B] the lanes that ran the head.
        """
        fresh = newest & (lanes.successor == NO_TOKEN)
        least, most = self._of_lanes(settings.min_loops), self._of_lanes(settings.max_loops)
        if not self.lossless:  # prompt tokens run all loops, the last one too
            in_prompt = lanes.position + 1 == self._of_lanes(settings.first)
            least, most = (jnp.where(in_prompt, self.num_loops, n) for n in (least, most))
        leaves = fresh & (look.loops >= most)
        may = fresh & ~leaves & (look.loops >= least)
        threshold = settings.thresholds[self._slot_of, jnp.minimum(lanes.loop, self.num_loops - 1)]
        if self._reads_logits:
            first_look = least - int(self.measure.needs_previous)
            looked = leaves | (fresh & (look.loops >= first_look))
        else:
            if self.can_exit:
                leaves |= may & (self.measure.score(look) > threshold)
            looked = leaves
        if self.lossless:
            looked |= active & (look.loops == self.num_loops)
        seen = self._head(params, settings, look, text, lanes.position + 1, looked)
        if self._reads_logits:
            leaves |= may & (seen.score > threshold)
        return seen, leaves, looked

    def _head(self, params, settings, look: Look, text, following, looked) -> Seen:
        """Vocabulary head, sampling and measure on the lanes to look at, compacted.

        Only here is there a branch, by the number of rows: the cache is not in it.
        """
        num_lanes = looked.shape[0]
        capacity = min(num_lanes, self.num_slots * (2 if self.lossless else 1))
        order = jnp.argsort(~looked, stable=True)[:capacity]

        def rows(size, order):
            at = order[:size]
            spread = lambda values: jnp.zeros(num_lanes, values.dtype).at[at].set(values)  # noqa: E731
            if not size:
                nothing = jnp.zeros(num_lanes, jnp.int32)
                return Seen(nothing, nothing * 0.0, nothing, nothing * 0.0)
            mine, slot = jax.tree.map(lambda a: a[at], look), self._slot_of[at]
            logits = self.model.apply({"params": head_params(params)}, mine.after, method="unembed")
            sampling = jax.tree.map(lambda a: a[slot], settings.sampling)
            # spare rows must not make the others pay for noise
            temperature = jnp.where(looked[at], sampling.temperature, 0.0)
            sampling = sampling.replace(temperature=temperature)
            history = History(text[slot], settings.first[slot])
            token, logprob = sample(logits, sampling, settings.seeds[slot], following[at], history)
            guess, score = token, logprob
            if self._reads_logits:
                guess = jnp.argmax(logits, axis=-1).astype(jnp.int32)
                score = self.measure.score(mine.replace(logits=logits))
            return jax.tree.map(spread, Seen(token, logprob, guess, score))

        sizes = sorted({0, capacity, *(n for n in (capacity // 2, capacity // 4) if n >= SMALL)})
        branch = jnp.searchsorted(jnp.asarray(sizes), jnp.sum(looked))
        with jax.named_scope("exit"):
            return jax.lax.switch(branch, [functools.partial(rows, n) for n in sizes], order)

    def _remember(self, lanes: Lanes, seen: Seen, looked):
        if not self._reads_logits:
            return lanes.guesses
        at = looked[:, None] & (lanes.loop[:, None] == jnp.arange(self.num_loops)[None])
        return jnp.where(at, seen.guess[:, None], lanes.guesses)

    def _left_early(self, cache, exited: Exited, lanes: Lanes, x, leaves, loops):
        """See to the keys and values of tokens that leave and go no further."""
        if not self.can_exit or self.completes:
            return cache, exited
        if self.missing_kv == "copy":
            at = jnp.where(leaves, lanes.position, self.context_length)
            return cache.copy_deeper(loops, self._slot_of, at), exited
        left = jnp.where(leaves, loops, self.num_loops)  # a lane is a slot here
        return cache, Exited(x, left, lanes.position)

    def _chunk(self, params, cache, state: State, chunk: Chunks):
        """Run one chunk at one loop; its state waits in `state.chunk` for the next loop."""
        columns = jnp.arange(self.chunk_length, dtype=jnp.int32)
        rows = chunk.start + columns
        tokens = state.text[chunk.slot, jnp.minimum(rows, self.context_length - 1)]
        rows = jnp.where(columns < chunk.length, rows, self.context_length + columns)
        embedded = self._apply(params, tokens[None], method="embed")
        x = jnp.where(chunk.loop == 0, embedded, state.chunk[None])
        x, cache = self._apply(
            params,
            x,
            chunk.loop,
            rows[None],
            cache=cache,
            slots=chunk.slot[None],
            method="run_loop",
        )
        ready = chunk.ends_prompt & (jnp.arange(self.num_slots) == chunk.slot)
        slots = state.slots.replace(waiting=state.slots.waiting | ready)
        return cache, state.replace(slots=slots, chunk=x[0])

    def _apply(self, params, *arguments, **options):
        return self.model.apply({"params": params}, *arguments, **options)

    # Slots and their lanes.

    @property
    def _slot_of(self) -> jax.Array:
        return self._of_lanes(jnp.arange(self.num_slots, dtype=jnp.int32))

    @property
    def _lane_of_slot(self) -> jax.Array:
        return jnp.tile(jnp.arange(self.lanes_per_slot, dtype=jnp.int32), self.num_slots)

    def _of_lanes(self, per_slot):
        """[S, ...] -> [B, ...]."""
        return jnp.repeat(per_slot, self.lanes_per_slot, axis=0)

    def _any(self, mask):
        """bool [B] -> bool [S]."""
        return jnp.any(mask.reshape(self.num_slots, -1), axis=1)

    def _count(self, mask):
        """bool [B] -> int32 [S]."""
        return jnp.sum(mask.reshape(self.num_slots, -1), axis=1, dtype=jnp.int32)

    def _pick(self, mask, values):
        """The value of each slot's one lane in `mask`, 0 if there is none: [B] -> [S]."""
        picked = jnp.where(mask, values, jnp.zeros_like(values))
        return jnp.sum(picked.reshape(self.num_slots, -1), axis=1, dtype=values.dtype)

    def _hand_on(self, slots: Slots, mask, token, position) -> Slots:
        """A new newest token in the slots of the lanes in `mask`."""
        new = Slots(self._pick(mask, token), self._pick(mask, position), self._any(mask))
        return jax.tree.map(lambda n, o: jnp.where(new.waiting, n, o), new, slots)
