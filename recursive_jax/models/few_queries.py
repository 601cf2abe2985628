"""One query per lane over the rows of a `KVCache`: attention of decoding on a CPU.

`few_queries.cc` does what `attention.attend_cached` does, in one pass over the rows; where it
cannot be compiled (`native`) that one does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models import native
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.kv_cache import KVCache

_MOST_SIZE = 512  # of a head, as in few_queries.cc


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
    return None if native.has("FewQueries") else "it is not compiled"


def attend(
    q: jax.Array,
    cache: KVCache,
    where,
    positions: jax.Array,
    window: jax.Array | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """What `attention.attend_cached` does with one query per lane, q `[B, 1, N, H]`, float32.

    Where it meets NaN only the head that does is NaN, there all heads of the lane.
    """
    loop, layer, slots = where
    lanes = lambda numbers: jnp.broadcast_to(numbers, slots.shape).astype(jnp.int32)  # noqa: E731
    windows = () if window is None else (lanes(window),)
    y = native.call("FewQueries", jax.ShapeDtypeStruct(q[:, 0].shape, jnp.float32))(
        q[:, 0],
        cache.keys,
        cache.values,
        jnp.reshape(layer, 1).astype(jnp.int32),
        lanes(loop),
        lanes(slots),
        positions[:, 0].astype(jnp.int32),
        *windows,
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0),
    )
    return y[:, None]
