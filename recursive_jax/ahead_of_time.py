"""A training step that is compiled for devices that are only described."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from recursive_jax.analysis.collectives import collectives, wire_bytes
from recursive_jax.plan_models import PlannedModels
from recursive_jax.planning import predict
from recursive_jax.trainer import Trainer
from recursive_jax.training.config import TrainConfig

LARGE = 1 << 20  # bytes of a collective that may be of weights


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler made of a step.

    Attributes:
      sizes: bytes on each device by kind, as the compiler has them.
      wire: bytes that a device receives in a step.
      student_in_loops: large collectives of the student in loops: kind -> how often in a step.
      seconds: that compiling took.
    """

    sizes: dict[str, int]
    wire: float
    student_in_loops: dict[str, int]
    seconds: float

    @property
    def bytes(self) -> int:
        """On each device. The compiler does not refuse what a device has no room for."""
        return sum(self.sizes.values())

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compiled_step(
    models: PlannedModels, config: TrainConfig, devices: Sequence[Any]
) -> CompiledStep:
    """Compile the step of a run; minutes for a model of 2B."""
    began = time.perf_counter()
    plan = predict(models, config, devices)
    sizes = config.data.batch_size, config.data.context_length
    compiled = Trainer(plan.setup, plan.mesh).lower(*sizes).compile()
    memory = compiled.memory_analysis()
    found = collectives(compiled.as_text(), plan.mesh.size)
    in_loops: dict[str, int] = {}
    for c in found:
        if c.trips and c.whole >= LARGE and "/teacher/" not in c.label:
            in_loops[c.kind] = in_loops.get(c.kind, 0) + c.arrays * c.times
    return CompiledStep(
        {
            "arguments": memory.argument_size_in_bytes,
            "new outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        },
        wire_bytes(found),
        in_loops,
        round(time.perf_counter() - began, 1),
    )
