"""What a training step takes and how long it lasts, by arithmetic on sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from recursive_jax import device_memory, fit, sharding
from recursive_jax.models.flops import TokenFlops, full_depth, training_flops
from recursive_jax.models.parameters import abstract_params, head_params
from recursive_jax.plan_models import PlannedModels
from recursive_jax.training.chips import bandwidths, peak_flops
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.draw_files import find_manifest
from recursive_jax.training.gathered import split_dim
from recursive_jax.training.setup import TrainSetup

SCORES = 2.96e9 / 2048**2  # bytes of HBM traffic per token, layer and token of a row: XLA attention
# HBM traffic of a layer beside its weights, by the bytes of its products: 0.6 GB for 2,048 tokens
# of Gemma 2B, forward, recomputed and backward, as compiled for v5e with the splash kernel.
LAYER = 3.7
OVER_TENSOR = "activations, over tensor"
TENSOR_LINKS = 0.5  # share of a chip's links that one axis of neighbours has
LOGITS = 4  # passes over float32 logits: written, normaliser, loss, gradient
OPTIMIZER = 7  # params, two moments, gradient: read; all but the gradient written


class Transfer(NamedTuple):
    """Collectives of one kind.

    Attributes:
      what, kind: what is moved, and how.
      times: in a step.
      bytes: that a device receives in a step.
      overlaps: with products beside it.
    """

    what: str
    kind: str
    times: int
    bytes: float
    overlaps: bool


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A training step by arithmetic.

    Attributes:
      config: of the run.
      mesh, setup: of the step.
      sizes: bytes on each device, by kind.
      way: how weights are gathered, in words.
      attention: the kernel, in words.
      gathers: of the block in a step, counted per weight.
      transfers: collectives.
      flops: model operations of a step, over all devices.
      seconds: of a step by cause; None where the chip is unknown.
      peak: bfloat16 FLOP/s of all devices, or None.
      limit: memory of a device, or None.
    """

    config: TrainConfig
    mesh: Mesh
    setup: TrainSetup
    sizes: dict[str, int]
    way: str
    attention: str
    gathers: int
    transfers: list[Transfer]
    flops: float
    seconds: dict[str, float] | None
    peak: float | None
    limit: int | None

    @property
    def bytes(self) -> int:
        """On each device."""
        return sum(self.sizes.values())

    @property
    def fits(self) -> bool | None:
        """Whether `device_memory.FILLED` of the memory holds it; None: the memory is unknown."""
        if self.limit is None:
            return None
        return self.bytes <= device_memory.FILLED * self.limit

    @property
    def step_seconds(self) -> float | None:
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def mfu(self) -> float | None:
        """Upper bound: products run at the peak, and nothing but the named causes is lost."""
        if self.seconds is None or self.peak is None:
            return None
        return self.flops / self.peak / self.step_seconds

    @property
    def run_seconds(self) -> float | None:
        """Of all steps."""
        return None if self.seconds is None else self.step_seconds * self.config.num_steps


def predict(models: PlannedModels, config: TrainConfig, devices: Sequence[Any]) -> Prediction:
    """The step of a run on these devices.

    Raises:
      ValueError: an impossible setting; the batch does not divide.
    """
    mesh = fit.make_mesh(config, devices)
    config.check_fits(models.student)
    num_ids, draws = None, 0
    if config.data.teacher:
        job = find_manifest(config.data.teacher).job
        num_ids, draws = job.num_ids, job.draws
    elif models.source and models.source.vocab_size != models.student.vocab_size:
        num_ids = min(models.source.vocab_size, models.student.vocab_size)
    plan = fit.plan_of(models.student, config, models.source, mesh, num_ids, draws)
    setup = plan.setup
    flops = fit.flops_of(config, setup)(models.student.num_loops)
    gathers, transfers = traffic(setup, mesh, config)
    kind = devices[0].device_kind
    peak = config.peak_flops or peak_flops(kind)
    return Prediction(
        config, mesh, setup, plan.sizes, plan.words,
        fit.attention_of(models.student, config, mesh)[1], gathers, transfers, flops,
        seconds_of(setup, mesh, config, plan.sizes, transfers, peak, kind),
        peak and peak * mesh.size, device_memory.device_bytes(devices[0]),
    )  # fmt: skip


