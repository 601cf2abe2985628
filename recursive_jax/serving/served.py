"""What a server serves: the facts that turn a body into requests, and events into an answer."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from recursive_jax.decoding.limits import Limits


@dataclasses.dataclass
class Served:
    """A model with its engine, as clients see it.

    Attributes:
      name: of the model, in requests and answers.
      step: of the checkpoint; None for other models.
      tokenizer: for the HTTP side only; the engine's thread has its own.
      stop: token ids that end a text.
      limits: of the engine.
      lossless: the engine drafts at early exits, and its tokens are those of full depth.
      scores: prompts can be scored (`echo` with `logprobs`).
      created: seconds since the epoch.
    """

    name: str
    step: int | None
    tokenizer: Any
    stop: tuple[int, ...]
    limits: Limits
    lossless: bool = False
    scores: bool = True
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def context_length(self) -> int:
        return self.limits.context_length

    @property
    def fingerprint(self) -> str | None:
        """`system_fingerprint` of answers: the checkpoint's step."""
        return None if self.step is None else f"step-{self.step}"
