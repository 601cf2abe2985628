"""`x @ wt.T` for a few rows x: where decoding on a CPU spends its time.

XLA's CPU kernels read the matrix once for every row, or copy it into blocks first. The kernel
reads it once for all rows, and adds their LoRAs on the way; where it cannot be compiled (`native`)
XLA's kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.cpu import build

MOST_ROWS = 64  # of our kernel: for more, XLA's take less time


class Lora(NamedTuple):
    """LoRAs of projections that read the same rows, for all loops: what `split_layers` makes."""

    loop: jax.Array  # int32 [N], of each row
    num_loops: int
    at: jax.Array  # [sum of L·R, in], of one projection after the other
    bts: Sequence[jax.Array]  # [out, L·R] of each


def few_rows(x: jax.Array, wt: jax.Array, out_dtype=None) -> jax.Array:
    """`x [..., in] @ wt.T` for `wt [out, in]`, on one CPU; speeds are in docs/results.md."""
    rows = x.reshape(-1, x.shape[-1])
    if takes(rows, wt, out_dtype or x.dtype):
        y = by_kernel(rows, wt)
    else:
        y = by_xla(rows, wt, out_dtype)
    return y.reshape(*x.shape[:-1], wt.shape[0])


def takes(rows: jax.Array, wt: jax.Array, out_dtype) -> bool:
    """Whether our kernel multiplies these `rows [N, in]`: few, of float32, on a CPU."""
    dtypes = {jnp.dtype(d) for d in (rows.dtype, wt.dtype, out_dtype)}
    ours = 0 < len(rows) <= MOST_ROWS and wt.size and dtypes == {jnp.dtype(jnp.float32)}
    return bool(ours and jax.default_backend() == "cpu" and build.has("SkinnyMatmul"))


def by_kernel(
    rows: jax.Array,
    wt: jax.Array,
    members: Sequence[tuple[int, int]] = (),
    lora: Lora | None = None,
) -> jax.Array:
    """`rows [N, in] @ (wt.T + a[loop] @ b[loop])` by `skinny_matmul.cc`; where `takes` is True.

    Args:
      members: (rows of wt, first rows of x that it is asked for) of the projections that wt joins;
        what nobody asks for is not computed, and undefined. () is one that is asked for all.
    """
    members = members or ((len(wt), len(rows)),)
    shape = jax.ShapeDtypeStruct((len(rows), len(wt)), jnp.float32)
    loras = () if lora is None else (lora.loop.astype(jnp.int32), lora.at, *lora.bts)
    outs, asked = (np.array(numbers, np.int64) for numbers in zip(*members, strict=True))
    loops = np.int64(0 if lora is None else lora.num_loops)
    return build.call("SkinnyMatmul", shape)(rows, wt, *loras, outs=outs, rows=asked, loops=loops)


def by_xla(rows: jax.Array, wt: jax.Array, out_dtype=None) -> jax.Array:
    """`rows [N, in] @ wt.T` in the form that XLA's CPU kernels take least time for.

    With the matrix on the left two rows and more take 0.7 to 0.8 of the time. The barrier keeps XLA
    from turning the product around again, and from making one row part of a slow loop. Rows of
    zeros fill up what the kernel takes at once: without them 12 rows take longer than 16.
    """
    count = len(rows)
    full = count if count == 1 else 4 if count <= 4 else -(-count // 8) * 8
    rows = jnp.pad(rows, ((0, full - count), (0, 0)))
    y = jnp.matmul(wt, rows.T, preferred_element_type=out_dtype)
    return jax.lax.optimization_barrier(y).T[:count]
