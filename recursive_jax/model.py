"""A model to decode with: whatever its name stands for, opened, and put on its devices."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from recursive_jax import sharding, text
from recursive_jax.decoding.thresholds import Thresholds
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder, split_layers
from recursive_jax.models.parameters import logical_axes
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import Source, open_source

# One CPU's products read a layer's weights faster where they are than out of a stack, but compiling
# every layer takes longer: done for blocks of more bytes than a processor's cache holds, and for so
# many passes of the block that they win back what compiling takes.
SPLIT_BYTES, SPLIT_PASSES = 64 << 20, 500


@dataclasses.dataclass(frozen=True)
class Opened:
    """All about a model but its weights.

    Attributes:
      spec: a checkpoint of ours, or whatever `open_source` opens.
      stop: ids that end a text.
      calibrated: thresholds of early exits it came with.
    """

    spec: str
    cfg: DecoderConfig
    tokenizer: Any
    stop: tuple[int, ...]
    calibrated: Thresholds | None
    source: Source | None

    def load(self, mesh: jax.sharding.Mesh, dtype: Any, passes: float = 0) -> Model:
        """With its weights in `dtype`, sharded over `mesh`; for so many passes of the block."""
        rules = sharding.rules_for(mesh, self.cfg)
        where = sharding.shardings(logical_axes(self.cfg), mesh, rules)
        if self.source is None:
            params, _ = checkpoint.load_params(self.spec, where, dtype)
        else:
            params = sharding.put_stacks(self.source.params, where, dtype)
        block = sum(leaf.nbytes for leaf in jax.tree.leaves(params["block"]))
        split = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        split &= block > SPLIT_BYTES and passes > SPLIT_PASSES
        decoder = Decoder(
            self.cfg,
            dtype=dtype,
            data_shards=sharding.data_shards(mesh),
            scan_layers=not split,
        )
        return Model(decoder, split_layers(params) if split else params, mesh, rules)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on its devices."""

    decoder: Decoder
    params: Any
    mesh: jax.sharding.Mesh
    rules: tuple[tuple[str, Any], ...]


def open_model(spec: str) -> Opened:
    """Everything but the weights is read and checked.

    Raises:
      FileNotFoundError, ValueError: not there, not understood, or damaged; by name.
    """
    if checkpoint.is_checkpoint(spec):
        source, calibrated = None, Thresholds.load(spec)
        cfg, facts = checkpoint.load_config(spec)
        tokenizer = text.load_tokenizer(pathlib.Path(spec) / "tokenizer")
        generation_config = facts.get("generation_config")
    else:
        source, calibrated = open_source(spec), None
        cfg, tokenizer = source.cfg, source.load_tokenizer()
        generation_config = source.generation_config
    text.check_vocabulary(tokenizer, cfg.vocab_size)
    stop = text.stop_ids(tokenizer, generation_config)
    return Opened(spec, cfg, tokenizer, stop, calibrated, source)
