"""After every pass: which tokens leave, and which tokens follow them.

The vocabulary head runs here, on the few lanes that need it; axes as in `tick`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax.decoding.exit_measures import ExitInputs, Measure
from recursive_jax.decoding.lanes import LaneMap
from recursive_jax.decoding.requests import Sampling
from recursive_jax.decoding.sampling import History, SamplingParams, sample
from recursive_jax.decoding.state import NO_TOKEN, HeadOutputs, Lanes, SlotSettings
from recursive_jax.models.interface import DecodeModel

IDLE = SamplingParams.stack([Sampling()])
FEWEST_ROWS = 8  # of the head: fewer cost the same, because reading its weights takes the time


@dataclasses.dataclass(frozen=True)
class ExitHead:
    """Exit decisions and the head; the attributes are those of `tick.DecodeLoop`."""

    model: DecodeModel
    lanes: LaneMap
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
        """Numbers of rows that the head is compiled for, ascending.

        Most ticks need at most seven eighths of the rows, even where many lanes run the head.
        """
        capacity = min(self.lanes.num_lanes, self.lanes.num_slots * (2 if self.lossless else 1))
        fewer = [capacity * eighths // 8 for eighths in (2, 4, 6, 7)]
        return sorted({0, capacity, *(n for n in fewer if n >= FEWEST_ROWS)})

    def exit_inputs(self, settings: SlotSettings, lanes: Lanes, x: jax.Array) -> ExitInputs:
        """The inputs of the exit measure; x [B, D] are the states after the pass."""
        recorded = jnp.zeros_like(lanes.loop)
        if settings.recorded.shape[1]:
            recorded = settings.recorded[self.lanes.slot_of_lane, lanes.position]
        return ExitInputs(lanes.loop + 1, lanes.x, x, recorded, guesses=lanes.guesses)

    def decide(
        self, params: Any, settings: SlotSettings, inputs: ExitInputs, text, lanes: Lanes,
        active, newest,
    ) -> tuple[HeadOutputs, jax.Array, jax.Array]:  # fmt: skip
        """Decide which tokens leave and which tokens follow.

        Args:
          text: int32 [S, N], prompts and answers by position.
          active, newest: bool [B], lanes in use, and those with the newest token of their slot.

        Returns:
          head outputs; bool [B], lanes whose successor is now known; bool [B], lanes that ran the
          head.
        """
        fresh = newest & (lanes.successor == NO_TOKEN)
        to_lanes = self.lanes.to_lanes
        least, most = to_lanes(settings.min_loops), to_lanes(settings.max_loops)
        if not self.lossless:  # prompt tokens run all loops, the last one too
            in_prompt = lanes.position + 1 == to_lanes(settings.first)
            least, most = (jnp.where(in_prompt, self.num_loops, n) for n in (least, most))
        leaves = fresh & (inputs.loops >= most)
        may = fresh & ~leaves & (inputs.loops >= least)
        after = jnp.minimum(lanes.loop, self.num_loops - 1)
        threshold = settings.thresholds[self.lanes.slot_of_lane, after]
        if self.reads_logits:
            first_use = least - int(self.measure.needs_previous)
            needs_head = leaves | (fresh & (inputs.loops >= first_use))
        else:
            if self.can_exit:
                leaves |= may & (self.measure.score(inputs) > threshold)
            needs_head = leaves
        if self.lossless:
            needs_head |= active & (inputs.loops == self.num_loops)
        head = self._run(params, settings, inputs, text, lanes.position + 1, needs_head)
        if self.reads_logits:
            leaves |= may & (head.score > threshold)
        return head, leaves, needs_head

    def record_guess(self, lanes: Lanes, head: HeadOutputs, needs_head) -> jax.Array:
        """`Lanes.guesses` [B, L] with the most likely tokens of this pass."""
        if not self.reads_logits:
            return lanes.guesses
        at = needs_head[:, None] & (lanes.loop[:, None] == jnp.arange(self.num_loops)[None])
        return jnp.where(at, head.guess[:, None], lanes.guesses)

    def _run(self, params, settings, inputs, text, following, needs_head) -> HeadOutputs:
        """Head, sampling and measure on the lanes that need it, compacted into few rows.

        This is the only branch of a tick, by the number of rows; the cache is not in it.
        """
        num_lanes, sizes = self.lanes.num_lanes, self.sizes
        compacts = any(0 < n < num_lanes for n in sizes)
        order = jnp.argsort(~needs_head, stable=True)[: sizes[-1]] if compacts else None

        def rows(size, order):
            if not size:
                nothing = jnp.zeros(num_lanes, jnp.int32)
                return HeadOutputs(nothing, nothing * 0.0, nothing, nothing * 0.0)
            every = size == num_lanes
            lane = None if every else order[:size]
            slot = None if every else self.lanes.slot_of_lane[lane]

            def of_lanes(tree):
                return tree if every else jax.tree.map(lambda a: a[lane], tree)

            def of_slots(a):
                return self.lanes.to_lanes(a) if every else a[slot]

            mine, here = of_lanes(inputs), of_lanes(needs_head)
            # Spare rows are zero, which kernels skip, and greedy: they cost no noise or filters.
            x = jnp.where(here[:, None], mine.after, jnp.zeros_like(mine.after))
            logits = self.model.logits(params, x)
            sampling = jax.tree.map(
                lambda given, idle: jnp.where(here, of_slots(given), idle), settings.sampling, IDLE
            )
            history = History(of_slots(text), of_slots(settings.first))
            token, logprob = sample(
                logits, sampling, of_slots(settings.seeds), of_lanes(following), history,
                top1=self.model.top1,
            )  # fmt: skip
            guess, score = token, logprob
            if self.reads_logits:
                guess = self.model.top1(logits)[0]
                score = self.measure.score(mine.replace(logits=logits))
            outputs = HeadOutputs(token, logprob, guess, score)
            if every:
                return outputs
            return jax.tree.map(lambda a: jnp.zeros(num_lanes, a.dtype).at[lane].set(a), outputs)

        branch = jnp.sum(jnp.sum(needs_head) > jnp.asarray(sizes))  # the smallest that fits
        with jax.named_scope("exit"):
            return jax.lax.switch(branch, [functools.partial(rows, n) for n in sizes], order)
