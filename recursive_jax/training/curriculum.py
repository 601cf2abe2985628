"""How many loops of the block a training step runs."""

from __future__ import annotations

import dataclasses

import numpy as np

CURRICULA = ("none", "random", "growing")


@dataclasses.dataclass(frozen=True)
class LoopCurriculum:
    """The number of loops of every step of a run.

    Attributes:
      kind: 'random': uniform in 1 … num_loops, drawn from seed and step. 'growing': from one loop
        to all of them over the first `share` of the steps, in equal parts.
      share: of the steps, for 'growing'.
      num_loops: of the model.
      num_steps, seed: of the run.

    Raises:
      ValueError: the model has one loop only.
    """

    kind: str
    share: float
    num_loops: int
    num_steps: int
    seed: int

    def __post_init__(self):
        if self.num_loops < 2:
            raise ValueError(
                f"loop_curriculum={self.kind!r} runs fewer loops than the model has, and this one "
                "has one loop; leave it out, or set model.num_loops"
            )

    def loops(self, step: int) -> int:
        """Loops of a step, 1 … num_loops. Steps count from 0.

        A function of the step alone: it is the same in every process, and in a run that resumes.
        """
        if self.kind == "random":
            return int(np.random.default_rng([self.seed, step]).integers(1, self.num_loops + 1))
        grown = step / (self.share * self.num_steps)  # 1 at the first step with all loops
        return min(self.num_loops, 1 + int(grown * (self.num_loops - 1) + 1e-9))  # against rounding
