"""What early exits cost in quality: every loop's answer to every token of a text.

Tokens are those of the text, not the model's own (teacher forcing). `trace` runs all loops, so its
keys and values are those of `missing_kv='complete'`, where a token that left still runs its other
loops. `walk` goes token by token, and a token that left leaves the keys and values of the other
policies behind.

Axes: N scored tokens, B windows, T tokens of a window, L loops, D embed, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.decoding.exit_measures import NO_GUESS, ExitInputs, Measure
from recursive_jax.models.chunked_head import chunk_length, cross_entropy
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.interface import Backfill, DecodeModel, Rows
from recursive_jax.models.parameters import head_params

HEAD_BYTES = 256 << 20  # of logits at a time


@dataclasses.dataclass(frozen=True)
class Trace:
    """Scores, guesses and log-likelihoods of every scored token, in the order of the windows.

    Attributes:
      score: f32 `[N, L]`, of the exit measure after each loop.
      guess: int32 `[N, L]`, most likely token.
      nll: f32 `[N, L]`, nats.
      target: int32 `[N]`, the text's own token.
      window: int32 `[N]`, its window.
      first: bool `[N]`, predicted from the first token of a window, which runs all loops as the
        last token of a prompt does.
    """

    score: np.ndarray
    guess: np.ndarray
    nll: np.ndarray
    target: np.ndarray
    window: np.ndarray
    first: np.ndarray

    def exit_loops(self, thresholds: Any) -> np.ndarray:
        """Loops that each token runs, int32 `[N]`.

        Args:
          thresholds: a token leaves above them, `[L - 1]` or one number.
        """
        num_loops = self.score.shape[1]
        bounds = np.broadcast_to(np.asarray(thresholds, np.float32), (num_loops - 1,))
        leaves = self.score > np.append(bounds, -np.inf)
        leaves[:, -1] = True
        leaves[self.first, :-1] = False
        return np.argmax(leaves, axis=1).astype(np.int32) + 1

    def oracle_loops(self) -> np.ndarray:
        """The first loop whose most likely token is that of the last loop (paper §3.8)."""
        return np.argmax(self.guess == self.guess[:, -1:], axis=1).astype(np.int32) + 1

    def take(self, windows: np.ndarray) -> Trace:
        """The tokens of some windows, bool `[B]`."""
        keep = windows[self.window]
        return Trace(*(getattr(self, f.name)[keep] for f in dataclasses.fields(self)))

    def outcome(self, exit_loops: np.ndarray) -> Outcome:
        """What the tokens get that leave after `exit_loops`."""
        at = exit_loops[:, None] - 1
        nll, guess = (np.take_along_axis(x, at, 1)[:, 0] for x in (self.nll, self.guess))
        return Outcome(exit_loops, nll, guess)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of every scored token: `exit_loops` int32 `[N]`, `nll` f32 `[N]`, `guess` int32 `[N]`."""

    exit_loops: np.ndarray
    nll: np.ndarray
    guess: np.ndarray


def trace(
    model: Decoder,
    params: Any,
    tokens: np.ndarray,
    scored: np.ndarray,
    measure: Measure,
    batch_size: int = 8,
    put: Callable[[Any], Any] = jnp.asarray,
    progress: Callable[[int], None] = lambda rows: None,
) -> Trace:
    """The scores, guesses and log-likelihoods of all loops on windows of text.

    Args:
      model: decoder of the params.
      params: nested.
      tokens, scored: int and bool `[B, T]`, as `text.eval_windows` returns them.
      measure: its scores are noted; Oracle scores nothing.
      batch_size: windows at a time.
      put: host batch -> device batch, in the sharding of the caller.
      progress: told the number of windows after each batch.
    """
    run = _tracer(model, measure)
    found: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(tokens), batch_size):
        rows, marks = tokens[start : start + batch_size], scored[start : start + batch_size, 1:]
        batch = np.pad(rows, ((0, batch_size - len(rows)), (0, 0)))
        out = [np.asarray(x)[:, : len(rows)] for x in run(params, put(batch))]  # [L, B, T - 1]
        found.append([np.moveaxis(x, 0, -1)[marks] for x in out])
        progress(len(rows))
    score, guess, nll = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Trace(score, guess, nll, *places(tokens, scored))


