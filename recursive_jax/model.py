"""A model to decode with: opened by name, and put on its devices."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from recursive_jax import sharding, text
from recursive_jax.console.output import note
from recursive_jax.cpu import build
from recursive_jax.cpu.cache import cache_class
from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.decoding.thresholds import Thresholds
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.interface import DecodeModel
from recursive_jax.models.kv_cache import RowCache
from recursive_jax.models.parameters import abstract_params, logical_axes
from recursive_jax.models.scanned import ScannedModel
from recursive_jax.models.tpu import PagedCache
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import Source, open_source

# The CPU model reads a block that exceeds the processor's cache faster than the scanned model. It
# compiles every layer, which takes longer: at least so many passes of the block amortise that.
CPU_BLOCK_BYTES, CPU_PASSES = 64 << 20, 500
GPU_BLOCK = 512  # cache rows that a GPU reads at once; a shorter cache is read whole


@dataclasses.dataclass(frozen=True)
class Opened:
    """All about a model except its weights.

    Attributes:
      spec: a checkpoint of ours, or a name that `open_source` opens.
      stop: ids that end a text.
      calibrated: thresholds of early exits that came with it.
      step: of a checkpoint of ours; None for the newest.
    """

    spec: str
    cfg: DecoderConfig
    tokenizer: Any
    stop: tuple[int, ...]
    calibrated: Thresholds | None
    source: Source | None
    step: int | None = None

    def load(
        self,
        mesh: jax.sharding.Mesh,
        dtype: Any,
        context_length: int,
        passes: float = 0,
        say: Callable[[str], None] = note,
    ) -> Model:
        """The model with its weights in `dtype` on `mesh`; other arguments as `decode_model`."""
        rules = sharding.rules_for(mesh, self.cfg)
        shardings = sharding.shardings(logical_axes(self.cfg), mesh, rules)
        if self.source is None:
            params, _ = checkpoint.load_params(self.spec, shardings, dtype, self.step, say)
        else:
            params = sharding.put_stacks(self.source.params, shardings, dtype)
        model = decode_model(self.cfg, dtype, mesh, context_length, passes, say)
        return Model(model, model.prepare(params, donate=True), mesh, rules)


@dataclasses.dataclass(frozen=True)
class Model:
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
    """
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
    if block_bytes > CPU_BLOCK_BYTES and passes > CPU_PASSES:
        return CpuModel(cfg, dtype)
    cache, attention = cache_class(cfg, dtype)
    return ScannedModel(decoder, cache, attention=attention)


def open_model(spec: str, step: int | None = None) -> Opened:
    """Everything but the weights, read and checked. `step`: of a checkpoint, None for the newest.

    Raises:
      FileNotFoundError, ValueError: not there, not understood, or damaged; by name.
    """
    if checkpoint.is_checkpoint(spec):
        source, calibrated = None, Thresholds.load(spec)
        if calibrated is not None:
            newest, params = checkpoint.params_checksum(spec, step)
            calibrated = calibrated.compare(newest, params)
            step = step if calibrated.stale else newest  # they are for these weights only
        cfg, facts = checkpoint.load_config(spec)
        tokenizer = text.load_tokenizer(pathlib.Path(spec) / "tokenizer")
        generation_config = facts.get("generation_config")
    else:
        if step is not None:
            raise ValueError(f"step={step} of {spec}, which is no checkpoint of this package")
        source, calibrated = open_source(spec), None
        cfg, tokenizer = source.cfg, source.load_tokenizer()
        generation_config = source.generation_config
    text.check_vocabulary(tokenizer, cfg.vocab_size)
    stop = text.stop_ids(tokenizer, generation_config)
    return Opened(spec, cfg, tokenizer, stop, calibrated, source, step)
