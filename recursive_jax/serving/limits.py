"""What a server accepts. Standard library only."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """Bounds of requests, with a flag of the job for each.

    Attributes:
      max_body_bytes: of a request's body; larger: 413.
      max_choices: prompts times `n` of a request; more: 400.
      max_stops: stop strings of a request, and `max_stop_length` characters of each; more: 400.
      max_logprobs: most likely tokens that are listed beside a token; more: 400.
      max_queue: choices that wait for a slot; more: 429.
      max_seconds: of a request, waiting included; longer: 504.
    """

    max_body_bytes: int = 4 << 20
    max_choices: int = 128
    max_stops: int = 16
    max_stop_length: int = 256
    max_logprobs: int = 5
    max_queue: int = 1024
    max_seconds: float = 600.0
