"""Settings of a run that fit and are fast: by arithmetic, then by the compiler."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from recursive_jax.ahead_of_time import CompiledStep, compiled_step
from recursive_jax.plan_models import PlannedModels
from recursive_jax.planning import Prediction, predict
from recursive_jax.training.config import TrainConfig

COMPILED = 3  # candidates that are compiled, at most
REMATS = ("dots", "full")
TENSORS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The end of a search.

    Attributes:
      plan: of the settings that were chosen; where nothing fits, of those that take least.
      compiled: their step, where steps were compiled.
      flags: that set them, as on the command line.
      fits: by the compiler, or else by arithmetic.
      tried, fitting: numbers of settings, by arithmetic.
      rows: of the fastest fitting settings: flags, bytes predicted, bytes compiled (or None), MFU.
      frees_most: where nothing fits: the one flag that frees most, and the bytes it frees.
    """

    plan: Prediction
    compiled: CompiledStep | None
    flags: str
    fits: bool
    tried: int
    fitting: int
    rows: list[tuple[str, int, int | None, float]]
    frees_most: tuple[str, int] | None

    def to_json(self) -> dict[str, Any]:
        names = ("flags", "fits", "tried", "fitting", "frees_most", "rows")
        return {name: getattr(self, name) for name in names}


def sweep(
    models: PlannedModels,
    config: TrainConfig,
    devices: Sequence[Any],
    real: Sequence[Any] | None,
    say: Callable[[str], None],
) -> Sweep:
    """Search mesh, micro-batches and recomputation of a run.

    Args:
      models, config: of the run; other settings stay.
      devices: of the slice, described.
      real: the compiler's devices; None compiles nothing.
      say: gets a line for every compile.

    Raises:
      ValueError: no mesh divides the batch.
    """
    found = []
    for changes in _candidates(config, len(devices)):
        changed = config.with_changes(**changes)
        try:
            found.append((_flags(config, changed), predict(models, changed, devices)))
        except ValueError as error:
            refused = error
    if not found:
        raise refused
    fitting = [(flags, plan) for flags, plan in found if plan.fits]
    fitting.sort(key=lambda pair: (pair[1].step_seconds, pair[1].bytes))
    if not fitting:
        flags, plan = min(found, key=lambda pair: pair[1].bytes)
        most = _frees_most(models, config, devices)
        return Sweep(plan, None, flags, False, len(found), 0, [], most)
    rows, chosen = [], None
    for flags, plan in fitting[:COMPILED]:
        compiled = None
        if real is not None and chosen is None:
            say(f"compiling {flags or 'the config as it is'} …")
            compiled = compiled_step(models, plan.config, real)
        fits = compiled is None or compiled.bytes <= plan.limit
        rows.append((flags, plan.bytes, compiled and compiled.bytes, plan.mfu))
        if chosen is None and fits:
            chosen = (plan, compiled, flags)
        last = (plan, compiled, flags)
    most = None if chosen else _frees_most(models, config, devices)
    return Sweep(*(chosen or last), chosen is not None, len(found), len(fitting), rows, most)


def _candidates(config: TrainConfig, devices: int) -> Iterator[dict[str, Any]]:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    meshes = []
    for tensor in TENSORS:
        if tensor in divisors:
            meshes.append((1, devices // tensor, tensor))
    # fsdp along one side of a slice, data along the other
    meshes += [(devices // n, n, 1) for n in divisors if n * n >= devices and n < devices]
    micro = [n for n in _powers(config.data.batch_size) if config.data.batch_size % n == 0]
    remats = dict.fromkeys((*REMATS, config.remat))
    for (data, fsdp, tensor), accumulate, remat in itertools.product(meshes, micro, remats):
        if config.data.batch_size // accumulate % (data * fsdp) == 0:
            yield {
                "mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor,
                "accumulate": accumulate, "remat": remat,
            }  # fmt: skip


def _powers(most: int) -> Iterator[int]:
    n = 1
    while n <= most:
        yield n
        n *= 2


def _flags(config: TrainConfig, changed: TrainConfig) -> str:
    names = ("mesh.data", "mesh.fsdp", "mesh.tensor", "accumulate", "remat")
    pairs = [(name, _get(config, name), _get(changed, name)) for name in names]
    return " ".join(f"--config.{name}={new}" for name, old, new in pairs if new != old)


def _get(config: TrainConfig, name: str) -> Any:
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)


def _frees_most(models, config, devices) -> tuple[str, int] | None:
    """The change of one setting that frees most memory, and the bytes it frees."""
    shards = len(devices)
    single: list[dict[str, Any]] = [
        {"accumulate": config.data.batch_size // shards},
        {"remat": "full"},
        {"gather": "layer"},
        {"mesh.fsdp": shards},
        {"data.context_length": config.data.context_length // 2},
        *({"mesh.tensor": n} for n in TENSORS[1:]),
    ]
    before, best = None, None
    for changes in [{}, *single]:
        try:
            plan = predict(models, config.with_changes(**changes), devices)
        except ValueError:
            continue
        if not changes:
            before = plan.bytes
            continue
        ((name, value),) = changes.items()
        freed = (before or 0) - plan.bytes
        if before is not None and freed > 0 and (best is None or freed > best[1]):
            best = (f"--config.{name}={value}", freed)
    return best
