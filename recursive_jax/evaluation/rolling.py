"""Perplexity as lm-eval defines it: of documents, by word and by byte.

A document is cut into windows of predicted tokens that do not overlap: every token is predicted
once. The first window starts behind the prefix token, and every later one behind the last token of
the window before it. The last window is short, so that it has more context: as much as the model
takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from recursive_jax.evaluation.likelihood import Pair, Score
from recursive_jax.evaluation.perplexity import exp

DEFINITION = (
    "lm-eval loglikelihood_rolling: documents in disjoint windows of max_length tokens, each "
    "behind one token of context, the last one behind as many as fit; per word (split at white "
    "space), per UTF-8 byte and per token"
)


def windows(tokens: Sequence[int], prefix: int, max_length: int) -> list[Pair]:
    """(context, tokens that it predicts) of every window of a document."""
    pairs = []
    for start in range(0, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        context = list(tokens[end - max_length - 1 : start]) if start else [prefix]
        pairs.append((context, list(tokens[start:end])))
    return pairs


def summarise(documents: Sequence[str], counts: Sequence[int], scores: Sequence[Score]) -> dict:
    """Perplexities by loops executed.

    Args:
      documents: the texts.
      counts: tokens of every window of all documents.
      scores: of these windows, in the same order.
    """
    tokens = int(sum(counts))
    words = sum(len(re.split(r"\s+", text)) for text in documents)
    size = sum(len(text.encode()) for text in documents)
    nll = -np.array([score.loglikelihood for score in scores])  # [N, E]
    totals = nll.sum(0)
    out: dict[str, Any] = {
        "definition": DEFINITION,
        "documents": len(documents),
        "tokens": tokens,
        "words": words,
        "bytes": size,
    }

    def measures(total: float, error: float) -> dict[str, float]:
        return {
            "nll": total / tokens,
            "nll_stderr": error,
            "perplexity": exp(total / tokens),
            "word_perplexity": exp(total / words),
            "byte_perplexity": exp(total / size),
            "bits_per_byte": total / size / math.log(2),
        }

    errors = [ratio_error(column, np.array(counts)) for column in nll.T]
    exits = [measures(float(t), e) for t, e in zip(totals, errors, strict=True)]
    return out | exits[-1] | ({"loops": exits} if len(exits) > 1 else {})


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of `sum(sums) / sum(counts)` over independent windows; None for one window."""
    if len(sums) < 2:
        return None
    rest = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt(len(sums) / (len(sums) - 1) * (rest**2).sum()) / counts.sum())
