"""Where an engine's arrays live on a mesh, and how its program is split over it.

Slots and their lanes are spread over the mesh axes of the batch. Each such shard runs its own
decode loop on its own slots, by `jax.shard_map` over these axes: no collective can cross them.
Within a shard the compiler splits heads, mlp and vocabulary over the other axes, by the logical
axis rules.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recursive_jax.decoding.state import Chunks, State
from recursive_jax.models.interface import Cache


class Placement:
    """One device (`mesh` is None), or a mesh with the logical axis rules its params follow.

    Attributes:
      shards: how many parts the slots are in.
      described: the mesh is of devices that are not here (`jax.experimental.topologies`): arrays
        are shapes only, and programs can be compiled but not run.

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
        self.described = mesh is not None and mesh.devices.flat[0] not in jax.devices()
        self.shards = math.prod(mesh.shape[a] for a in self._slot_axes) if mesh else 1
        # The rules for activations within a shard.
        self._rules = [
            (name, tuple(a for a in axes if a not in self._slot_axes) or None)
            for name, axes in named.items()
        ]
        self._kv_axes = dict(self._rules).get("kv_heads")

    def spread(self, run: Callable) -> Callable:
        """`DecodeLoop.run` of one shard's slots -> that of all slots."""
        if self._mesh is None:
            return run
        slots, whole = PartitionSpec(self._slot_axes), PartitionSpec()
        cache = outputs = PartitionSpec(None, None, self._slot_axes)

        def spread(params, cache_, state, inputs, fresh, first, count, until, chunks):
            with nn.logical_axis_rules(self._rules):
                return jax.shard_map(
                    run,
                    mesh=self._mesh,
                    in_specs=(whole, cache, slots, slots, whole, whole, whole, whole, slots),
                    out_specs=(cache, slots, outputs, slots),
                    axis_names=set(self._slot_axes),
                    check_vma=False,
                )(params, cache_, state, inputs, fresh, first, count, until, chunks)

        return spread

    @property
    def platform(self) -> str:
        """'cpu', 'gpu' or 'tpu'."""
        return jax.default_backend() if self._mesh is None else self._mesh.devices.flat[0].platform

    def cache_formats(self, cache: Cache) -> Cache | None:
        """`Format`s of the cache's arrays: slots are split, and kv heads by the rules.

        The order in memory is that of the axes, as ticks write and read. TPUs prefer another order
        between calls, and would copy the whole cache at the beginning and the end of each call.

        Args:
          cache: its shapes.
        """
        if self._mesh is None:
            return None
        split, formats = {"slot": self._slot_axes, "kv_heads": self._kv_axes}, {}
        for name, axes in cache.AXES.items():
            sharding = self._sharding(*[split.get(axis) for axis in axes])
            formats[name] = Format(Layout(major_to_minor=tuple(range(len(axes)))), sharding)
        return cache.replace(**formats)

    @property
    def slots(self) -> NamedSharding | None:
        """The sharding of arrays whose first axis is slots, lanes or shards."""
        return self._sharding(self._slot_axes)

    def outputs(self, cache: Cache | None):
        """Shardings of the results of `spread(run)`; `cache`: those of the cache."""
        return cache, self.slots, self._sharding(None, None, self._slot_axes), self.slots

    def put(self, tree: State | Chunks | jax.typing.ArrayLike | None):
        """Host arrays that begin with an axis of slots (or of shards) -> their devices."""
        return self._put(tree, self.slots)

    def everywhere(self, *values):
        """Host values that all devices need."""
        return values if self._mesh is None else self._put(values, self._sharding())

    def make(self, function: Callable, sharding: Cache | None):
        """The result of `function()`, made with this sharding."""
        if not self.described:
            return jax.jit(function, out_shardings=sharding)()
        return jax.tree.map(self._described, jax.eval_shape(function), sharding)

    def compile(self, jitted, *arguments):
        """An executable of a jitted function for these devices."""
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            if not self.described:
                return jitted.lower(*arguments).compile()
            lowered = jitted.trace(*arguments).lower(lowering_platforms=(self.platform,))
            return lowered.compile()

    def _put(self, tree, sharding):
        if not self.described:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda x: self._described(x, sharding), tree)

    def _described(self, x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def _sharding(self, *spec) -> NamedSharding | None:
        return None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(*spec))


def _axes(axes) -> tuple[str, ...]:
    """Mesh axes of a rule: a name, several, or None."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
