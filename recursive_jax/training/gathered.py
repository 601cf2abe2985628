"""The gradient of a step on whole weights, which are gathered once.

The compiler keeps the gradient that a loop sums in some sharding. It therefore gathers weights and
reduces gradients in every loop of the block, chunk of the loss and micro-batch. Here the loss and
its gradient run inside `jax.shard_map`: each device has whole weights and its own rows. Each weight
is gathered once, before all loops, and its gradient is reduced once, behind them. Mesh axes other
than `ROWS` are left to the compiler.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = ("data", "fsdp")  # mesh axes that the rows of a batch are spread over
SPLIT = "fsdp"  # the one of them that weights are split over


@dataclasses.dataclass(frozen=True, eq=False)
class Gather:
    """Gathers weights, and runs a gradient on them.

    Attributes:
      mesh: of the step.
      rules: (logical axis, mesh axes), of the model.
      params, head: shardings of the student's params, and of the teacher's head (None without).
      dtype: in which weights are gathered. Gradients are summed over devices in float32.
      rings: sizes of the physical rings that the mesh axis fsdp consists of; their product is its
        size. A reduction over an axis that is no ring moves twice the bytes on TPUs. None: one.
      reduce_each: reduce the gradient of every micro-batch. Otherwise a float32 sum of whole
        gradients is kept, and reduced once.
    """

    mesh: Mesh
    rules: Sequence[tuple[str, Any]]
    params: Any
    head: Any = None
    dtype: Any = jnp.float32
    rings: tuple[int, ...] | None = None
    reduce_each: bool = False

    def gradient(
        self, gradient: Callable[..., tuple[Any, Any]], params: Any, head: Any, micro: Any
    ) -> tuple[Any, Any]:
        """The sum of `gradient(whole params, whole head, micro-batch) -> (grads, sums)` over rows.

        Args:
          gradient: of the rows of one device.
          params, head: as the shardings have them.
          micro: pytree of arrays `[micro-batch, row, ...]`.

        Returns:
          float32 grads in the shardings of the params, and sums.
        """

        def local(params, head, micro):
            with jax.named_scope("gather"):
                whole = jax.tree.map(self._gather, params, self.params)
                head = jax.tree.map(self._gather, head, self.head)

            def one(micro):
                grads, sums = gradient(whole, head, micro)
                grads = self._reduce(grads) if self.reduce_each else _float32(grads)
                return grads, sums

            grads, sums = sum_of(one, micro)
            grads = grads if self.reduce_each else self._reduce(grads)
            return grads, jax.lax.psum(sums, ROWS)

        split = jax.tree.map(lambda s: _only(s.spec, ROWS), (self.params, self.head))
        with nn.logical_axis_rules(self._rules_inside()):
            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(*split, PartitionSpec(None, ROWS)),
                out_specs=(split[0], PartitionSpec()),
                axis_names=set(ROWS),
                check_vma=False,
            )(params, head, micro)

    def _gather(self, x: jax.Array, sharding: NamedSharding) -> jax.Array:
        dim = split_dim(sharding)
        if dim is None:
            return x
        x = x.astype(self.dtype)  # the part, not the whole
        for groups in reversed(self._groups()):
            x = jax.lax.all_gather(x, SPLIT, axis=dim, tiled=True, axis_index_groups=groups)
        return x

    def _reduce(self, grads: Any) -> Any:
        def reduce(x, sharding):
            dim = split_dim(sharding)
            if dim is None:
                return jax.lax.psum(x, ROWS)
            for groups in self._groups():
                x = jax.lax.psum_scatter(
                    x, SPLIT, scatter_dimension=dim, tiled=True, axis_index_groups=groups
                )
            return jax.lax.psum(x, "data") if self.mesh.shape["data"] > 1 else x

        with jax.named_scope("reduce"):
            return jax.tree.map(reduce, _float32(grads), self.params)

    def _groups(self) -> list[list[list[int]] | None]:
        """Device groups of every ring of the mesh axis, the outermost ring first."""
        if self.rings is None or len(self.rings) == 1:
            return [None]
        index = np.arange(math.prod(self.rings)).reshape(self.rings)
        return [
            np.moveaxis(index, i, -1).reshape(-1, size).tolist()
            for i, size in enumerate(self.rings)
        ]

    def _rules_inside(self) -> list[tuple[str, Any]]:
        """The rules without the axes that are manual inside."""
        return [
            (name, _keep(axes, set(self.mesh.axis_names) - set(ROWS))) for name, axes in self.rules
        ]


def sum_of(function: Callable[[Any], Any], micro: Any) -> Any:
    """The sum of `function(micro-batch)` over the first axis of all arrays of `micro`."""
    first = jax.tree.map(lambda x: x[0], micro)
    if jax.tree.leaves(micro)[0].shape[0] == 1:
        return function(first)

    def add(total, one):
        return jax.tree.map(jnp.add, total, function(one)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))
    return jax.lax.scan(add, zero, micro)[0]


def split_dim(sharding: NamedSharding) -> int | None:
    """The dimension that is split over `SPLIT`; None: not split."""
    if sharding.mesh.shape[SPLIT] == 1:
        return None
    dims = [i for i, axes in enumerate(sharding.spec) if SPLIT in _names(axes)]
    return dims[0] if dims else None


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _only(spec: PartitionSpec, kept) -> PartitionSpec:
    return PartitionSpec(*[_keep(axes, kept) for axes in spec])


def _keep(axes, kept):
    names = tuple(name for name in _names(axes) if name in kept)
    return names if len(names) > 1 else names[0] if names else None


def _names(axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
