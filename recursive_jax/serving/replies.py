"""From events of the engine to the JSON of answers."""

from __future__ import annotations

import collections
import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from recursive_jax import text
from recursive_jax.decoding.requests import Event
from recursive_jax.serving.asked import Asked
from recursive_jax.serving.schema import ChatBody
from recursive_jax.serving.scoring import Scores
from recursive_jax.serving.served import Served


@dataclasses.dataclass
class Token:
    """One token of an answer or of an echoed prompt.

    Attributes:
      id: of the vocabulary.
      piece: its text; '' while a character is incomplete.
      offset: of the piece in the choice's text.
      logprob: nats; None of a prompt's first token.
      top: `(token, log-probability)` of the most likely ones; None where they are not known.
    """

    id: int
    piece: str
    offset: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


class Choice:
    """One choice of an answer, as it grows.

    Attributes:
      index: in the answer.
      finish_reason: None while it grows.
    """

    def __init__(self, index: int, asked: Asked, served: Served):
        self.index, self.finish_reason = index, None
        self.text, self.exit_loops, self.token_ids = "", [], []
        self.tokens: list[Token] = []
        self._asked, self._served = asked, served
        self._reader: text.Detokenizer | None = None
        self._offset = self._echoed = 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Characters, tokens and exit loops so far."""
        return len(self.text), len(self.tokens), len(self.exit_loops)

    def echo(self, scores: Scores | None) -> None:
        """Begin with the prompt."""
        ids, tokenizer = self._asked.prompt_of(self.index), self._served.tokenizer
        self.text = tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if scores is not None:
            self._reader = text.Detokenizer(tokenizer)
            tops = [(), *scores.top]
            logprobs = [None, *scores.logprobs]
            for token, logprob, top in zip(ids, logprobs, tops[: len(ids)], strict=True):
                self._append(token, logprob, top[: self._asked.top])
            self._echoed = len(ids)

    def add(self, event: Event) -> None:
        """Append an event."""
        self.finish_reason = event.finish_reason
        self.text += event.piece
        self.exit_loops += event.exit_loops
        self.token_ids += event.tokens
        if self._asked.top is not None:
            if self._reader is None:
                prompt = self._asked.prompt_of(self.index)
                self._reader = text.Detokenizer(self._served.tokenizer, prompt)
            for token, logprob in zip(event.tokens, event.logprobs, strict=True):
                self._append(token, logprob, [(token, logprob)][: self._asked.top])
        if event.completion is not None:  # a stop string may have cut tokens of earlier events
            self.exit_loops = list(event.completion.exit_loops)
            self.token_ids = list(event.completion.tokens)
            del self.tokens[self._echoed + len(self.exit_loops) :]

    @property
    def ids(self) -> list[int]:
        """Token ids of the prompt and of the answer, which has log-probabilities."""
        answer = [token.id for token in self.tokens[self._echoed :]]
        return [*self._asked.prompt_of(self.index), *answer]

    def rescore(self, scores: Scores) -> None:
        """Take the log-probabilities of the answer from scores of `ids`."""
        start = len(self._asked.prompt_of(self.index)) - 1
        for place, token in enumerate(self.tokens[self._echoed :], start):
            token.logprob, token.top = scores.logprobs[place], scores.top[place][: self._asked.top]

    def _append(self, token: int, logprob: float | None, top) -> None:
        piece = self._reader.add([token])
        self.tokens.append(Token(token, piece, self._offset, logprob, top))
        self._offset += len(piece)

    def name(self, token: int) -> str:
        """A token's text, or its bytes where they are no whole character."""
        tokenizer = self._served.tokenizer
        name = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return f"token_id:{token}" if "\ufffd" in name else name


class Reply:
    """The answer to one HTTP request.

    Args:
      asked: the request.
      served: what answers it.
    """

    def __init__(self, asked: Asked, served: Served):
        self.asked, self._served = asked, served
        self.chat = isinstance(asked.body, ChatBody)
        self.choices = [Choice(i, asked, served) for i in range(len(asked.requests))]
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        self._head = {
            "id": prefix + uuid.uuid4().hex,
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }

    def whole(self) -> dict[str, Any]:
        """The answer, once all choices are over."""
        head = self._head | ({"object": "chat.completion"} if self.chat else {})
        choices = [self._whole_choice(choice) for choice in self.choices]
        return head | {"choices": choices, "usage": self.usage()}

    def begin(self) -> list[dict[str, Any]]:
        """The chunks before the first token: of a chat, the role of each choice."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": c.index, "delta": delta, "finish_reason": None}])
            for c in self.choices
        ]

    def chunk(self, choice: Choice, letters: int, tokens: int, loops: int) -> dict[str, Any]:
        """The chunk with what a choice has beyond these `Choice.sizes`."""
        new = {"index": choice.index, "finish_reason": choice.finish_reason}
        piece = choice.text[letters:]
        new |= {"delta": {"content": piece}} if self.chat else {"text": piece}
        details = self._details(choice, tokens, loops)
        return self._chunk([new | details])

    def last(self) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Counts of tokens, and the loops that new tokens ran."""
        prompt = sum(len(ids) for ids in self.asked.prompts)
        exits = collections.Counter(n for choice in self.choices for n in choice.exit_loops)
        new = exits.total()
        loops = sum(n * count for n, count in exits.items())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "mean_loops": loops / new if new else None,
            "exit_loops": {str(n): exits[n] for n in sorted(exits)},
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        return self._head | kind | {"choices": choices}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        whole = {"index": choice.index, "finish_reason": choice.finish_reason}
        if self.chat:
            whole["message"] = {"role": "assistant", "content": choice.text}
        else:
            whole["text"] = choice.text
        return whole | self._details(choice)

    def _details(self, choice: Choice, tokens: int = 0, new: int = 0) -> dict[str, Any]:
        """What is asked for of each token, after so many tokens and new tokens."""
        details: dict[str, Any] = {"logprobs": None}
        if self.asked.top is not None:
            make = _chat_logprobs if self.chat else _logprobs
            details["logprobs"] = make(choice, choice.tokens[tokens:], self.asked.top)
        if self.asked.body.return_exit_loops:
            details["exit_loops"] = choice.exit_loops[new:]
        if self.asked.body.return_token_ids:
            details["token_ids"] = choice.token_ids[new:]
        return details


def _logprobs(choice: Choice, tokens: Sequence[Token], top: int) -> dict[str, Any]:
    """Of completions: four lists, one entry per token."""
    tops = []
    for token in tokens:
        names: dict[str, float] = {}
        # The most likely of several tokens with one text; the token itself is always there.
        pairs = [*token.top, *([(token.id, token.logprob)] if token.logprob is not None else [])]
        for other, logprob in pairs:
            name = choice.name(other)
            names[name] = max(logprob, names.get(name, logprob))
        tops.append(names or None)
    return {
        "tokens": [choice.name(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _chat_logprobs(choice: Choice, tokens: Sequence[Token], top: int) -> dict[str, Any]:
    """Of chats: an object per token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        name = choice.name(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

    return {
        "content": [
            entry(token.id, token.logprob)
            | {"top_logprobs": [entry(*pair) for pair in token.top[:top]]}
            for token in tokens
        ],
        "refusal": None,
    }
