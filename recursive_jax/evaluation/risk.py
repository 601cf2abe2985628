"""Exit thresholds with a guarantee: Learn then Test on held-out text.

Theorem (Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test", 2021, fixed-sequence
testing). Let candidates be ordered without looking at the losses, and let p_j be a valid p-value of
"the risk of candidate j is above the bound". If candidates are accepted in order until the first
p_j > 1 - confidence, then with probability at least `confidence` over the calibration text every
accepted candidate has a risk of at most the bound.

The p-value is that of a betting martingale (Waudby-Smith and Ramdas, "Estimating means of bounded
random variables by betting", 2020). It is valid for any number of losses in [0, 1].

With n windows and a confidence of 0.9, a risk that is closer to the bound than some 2.3 / n is not
accepted: a window with a loss of 1 may just not have come up. So some hundred windows are worth
their time.

Assumption: the windows of the calibration text, and those the thresholds are used on, are drawn
independently from one distribution. The tokens of a window may depend on each other, so a loss is
that of a whole window. Windows of few documents are no independent draws of other documents. Text
of another kind than the calibration text has no guarantee, and neither has longer context, nor what
the model writes itself: tokens are those of the text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from recursive_jax.evaluation.exits import Outcome, Trace

RISKS = ("disagreement", "perplexity")
LARGEST_RISE = 1.0  # nats per token: a window's rise of the nll counts at most so much
# Candidates: shares of tokens that may differ among those that leave after a loop.
CANDIDATES = (0.0, *np.geomspace(0.002, 1.0, 96).tolist())


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Thresholds after loop 1, 2, … L - 1, and their test on the calibration text.

    `risk` is in the unit of the bound; `p_value` is of "the risk is above the bound".
    """

    thresholds: tuple[float, ...]
    risk: float
    p_value: float
    mean_loops: float


def betting_p_value(losses: np.ndarray, bound: float) -> float:
    """A valid p-value of "the mean is above `bound`", for independent losses in [0, 1].

    It is one over the largest value of a martingale that grows while losses stay below the bound.
    Its factors follow the running mean and variance, as in "Distribution-free, risk-controlling
    prediction sets" (Bates et al., 2021, Proposition 5).

    Args:
      losses: `[n]`, in the order in which they were drawn.
      bound: in [0, 1].
    """
    losses = np.asarray(losses, np.float64)
    if losses.size and not (0 <= losses.min() and losses.max() <= 1):
        raise ValueError("losses outside of [0, 1] have no such p-value")
    count = np.arange(1, losses.size + 1)
    means = (0.5 + np.cumsum(losses)) / (1 + count)
    variances = (0.25 + np.cumsum((losses - means) ** 2)) / (1 + count)
    known = np.concatenate([[0.25], variances[:-1]])  # before the loss is seen
    bets = np.minimum(1.0, np.sqrt(2 * math.log(20) / (losses.size * known)))
    with np.errstate(divide="ignore"):  # a bet may lose everything
        wealth = np.cumsum(np.log1p(-bets * (losses - bound))) if losses.size else np.zeros(1)
    return float(min(1.0, math.exp(-max(0.0, wealth.max()))))


@dataclasses.dataclass(frozen=True)
class WindowLosses:
    """Losses of the tokens of every window, float64 `[B]` each.

    Attributes:
      sums: 'disagreement': tokens that differ from full depth. 'perplexity': the rise of the nll
        against full depth, in nats; a window's mean rise counts from 0 (a fall is no merit) to
        `LARGEST_RISE`.
      counts: tokens that may leave early; the first token of a window runs all loops.
      kind: of risk, one of `RISKS`.
    """

    sums: np.ndarray
    counts: np.ndarray
    kind: str

    @property
    def risk(self) -> float:
        """Of all tokens: the share that differs, or the relative rise of the perplexity."""
        mean = float(self.sums.sum() / self.counts.sum())
        return mean if self.kind == "disagreement" else math.expm1(mean)

    def p_value(self, bound: float) -> float:
        """Of "the risk of a token is above `bound`"; see `betting_p_value`.

        Windows differ in length, so the loss of a window with n of at most C tokens is
        `bound + (sum - bound * n) / C`: its mean is at most `bound` exactly if that of tokens is.
        """
        largest = 1.0
        if self.kind == "perplexity":
            bound, largest = math.log1p(bound) / LARGEST_RISE, LARGEST_RISE
        excess = self.sums / largest - bound * self.counts
        return betting_p_value(np.clip(bound + excess / self.counts.max(), 0, 1), bound)


def window_losses(found: Trace, outcome: Outcome, kind: str) -> WindowLosses:
    """The losses of all windows that have a token which may leave."""
    if kind == "disagreement":
        values = (outcome.guess != found.guess[:, -1]).astype(np.float64)
    else:
        values = outcome.nll.astype(np.float64) - found.nll[:, -1]
    may_leave = ~found.first
    windows, counts = np.unique(found.window[may_leave], return_counts=True)
    sums = np.bincount(found.window[may_leave], weights=values[may_leave])[windows]
    if kind == "perplexity":
        sums = np.clip(sums / counts, 0.0, LARGEST_RISE) * counts
    return WindowLosses(sums, counts.astype(np.float64), kind)


def path(found: Trace, chosen: np.ndarray) -> list[tuple[float, ...]]:
    """Candidate thresholds, from the most careful to those above which every token is.

    A candidate bounds the share of tokens that differ among those that leave after a loop, the same
    share for all loops. Which scores that needs is read from the windows `chosen`, bool `[B]`.
    """
    tokens = chosen[found.window] & ~found.first
    candidates = []
    for share in CANDIDATES:
        thresholds = []
        for loop in range(found.score.shape[1] - 1):
            score = found.score[tokens, loop]
            order = np.argsort(-score, kind="stable")
            score = score[order].astype(np.float64)
            differs = found.guess[tokens, loop][order] != found.guess[tokens, -1][order]
            shares = np.cumsum(differs) / np.arange(1, len(order) + 1)
            ends = np.append(score[1:] != score[:-1], True)  # equal scores leave together
            good = np.nonzero((shares <= share) & ends)[0]
            if not len(good):
                thresholds.append(math.inf)
                continue
            last = good[-1]
            below = score[last + 1] if last + 1 < len(score) else score[last] - 1e-3
            thresholds.append(float((score[last] + below) / 2))
        candidates.append(tuple(thresholds))
    return candidates


def learn_then_test(
    candidates: Sequence[tuple[float, ...]],
    try_out: Callable[[tuple[float, ...]], tuple[WindowLosses, float]],
    bound: float,
    confidence: float,
) -> tuple[Candidate | None, list[Candidate]]:
    """The last candidate that the test accepts, or None, and all that were tried.

    Args:
      candidates: in the order of `path`, chosen on other windows.
      try_out: thresholds -> `window_losses` of the test windows, mean loops.
      bound: of the risk.
      confidence: probability that the bound holds, such as 0.9.
    """
    accepted, tried = None, []
    for thresholds in candidates:
        losses, mean_loops = try_out(thresholds)
        p_value = losses.p_value(bound)
        tried.append(Candidate(thresholds, losses.risk, p_value, mean_loops))
        if p_value > 1 - confidence:
            break
        accepted = tried[-1]
    return accepted, tried
