"""Arrays that the device keeps and exchanges with the host while it decodes.

Axes: S slots, B lanes, C chunk length, D embed, L loops, W stop ids, T ticks, N cache length, F
fields of `TickOutputs`, O numbers of `StepInputs`. On a mesh the slots of all shards are
concatenated, and so are their lanes and chunks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from recursive_jax.decoding.sampling import SamplingParams

MAX_TICKS = 8  # per round trip to the host
NO_TOKEN = -1


@struct.dataclass
class Lanes:
    """Tokens on their way through the loops."""

    x: jax.Array  # [B, D], state after the loops so far
    loop: jax.Array  # int32 [B], the next loop to run; num_loops: the lane is idle
    position: jax.Array  # int32 [B]
    successor: jax.Array  # int32 [B], the token that follows; NO_TOKEN while unknown
    exit_loops: jax.Array  # int32 [B], loops executed when the successor became known
    guesses: jax.Array  # int32 [B, L], most likely token after each loop; [B, 0] if unused


@struct.dataclass
class Slots:
    """The newest token of every slot."""

    token: jax.Array  # int32 [S]
    position: jax.Array  # int32 [S]
    waiting: jax.Array  # bool [S], it has not started

    @classmethod
    def empty(cls, num_slots: int) -> Slots:
        zeros = np.zeros(num_slots, np.int32)
        return cls(zeros, zeros.copy(), np.zeros(num_slots, bool))


@struct.dataclass
class PendingBackfill:
    """Tokens that left in the last tick. Deeper loops still lack their keys and values."""

    x: jax.Array  # [S, D], the states with which they left
    loops: jax.Array  # int32 [S], loops executed; num_loops: nothing is missing
    position: jax.Array  # int32 [S]


@struct.dataclass
class State:
    """All that stays on the device between calls, except the cache."""

    lanes: Lanes
    slots: Slots
    pending: PendingBackfill
    text: jax.Array  # int32 [S, N], prompt and answer so far, by position
    chunk: jax.Array  # [C, D], state of the prompt chunk that runs


@struct.dataclass
class SlotSettings:
    """The settings of the request in every slot."""

    sampling: SamplingParams
    seeds: jax.Array  # uint32 [S]
    stop: jax.Array  # int32 [S, W], padded with NO_TOKEN
    first: jax.Array  # int32 [S], position of the answer's first token
    last: jax.Array  # int32 [S], the last position that an answer token may have
    min_loops: jax.Array  # int32 [S]
    max_loops: jax.Array  # int32 [S]
    thresholds: jax.Array  # f32 [S, L]
    recorded: jax.Array  # int32 [S, N], by position; [S, 0] unless the measure is `Recorded`


@struct.dataclass
class SlotUpdates:
    """Slots that start anew: admitted, or released (then `waiting` is False). Applied once."""

    reset: jax.Array  # bool [S]
    slots: Slots
    text: jax.Array  # int32 [S, N]


@struct.dataclass
class StepInputs:
    """Host inputs of a step, packed into one int32 array: one transfer instead of twenty."""

    settings: SlotSettings
    updates: SlotUpdates

    def pack(self) -> np.ndarray:
        """int32 [S, O], a copy; on the host."""
        leaves = [leaf.reshape(len(leaf), leaf[0].size) for leaf in jax.tree.leaves(self)]
        bits = [a.astype(np.int32) if a.dtype == bool else a.view(np.int32) for a in leaves]
        return np.concatenate(bits, axis=1)

    def unpack(self, packed: jax.Array) -> StepInputs:
        """Inputs of the same shapes as `self` from a packed array; on the device."""
        leaves, structure = jax.tree.flatten(self)
        ends = np.cumsum([leaf[0].size for leaf in leaves])
        parts = jnp.split(packed, ends[:-1], axis=1)
        unpacked = [
            (part != 0 if leaf.dtype == bool else part.view(leaf.dtype)).reshape(leaf.shape)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, unpacked)


@struct.dataclass
class Chunks:
    """Prompt work of the coming ticks, `scheduler.Chunk` as arrays; length 0: nothing to do."""

    slot: jax.Array  # int32 [T]
    start: jax.Array  # int32 [T]
    length: jax.Array  # int32 [T]
    loop: jax.Array  # int32 [T]
    ends_prompt: jax.Array  # bool [T]


@struct.dataclass
class TickOutputs:
    """What happened in a tick; on the host, after `unpack`, lists of numbers."""

    token: jax.Array  # int32 [S], NO_TOKEN where a slot has no new token
    logprob: jax.Array  # f32 [S]
    exit_loops: jax.Array  # int32 [S]
    newest: jax.Array  # int32 [S], loop that the slot's newest token ran, -1 if none
    exited: jax.Array  # bool [S], another token starts in the next tick
    finished: jax.Array  # bool [S], the request ended
    tainted: jax.Array  # bool [S], a state is not finite: the cache may hold NaN
    busy: jax.Array  # int32 [S], lanes in use
    head_rows: jax.Array  # int32 [S], lanes that ran the head
    drafted: jax.Array  # int32 [S], committed tokens whose next token had been drafted
    dropped: jax.Array  # int32 [S], lanes given up because a draft was wrong

    def pack(self) -> jax.Array:
        """int32 [F, S]: one transfer to the host instead of eleven."""
        bits = self.replace(logprob=self.logprob.view(jnp.int32))
        columns = [getattr(bits, field.name) for field in dataclasses.fields(self)]
        return jnp.stack([column.astype(jnp.int32) for column in columns])

    @classmethod
    def nothing(cls, num_slots: int) -> jax.Array:
        """int32 [F, T, S], packed outputs of ticks that did not run."""
        none = {"token": NO_TOKEN, "newest": -1}
        row = jnp.array([none.get(f.name, 0) for f in dataclasses.fields(cls)], jnp.int32)
        return jnp.tile(row[:, None, None], (1, MAX_TICKS, num_slots))

    @classmethod
    def unpack(cls, packed: np.ndarray) -> list[TickOutputs]:
        """The outputs of every tick: int32 [F, T, S] -> T of them; truth values are 0 and 1."""
        columns = dict(zip((f.name for f in dataclasses.fields(cls)), packed, strict=True))
        columns["logprob"] = columns["logprob"].view(np.float32)
        return [cls(*tick) for tick in zip(*(c.tolist() for c in columns.values()), strict=True)]


@struct.dataclass
class HeadOutputs:
    """What the head found for every lane; garbage for lanes that did not run the head."""

    token: jax.Array  # int32 [B], sampled
    logprob: jax.Array  # f32 [B]
    guess: jax.Array  # int32 [B], most likely
    score: jax.Array  # f32 [B], of the exit measure
