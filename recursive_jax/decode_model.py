"""The choice between the implementations of `models.interface.DecodeModel`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from recursive_jax import sharding
from recursive_jax.console.output import note
from recursive_jax.cpu import build
from recursive_jax.cpu.cache import cache_class
from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.interface import DecodeModel
from recursive_jax.models.kv_cache import RowCache
from recursive_jax.models.parameters import abstract_params
from recursive_jax.models.scanned import ScannedModel
from recursive_jax.models.tpu import PagedCache

# The CPU model reads a block that exceeds the processor's cache faster than the scanned model. It
# compiles every layer, which takes longer: at least so many passes of the block amortise that.
CPU_BLOCK_BYTES, CPU_PASSES = 64 << 20, 500
GPU_BLOCK = 512  # cache rows that a GPU reads at once; a shorter cache is read whole


@dataclasses.dataclass(frozen=True)
class OnDevices:
    """A model on its devices; `params` are as `decoder.prepare` returns them."""

    decoder: DecodeModel
    params: Any
    mesh: jax.sharding.Mesh
    rules: tuple[tuple[str, Any], ...]


def decode_model(
    cfg: DecoderConfig,
    dtype: Any,
    mesh: jax.sharding.Mesh,
    context_length: int,
    passes: float = 0,
    say: Callable[[str], None] = note,
) -> DecodeModel:
    """The implementation of `models.interface.DecodeModel` for these devices.

    Args:
      dtype: compute dtype.
      mesh: the devices.
      context_length: rows of a cache slot.
      passes: expected passes of the block; few passes do not amortise a long compilation.
      say: is given the progress of building the CPU kernels, a line at a time.

    Raises:
      ValueError: the layers are shared in an order that cannot be decoded loop after loop.
    """
    cfg.check_decodes()
    platform, decoder = mesh.devices.flat[0].platform, Decoder(cfg, dtype=dtype)
    if platform == "tpu":
        axes = dict(sharding.rules_for(mesh, cfg)).get("heads") or ()
        axes = (axes,) if isinstance(axes, str) else axes
        shards = math.prod(mesh.shape[axis] for axis in axes)
        name = "ragged paged attention"
        reason = PagedCache.unsupported(cfg, dtype, context_length, shards)
        if reason is None:
            return ScannedModel(decoder, PagedCache, attention=f"{name} kernel")
        return ScannedModel(decoder, RowCache, attention=f"XLA ({name}: {reason})")
    if platform != "cpu":
        reason = f"our kernels are for TPUs and CPUs, not {platform}"
        return ScannedModel(decoder, block_length=GPU_BLOCK, attention=f"XLA ({reason})")
    if mesh.size > 1:
        return ScannedModel(decoder, attention="XLA (the CPU's kernels are for one device)")
    build.has("SkinnyMatmul", say)  # built here, where its progress can be shown
    leaves = jax.tree.leaves(abstract_params(cfg)["block"])
    block_bytes = sum(leaf.size for leaf in leaves) * np.dtype(dtype).itemsize
    if block_bytes > CPU_BLOCK_BYTES and passes > CPU_PASSES and not cfg.prefix_length:
        return CpuModel(cfg, dtype)
    cache, attention = cache_class(cfg, dtype)
    return ScannedModel(decoder, cache, attention=attention)
