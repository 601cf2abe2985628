"""Sums over the vocabulary head, one chunk of positions at a time.

Hidden states come out of the decoder. Logits exist only here, for one chunk of positions:
`chunked_sum` computes a chunk's loss and its gradient in the forward pass. The logits (262k wide
for Gemma 3) are therefore neither kept for the backward pass nor computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target), nats: logits f32 `[..., V]`, targets int `[...]` -> `[...]`."""
    # A comparison instead of a gather: it fuses, and its gradient needs no scatter.
    vocab = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target = jnp.where(vocab == targets[..., None], logits, 0.0).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - target


def chunked_sum(
    fn: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    head: Any,
    hidden: jax.Array,
    data: Any,
    chunk: int,
) -> tuple[jax.Array, Any]:
    """Sum of `fn(head, hidden chunk, data chunk) -> (loss, aux)` over chunks of positions.

    Differentiable in `head` and `hidden`; not in `data`, and aux carries no gradient. The gradient
    of a chunk is computed with its value, so the logits of one chunk exist at a time.

    Args:
      fn: returns sums over the positions of its chunk.
      head: pytree of params.
      hidden: `[E, B, T, D]`, E exits.
      data: pytree of arrays `[B, T, ...]`.
      chunk: positions per chunk. T is padded with zeros, so `data` must hold the weights.
    """
    length = hidden.shape[2]
    chunk = min(chunk, length)
    num_chunks = -(-length // chunk)
    pad = num_chunks * chunk - length

    def split(x, axis):
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], num_chunks, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return _sum_over_chunks(fn, head, split(hidden, 2), jax.tree.map(lambda x: split(x, 1), data))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_chunks(fn, head, hidden, data):
    def body(total, xs):
        return jax.tree.map(jnp.add, total, fn(head, *xs)), None

    first = jax.tree.map(lambda x: x[0], (hidden, data))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, head, *first))
    return jax.lax.scan(body, zeros, (hidden, data))[0]


def _sum_over_chunks_fwd(fn, head, hidden, data):
    value_and_grad = jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)
    if hidden.shape[0] == 1:  # one chunk: no scan, no accumulator
        first = jax.tree.map(lambda x: x[0], (hidden, data))
        total, (d_head, d_hidden) = value_and_grad(head, *first)
        return total, (d_head, d_hidden[None], data)

    def body(carry, xs):
        total, (d_head, d_hidden) = value_and_grad(head, *xs)
        return jax.tree.map(jnp.add, carry, (total, d_head)), d_hidden

    first = jax.tree.map(lambda x: x[0], (hidden, data))
    sums = jax.eval_shape(fn, head, *first)
    wide = jax.eval_shape(functools.partial(jax.tree.map, _at_least_float32), head)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums, wide))
    (total, d_head), d_hidden = jax.lax.scan(body, zeros, (hidden, data))
    d_head = jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, head)
    return total, (d_head, d_hidden, data)


def _sum_over_chunks_bwd(fn, residuals, cotangent):
    d_head, d_hidden, data = residuals
    scale, _ = cotangent  # the aux part carries no gradient

    def scaled(tree):
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), tree)

    return scaled(d_head), scaled(d_hidden), jax.tree.map(_zero_cotangent, data)


def _at_least_float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _zero_cotangent(x):
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return jnp.zeros(x.shape, jax.dtypes.float0)


_sum_over_chunks.defvjp(_sum_over_chunks_fwd, _sum_over_chunks_bwd)


def chunk_length(batch: int, length: int, vocab: int, copies: int, budget_bytes: int) -> int:
    """Positions per chunk so that `copies` f32 arrays `[batch, chunk, vocab]` fit a budget."""
    per_position = 4 * batch * vocab * copies
    return max(1, min(length, budget_bytes // per_position))
