"""What the device keeps and exchanges with the host while it decodes.

Axes: S slots, B lanes, C chunk length, D embed, L loops, W stop ids, T ticks, N cache length, F
fields of `Found`, O numbers of `Orders`. On a mesh the shards' slots stand one behind the other,
and so do their lanes and chunks.
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
    loop: jax.Array  # int32 [B], the one that runs next; num_loops: the lane is idle
    position: jax.Array  # int32 [B]
    successor: jax.Array  # int32 [B], the token that follows; NO_TOKEN while unknown
    exit_loops: jax.Array  # int32 [B], loops executed when the successor became known
    guesses: jax.Array  # int32 [B, L], most likely token after each loop; [B, 0] if nobody asks


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
class Exited:
    """Tokens that left in the last tick and lack keys and values in deeper loops."""

    x: jax.Array  # [S, D], the states with which they left
    loops: jax.Array  # int32 [S], loops executed; num_loops: nothing is missing
    position: jax.Array  # int32 [S]


@struct.dataclass
class State:
    """All that stays on the device between calls, but for the cache."""

    lanes: Lanes
    slots: Slots
    exited: Exited
    text: jax.Array  # int32 [S, N], prompt and answer so far, by position
    chunk: jax.Array  # [C, D], state of the prompt chunk that runs


@struct.dataclass
class Settings:
    """What every slot was asked for."""

    sampling: SamplingParams
    seeds: jax.Array  # uint32 [S]
    stop: jax.Array  # int32 [S, W], filled up with NO_TOKEN
    first: jax.Array  # int32 [S], where the answer's first token will stand
    last: jax.Array  # int32 [S], where its last one may stand
    min_loops: jax.Array  # int32 [S]
    max_loops: jax.Array  # int32 [S]
    thresholds: jax.Array  # f32 [S, L]
    recorded: jax.Array  # int32 [S, N], by position; [S, 0] unless the measure is `Recorded`


@struct.dataclass
class Changes:
    """Slots that start anew: admitted, or released (then `waiting` is False). Done once."""

    reset: jax.Array  # bool [S]
    slots: Slots
    text: jax.Array  # int32 [S, N]


@struct.dataclass
class Orders:
    """What the host has to say about its slots; to the device, one array is faster than twenty."""

    settings: Settings
    changes: Changes

    def pack(self) -> np.ndarray:
        """int32 [S, O], a copy; on the host."""
        rows = lambda a: a.reshape(len(a), a[0].size)  # noqa: E731
        leaves = [rows(leaf) for leaf in jax.tree.leaves(self)]
        bits = [a.astype(np.int32) if a.dtype == bool else a.view(np.int32) for a in leaves]
        return np.concatenate(bits, axis=1)

    def unpack(self, packed: jax.Array) -> Orders:
        """`pack`ed orders of the same shapes; on the device."""
        leaves, structure = jax.tree.flatten(self)
        ends = np.cumsum([leaf[0].size for leaf in leaves])
        parts = jnp.split(packed, ends[:-1], axis=1)
        back = lambda a, leaf: a != 0 if leaf.dtype == bool else a.view(leaf.dtype)  # noqa: E731
        both = zip(parts, leaves, strict=True)
        parts = [back(a, leaf).reshape(leaf.shape) for a, leaf in both]
        return jax.tree.unflatten(structure, parts)


@struct.dataclass
class Chunks:
    """Prompt work of the coming ticks, `scheduler.Chunk` as arrays; length 0: nothing to do."""

    slot: jax.Array  # int32 [T]
    start: jax.Array  # int32 [T]
    length: jax.Array  # int32 [T]
    loop: jax.Array  # int32 [T]
    ends_prompt: jax.Array  # bool [T]


@struct.dataclass
class Found:
    """What happened in a tick; on the host, `unpack`ed, lists of numbers."""

    token: jax.Array  # int32 [S], NO_TOKEN where a slot brought none
    logprob: jax.Array  # f32 [S]
    exit_loops: jax.Array  # int32 [S]
    newest: jax.Array  # int32 [S], loop that the slot's newest token ran, -1 if none
    exited: jax.Array  # bool [S], another token starts from the next tick on
    finished: jax.Array  # bool [S], the request ended
    tainted: jax.Array  # bool [S], a state is not finite: the cache may hold NaN
    busy: jax.Array  # int32 [S], lanes in use
    head_rows: jax.Array  # int32 [S], lanes that were looked at through the head
    drafted: jax.Array  # int32 [S], committed tokens whose successor had been drafted
    dropped: jax.Array  # int32 [S], lanes given up because a draft was wrong

    def pack(self) -> jax.Array:
        """int32 [F, S]: to the host, one array is faster than eleven."""
        bits = self.replace(logprob=self.logprob.view(jnp.int32))
        columns = [getattr(bits, field.name) for field in dataclasses.fields(self)]
        return jnp.stack([column.astype(jnp.int32) for column in columns])

    @classmethod
    def nothing(cls, num_slots: int) -> jax.Array:
        """int32 [F, T, S], packed ticks that did not run."""
        none = {"token": NO_TOKEN, "newest": -1}
        row = jnp.array([none.get(f.name, 0) for f in dataclasses.fields(cls)], jnp.int32)
        return jnp.tile(row[:, None, None], (1, MAX_TICKS, num_slots))

    @classmethod
    def unpack(cls, packed: np.ndarray) -> list[Found]:
        """int32 [F, T, S] -> every tick's; truth values are 0 and 1."""
        columns = dict(zip((f.name for f in dataclasses.fields(cls)), packed, strict=True))
        columns["logprob"] = columns["logprob"].view(np.float32)
        return [cls(*tick) for tick in zip(*(c.tolist() for c in columns.values()), strict=True)]


@struct.dataclass
class Seen:
    """What the head says about every lane; garbage where it was not looked."""

    token: jax.Array  # int32 [B], sampled
    logprob: jax.Array  # f32 [B]
    guess: jax.Array  # int32 [B], most likely
    score: jax.Array  # f32 [B], of the exit measure
