"""What a resumed run must share with the run that was saved."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from recursive_jax.training.config import TrainConfig
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig

PROGRESS_KEY = "plan"  # in the saved progress; renaming it would break resuming older runs


@dataclasses.dataclass(frozen=True)
class RunContract:
    """Values that determine the steps of a run, by the names under which a step saves them.

    A key that an older run did not save has the default here. A new setting therefore needs a
    default that means "as before", and does not refuse an older run.

    Attributes:
      training_text, held_out_text: hashes of the tokenised text.
      teacher_draws: fingerprint; '': the teacher runs in each step, or there is none.
      near_start: the settings are those of `TrainConfig.from_near`.
      clipping, own_lora_rate, ema, optimizer: these change the tree of the saved state.
    """

    num_steps: int
    batch_size: int
    context_length: int
    seed: int
    training_text: str
    held_out_text: str
    clipping: bool
    own_lora_rate: bool
    objective: Objective
    ema: bool = False
    near_start: bool = False
    loop_curriculum: str = "none"
    teacher_draws: str = ""
    optimizer: str = "adamw"

    _SAVED_AS = {
        "training_text": "training text",
        "held_out_text": "held-out text",
        "clipping": "gradient clipping",
        "own_lora_rate": "own LoRA rate",
        "ema": "averaged weights",
        "near_start": "near start",
        "loop_curriculum": "loop curriculum",
        "teacher_draws": "draws of the teacher",
    }

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        training: np.ndarray | str,
        held_out: np.ndarray,
        near_kl: float | None = None,
        teacher_draws: str = "",
    ) -> RunContract:
        """The contract of a config and its text.

        Args:
          config: of the run.
          training: hashes of the training documents, uint64 `[D]`, or `Rows.content`.
          held_out: tokens of the held-out windows, int32 `[N, T]`.
          near_kl: of a near start, for which the config is; None: the start is another.
          teacher_draws: fingerprint of them; '': there are none.
        """
        curriculum = config.loop_curriculum
        if curriculum == "growing":
            curriculum += f" over {config.loop_curriculum_share} of the run"
        return cls(
            num_steps=config.num_steps,
            batch_size=config.data.batch_size,
            context_length=config.data.context_length,
            seed=config.seed,
            training_text=training if isinstance(training, str) else _hash(training),
            held_out_text=_hash(held_out),
            clipping=config.optimizer.clip_norm > 0,
            own_lora_rate=config.optimizer.lora_lr_scale != 1.0,
            objective=config.objective,
            ema=config.ema_decay > 0,
            near_start=near_kl is not None,
            loop_curriculum=curriculum,
            teacher_draws=teacher_draws,
            optimizer=_state_of(config.optimizer),
        )

    @classmethod
    def records_start(cls, saved: Mapping[str, Any]) -> bool:
        """Whether a saved run knew of near starts; an older one goes on as it was."""
        return cls._SAVED_AS["near_start"] in saved

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {self._SAVED_AS.get(name, name): value for name, value in values.items()}

    def check(self, saved: Mapping[str, Any], workdir: str | os.PathLike) -> None:
        """Raise ValueError, with both values, where a saved run had another value."""
        here = self.to_json()
        defaults = {
            self._SAVED_AS.get(field.name, field.name): field.default
            for field in dataclasses.fields(self)
            if field.default is not dataclasses.MISSING
        }
        there = {**defaults, **saved}
        if isinstance(there.get("objective"), Mapping):  # it may lack terms that are newer
            there["objective"] = dataclasses.asdict(Objective()) | dict(there["objective"])
        changed = [name for name in here if there.get(name) != here[name]]
        if not changed:
            return
        then = ", ".join(f"{name} was {there.get(name, 'not recorded')}" for name in changed)
        now = ", ".join(f"{name} is {here[name]}" for name in changed)
        raise ValueError(
            f"{workdir} cannot go on where it stopped: {then}; now {now}. "
            f"Put it back, or start a new --workdir with --config.init_from={workdir}"
        )


def _state_of(optimizer: OptimizerConfig) -> str:
    """What determines the arrays of an optimizer besides clipping and the LoRAs' rate."""
    words = [optimizer.name]
    if optimizer.mu_dtype != "float32":
        words.append(f"with moments in {optimizer.mu_dtype}")
    if optimizer.rates:
        words.append(f"at rates {optimizer.rates!r}")
    return " ".join(words)


def _hash(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
