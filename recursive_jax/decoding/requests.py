"""Requests of a decode loop, and their answers. Standard library only.

A request runs beside others, and which ones is left to chance: it depends on the slots and on the
time of arrival. This is what does not depend on the others:

- The random numbers of a token. They depend on `Sampling.seed` and the token's position only.
- The number of loops that `recorded_loops`, a static exit or full depth give a token.
- The log-probabilities in float32, up to 1e-5. Their last bits differ: the compiler multiplies
  batches of other sizes in another order, for example where the prompt of another request runs
  beside a token.

In float32 a greedy token is therefore the same, unless two tokens are equally likely up to that
difference. A sampled token, a draft or an early exit likewise changes only where it is decided by
that difference. In bfloat16 the differences are larger, so that such near-ties are more frequent.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
import sys
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: penalties, temperature, then filters as ordered here.

    Attributes:
      temperature: 0 takes the most likely token (the filters then change nothing).
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens that holds this much probability;
        1 keeps all.
      min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
      seed: the random numbers of a token depend on it and on the token's position only.
      repetition_penalty: logits of tokens in prompt or answer are divided by it where positive,
        else multiplied (CTRL); 1 changes nothing.
      presence_penalty: taken off the logits of tokens that are in the answer.
      frequency_penalty: taken off as often as the token is in the answer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self):
        for name, integer, low, high in (
            ("temperature", False, 0, 1e6),
            ("top_k", True, 0, 2**31 - 1),
            ("top_p", False, 0, 1),
            ("min_p", False, 0, 1),
            ("seed", True, 0, 2**32 - 1),
            ("repetition_penalty", False, 0.01, 100),
            ("presence_penalty", False, -100, 100),
            ("frequency_penalty", False, -100, 100),
        ):
            check_number(name, getattr(self, name), integer, low, high)
        if self.top_p == 0:
            raise ValueError("top_p=0 keeps no token; expected more than 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
      id: repeated in the completion.
      tokens: prompt ids, at least one.
      max_new_tokens: stop after so many, at least one.
      stop: token ids that end the text; they are not part of it.
      min_loops: the fewest loops of every token, whatever its exit score.
      max_loops: the most loops before a token's successor is chosen (drafted, if the engine is
        lossless); None means all. Without `lossless` the prompt's last token runs all loops.
      exit_threshold: of the engine's exit measure, after every loop; None: the engine's own.
      recorded_loops: for the measure 'recorded': loops after which each new token is chosen. The
        first one is a draft. Without `lossless` it has no effect: the prompt runs all loops.
      stop_strings: texts that end the answer and are not part of it. `session.Session` finds them
        when it has a tokenizer.
      logprobs: return the log-probability of every generated token, in nats.
    """

    id: str | int
    tokens: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[int, ...] = ()
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    min_loops: int = 1
    max_loops: int | None = None
    exit_threshold: float | None = None
    recorded_loops: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self):
        for name in ("tokens", "stop", "recorded_loops"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "stop_strings", _strings(self.stop_strings))
        if not self.tokens:
            raise ValueError("the prompt has no tokens; expected at least one")
        check_number("max_new_tokens", self.max_new_tokens, True, 1, 2**31 - 1)
        check_number("min_loops", self.min_loops, True, 1, 2**31 - 1)
        if self.max_loops is not None:
            check_number("max_loops", self.max_loops, True, self.min_loops, 2**31 - 1)
        if not isinstance(self.logprobs, bool):
            raise ValueError(f"logprobs={shown(self.logprobs)}; expected true or false")

    def check_fits(self, context_length: int) -> None:
        """Raises ValueError unless prompt and answer fit into the context together."""
        if len(self.tokens) >= context_length:
            raise ValueError(
                f"the prompt has {len(self.tokens)} tokens, the context holds {context_length} "
                "and needs room for an answer; shorten the prompt or raise context_length"
            )
        if len(self.tokens) + self.max_new_tokens > context_length:
            raise ValueError(
                f"{len(self.tokens)} prompt tokens + max_new_tokens={self.max_new_tokens} do not "
                f"fit into context_length={context_length}; lower the one or raise the other"
            )


def _strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(
            f"stop={shown(stop)}; expected a text, or a list of texts, none of them empty"
        )
    return tuple(strings)


def not_numbers(count: int) -> str:
    """The error of a request whose new token number `count` has a NaN log-probability."""
    return (
        f"the model's logits for new token {count} are not numbers: damaged weights, or too large "
        "for the compute dtype (try float32)"
    )


@dataclasses.dataclass(frozen=True)
class Event:
    """News about one request since its previous event.

    Attributes:
      index: number of the request in its session.
      tokens: new tokens, without the stop token. A stop string ends a completion earlier than the
        events before it, if it begins in their tokens.
      exit_loops: loops executed for each token, 1 … num_loops.
      logprobs: log-probability of each token in nats, of the model itself: before temperature and
        filters.
      finish_reason: None while the request goes on. At its end 'stop' (a stop token or a stop
        string), 'length' or 'error'.
      error: the error message when finish_reason is 'error'.
      piece: new text; '' without a tokenizer.
      completion: the whole answer, in the last event of the request.
    """

    index: int
    tokens: tuple[int, ...]
    exit_loops: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None = None
    error: str | None = None
    piece: str = ""
    completion: Completion | None = None


@dataclasses.dataclass
class Completion:
    """The answer to a request. `text` is empty unless the session has a tokenizer."""

    id: str | int
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    exit_loops: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @classmethod
    def failed(cls, name: str | int, error: object) -> Completion:
        """The answer to a request that cannot be answered."""
        return cls(name, finish_reason="error", error=str(error))

    def add(self, event: Event) -> None:
        """Append the tokens of an event."""
        self.tokens.extend(event.tokens)
        self.exit_loops.extend(event.exit_loops)
        self.logprobs.extend(event.logprobs)
        self.finish_reason, self.error = event.finish_reason, event.error

    def cut(self, count: int) -> None:
        """End the answer after its first `count` tokens, because of a stop string."""
        for column in (self.tokens, self.exit_loops, self.logprobs):
            del column[count:]
        self.finish_reason, self.error = "stop", None

    def to_json(self, logprobs: bool = False) -> dict[str, Any]:
        """The record `id, text, tokens, exit_loops, finish_reason`, and `error` if there is one.

        With `logprobs` also the log-probabilities in nats, rounded to six decimals. They were
        computed in float32.
        """
        record = {name: getattr(self, name) for name in ("id", "text", "tokens", "exit_loops")}
        if logprobs:
            record["logprobs"] = [round(x, 6) for x in self.logprobs]
        record["finish_reason"] = self.finish_reason
        return record | ({"error": self.error} if self.error else {})


def check_number(name: str, value: Any, integer: bool, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a finite number in [low, high]."""
    kind = numbers.Integral if integer else numbers.Real
    good = isinstance(value, kind) and not isinstance(value, bool)
    # the largest float is smaller than some integers, and not a number is in no range
    if not good or not low <= value <= min(high, sys.float_info.max):
        most = "" if high == math.inf else f" and at most {high}"
        raise ValueError(
            f"{name}={shown(value)}; expected {'an integer' if integer else 'a number'}, "
            f"at least {low}{most}"
        )


def shown(value: Any) -> str:
    """The repr of a value for an error message; long strings, numbers and lists are shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)