def traffic(setup: TrainSetup, mesh: Mesh, config: TrainConfig) -> tuple[int, list[Transfer]]:
    """How often the block is gathered in a step, and the collectives of a step."""
    cfg, wide = setup.model.cfg, np.dtype(setup.model.dtype).itemsize
    fsdp, data, tensor = (mesh.shape[name] for name in ("fsdp", "data", "tensor"))
    micro, loops = config.accumulate, cfg.num_loops
    rows = config.data.batch_size // micro // sharding.data_shards(mesh)
    tokens = rows * config.data.context_length
    chunk = setup.chunk(loops if setup.exits else 1, tokens)
    chunks = -(-tokens // chunk) * micro
    params, places = abstract_params(cfg), device_memory.layout(cfg, mesh)[1]
    part = (fsdp - 1) / fsdp
    block = sum(device_memory.whole(params["block"], places["block"], wide)) * part
    head = sum(device_memory.whole(head_params(params), head_params(places), wide)) * part
    sums = 4 * _unsplit(params, places) * 2 * (mesh.size // tensor - 1) / (mesh.size // tensor)
    found: list[Transfer] = []

    def add(what, kind, times, size, overlaps=False):
        if size:
            found.append(Transfer(what, kind, times, times * size, overlaps))

    if setup.gather is not None:
        reduced = micro if setup.gather.reduce_each else 1
        gathers = 1 if block else 0
        add("block", "all-gather", 1, block)
        add("embedding and head", "all-gather", 1, head)
        scattered = (block + head) * 4 / wide
        add("gradients", "reduce-scatter", reduced, scattered, reduced > 1)
        if data > 1 and part:
            over_data = scattered / part / fsdp * 2 * (data - 1) / data
            add("gradients, over data", "all-reduce", reduced, over_data, reduced > 1)
    else:
        gathers = 2 * loops * micro if block else 0  # forward and backward
        add("block", "all-gather", gathers, block, True)
        add("gradients of the block", "all-reduce", loops * micro, 2 * block, True)
        add("head, by chunk of the loss", "all-gather", chunks, head)
        add("its gradients", "all-reduce", chunks, 2 * head)
        add("embedding", "all-gather", micro, head)
        add("its gradient", "all-reduce", micro, 2 * head * 4 / wide)
    add("what is not split", "all-reduce", 1, sums)
    if setup.teacher is not None and part:
        teacher = setup.teacher.cfg
        theirs, t_places = abstract_params(teacher), device_memory.layout(teacher, mesh)[1]
        layers = sum(device_memory.whole(theirs["block"], t_places["block"], wide)) * part
        outer = device_memory.whole(head_params(theirs), head_params(t_places), wide)
        add("teacher's layers", "all-gather", micro, layers, True)
        add("teacher's embedding", "all-gather", micro, max(outer, default=0) * part)
        gathers_head = micro if setup.gather is None else 1  # not by chunk: it is a constant there
        add("teacher's head", "all-gather", gathers_head, sum(outer) * part)
    if tensor > 1:
        passes = 6 if config.remat == "full" else 4  # two products each forward, again, backward
        depth = cfg.depth * passes + (setup.teacher.cfg.depth * 2 if setup.teacher else 0)
        size = tokens * cfg.embed_dim * wide * 2 * (tensor - 1) / tensor
        add(OVER_TENSOR, "all-reduce", depth * micro, size)
    return gathers, found


def _unsplit(params: Any, places: Any) -> int:
    """Numbers on each device of the params that are not split over fsdp."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True)
    return sum(device_memory.held([x], [s], 1) for x, s in pairs if split_dim(s) is None)


def seconds_of(
    setup: TrainSetup,
    mesh: Mesh,
    config: TrainConfig,
    sizes: dict[str, int],
    transfers: Sequence[Transfer],
    peak: float | None,
    device_kind: str,
) -> dict[str, float] | None:
    """Seconds of a step by cause, at best; None for an unknown chip.

    Products run at the peak, the recomputed ones of `remat` included. Transfers that overlap cost
    what they last longer than the products. What layers do beside products is bound by memory.
    """
    widths = bandwidths(device_kind)
    if peak is None or widths is None:
        return None
    hbm, links = widths
    cfg, teacher = setup.model.cfg, setup.teacher and setup.teacher.cfg
    length = config.data.context_length
    tokens = config.tokens_per_step / mesh.size  # of a device, where tensor splits a token as well
    model = tokens * training_flops(cfg, length, None, setup.exits, teacher)
    block = tokens * cfg.num_loops * TokenFlops.of(cfg, (length + 1) / 2).loop
    again = {"full": 1.0, "dots": 0.0, "none": 0.0}.get(config.remat, 0.0)
    depth = cfg.depth + (teacher.depth / 4 if teacher is not None else 0)
    heads = (cfg.num_loops if setup.exits else 1) + (teacher is not None)
    scores = SCORES * length * tokens * depth / hbm if setup.model.attention == "xla" else 0.0
    compute = (model + again * block) / peak
    products = sum(out for _, out in cfg.projections.values())
    vectors = LAYER * np.dtype(setup.model.dtype).itemsize * products * tokens * depth / hbm
    beside = sum(t.bytes for t in transfers if t.overlaps) / links
    return {
        "products": model / peak,
        "recomputed products": again * block / peak,
        "transfers": sum(
            t.bytes / (TENSOR_LINKS if t.what == OVER_TENSOR else 1)
            for t in transfers
            if not t.overlaps
        )
        / links,
        "transfers beside products, what they last longer": max(0.0, beside - compute),
        "activations of layers": vectors,
        "attention scores": scores,
        "logits": 4 * LOGITS * heads * tokens * cfg.vocab_size / hbm,
        "optimizer": OPTIMIZER * sizes["params"] / hbm,
    }


def token_flops(models: PlannedModels, config: TrainConfig) -> dict[str, float]:
    """Model operations of one token, by part."""
    cfg, length = models.student, config.data.context_length
    cost = TokenFlops.of(cfg, (length + 1) / 2)
    exits = cfg.num_loops if config.objective.exits and cfg.num_loops > 1 else 1
    parts = {"block": 3 * cfg.num_loops * cost.loop, "head": 3 * exits * cost.head}
    if config.objective.kd and not config.data.teacher:
        parts["teacher"] = full_depth(models.source, (length + 1) / 2)
    return parts
