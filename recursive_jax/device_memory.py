"""Memory that a training step takes on each device, by arithmetic, and what follows from it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from recursive_jax import sharding
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params, head_params, logical_axes
from recursive_jax.training.gathered import Gather, split_dim
from recursive_jax.training.setup import TrainSetup

FILLED = 0.92  # share of a device's memory that is planned; the rest is code and fragments
WAYS = {
    "step": "gathered once a step",
    "micro": "gathered once a step, gradients reduced by micro-batch",
    "layer": "gathered layer by layer",
}

# GiB of memory of one JAX device, by the beginning of its `device_kind`; the longest goes first.
# cloud.google.com/tpu/docs, "HBM capacity per chip"; v2, v3 and 7x: half of it.
HBM_GIB = {
    "TPU v2": 8,
    "TPU v3": 16,
    "TPU v4": 32,
    "TPU v5": 95,
    "TPU v5 lite": 16,
    "TPU v5e": 16,
    "TPU v5p": 95,
    "TPU v6 lite": 32,
    "TPU v6e": 32,
    "TPU7x": 96,
}


def device_bytes(device: Any) -> int | None:
    """Memory of a device; None where it is not known, as on CPUs."""
    known = [kind for kind in HBM_GIB if f"{device.device_kind} ".startswith(f"{kind} ")]
    if known:
        return HBM_GIB[max(known, key=len)] << 30
    if device.platform == "cpu" or device not in jax.local_devices():
        return None
    return (device.memory_stats() or {}).get("bytes_limit")


def held(tree: Any, shardings: Any, itemsize: int | None = None) -> int:
    """Bytes on each device of arrays (or their shapes) in these shardings."""
    return sum(
        math.prod(s.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
        for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def whole(tree: Any, shardings: Any, itemsize: int) -> list[int]:
    """Bytes on each device of every array that is split over fsdp, once it is gathered."""
    found = []
    for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        if split_dim(s) is not None:
            found.append(held([x], [s], itemsize) * s.mesh.shape["fsdp"])
    return found


class Plan(NamedTuple):
    """How a step uses weights that are spread over devices.

    Attributes:
      setup: of the step, with its `gather` and `least_chunk`.
      sizes: bytes on each device by kind.
      words: the way, and why, for a person.
    """

    setup: TrainSetup
    sizes: dict[str, int]
    words: str


def step_bytes(
    setup: TrainSetup, mesh: Mesh, rows: int, length: int, way: str = "step"
) -> dict[str, int]:
    """Bytes on each device during a step, by kind.

    Args:
      setup: of the step; its own `gather` is not read.
      rows, length: of the batch, over all devices and micro-batches.
      way: 'step', 'micro' (`Gather.reduce_each`) or 'layer' (without a `Gather`).
    """
    cfg, wide = setup.model.cfg, np.dtype(setup.model.dtype).itemsize
    params, places = abstract_params(cfg), layout(cfg, mesh)[1]
    state = jax.eval_shape(setup.init, params)
    state_places = sharding.state_shardings(state, places, mesh)
    sizes = {
        "params": held(params, places),
        "optimizer": held(state.opt_state, state_places.opt_state),
        "gradient": held(params, places),
    }
    if state.ema is not None:
        sizes["average"] = held(state.ema, state_places.ema)
    local = rows // sharding.data_shards(mesh)
    block, head = params["block"], head_params(params)
    gathered_block = whole(block, places["block"], wide)
    gathered_head = whole(head, head_params(places), wide)
    if setup.teacher is not None:
        teacher, t_places = setup.teacher.cfg, layout(setup.teacher.cfg, mesh)[1]
        teacher_params = abstract_params(teacher)
        sizes["teacher"] = held(teacher_params, t_places, wide)
        gathered_teacher = whole(head_params(teacher_params), head_params(t_places), wide)
        sizes["teacher's head"] = sum(gathered_teacher)
        sizes["teacher's states"] = local * length * cfg.embed_dim * wide
    sizes["gathered head"] = sum(gathered_head)
    # Whole gradients; the largest, that of the head, is summed in float32.
    gradient = (sum(gathered_block) + sum(gathered_head)) if way != "layer" else 0
    gradient += max(gathered_head or [sizes["gradient"]]) * 4 // wide
    if way == "layer":
        sizes["gathered block"] = 2 * sum(gathered_block) // cfg.num_layers
    else:
        sizes["gathered block"] = sum(gathered_block)
        if setup.accumulate > 1:
            # Measured (docs/pods.md): the compiler reduces all of a micro-batch's gradients at
            # once, and each is whole in float32. Their sum is whole as well, if it is not split.
            gradient += (
                (sum(gathered_block) + sum(gathered_head)) * 4 // wide * (1 + (way == "step"))
            )
    sizes["whole gradient"] = gradient
    micro = max(local // setup.accumulate, 1)
    sizes["activations"] = activation_bytes(setup, mesh, micro, length)
    exits = cfg.num_loops if setup.exits else 1
    copies = exits + (setup.teacher is not None) + 1  # and a gradient
    chunk = setup.chunk(exits, micro * length)
    sizes["logits"] = 4 * chunk * copies * cfg.vocab_size // mesh.shape["tensor"]
    return sizes


def activation_bytes(setup: TrainSetup, mesh: Mesh, rows: int, length: int) -> int:
    """Bytes on each device of what the backward pass of `rows` rows needs, and of one layer."""
    model, tensor = setup.model, mesh.shape["tensor"]
    cfg, wide = model.cfg, np.dtype(model.dtype).itemsize
    tokens = rows * length
    carry = tokens * cfg.embed_dim * wide
    products = tokens * sum(out for _, out in cfg.projections.values()) * wide // tensor
    scores = 0
    if model.attention == "xla":  # float32 scores, and weights
        scores = rows * cfg.num_heads * length**2 * (4 + wide) // tensor
    layer = 4 * products + 2 * scores
    kept = {"full": 0, "offload_dots": 0, "dots": products, "none": layer}
    kept = kept.get(model.remat_policy, layer)
    loops = cfg.num_loops + (1 if setup.exits else 0)
    return (carry + kept) * cfg.depth + carry * loops + layer


@functools.lru_cache(maxsize=16)
def layout(cfg: DecoderConfig, mesh: Mesh) -> tuple[Any, Any]:
    """The rules of a model on a mesh, and the shardings of its params."""
    rules = sharding.rules_for(mesh, cfg)
    return rules, sharding.shardings(logical_axes(cfg), mesh, rules)


def plan(setup: TrainSetup, mesh: Mesh, rows: int, length: int, asked: str = "auto") -> Plan:
    """The way to gather weights: the one asked for, or the fastest that fits.

    Chunks of the loss are halved twice, if need be, before weights are gathered layer by layer.

    Args:
      setup: without `gather`; rows, length: as for `step_bytes`.
      asked: a value of `config.GATHER_CHOICES`.
    """
    limit = device_bytes(mesh.devices.flat[0])
    ways = ["step", *["micro"] * (setup.accumulate > 1), "layer"]
    if asked != "auto":
        ways = ways[:-1] if asked == "step" else ways[-1:]
    if sharding.data_shards(mesh) == 1:
        ways = ["layer"]
    chunks = [setup.least_chunk // part for part in (1, 2, 4) if setup.least_chunk >= part]
    for way, chunk in itertools.product(ways, chunks):
        tried = dataclasses.replace(setup, least_chunk=chunk)
        sizes = step_bytes(tried, mesh, rows, length, way)
        total = sum(sizes.values())
        fits = limit is None or total <= FILLED * limit
        if fits:
            break
    words = "whole, on one device"
    if sharding.data_shards(mesh) > 1:
        words = f"{WAYS[way]} ({'set' if asked != 'auto' else 'auto'})"
        tried = dataclasses.replace(tried, gather=_gather(setup, mesh, way))
    room = f" of {limit / 1e9:.1f}" if limit else ""
    words += f"; about {total / 1e9:.1f}{room} GB a device" + ("" if fits else ": may not fit")
    return Plan(tried, sizes, words)


def _gather(setup: TrainSetup, mesh: Mesh, way: str) -> Gather | None:
    if way == "layer":
        return None
    rules, places = layout(setup.model.cfg, mesh)
    teacher = setup.teacher
    head = None if teacher is None else head_params(layout(teacher.cfg, mesh)[1])
    dtype, rings = setup.model.dtype, sharding.rings(mesh)
    return Gather(mesh, rules, places, head, dtype, rings, way == "micro")
