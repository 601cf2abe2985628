"""Memory that a conversion takes at most, counted from shapes before anything is read."""

from __future__ import annotations

import math
import os

from recursive_jax import calibration
from recursive_jax.evaluation import moments
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import leaves
from recursive_jax.weights import tying
from recursive_jax.weights.tie_config import TieConfig

BASE = 1.0e9  # of Python, JAX and compiled programs
OVERHEAD = 1.25  # of allocators, and what is not counted
LOGITS = 1 << 30  # of the parts that run the head, at most


def num_bytes(cfg: DecoderConfig, tied: DecoderConfig, how: TieConfig) -> float:
    """Bytes of host memory, at most, on a CPU; a device has its own copy of one result.

    Args:
      cfg: of the source.
      tied: of the result; with a `lora_budget` its ranks are not known yet.
      how: of the conversion.
    """
    result = 4 * sum(math.prod(leaf.shape) for leaf in leaves(tied).values())
    if how.lora_budget is not None:
        result += 4 * how.lora_budget * sum(
            math.prod(leaf.shape) for leaf in leaves(cfg).values() if leaf.in_block
        )  # fmt: skip
    calibrated = calibration.needed(how)
    results = 2 if calibrated and how.resolved().metric == "auto" else 1
    fit = max(_fit(cfg, name, tied.num_loops, calibrated) for name in cfg.projections)
    logits = min(LOGITS, 4 * 4 * 8 * calibration.CONTEXT_LENGTH * cfg.vocab_size)
    measured = result + logits  # the device's copy, which is this memory too
    parts = [results * result + max(fit, measured), _outer(cfg) + logits + _layer(cfg)]
    if calibrated:
        parts.append(_pass(cfg))
    return BASE + OVERHEAD * max(parts)


def _fit(cfg: DecoderConfig, name: str, num_loops: int, calibrated: bool) -> int:
    """Float64 arrays of the fit of one projection, in as many layers as run at once."""
    in_dim, out_dim = cfg.projections[name]
    matrices = (2 * num_loops + 26) * in_dim * out_dim  # L-BFGS alone has 13
    square = min(in_dim, out_dim) ** 2 * 3  # Gram matrix and eigenvectors
    if calibrated:
        sizes = (math.prod(moments.block_shape(n)) for n in (in_dim, out_dim))
        square += sum(sizes) * (2 * num_loops + 6)
    workers = 1
    if in_dim * out_dim < tying.LARGE:
        workers = min(tying.LAYERS_AT_ONCE, os.cpu_count() or 1)
    return 8 * workers * (matrices + square)


def _outer(cfg: DecoderConfig) -> int:
    """Embedding and head: the host's copy and the device's."""
    return 2 * 4 * sum(math.prod(x.shape) for x in leaves(cfg).values() if not x.in_block)


def _layer(cfg: DecoderConfig) -> int:
    return 2 * 4 * sum(math.prod(x.shape[1:]) for x in leaves(cfg).values() if x.in_block)


def _pass(cfg: DecoderConfig) -> int:
    """The passes that measure moments: one layer, its moments, the states of some windows."""
    shapes = moments.probe_shapes(cfg).values()
    probes = 4 * 4 * sum(math.prod(shape) for shape in shapes)
    positions = moments.WINDOWS * min(calibration.CONTEXT_LENGTH, cfg.max_length)
    states = 4 * positions * (20 * cfg.embed_dim + 8 * cfg.mlp_dim)
    scores = 4 * 4 * positions * cfg.num_heads * min(calibration.CONTEXT_LENGTH, cfg.max_length)
    logits = 4 * 4 * moments.WINDOWS * 64 * cfg.vocab_size
    return _outer(cfg) + _layer(cfg) + probes + states + scores + logits
