"""Products of a few rows with large weights: where decoding on a CPU spends its time.

`kernels/skinny_matmul.cc` reads the weights once for all rows and adds every row's LoRA in the same
pass. XLA's CPU kernels read the matrix once per row, or copy it into blocks first; they are used
where the kernel cannot be compiled (`build`), and for other dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from recursive_jax.cpu import build
from recursive_jax.models.layers import at_loop, mask_loops

MOST_ROWS = 64  # of the kernel: for more rows, XLA takes less time


@struct.dataclass
class LoraMatrix:
    """One projection, or several that read the same rows: weights, LoRAs of all loops, biases.

    Every projection i has either LoRA factors or, where their product is smaller, the product.
    """

    w: jax.Array  # [out, in], the projections' weights one after the other
    a: jax.Array | None  # [sum of L·R_i, in]; None when no projection has factors
    b: tuple[jax.Array, ...]  # [out_i, L·R_i] of each projection
    delta: tuple[tuple[jax.Array | None, ...], ...]  # per projection and loop [out_i, in], or ()
    bias: tuple[jax.Array | None, ...]  # [out_i], or [L, out_i]
    num_loops: int = struct.field(pytree_node=False)

    @property
    def ranks(self) -> list[int]:
        """L·R_i of each projection."""
        return [b.shape[1] for b in self.b]

    @property
    def widths(self) -> list[int]:
        """out_i of each projection."""
        return [b.shape[0] for b in self.b]


def matmul(
    x: jax.Array, m: LoraMatrix, loop: jax.Array, rows_asked: Sequence[int] = ()
) -> tuple[jax.Array, ...]:
    """Every projection of x `[R, in]`, with the LoRA and the bias of each row's loop.

    Args:
      loop: int32 `[R]`.
      rows_asked: compute projection i for the first `rows_asked[i]` rows only (default: all rows).

    Returns:
      `[rows_asked[i], out_i]` of each projection.
    """
    counts = list(rows_asked) or [len(x)] * len(m.b)
    x = x.astype(m.w.dtype)
    product = by_kernel if kernel_takes(x, m.w, x.dtype) else by_xla
    parts = []
    for y, deltas, bias, n in zip(
        product(x, m, loop, counts), m.delta, m.bias, counts, strict=True
    ):
        for i, delta in enumerate(deltas):
            if delta is not None:
                # The kernel skips zero rows. A loop with no active row therefore costs nothing.
                mine = jnp.where((loop[:n] == i)[:, None], x[:n], jnp.zeros_like(x[:n]))
                y = y + skinny_matmul(mine, delta)
        if bias is not None:
            y = y + (at_loop(bias, loop[:n], 2) if bias.ndim == 2 else bias[None])
        parts.append(y)
    return tuple(parts)


def skinny_matmul(x: jax.Array, w: jax.Array, out_dtype=None) -> jax.Array:
    """`x [R, in] @ w.T` for `w [out, in]`, on one CPU."""
    if kernel_takes(x, w, out_dtype or x.dtype):
        b = (jnp.zeros((len(w), 0), w.dtype),)
        plain = LoraMatrix(w, None, b, ((),), (None,), num_loops=1)
        return by_kernel(x, plain, jnp.zeros(len(x), jnp.int32), [len(x)])[0]
    return weights_first(x, w, out_dtype)


def kernel_takes(x: jax.Array, w: jax.Array, out_dtype) -> bool:
    """Whether the kernel multiplies these rows: few of them, float32, on a CPU."""
    dtypes = {jnp.dtype(d) for d in (x.dtype, w.dtype, out_dtype)}
    fits = 0 < len(x) <= MOST_ROWS and w.size and dtypes == {jnp.dtype(jnp.float32)}
    return bool(fits and jax.default_backend() == "cpu" and build.has("SkinnyMatmul"))


def by_kernel(
    x: jax.Array, m: LoraMatrix, loop: jax.Array, counts: Sequence[int]
) -> list[jax.Array]:
    """`x @ (w + a[loop] @ b[loop])` by the kernel, for rows that `kernel_takes`."""
    result = jax.ShapeDtypeStruct((len(x), len(m.w)), jnp.float32)
    factors = () if m.a is None else (loop.astype(jnp.int32), m.a, *m.b)
    y = build.call("SkinnyMatmul", result)(
        x,
        m.w,
        *factors,
        outs=np.array(m.widths, np.int64),
        rows=np.array(counts, np.int64),
        loops=np.int64(m.num_loops if factors else 0),
    )
    parts = jnp.split(y, np.cumsum(m.widths)[:-1], axis=-1)
    return [part[:n] for part, n in zip(parts, counts, strict=True)]


def by_xla(x: jax.Array, m: LoraMatrix, loop: jax.Array, counts: Sequence[int]) -> list[jax.Array]:
    """The same product by XLA: one wide adapter of all loops, masked (`layers.mask_loops`)."""
    parts = jnp.split(weights_first(x, m.w), np.cumsum(m.widths)[:-1], axis=-1)
    parts = [part[:n] for part, n in zip(parts, counts, strict=True)]
    if m.a is None:
        return parts
    wides = jnp.split(weights_first(x, m.a), np.cumsum(m.ranks)[:-1], axis=-1)
    return [
        y + weights_first(mask_loops(wide[:n], loop[:n], m.num_loops), b) if b.size else y
        for y, wide, b, n in zip(parts, wides, m.b, counts, strict=True)
    ]


def weights_first(x: jax.Array, w: jax.Array, out_dtype=None) -> jax.Array:
    """`x [R, in] @ w.T` in the form that XLA's CPU kernels compute fastest.

    With the matrix on the left, two rows and more take 0.7 to 0.8 of the time. The barrier stops
    XLA from reversing the product and from making one row part of a slow loop. Zero rows fill the
    kernel's tile: 12 rows alone take longer than 16.
    """
    count = len(x)
    full = count if count == 1 else 4 if count <= 4 else -(-count // 8) * 8
    x = jnp.pad(x, ((0, full - count), (0, 0)))
    y = jnp.matmul(w, x.T, preferred_element_type=out_dtype)
    return jax.lax.optimization_barrier(y).T[:count]
