"""One query per lane over the rows of a `KVCache`: attention of decoding on a CPU.

`decode_attention.cc` writes new rows and does what `attention.attend_cached` does, in one pass
over the rows; where it cannot be compiled (`native`) XLA does both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.cpu import build
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.kv_cache import KVCache

_MOST_SIZE = 512  # of a head, as in decode_attention.cc


def refusal(cfg: DecoderConfig, dtype: Any, devices: int = 1) -> str | None:
    """Why the kernel cannot serve this model, or None if it can.

    Args:
      dtype: of the cache.
      devices: that the cache is spread over.
    """
    if devices > 1:
        return "it is for one device"
    if np.dtype(dtype) != np.float32:
        return f"it does not take {np.dtype(dtype).name}"
    if cfg.head_dim % 8 or cfg.head_dim > _MOST_SIZE:
        return f"head_dim={cfg.head_dim} is not a multiple of 8 up to {_MOST_SIZE}"
    return None if build.has("DecodeAttention") else "it is not compiled"


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    where,
    positions: jax.Array,
    window: jax.Array | None,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, KVCache]:
    """What `Cache.write` and then `attention.attend_cached` do, for one query per lane; float32.

    Where it meets NaN only the head that does is NaN, there all heads of the lane.

    Args:
      q: `[B, 1, N, H]`, asked at the place of the first B rows.
      k, v: the new rows, `[R, 1, K, H]`, R >= B.
      where: loop (scalar or `[R]`), layer, slots `[R]`.
      positions: `[R, 1]`.
      window: scalar or `[B]`, or None.

    Returns:
      `[B, 1, N, H]`, and the cache with the new rows.
    """
    loop, layer, slots = where
    ints = lambda numbers, count: jnp.broadcast_to(numbers, count).astype(jnp.int32)  # noqa: E731
    rows, lanes = len(k), len(q)
    windows = () if window is None else (ints(window, lanes),)
    like = lambda array: jax.ShapeDtypeStruct(array.shape, jnp.float32)  # noqa: E731
    results = like(q[:, 0]), like(cache.keys), like(cache.values)
    y, keys, values = build.call("DecodeAttention", results, input_output_aliases={3: 1, 4: 2})(
        q[:, 0],
        k[:, 0],
        v[:, 0],
        cache.keys,
        cache.values,
        ints(layer, 1),
        ints(loop, rows),
        ints(slots, rows),
        ints(positions[:, 0], rows),
        *windows,
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0),
    )
    return y[:, None], KVCache(keys, values)
