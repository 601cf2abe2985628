"""A training step that is compiled for devices that are only described."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from recursive_jax.analysis.collectives import Collective, collectives, wire_bytes
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
      collectives: of a step.
      seconds: that compiling took.
    """

    sizes: dict[str, int]
    collectives: list[Collective]
    seconds: float

    @property
    def bytes(self) -> int:
        """On each device. The compiler does not refuse what a device has no room for."""
        return sum(self.sizes.values())

    @property
    def student_in_loops(self) -> dict[str, int]:
        """Large collectives of the student in loops: kind -> how often in a step."""
        found: dict[str, int] = {}
        for c in self.collectives:
            if c.trips and c.whole >= LARGE and "/teacher/" not in c.label:
                found[c.kind] = found.get(c.kind, 0) + c.arrays * c.times
        return found

    def to_json(self) -> dict[str, Any]:
        """As in the file of `recursive_jax.plan`; `wire_bytes`: that a device receives."""
        return {
            "bytes_by_kind": self.sizes,
            "wire_bytes": wire_bytes(self.collectives),
            "student_in_loops": self.student_in_loops,
            "seconds": self.seconds,
        }


def compiled_step(
    models: PlannedModels, config: TrainConfig, devices: Sequence[Any]
) -> CompiledStep:
    """Compile the step of a run; minutes for a model of 2B."""
    began = time.perf_counter()
    plan = predict(models, config, devices)
    sizes = config.data.batch_size, config.data.context_length
    compiled = Trainer(plan.setup, plan.mesh).lower(*sizes).compile()
    memory = compiled.memory_analysis()
    return CompiledStep(
        {
            "arguments": memory.argument_size_in_bytes,
            "new outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        },
        collectives(compiled.as_text(), plan.mesh.size),
        round(time.perf_counter() - began, 1),
    )
