"""Which lanes belong to which slot: arrays by slot and arrays by lane.

Axes: S slots, P lanes of a slot, B = S·P lanes. The lanes of a slot are adjacent.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LaneMap:
    """The slots of one program; on a mesh, those of one shard."""

    num_slots: int
    lanes_per_slot: int

    @property
    def num_lanes(self) -> int:
        return self.num_slots * self.lanes_per_slot

    @property
    def slot_of_lane(self) -> jax.Array:
        """int32 [B]."""
        return self.to_lanes(jnp.arange(self.num_slots, dtype=jnp.int32))

    @property
    def lane_within_slot(self) -> jax.Array:
        """int32 [B], 0 … P - 1."""
        return jnp.tile(jnp.arange(self.lanes_per_slot, dtype=jnp.int32), self.num_slots)

    def to_lanes(self, per_slot):
        """The value of each lane's slot: [S, ...] -> [B, ...]."""
        return jnp.repeat(per_slot, self.lanes_per_slot, axis=0)

    def any(self, mask):
        """Whether a slot has a lane in `mask`: bool [B] -> bool [S]."""
        return jnp.any(mask.reshape(self.num_slots, -1), axis=1)

    def count(self, mask):
        """How many lanes of a slot are in `mask`: bool [B] -> int32 [S]."""
        return jnp.sum(mask.reshape(self.num_slots, -1), axis=1, dtype=jnp.int32)

    def pick(self, mask, values):
        """The value of each slot's one lane in `mask`, 0 if there is none: [B] -> [S]."""
        picked = jnp.where(mask, values, jnp.zeros_like(values))
        return jnp.sum(picked.reshape(self.num_slots, -1), axis=1, dtype=values.dtype)
