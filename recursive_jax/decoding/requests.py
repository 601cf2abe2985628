"""What is asked of a decode loop and what comes back. Standard library only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
FIELDS = ("id", "prompt", "messages", *OPTIONS)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: penalties, temperature, then filters as ordered here.

    Attributes:
      temperature: 0 takes the most likely token (the filters then change nothing).
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens that holds this much probability;
        1 keeps all.
      min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
      seed: with the position, all the randomness there is: a request's tokens do not depend on
        what else is in the batch.
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
            ("temperature", False, 0, math.inf),
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

    @property
    def penalises(self) -> bool:
        """Whether what is chosen depends on which tokens there were, not on logits alone."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
      id: comes back with the completion.
      tokens: prompt ids, at least one.
      max_new_tokens: stop after so many, at least one.
      stop: token ids that end the text; they are not part of it.
      min_loops: loops that every token runs at least, whatever the exit measure says.
      max_loops: loops after which every token's successor is chosen at the latest; None means all.
      exit_threshold: of the engine's exit measure, after every loop; None means the engine's own.
      recorded_loops: for the measure 'recorded': loops after which each new token is chosen.
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

    def __post_init__(self):
        for name in ("tokens", "stop", "recorded_loops"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.tokens:
            raise ValueError("the prompt has no tokens; expected at least one")
        check_number("max_new_tokens", self.max_new_tokens, True, 1, 2**31 - 1)
        check_number("min_loops", self.min_loops, True, 1, 2**31 - 1)
        if self.max_loops is not None:
            check_number("max_loops", self.max_loops, True, self.min_loops, 2**31 - 1)

    def check_fits(self, context_length: int) -> None:
        """Raises ValueError when prompt and answer do not fit into the context together."""
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


def not_numbers(count: int) -> str:
    """Why a request ended whose new token number `count` has a NaN log-probability."""
    return (
        f"the model's logits for new token {count} are not numbers: damaged weights, or too large "
        "for the compute dtype (try float32)"
    )


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to one request since the last event about it.

    Attributes:
      index: which of the requests that were given.
      tokens: its new tokens, the stop token left out.
      exit_loops: loops executed for each of them, 1 … num_loops.
      logprobs: log-probability of each, nats, of the model itself: before temperature and filters.
      finish_reason: None while it goes on, at the end 'stop' (a stop token), 'length' or 'error'.
      error: what went wrong when finish_reason is 'error'.
    """

    index: int
    tokens: tuple[int, ...]
    exit_loops: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None = None
    error: str | None = None


@dataclasses.dataclass
class Completion:
    """A request's answer; `text` is for the caller to fill in, who has the tokenizer."""

    id: str | int
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    exit_loops: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    def add(self, event: Event) -> None:
        self.tokens.extend(event.tokens)
        self.exit_loops.extend(event.exit_loops)
        self.logprobs.extend(event.logprobs)
        self.finish_reason, self.error = event.finish_reason, event.error

    def to_json(self) -> dict[str, Any]:
        """`id, text, tokens, exit_loops, finish_reason`, and `error` where there is one."""
        record = {
            name: getattr(self, name)
            for name in ("id", "text", "tokens", "exit_loops", "finish_reason")
        }
        return record | ({"error": self.error} if self.error else {})


def check_number(name: str, value: Any, integer: bool, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a finite number in [low, high]."""
    kinds = (int,) if integer else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool)
    # the largest float is smaller than some integers, and not a number is in no range
    if not good or not low <= value <= min(high, sys.float_info.max):
        most = "" if high == math.inf else f" and at most {high}"
        raise ValueError(
            f"{name}={value!r}; expected {'an integer' if integer else 'a number'}, "
            f"at least {low}{most}"
        )


@dataclasses.dataclass
class Prompt:
    """A line of a prompts file, before there is a tokenizer.

    Attributes:
      content: a text to continue, or a conversation `{"role": ..., "content": ...}` to go on with.
      options: a value for each of `OPTIONS`, not checked yet.
      where: "FILE:LINE: " to begin errors with.
      error: why this line cannot be answered.
    """

    id: str | int
    content: str | list[dict[str, str]] = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""
    error: str | None = None


def read_prompts(path: str | os.PathLike, defaults: Mapping[str, Any]) -> list[Prompt]:
    """Prompts of a text file, one a line, or of a .jsonl file; empty lines are skipped.

    A line of a .jsonl file holds `prompt` or `messages`, and may hold `id` and `OPTIONS`. Without
    an id it gets its line number; without a seed one made of `defaults['seed']` and the line
    number, so that equal prompts get different samples. A bad line comes back with its `error`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not text, or no prompt in it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; expected prompts, one a line, or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    prompts, lines_of = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        options = {**defaults, "seed": _line_seed(defaults["seed"], number)}
        prompt = Prompt(number, line.rstrip("\r"), options, f"{path}:{number}: ")
        try:
            if path.suffix == ".jsonl":
                _read_record(prompt, line)
            if prompt.id in lines_of:
                raise ValueError(f"id {prompt.id!r} is taken by line {lines_of[prompt.id]}")
        except ValueError as error:
            prompt.error = f"{prompt.where}{error}"
        lines_of.setdefault(prompt.id, number)
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts; expected one a line")
    return prompts


def _line_seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _read_record(prompt: Prompt, line: str) -> None:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with prompt or messages, got {line[:40]}")
    name = record.get("id", prompt.id)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"id={name!r}; expected a string or an integer")
    prompt.id = name
    unknown = sorted(set(record) - set(FIELDS))
    if unknown:
        raise ValueError(f"unknown fields {unknown}; expected some of {', '.join(FIELDS)}")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError("expected either prompt or messages")
    if "prompt" in record:
        prompt.content = record["prompt"]
        if not isinstance(prompt.content, str):
            raise ValueError(f"prompt={prompt.content!r}; expected a string")
    else:
        prompt.content = record["messages"]
        if not _is_conversation(prompt.content):
            raise ValueError('messages: expected a list of {"role": "...", "content": "..."}')
    prompt.options = {**prompt.options, **{n: record[n] for n in OPTIONS if n in record}}


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(m, dict) and set(m) == {"role", "content"} for m in messages)
        and all(isinstance(value, str) for m in messages for value in m.values())
    )


class Answers:
    """A file of answers: FILE.part grows as they finish, FILE is written in order at the end.

    Args:
      path: FILE; its directory is made.
      write: False on all processes but one.
    """

    def __init__(self, path: str | os.PathLike, write: bool = True):
        self.path, self._write = pathlib.Path(path), write
        self._lines: dict[int, str] = {}
        self._file = None
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir() or not os.access(self.path.parent, os.W_OK):
                raise ValueError(f"cannot write {path}; expected a file in a writable directory")

    def add(self, index: int, completion: Completion) -> None:
        """`index` is its place in the file. On disk when this returns."""
        self._lines[index] = json.dumps(completion.to_json(), ensure_ascii=False) + "\n"
        if self._write:
            self._file = self._file or self._open(".part")
            self._file.write(self._lines[index])
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            with self._open(".sorted") as f:
                f.writelines(self._lines[index] for index in sorted(self._lines))
            os.replace(f.name, self.path)
            os.unlink(f"{self.path}.part")

    def _open(self, suffix: str):
        # What UTF-8 cannot hold (half a surrogate pair in an id) becomes a JSON escape.
        return open(f"{self.path}{suffix}", "w", encoding="utf-8", errors="backslashreplace")
