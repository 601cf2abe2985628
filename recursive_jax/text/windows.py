"""Windows of text for measuring perplexity."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from recursive_jax.text.pieces import pieces
from recursive_jax.text.tokenizer import Ids, bos_prefix, encode_batch


class Windows(NamedTuple):
    """Text cut into windows.

    Attributes:
      tokens: int32 `[N, T]`, padded with zeros after the end of a short window.
      scored: bool `[N, T]`; True where the log-probability of `tokens[n, t]` given
        `tokens[n, :t]` counts. `scored[:, 0]` and padding are always False.
    """

    tokens: np.ndarray
    scored: np.ndarray


def eval_windows(
    tokenizer: Any,
    texts: Iterable[str | Ids],
    context_length: int = 512,
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Windows:
    """Windows of texts; every job measures perplexity on windows from this function.

    A text is cut into consecutive windows of `context_length` tokens that do not overlap. No window
    has two texts. With a BOS rule, every window starts with it. Its ids count towards the length
    and are not scored, and every token of the text is scored once. Without a BOS rule, the first
    token of each window has no context and is not scored.

    Args:
      tokenizer: for the BOS rule, and for the ids of texts that are strings.
      texts: strings, or content ids of texts that are tokenised already.
      context_length: T, at least one token more than the BOS rule.
      max_tokens: stop after this many scored tokens; None takes all.
      vocab_size: of the model. A text with a larger id raises ValueError.

    Raises:
      ValueError: the texts have no token to score, or T is too short.
    """
    prefix = bos_prefix(tokenizer)
    unscored = max(len(prefix), 1)
    if context_length <= unscored:
        raise ValueError(
            f"context_length={context_length} leaves nothing to score behind the BOS rule "
            f"{prefix}; expected at least {unscored + 1}"
        )
    budget = np.inf if max_tokens is None else max_tokens
    step = context_length - len(prefix)
    windows = []
    for text in texts:
        for content in _blocks(_contents(text, tokenizer, vocab_size), step):
            if budget <= 0:
                break
            window = [*prefix, *content]
            window = window[: int(min(context_length, unscored + budget))]
            if len(window) > unscored:
                windows.append(window)
                budget -= len(window) - unscored
        if budget <= 0:
            break
    if not windows:
        raise ValueError("no text to measure perplexity on: expected at least two tokens of text")
    tokens = np.zeros((len(windows), context_length), np.int32)
    scored = np.zeros(tokens.shape, bool)
    for n, window in enumerate(windows):
        tokens[n, : len(window)] = window
        scored[n, unscored : len(window)] = True
    return Windows(tokens, scored)


def _contents(text: str | Ids, tokenizer: Any, vocab_size: int | None) -> Iterator[Ids]:
    """The content ids of a text, some at a time: of a long text, a few windows may be needed."""
    if not isinstance(text, str):
        yield text
        return
    for piece in pieces(text, functools.partial(encode_batch, tokenizer)):
        yield encode_batch(tokenizer, [piece.text], vocab_size)[0][piece.skip :]


def _blocks(parts: Iterable[Ids], length: int) -> Iterator[list[int]]:
    """The ids of all parts, `length` at a time; the last block may be shorter."""
    rest: list[int] = []
    for part in parts:
        rest += list(part)
        whole = len(rest) - len(rest) % length
        yield from (rest[start : start + length] for start in range(0, whole, length))
        rest = rest[whole:]
    if rest:
        yield rest
