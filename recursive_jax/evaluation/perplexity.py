"""Perplexity of every exit on windows of text."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.chunked_head import chunk_length, chunked_sum, cross_entropy
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import head_params


def perplexity(
    model: Decoder,
    params: Any,
    tokens: np.ndarray,
    scored: np.ndarray,
    batch_size: int = 8,
    all_loops: bool = False,
    put: Callable[[Any], Any] = jnp.asarray,
) -> dict[str, Any]:
    """Perplexity of every exit.

    Args:
      model: decoder of the params.
      params: nested.
      tokens: int `[N, T]` windows.
      scored: bool `[N, T]`, True where `tokens[n, t]` is scored.
      batch_size: windows per call of the model.
      all_loops: measure every exit, not only the last loop.
      put: host batch -> device batch, in the sharding of the caller.

    Returns:
      `nll` (nats per scored token), `perplexity`, `tokens`, and `nll_stderr`: the standard error
      of `nll` over independent windows, None for a single one. With `all_loops` also `nll_exits`,
      `perplexity_exits` and `nll_stderr_exits`, lists by loops executed.
    """
    moments, counts = 0.0, scored[:, 1:].sum(1).astype(np.float64)
    count = int(counts.sum())
    if not count:
        raise ValueError("no scored tokens: expected at least one True behind the first column")
    score = _scorer(model, all_loops)
    for batch in _batches(tokens, scored, batch_size):
        moments = moments + np.asarray(score(params, *put(batch)), np.float64)
    totals, squares, products = moments
    nll = totals / count
    out = {"nll": float(nll[-1]), "perplexity": exp(nll[-1]), "tokens": count}
    errors = [None] * len(nll)
    if (windows := np.count_nonzero(counts)) > 1:  # the error of a ratio of two sums
        spread = squares - 2 * nll * products + nll**2 * (counts**2).sum()
        variance = windows / (windows - 1) * np.maximum(spread, 0)
        errors = [float(x) for x in np.sqrt(variance) / count]
    out["nll_stderr"] = errors[-1]
    if all_loops:
        out["nll_stderr_exits"] = errors
        out["nll_exits"] = [float(x) for x in nll]
        out["perplexity_exits"] = [exp(x) for x in nll]
    return out


def exp(nll: float) -> float:
    """The perplexity of a mean nll in nats: at most exp(700), which JSON can express."""
    return math.exp(min(nll, 700))  # exp overflows above 709; NaN stays NaN


def _batches(tokens, scored, batch_size) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(tokens), batch_size):
        rows = tokens[start : start + batch_size], scored[start : start + batch_size]
        short = batch_size - len(rows[0])
        yield tuple(np.pad(x, ((0, short), (0, 0))) for x in rows)  # padding is not scored


@functools.lru_cache(maxsize=8)
def _scorer(model: Decoder, all_loops: bool):
    """Jitted `(params, tokens [B, T], scored [B, T]) -> [3, E]`.

    Sums over windows of their summed nll, of its square, and of its product with their tokens.
    """

    def chunk_nll(head, hidden, data):
        def exit_nll(x):  # [B, t, D]
            logits = model.apply({"params": head}, x, method="unembed")
            return (data["weights"] * cross_entropy(logits, data["targets"])).sum(-1)

        nll = jnp.stack([exit_nll(x) for x in hidden])  # [E, B]
        return nll[-1].sum(), nll

    @jax.jit
    def score(params, tokens, scored):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
        hidden = model.apply({"params": params}, inputs, positions, all_loops=all_loops)
        hidden = hidden if all_loops else hidden[None]
        data = {"targets": targets, "weights": scored[:, 1:].astype(jnp.float32)}
        rows = -(-inputs.shape[0] // model.data_shards)  # on one device
        chunk = chunk_length(
            rows, inputs.shape[1], model.cfg.vocab_size, hidden.shape[0], 256 << 20
        )
        nll = chunked_sum(chunk_nll, head_params(params), hidden, data, chunk)[1]  # [E, B]
        counts = data["weights"].sum(-1)[None]
        return jnp.stack([nll.sum(-1), (nll**2).sum(-1), (nll * counts).sum(-1)])

    return score
