"""Where an engine's arrays live on a mesh, and how its program is split over it.

Slots and their lanes are spread over the axes of the mesh that share a batch; every such shard
runs a decode loop of its own on its own slots, and knows nothing of the others. That is what
`jax.shard_map` over these axes says, so no collective can cross them. Within a shard the compiler
splits heads, mlp and vocabulary over the other axes, by the logical axis rules.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recursive_jax.decoding.state import Changes, Chunks, Settings, State


class Placement:
    """One device (`mesh` is None), or a mesh with the logical axis rules its params follow.

    Attributes:
      shards: how many parts the slots are in.

    Raises:
      ValueError: the rules split weights over an axis that slots are spread over.
    """

    def __init__(self, mesh: Mesh | None, rules: Sequence[tuple[str, Any]]):
        self._mesh = mesh
        named = {name: _axes(axes) for name, axes in rules}
        self._slot_axes = () if mesh is None else named.get("batch", ())
        for name, axes in named.items():
            shared = [a for a in axes if a in self._slot_axes and mesh.shape[a] > 1]
            if shared and name != "batch":
                raise ValueError(
                    f"mesh axis {shared[0]}={mesh.shape[shared[0]]} splits both slots and weights "
                    f"({name}); an engine keeps whole weights on every shard of its slots: use "
                    "data and tensor"
                )
        self.shards = math.prod(mesh.shape[a] for a in self._slot_axes) if mesh else 1
        # What the model may say about its activations within a shard.
        self._rules = [
            (name, tuple(a for a in axes if a not in self._slot_axes) or None)
            for name, axes in named.items()
        ]
        self._kv_axes = dict(self._rules).get("kv_heads")

    def spread(self, run: Callable) -> Callable:
        """`Ticks.run` of one shard's slots -> that of all slots."""
        if self._mesh is None:
            return run
        slots, whole = PartitionSpec(self._slot_axes), PartitionSpec()
        per_tick = PartitionSpec(None, self._slot_axes)
        cache = PartitionSpec(None, None, self._slot_axes)

        def spread(params, cache_, state, settings, changes, first, count, until, chunks):
            with nn.logical_axis_rules(self._rules):
                return jax.shard_map(
                    run,
                    mesh=self._mesh,
                    in_specs=(whole, cache, slots, slots, slots, whole, whole, whole, slots),
                    out_specs=(cache, slots, per_tick, slots),
                    axis_names=set(self._slot_axes),
                    check_vma=False,
                )(params, cache_, state, settings, changes, first, count, until, chunks)

        return spread

    @property
    def cache(self) -> NamedSharding | None:
        """Of `KVCache.rows`: slots apart, and kv heads as the rules say."""
        return self._sharding(None, None, self._slot_axes, None, self._kv_axes)

    @property
    def slots(self) -> NamedSharding | None:
        """Of arrays whose first axis is slots, lanes, or whatever each shard has of its own."""
        return self._sharding(self._slot_axes)

    @property
    def outputs(self):
        """Of what `spread(run)` returns."""
        return self.cache, self.slots, self._sharding(None, self._slot_axes), self.slots

    def put(self, tree: State | Settings | Changes | Chunks | None):
        """Host arrays that begin with an axis of slots (or of shards) -> their devices."""
        return jax.device_put(tree, self.slots)

    def everywhere(self, *values):
        """Host values that all devices need."""
        return values if self._mesh is None else jax.device_put(values, self._sharding())

    def context(self) -> contextlib.AbstractContextManager:
        """While a program for this mesh is traced."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _sharding(self, *spec) -> NamedSharding | None:
        return None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(*spec))


def _axes(axes) -> tuple[str, ...]:
    """Mesh axes of a rule: a name, several, or None."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
