"""After every pass: which lanes' tokens leave, and which tokens follow them.

The vocabulary head runs here, on the few lanes that may bring a token; axes as in `tick`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from recursive_jax.decoding.exit_measures import Look, Measure
from recursive_jax.decoding.lanes import Layout
from recursive_jax.decoding.requests import Sampling
from recursive_jax.decoding.sampling import History, SamplingParams, largest, sample
from recursive_jax.decoding.state import NO_TOKEN, Lanes, Seen
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import head_params

IDLE = SamplingParams.stack([Sampling()])
SMALL = 8  # rows of the head: fewer cost the same, reading its weights is what takes time


@dataclasses.dataclass(frozen=True)
class Exits:
    """How an engine decides; the attributes are those of `tick.Ticks`."""

    model: Decoder
    layout: Layout
    measure: Measure | None
    can_exit: bool
    lossless: bool

    @property
    def num_loops(self) -> int:
        return self.model.cfg.num_loops

    @property
    def reads_logits(self) -> bool:
        return self.measure is not None and self.measure.needs_logits

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows that the head runs on, ascending: each is a program to compile.

        Where many lanes are looked at in every tick, most ticks need seven eighths of the rows.
        """
        capacity = min(self.layout.num_lanes, self.layout.num_slots * (2 if self.lossless else 1))
        fewer = [capacity * eighths // 8 for eighths in (2, 4, 6, 7)]
        return sorted({0, capacity, *(n for n in fewer if n >= SMALL)})

    def what_to_see(self, settings, lanes: Lanes, x) -> Look:
        recorded = jnp.zeros_like(lanes.loop)
        if settings.recorded.shape[1]:
            recorded = settings.recorded[self.layout.slot_of, lanes.position]
        return Look(lanes.loop + 1, lanes.x, x, recorded, guesses=lanes.guesses)

    def look(self, params, settings, look: Look, text, lanes: Lanes, active, newest):
        """Who leaves, and what follows.

        Returns:
          seen; bool [B] whose successor is now known; bool [B] the lanes that ran the head.
        """
        fresh = newest & (lanes.successor == NO_TOKEN)
        of_lanes = self.layout.of_lanes
        least, most = of_lanes(settings.min_loops), of_lanes(settings.max_loops)
        if not self.lossless:  # prompt tokens run all loops, the last one too
            in_prompt = lanes.position + 1 == of_lanes(settings.first)
            least, most = (jnp.where(in_prompt, self.num_loops, n) for n in (least, most))
        leaves = fresh & (look.loops >= most)
        may = fresh & ~leaves & (look.loops >= least)
        not_after = jnp.minimum(lanes.loop, self.num_loops - 1)
        threshold = settings.thresholds[self.layout.slot_of, not_after]
        if self.reads_logits:
            first_look = least - int(self.measure.needs_previous)
            looked = leaves | (fresh & (look.loops >= first_look))
        else:
            if self.can_exit:
                leaves |= may & (self.measure.score(look) > threshold)
            looked = leaves
        if self.lossless:
            looked |= active & (look.loops == self.num_loops)
        seen = self._head(params, settings, look, text, lanes.position + 1, looked)
        if self.reads_logits:
            leaves |= may & (seen.score > threshold)
        return seen, leaves, looked

    def _head(self, params, settings, look: Look, text, following, looked) -> Seen:
        """Vocabulary head, sampling and measure on the lanes to look at, compacted.

        Only here is there a branch, by the number of rows: the cache is not in it.
        """
        num_lanes, sizes = self.layout.num_lanes, self.sizes
        compacts = any(0 < n < num_lanes for n in sizes)
        order = jnp.argsort(~looked, stable=True)[: sizes[-1]] if compacts else None

        def rows(size, order):
            if not size:
                nothing = jnp.zeros(num_lanes, jnp.int32)
                return Seen(nothing, nothing * 0.0, nothing, nothing * 0.0)
            if size == num_lanes:  # as they stand
                lanes, slots, spread = lambda a: a, self.layout.of_lanes, lambda a: a
            else:
                at, slot = order[:size], self.layout.slot_of[order[:size]]
                lanes, slots = lambda a: a[at], lambda a: a[slot]
                spread = lambda a: jnp.zeros(num_lanes, a.dtype).at[at].set(a)  # noqa: E731
            mine, here = jax.tree.map(lanes, look), lanes(looked)
            # spare rows are zeros, which `few_rows` leaves out, and must not make the others pay
            # for noise, filters or penalties
            x = jnp.where(here[:, None], mine.after, jnp.zeros_like(mine.after))
            logits = self.model.apply({"params": head_params(params)}, x, method="unembed")
            sampling = jax.tree.map(
                lambda mine, idle: jnp.where(here, slots(mine), idle), settings.sampling, IDLE
            )
            history = History(slots(text), slots(settings.first))
            seeds, where = slots(settings.seeds), lanes(following)
            one_device = self.model.on_one_device
            token, logprob = sample(logits, sampling, seeds, where, history, one_device)
            guess, score = token, logprob
            if self.reads_logits:
                guess = largest(logits, one_device)
                score = self.measure.score(mine.replace(logits=logits))
            return jax.tree.map(spread, Seen(token, logprob, guess, score))

        branch = jnp.sum(jnp.sum(looked) > jnp.asarray(sizes))  # the smallest that holds them
        with jax.named_scope("exit"):
            return jax.lax.switch(branch, [functools.partial(rows, n) for n in sizes], order)

    def remember(self, lanes: Lanes, seen: Seen, looked):
        if not self.reads_logits:
            return lanes.guesses
        at = looked[:, None] & (lanes.loop[:, None] == jnp.arange(self.num_loops)[None])
        return jnp.where(at, seen.guess[:, None], lanes.guesses)
