"""From the body of a request to requests of the engine."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Sequence

from recursive_jax import text
from recursive_jax.decoding.prompts import make_request, with_special_stops
from recursive_jax.decoding.requests import Request
from recursive_jax.serving.errors import ApiError
from recursive_jax.serving.limits import ServerLimits
from recursive_jax.serving.schema import ChatBody, CompletionBody, Generation, Message
from recursive_jax.serving.served import Served

DEFAULT_TOKENS = 16  # of a completion, as OpenAI's


@dataclasses.dataclass
class Asked:
    """What one HTTP request asks for.

    Attributes:
      body: as it was parsed.
      prompts: token ids of each prompt.
      requests: `n` for each prompt, by choice.
      top: most likely tokens to list beside each token; None: no log-probabilities.
      echo: choices begin with the prompt.
      generates: False: only prompts are echoed.
      rescored: the most likely tokens beside new ones come from a pass over the whole answer.
    """

    body: Generation
    prompts: list[list[int]]
    requests: list[Request]
    top: int | None = None
    echo: bool = False
    generates: bool = True
    rescored: bool = False

    def prompt_of(self, choice: int) -> list[int]:
        return self.prompts[choice // self.body.n]


def completion(body: CompletionBody, served: Served, limits: ServerLimits) -> Asked:
    """What a body of `/v1/completions` asks for.

    Raises:
      ApiError: 400 or 404, the engine cannot answer it.
    """
    prompt = body.prompt
    is_ids = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
    prompts = [prompt] if isinstance(prompt, str) or is_ids else prompt
    _check(body, len(prompts), served, limits)
    top = body.logprobs
    longest = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if not longest and not body.echo:
        raise ApiError(400, "max_tokens: expected at least 1, or echo", "max_tokens")
    if body.echo and top is not None and not served.scores:
        raise ApiError(400, "echo with logprobs: not served on several devices", "echo")
    with as_client_errors("prompt"):
        ids = [_ids(prompt, served) for prompt in prompts]
    asked = _asked(body, ids, [longest] * len(ids), top, served, limits)
    return dataclasses.replace(asked, echo=body.echo, generates=longest > 0)


def chat(body: ChatBody, served: Served, limits: ServerLimits) -> Asked:
    """What a body of `/v1/chat/completions` asks for; errors as `completion`."""
    _check(body, 1, served, limits)
    longest = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if longest == 0:
        raise ApiError(400, "max_completion_tokens: expected at least 1", "max_completion_tokens")
    with as_client_errors("messages"):
        ids = chat_ids(body.messages, served)
    top = body.top_logprobs if body.logprobs else None
    longest = longest or max(served.context_length - len(ids), 1)
    return _asked(body, [ids], [longest], top, served, limits)


def chat_ids(messages: Sequence[Message], served: Served) -> list[int]:
    """Ids of a conversation. Raises ValueError."""
    ids = text.apply_chat(served.tokenizer, [message.to_template() for message in messages])
    text.check_ids(served.tokenizer, ids, served.limits.vocab_size)
    return ids


def check_model(name: str | None, served: Served) -> None:
    """Raise ApiError 404 for another model than the one that is served."""
    if name not in (None, served.name):
        raise ApiError(404, f"model: this server has {served.name!r} only", "model")


class as_client_errors:
    """A context in which a ValueError becomes an ApiError 400."""

    def __init__(self, param: str | None):
        self._param = param

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, ValueError):
            raise ApiError(400, str(error), self._param) from error


def _check(body: Generation, num_prompts: int, served: Served, limits: ServerLimits) -> None:
    """Raise ApiError for what can be said before anything is tokenised."""
    check_model(body.model, served)
    if not num_prompts:
        raise ApiError(400, "prompt: the list is empty; expected at least one prompt", "prompt")
    if num_prompts * body.n > limits.max_choices:
        raise ApiError(
            400,
            f"{num_prompts} prompts with n={body.n}: this server makes {limits.max_choices} "
            "choices at most for one request; send several requests",
            "n",
        )
    if len(body.stops) > limits.max_stops:
        raise ApiError(
            400, f"stop: {len(body.stops)} texts; expected {limits.max_stops} at most", "stop"
        )
    if any(not stop or len(stop) > limits.max_stop_length for stop in body.stops):
        raise ApiError(
            400, f"stop: expected texts of 1 to {limits.max_stop_length} characters", "stop"
        )
    if body.lossless is False and served.lossless:
        raise ApiError(
            400,
            "lossless: this server runs --lossless, so its tokens are always those of full depth; "
            "leave it out",
            "lossless",
        )
    _check_exits(body, served)


def _check_exits(body: Generation, served: Served) -> None:
    loops = served.limits.num_loops
    for name in ("min_loops", "max_loops"):
        if (getattr(body, name) or 1) > loops:
            raise ApiError(400, f"{name}: the model has {loops} loops", name)
    if (body.max_loops or loops) < body.min_loops:
        raise ApiError(400, "max_loops: expected at least min_loops", "max_loops")
    if (body.max_loops or loops) < loops and not served.limits.can_exit:
        raise ApiError(
            400, "max_loops: this server runs all loops; start it with --exit_measure", "max_loops"
        )
    name = "exit_measure_threshold"
    if body.exit_measure_threshold is not None:
        check = served.limits.check_threshold
        if check is None:
            raise ApiError(400, f"{name}: this server has no exit measure with a threshold", name)
        with as_client_errors(name):
            check(body.exit_measure_threshold)
    exits = body.exit_measure_threshold is not None or (body.max_loops or loops) < loops
    if body.lossless and exits and not served.lossless:
        raise ApiError(
            400,
            "lossless: this server runs all loops for it, so give no max_loops and no threshold",
            "lossless",
        )


def _ids(prompt: str | list[int], served: Served) -> list[int]:
    """Ids of one prompt. Raises ValueError."""
    if not isinstance(prompt, str):
        ids = list(prompt)
        if any(token >= served.limits.vocab_size for token in ids):
            raise ValueError(f"token ids: expected 0 … {served.limits.vocab_size - 1}")
    else:
        ids = text.encode(served.tokenizer, prompt, served.limits.vocab_size)
        prefix = text.bos_prefix(served.tokenizer)
        if prefix and ids[: 2 * len(prefix)] == prefix * 2:
            logging.warning("a prompt begins with two BOS tokens: the tokenizer adds one by itself")
    if not ids:
        raise ValueError("the prompt has no tokens; give it a text")
    return ids


def _asked(
    body: Generation, prompts: list[list[int]], longest: list[int], top: int | None,
    served: Served, limits: ServerLimits,
) -> Asked:  # fmt: skip
    if (top or 0) > limits.max_logprobs:
        name = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
        raise ApiError(400, f"{name}: expected {limits.max_logprobs} at most", name)
    rescored = bool(top) and any(longest) and not _knows_top(body, top)
    if rescored:
        _check_rescored(body, served)
    seed = secrets.randbits(32) if body.seed is None else body.seed
    requests = []
    for ids, most in zip(prompts, longest, strict=True):
        if len(ids) + most > served.context_length:
            raise ApiError(
                400,
                f"{len(ids)} tokens of the prompt and max_tokens={most} exceed the context of "
                f"{served.context_length} tokens; shorten the prompt or lower max_tokens",
                "max_tokens",
            )
        for _ in range(body.n):
            number = len(requests)
            options = _options(body, most, served) | {"seed": (seed + number) % 2**32}
            with as_client_errors(None):
                request = make_request(number, ids, _stop_ids(body, served), options)
                request = with_special_stops(request, served.tokenizer)
                if most:
                    served.limits.check(request)
            requests.append(request)
    return Asked(body, prompts, requests, top, rescored=rescored)


def _knows_top(body: Generation, top: int) -> bool:
    """Whether the engine knows the `top` most likely tokens: the one that it chooses."""
    penalties = body.presence_penalty, body.frequency_penalty, body.repetition_penalty - 1
    return top <= 1 and body.temperature == 0 and not any(penalties)


def _check_rescored(body: Generation, served: Served) -> None:
    """Raise ApiError if the answer cannot be scored once it is there."""
    deep = body.lossless or served.lossless or not served.limits.can_exit
    deep = deep or body.min_loops == served.limits.num_loops
    reason = None
    if body.stream:
        reason = "not in a stream"
    elif not served.scores:
        reason = "not on several devices"
    elif not deep:
        reason = "not for tokens that leave early; set lossless to true"
    if reason is not None:
        raise ApiError(
            400, f"logprobs: the most likely tokens are listed {reason}, or ask for 0 of them",
            "logprobs",
        )  # fmt: skip


def _stop_ids(body: Generation, served: Served) -> tuple[int, ...]:
    return () if body.ignore_eos else served.stop


def _options(body: Generation, most: int, served: Served) -> dict:
    all_loops = body.lossless and not served.lossless  # the same tokens, without drafts
    return {
        "max_new_tokens": max(most, 1),
        "temperature": body.temperature,
        "top_k": max(body.top_k, 0),
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "stop": body.stops,
        "min_loops": served.limits.num_loops if all_loops else body.min_loops,
        "max_loops": body.max_loops,
        "exit_threshold": body.exit_measure_threshold,
        "logprobs": True,
    }
