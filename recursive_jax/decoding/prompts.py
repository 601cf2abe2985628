"""Files of prompts in, files of answers out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from recursive_jax import text
from recursive_jax.decoding.requests import Completion, Request, Sampling

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
        request.check_fits(context_length)
    except ValueError as error:
        raise ValueError(f"{prompt.where}{error}") from error
    return request


def read_prompts(path: str | os.PathLike, defaults: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a text file, one a line, or of a .jsonl file. Empty lines are skipped.

    A line of a .jsonl file has `prompt` or `messages`, and may have the other `FIELDS`. Its default
    id is the line number, or "line 7" if another line has the id 7. Its default seed is made of
    `defaults['seed']` and the line number, so that equal prompts get different samples. The prompt
    of a bad line has an `error`.

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
            if prompt.named and prompt.id in lines_of:
                raise ValueError(f"id {prompt.id!r} is taken by line {lines_of[prompt.id]}")
        except ValueError as error:
            prompt.error = f"{prompt.where}{error}"
        if prompt.named:
            lines_of.setdefault(prompt.id, number)
        prompts.append(prompt)
    for prompt in prompts:
        if not prompt.named and prompt.id in lines_of:
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
        raise ValueError(f"id={name!r}; expected a string or an integer")
    prompt.id, prompt.named = name, "id" in record
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
    loops = record.get("recorded_loops", [])
    if not isinstance(loops, list) or not all(type(n) is int for n in loops):
        raise ValueError(f"recorded_loops={loops!r}; expected a list of integers")
    given = {n: record[n] for n in (*OPTIONS, "recorded_loops") if n in record}
    prompt.options = {**prompt.options, **given}


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(m, dict) and set(m) == {"role", "content"} for m in messages)
        and all(isinstance(value, str) for m in messages for value in m.values())
    )


def check_writable(path: str | os.PathLike) -> None:
    """Make the directory of a file that will be written; ValueError if the file is not writable."""
    if _is_stream(pathlib.Path(path)):
        return
    real = pathlib.Path(os.path.realpath(path))
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=real.parent):  # permission bits alone do not tell
            writable = not real.is_dir() and (not real.exists() or os.access(real, os.W_OK))
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"cannot write {path}; expected a file in a writable directory")


def _is_stream(path: pathlib.Path) -> bool:
    """Whether a path is a pipe, a device or an open file, which must not be replaced by a file."""
    if not path.exists() or path.is_dir():
        return False
    return not path.is_file() or _descriptor(path) is not None


def _descriptor(path: pathlib.Path) -> int | None:
    """The descriptor behind /dev/stdout and the like.

    It is duplicated, not opened by name: a file opened by name is written from its beginning.
    """
    names = {"/dev/stdout": 1, "/dev/stderr": 2}
    number = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", os.path.abspath(path))
    return int(number[1]) if number else names.get(os.path.abspath(path))


class Answers:
    """A file of answers. FILE.part grows as answers finish; `close` writes FILE in order.

    As a context manager it closes at the end and after an error. An interrupted run leaves
    FILE.part. A pipe or a device such as /dev/stdout gets all answers in `close`.

    Args:
      path: FILE, or a link to it. Its directory is made.
      write: whether this process writes; False on all processes but one.
    """

    def __init__(self, path: str | os.PathLike, write: bool = True):
        self._stream = _is_stream(pathlib.Path(path))
        self.path = pathlib.Path(path if self._stream else os.path.realpath(path))
        self._write, self._lines, self._file = write, {}, None
        if write:
            check_writable(path)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not KeyboardInterrupt:
            self.close()

    def add(self, index: int, completion: Completion, logprobs: bool = False) -> None:
        """Write one answer; it is on disk when this returns.

        Args:
          index: place of the answer in the file.
          completion: the answer.
          logprobs: whether its record has the log-probabilities of the tokens.
        """
        record = completion.to_json(logprobs)
        self._lines[index] = json.dumps(record, ensure_ascii=False) + "\n"
        if self._write and not self._stream:
            self._file = self._file or self._open(".part")
            self._file.write(self._lines[index])
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._write_all(".sorted")
            os.replace(f"{self.path}.sorted", self.path)
            os.unlink(f"{self.path}.part")
            self._file = None
        elif self._stream and self._write:
            self._write_all("")
            self._write = False

    def _write_all(self, suffix: str) -> None:
        with self._open(suffix) as f:
            f.writelines(self._lines[index] for index in sorted(self._lines))

    def _open(self, suffix: str):
        # Half a surrogate pair in an id is not UTF-8; it is written as a JSON escape.
        number = _descriptor(self.path)
        where = f"{self.path}{suffix}" if number is None else os.dup(number)
        return open(where, "w", encoding="utf-8", errors="backslashreplace")
