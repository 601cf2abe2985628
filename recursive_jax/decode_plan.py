"""Memory and speed of a decode engine on one device, by arithmetic."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from recursive_jax import device_memory, sharding
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.kv_cache import KVCache
from recursive_jax.models.parameters import abstract_params, parameter_counts
from recursive_jax.training.chips import bandwidths


def decode_plan(
    cfg: DecoderConfig, device: Any, dtype: str, slots: int, context: int
) -> dict[str, Any]:
    """Bytes and bounds of an engine, as JSON; a bound is None for an unknown device.

    A tick runs the block once for every slot. It reads the block, the head, and the keys and values
    of one loop. Full depth takes `num_loops` ticks a token.

    Args:
      cfg: of the model.
      device: that it runs on.
      dtype: of weights and cache, as `sharding.compute_dtype` takes it.
      slots, context: requests at once, and the cache rows of each.
    """
    wide = np.dtype(sharding.compute_dtype(dtype)).itemsize
    counts = parameter_counts(abstract_params(cfg))
    cache = _cache_bytes(cfg, slots, context, wide)
    weights = counts["total"] * wide
    head = cfg.vocab_size * cfg.embed_dim * wide
    block = (counts["total"] - counts["embedding"]) * wide
    limit = device_memory.device_bytes(device)
    room = None if limit is None else device_memory.FILLED * limit - weights
    widths = bandwidths(device.device_kind)
    tick = block + head + cache / cfg.num_loops
    ticks = widths and widths[0] / tick
    return {
        "slots": slots,
        "context": context,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "bytes": weights + cache,
        "device_bytes": limit,
        "fits": None if room is None else cache <= room,
        "most_slots": None if room is None else max(int(room // (cache / slots)), 0),
        "bytes_per_tick": tick,
        "ticks_per_second": ticks,
        "tokens_per_second_full_depth": ticks and slots * ticks / cfg.num_loops,
    }


def _cache_bytes(cfg: DecoderConfig, slots: int, context: int, wide: int) -> int:
    cache = jax.eval_shape(lambda: KVCache.zeros(cfg, slots, context))
    return sum(x.size for x in jax.tree.leaves(cache)) * wide
