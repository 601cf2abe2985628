"""Files of prompts, and the requests that they become.

Every answer has an id of its own: that of its line, or the number of the line. A line whose id
another line has taken is an error. Its answer has the id 'line 7', where 7 is its number, so that
the id stands for the answer of the first line only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from recursive_jax import text
from recursive_jax.decoding.requests import Request, Sampling, shown

SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
# A line may set these; flags set them for all lines.
OPTIONS = (
    "max_new_tokens",
    *SAMPLING,
    "stop",
    "min_loops",
    "max_loops",
    "exit_threshold",
    "logprobs",
)
FIELDS = ("id", "prompt", "messages", *OPTIONS, "recorded_loops")


@dataclasses.dataclass
class Prompt:
    """A line of a prompts file, not tokenized yet.

    Attributes:
      content: a text to continue, or a conversation: a list of `{"role": ..., "content": ...}`.
      options: a value for each of `OPTIONS`, and perhaps `recorded_loops`; not checked yet.
      where: "FILE:LINE: ", the beginning of error messages.
      error: why this line cannot be answered.
      named: whether the line has an `id`. Otherwise `id` is its line number.
    """

    id: str | int
    content: str | list[dict[str, str]] = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""
    error: str | None = None
    named: bool = False


def make_request(
    name: str | int, tokens: Sequence[int], stop_ids: Sequence[int], options: Mapping[str, Any]
) -> Request:
    """The request of a tokenized prompt with the options of its line.

    Raises:
      ValueError: an option is out of range.
    """
    options = dict(options)
    sampling = Sampling(**{n: options.pop(n) for n in SAMPLING if n in options})
    strings = options.pop("stop", ())
    return Request(name, tokens, stop=stop_ids, sampling=sampling, stop_strings=strings, **options)


def to_request(
    prompt: Prompt,
    tokenizer: Any,
    vocab_size: int,
    stop_ids: Sequence[int],
    context_length: int,
    chat: bool = False,
) -> Request:
    """Tokenize a prompt; returns its request.

    Args:
      tokenizer: any tokenizer of `transformers`.
      vocab_size: of the model; every token id is below it.
      stop_ids: token ids that end the answer.
      context_length: tokens of prompt and answer together, at most.
      chat: apply the chat template to a text too, not only to a conversation.

    A stop string that is a special token stops at the token's id: texts of answers hold no special
    tokens.

    Raises:
      ValueError: the prompt cannot be answered. The message begins with `prompt.where`.
    """
    if prompt.error:
        raise ValueError(prompt.error)
    try:
        if chat or not isinstance(prompt.content, str):
            tokens = text.apply_chat(tokenizer, prompt.content)
            text.check_ids(tokenizer, tokens, vocab_size)
        else:
            tokens = text.encode(tokenizer, prompt.content, vocab_size)
        if not tokens:
            raise ValueError(
                "the prompt is empty and this tokenizer has no BOS to begin with; give it a text"
            )
        request = make_request(prompt.id, tokens, stop_ids, prompt.options)
        request = with_special_stops(request, tokenizer)
        request.check_fits(context_length)
    except ValueError as error:
        raise ValueError(f"{prompt.where}{error}") from error
    return request


def with_special_stops(request: Request, tokenizer: Any) -> Request:
    """The request, which also stops at the ids of special tokens among its stop strings.

    Raises:
      ValueError: a stop string holds a special token and other text.
    """
    if not request.stop_strings:
        return request
    ids = (*request.stop, *_special_ids(tokenizer, request.stop_strings))
    return dataclasses.replace(request, stop=dict.fromkeys(ids))


def _special_ids(tokenizer: Any, strings: Sequence[str]) -> list[int]:
    """Ids of the special tokens among stop strings.

    Raises:
      ValueError: a string holds a special token and other text. It would never be found.
    """
    added = tokenizer.added_tokens_decoder
    special = {token.content: i for i, token in added.items() if token.special}
    for string in strings:
        held = [token for token in special if token and token in string]
        if held and string not in special:
            raise ValueError(
                f"stop={shown(string)} holds the special token {max(held, key=len)!r} beside other "
                "text, and texts of answers hold no special tokens; give the token alone, or the "
                "text alone"
            )
    return [special[string] for string in strings if string in special]


def read_prompts(path: str | os.PathLike, defaults: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a text file, one a line, or of a .jsonl file. Empty lines are skipped.

    A line of a .jsonl file has `prompt` or `messages`, and may have the other `FIELDS`. Its default
    id is the line number, or "line 7" if another line has the id 7. Its default seed is made of
    `defaults['seed']` and the line number, so that equal prompts get different samples. The prompt
    of a bad line has an `error`. A line whose id is taken is such a line, and its id is "line 7".

    Raises:
      FileNotFoundError: no such file.
      ValueError: a directory, not text, or no prompt in it.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}; expected prompts, one a line, or .jsonl")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; expected a file of prompts in it")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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
        except ValueError as error:
            prompt.error = f"{prompt.where}{error}"
        if prompt.named and prompt.id in lines_of:
            taken = f"id {shown(prompt.id)} is taken by line {lines_of[prompt.id]}"
            prompt.error = prompt.error or f"{prompt.where}{taken}"
            prompt.id, prompt.named = f"line {number}", False
        elif prompt.named:
            lines_of[prompt.id] = number
        prompts.append(prompt)
    for prompt in prompts:
        while not prompt.named and prompt.id in lines_of:
            prompt.id = f"line {prompt.id}"
    if not prompts:
        raise ValueError(f"{path} holds no prompts; expected one a line")
    return prompts


def _line_seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _read_record(prompt: Prompt, line: str) -> None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("a number of too many digits, or lists too deep in each other") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with prompt or messages, got {line[:40]}")
    name = record.get("id", prompt.id)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"id={shown(name)}; expected a string or an integer")
    prompt.id, prompt.named = name, "id" in record
    unknown = sorted(set(record) - set(FIELDS))
    if unknown:
        raise ValueError(f"unknown fields {shown(unknown)}; expected some of {', '.join(FIELDS)}")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError("expected either prompt or messages")
    if "prompt" in record:
        prompt.content = record["prompt"]
        if not isinstance(prompt.content, str):
            raise ValueError(f"prompt={shown(prompt.content)}; expected a string")
    else:
        prompt.content = record["messages"]
        if not _is_conversation(prompt.content):
            raise ValueError('messages: expected a list of {"role": "...", "content": "..."}')
    loops = record.get("recorded_loops", [])
    if not isinstance(loops, list) or not all(type(n) is int for n in loops):
        raise ValueError(f"recorded_loops={shown(loops)}; expected a list of integers")
    given = {n: record[n] for n in (*OPTIONS, "recorded_loops") if n in record}
    prompt.options = {**prompt.options, **given}


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(m, dict) and set(m) == {"role", "content"} for m in messages)
        and all(isinstance(value, str) for m in messages for value in m.values())
    )
