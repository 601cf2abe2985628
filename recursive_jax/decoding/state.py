"""What the device keeps and exchanges with the host while it decodes.

Axes: S slots, B lanes, C chunk length, D embed, L loops, W stop ids, T ticks, N cache length. On a
mesh the shards' slots stand one behind the other, and so do their lanes and chunks.
"""

from __future__ import annotations

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
    """Slots that start anew: admitted, or released (then `waiting` is False)."""

    reset: jax.Array  # bool [S]
    slots: Slots
    text: jax.Array  # int32 [S, N]


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
    """What happened in every tick, on its way to the host."""

    token: jax.Array  # int32 [T, S], NO_TOKEN where a slot brought none
    logprob: jax.Array  # f32 [T, S]
    exit_loops: jax.Array  # int32 [T, S]
    newest: jax.Array  # int32 [T, S], loop that the slot's newest token ran, -1 if none
    exited: jax.Array  # bool [T, S], another token starts from the next tick on
    finished: jax.Array  # bool [T, S], the request ended
    tainted: jax.Array  # bool [T, S], a state is not finite: the cache may hold NaN
    busy: jax.Array  # int32 [T, S], lanes in use
    head_rows: jax.Array  # int32 [T, S], lanes that were looked at through the head
    drafted: jax.Array  # int32 [T, S], committed tokens whose successor had been drafted
    dropped: jax.Array  # int32 [T, S], lanes given up because a draft was wrong

    @classmethod
    def empty(cls, num_slots: int) -> Found:
        shape = (MAX_TICKS, num_slots)
        per_slot = lambda fill, dtype=jnp.int32: jnp.full(shape, fill, dtype)  # noqa: E731
        return cls(
            token=per_slot(NO_TOKEN),
            logprob=per_slot(0.0, jnp.float32),
            exit_loops=per_slot(0),
            newest=per_slot(-1),
            exited=per_slot(False, bool),
            finished=per_slot(False, bool),
            tainted=per_slot(False, bool),
            busy=per_slot(0),
            head_rows=per_slot(0),
            drafted=per_slot(0),
            dropped=per_slot(0),
        )


@struct.dataclass
class Seen:
    """What the head says about every lane; garbage where it was not looked."""

    token: jax.Array  # int32 [B], sampled
    logprob: jax.Array  # f32 [B]
    guess: jax.Array  # int32 [B], most likely
    score: jax.Array  # f32 [B], of the exit measure
