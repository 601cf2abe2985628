"""Norms of a gradient by group of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax.models.parameters import COUNT_GROUPS, LORA, kinds


def squares_by_group(grads: Any) -> dict[str, jax.Array]:
    """The sum of squares of every group: f32 `[]` each. Their sum is the square of the whole norm.

    Groups: `shared` (the block's projection matrices), `lora_loop_1` … (the factors of a loop),
    `prefix`, `norms` (with biases and gates), `embedding` (with an untied head).

    Args:
      grads: gradient, in the tree of the params.

    Raises:
      KeyError: a leaf is no parameter of a `Decoder`.
    """
    groups: dict[str, jax.Array] = {}

    def add(name: str, value: jax.Array) -> None:
        groups[name] = groups.get(name, 0.0) + value

    for kind, x in zip(jax.tree.leaves(kinds(grads)), jax.tree.leaves(grads), strict=True):
        if kind in LORA:  # [layer, loop, ...]
            by_loop = jnp.square(x).sum(axis=(0, *range(2, x.ndim)))
            for loop in range(x.shape[1]):
                add(f"lora_loop_{loop + 1}", by_loop[loop])
        else:
            add(COUNT_GROUPS.get(kind, "norms"), jnp.square(x).sum())
    return groups
