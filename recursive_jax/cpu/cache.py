"""A cache whose decode lanes attend by a kernel for one CPU.

`kernels/decode_attention.cc` writes the new rows and attends, in one pass over the rows. It writes
into the cache that it is given, see `decoding.donation`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from recursive_jax.cpu import build
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.interface import Rows
from recursive_jax.models.kv_cache import ArrayCache, KVCache

KERNEL = "decode_attention.cc"
MOST_HEAD_DIM = 512  # as in the kernel


@struct.dataclass
class CpuCache(KVCache):
    """A `KVCache` on one CPU. A NaN in one head of a lane stays in that head."""

    @classmethod
    def unsupported(cls, cfg: DecoderConfig, dtype: Any, length: int) -> str | None:
        """Why the kernel cannot serve this model, in words, or None if it can."""
        if np.dtype(dtype) != np.float32:
            return f"it does not take {np.dtype(dtype).name}"
        if cfg.head_dim % 8 or cfg.head_dim > MOST_HEAD_DIM:
            return f"head_dim={cfg.head_dim} is not a multiple of 8 up to {MOST_HEAD_DIM}"
        return None if build.has("DecodeAttention") else "it is not compiled"

    def attend(self, q, k, v, rows: Rows, layer, window, scale, softcap):
        """Write k and v, then attend; see `interface.Cache`."""
        lanes = len(q) - rows.prompt
        if not lanes:
            return super().attend(q, k, v, rows, layer, window, scale, softcap)
        y, cache = self._attend_lanes(
            q[:lanes], k, v, rows, layer, None if window is None else window[:lanes], scale, softcap
        )
        if rows.prompt:
            new = slice(lanes, len(q))
            prompt = Rows(rows.loop[new], rows.position[new], rows.slot[new], rows.prompt)
            limits = None if window is None else window[new]
            y_prompt = cache.look(q[new], prompt, layer, limits, scale, softcap)
            y = jnp.concatenate([y, y_prompt])
        return y, cache

    def _attend_lanes(self, q, k, v, rows: Rows, layer, window, scale, softcap):
        """The kernel: q `[B, N, H]` belongs to the first B of the new rows."""

        def ints(numbers, count):
            return jnp.broadcast_to(numbers, count).astype(jnp.int32)

        def like(array):
            return jax.ShapeDtypeStruct(array.shape, jnp.float32)

        call = build.call(
            "DecodeAttention",
            (like(q), like(self.keys), like(self.values)),
            input_output_aliases={3: 1, 4: 2},
        )
        y, keys, values = call(
            q,
            k,
            v,
            self.keys,
            self.values,
            ints(layer, 1),
            *(ints(column, len(k)) for column in (rows.loop, rows.slot, rows.position)),
            *(() if window is None else (ints(window, len(q)),)),
            scale=np.float32(scale),
            softcap=np.float32(softcap or 0),
        )
        return y, self.replace(keys=keys, values=values)


def cache_class(cfg: DecoderConfig, dtype: Any) -> tuple[type[ArrayCache], str]:
    """The cache for one CPU, and how rows attend to it, in words."""
    reason = CpuCache.unsupported(cfg, dtype, 0)
    if reason is None:
        return CpuCache, f"{KERNEL} kernel"
    return KVCache, f"XLA ({KERNEL}: {reason})"