def places(tokens: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target, window and `first` of every scored token; see `Trace`."""
    window, column = np.nonzero(scored[:, 1:])
    return tokens[:, 1:][window, column], window.astype(np.int32), column == 0


@functools.lru_cache(maxsize=8)
def _tracer(model: Decoder, measure: Measure):
    """Jitted `(params, tokens [B, T]) -> score, guess, nll`, each `[L, B, T - 1]`."""
    num_loops = model.cfg.num_loops

    def look(head, before, after, targets):
        """One chunk of positions: states `[L, B, t, D]`, targets `[B, t]`."""
        rows, guesses, found = targets.size, [], []
        for loop in range(num_loops):
            logits = model.apply({"params": head}, after[loop], method="unembed")
            nll, logits = cross_entropy(logits, targets), logits.reshape(rows, -1)
            guesses.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
            deeper = [jnp.full_like(guesses[0], NO_GUESS)] * (num_loops - loop - 1)
            states = (x[loop].reshape(rows, -1) for x in (before, after))
            nothing = jnp.zeros(rows, jnp.int32)
            score = measure.score(
                ExitInputs(
                    nothing + loop + 1, *states, nothing, logits, jnp.stack([*guesses, *deeper], 1)
                )
            )
            found.append((score.reshape(nll.shape), guesses[-1].reshape(nll.shape), nll))
        return tuple(jnp.stack(parts) for parts in zip(*found, strict=True))

    @jax.jit
    def run(params, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
        after = model.apply({"params": params}, inputs, positions, all_loops=True)
        first = model.apply({"params": params}, inputs, method="embed")
        before = jnp.concatenate([first[None], after[:-1]])
        rows = -(-inputs.shape[0] // model.data_shards)
        length = inputs.shape[1]
        chunk = chunk_length(rows, length, model.cfg.vocab_size, 2, HEAD_BYTES)
        count = -(-length // chunk)

        def split(x, axis):
            pad = [(0, count * chunk - length if i == axis else 0) for i in range(x.ndim)]
            shape = (*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
            return jnp.moveaxis(jnp.pad(x, pad).reshape(shape), axis, 0)

        parts = split(before, 2), split(after, 2), split(targets, 1)
        found = jax.lax.map(lambda part: look(head_params(params), *part), parts)
        return tuple(
            jnp.moveaxis(x, 0, 2).reshape(num_loops, inputs.shape[0], -1)[..., :length]
            for x in found
        )

    return run


def walk(
    model: DecodeModel,
    params: Any,
    tokens: np.ndarray,
    scored: np.ndarray,
    measure: Measure,
    thresholds: Any,
    missing_kv: str,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda rows: None,
) -> Outcome:
    """Go through windows token by token, as the engine would with the text's tokens forced.

    Args:
      model: as the engine's; `params` as its `prepare` returned them.
      thresholds: a token leaves above them, `[L - 1]` or one number.
      missing_kv: the keys and values of skipped loops: 'complete', 'propagate' or 'copy'.
      batch_size: windows at a time, each a slot of the cache.
      Others as `trace`.
    """
    num_loops = model.cfg.num_loops
    bounds = np.broadcast_to(np.asarray(thresholds, np.float32), (num_loops - 1,))
    run = _walker(model, measure, missing_kv)
    found = []
    for start in range(0, len(tokens), batch_size):
        rows, marks = tokens[start : start + batch_size], scored[start : start + batch_size, 1:]
        batch = np.pad(rows, ((0, batch_size - len(rows)), (0, 0)))
        out = [np.asarray(x).T[: len(rows)] for x in run(params, batch, bounds)]  # [B, T - 1]
        found.append([x[marks] for x in out])
        progress(len(rows))
    return Outcome(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@functools.lru_cache(maxsize=8)
def _walker(model: DecodeModel, measure: Measure, missing_kv: str):
    """Jitted `(params, tokens [B, T], thresholds) -> exit_loops, nll, guess`, each `[T - 1, B]`."""
    num_loops = model.cfg.num_loops

    @jax.jit
    def run(params, tokens, thresholds):
        slots = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        thresholds = jnp.append(thresholds, -jnp.inf)
        cache = model.new_cache(tokens.shape[0], tokens.shape[1])

        def step(cache, now):
            position, token, target = now
            at = jnp.full_like(slots, position)
            idle = jnp.full_like(slots, cache.length)
            x = model.embed(params, token)
            left = jnp.zeros(slots.shape, bool)  # after an earlier loop
            exit_loops, guess = jnp.zeros_like(slots), jnp.zeros_like(slots)
            guesses = jnp.full((slots.size, num_loops), NO_GUESS, jnp.int32)
            nll = jnp.zeros(slots.shape, jnp.float32)
            for loop in range(num_loops):
                here = jnp.full_like(slots, loop)
                stays = left & (missing_kv != "complete")  # with the state it left with
                backfill = None
                if missing_kv == "propagate" and loop:
                    backfill = Backfill(x, here, jnp.where(left, at, idle), slots)
                rows = Rows(here, jnp.where(stays, idle, at), slots)
                after, cache = model.run_block(params, x, rows, cache, backfill)
                logits = model.logits(params, after)
                most = model.top1(logits)[0]
                guesses = guesses.at[:, loop].set(most)
                inputs = ExitInputs(here + 1, x, after, slots * 0, logits, guesses)
                may = (position > 0) & (measure.score(inputs) > thresholds[loop])
                leaves = ~left & (may | (loop == num_loops - 1))
                exit_loops = jnp.where(leaves, loop + 1, exit_loops)
                guess = jnp.where(leaves, most, guess)
                nll = jnp.where(leaves, cross_entropy(logits, target), nll)
                left |= leaves
                x = jnp.where(stays[:, None], x, after)
            if missing_kv == "copy":
                cache = cache.copy_deeper(exit_loops, slots, at)
            return cache, (exit_loops, nll, guess)

        length = tokens.shape[1] - 1
        now = jnp.arange(length, dtype=jnp.int32), tokens[:, :-1].T, tokens[:, 1:].T
        return jax.lax.scan(step, cache, now)[1]

    return run


def qualities(found: Trace, outcome: Outcome) -> dict[str, Any]:
    """Quality and depth of one way to exit, all on the same tokens.

    Returns:
      `nll` (nats per token), `accuracy` (share of tokens whose most likely token is the text's),
      `agreement` (with the last loop at full depth), `mean_loops`, `depth` (share of tokens by
      loops run).
    """
    num_loops = found.guess.shape[1]
    depth = np.bincount(outcome.exit_loops, minlength=num_loops + 1)[1:] / len(found.target)
    return {
        "nll": float(outcome.nll.mean(dtype=np.float64)),
        "accuracy": float((outcome.guess == found.target).mean()),
        "agreement": float((outcome.guess == found.guess[:, -1]).mean()),
        "mean_loops": float(outcome.exit_loops.mean()),
        "depth": [float(share) for share in depth],
    }
