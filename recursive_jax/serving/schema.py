"""Bodies of requests: fields, types and ranges. An unknown field is an error, null is no value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recursive_jax.serving.errors import ApiError

# Fields of OpenAI's API that are not served: values that change nothing, and why others are wrong.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "the model is given no tools"),
    "tool_choice": (("none", "auto"), "the model is given no tools"),
    "parallel_tool_calls": ((True, False), "the model is given no tools"),
    "functions": (([],), "the model is given no functions"),
    "function_call": (("none", "auto"), "the model is given no functions"),
    "response_format": (({"type": "text"},), "answers are free text"),
    "logit_bias": (({},), "logits are changed by penalties only"),
    "best_of": ((1,), "n answers are made and all are returned"),
    "suffix": (("",), "the model continues a text and fills no gap"),
    "modalities": ((["text"],), "answers are text"),
    "store": ((False,), "answers are not stored"),
    "metadata": (({},), "answers are not stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "reasoning_effort": (("none",), "bound the loops with max_loops instead"),
}
PROMPT = "expected a text, a list of texts, a list of token ids, or a list of lists of token ids"
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Body(BaseModel):
    """A JSON object without other fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        """Leave out null, and values of unsupported fields that change nothing."""
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            neutral, reason = UNSUPPORTED.get(name, ((), ""))
            if value is None or any(type(value) is type(n) and value == n for n in neutral):
                continue
            if reason:
                raise ValueError(f"{name} is not supported: {reason}; leave it out")
            kept[name] = value
        return kept


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # no padding is added, which is always allowed


class Generation(Body):
    """The fields that completions and chat share.

    OpenAI's names and defaults. `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are those
    of other servers. The last ones are about depth.
    """

    model: str | None = None
    max_tokens: Count | None = None
    n: Positive = 1
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-100, le=100)
    frequency_penalty: float = Field(0.0, ge=-100, le=100)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    ignore_eos: bool = False
    user: str | None = Field(None, description="accepted and not used")
    exit_measure_threshold: float | None = Field(
        None, description="tokens leave when the score of the exit measure is above it"
    )
    min_loops: Positive = Field(1, description="loops that every token runs at least")
    max_loops: Positive | None = Field(None, description="loops that a token runs at most")
    lossless: bool | None = Field(None, description="true: the tokens are those of full depth")
    return_exit_loops: bool = Field(False, description="choices have `exit_loops`, one per token")
    return_token_ids: bool = Field(False, description="choices have `token_ids` of new tokens")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionBody(Generation):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str] | list[Count] | list[list[Count]]
    echo: bool = False
    logprobs: Count | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def to_template(self) -> dict[str, str]:
        """The message as chat templates read it. They call the developer 'system'."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(Generation):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Count = 0

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatBody:
        longest = self.max_completion_tokens
        if longest is not None and self.max_tokens not in (None, longest):
            raise ValueError(
                "max_tokens and max_completion_tokens differ; they are one limit, so give one"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs without logprobs; set logprobs to true")
        return self


class TokenizeBody(Body):
    """Body of `POST /tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = Field(default_factory=list)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("expected either prompt or messages")
        return self


class DetokenizeBody(Body):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[Count]


class ByLoopBody(Body):
    """Body of `POST /by_loop`: tokens of a prompt and its answer, and where the answer begins."""

    tokens: list[Count] = Field(min_length=2)
    start: Positive


class ReloadBody(Body):
    """Body of `POST /admin/reload`: the newest step, or this one, of the same checkpoint."""

    step: Count | None = None


def parse(kind: type[Body], data: bytes) -> Any:
    """The body in `data`, which is JSON.

    Raises:
      ApiError: 400, with the first thing that is wrong.
    """
    try:
        return kind.model_validate_json(data or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    words = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        words, param = f"the body is not JSON: {words.removeprefix('Invalid JSON: ')}", None
    elif first["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields)) if len(first["loc"]) == 1 else None
        words = f"unknown field {_short(param)}" + (f"; expected some of {known}" if known else "")
    elif first["loc"][:1] == ("prompt",) and first["type"] != "missing":
        words, param = f"prompt: {PROMPT}", "prompt"
    elif param:
        words = f"{_short(param)}: {words[:1].lower()}{words[1:]}"
    raise ApiError(400, words, _short(param))


def _short(name: str | None) -> str | None:
    """A field's name for a message: the client may have sent a name of any length."""
    return name if name is None or len(name) <= 80 else name[:77] + "..."
