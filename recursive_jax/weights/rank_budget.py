"""LoRA ranks by projection, dealt from one budget of parameters.

Each rank goes where it takes most off the fit's error per parameter. Errors of different
projections compare in the metric of the loss only (`joint`, metric 'fisher'). By plain spectra the
ranks come out worse than equal ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.linalg

from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights import joint, low_rank
from recursive_jax.weights.joint import Metric, Moment
from recursive_jax.weights.tie_config import break_even_rank


def gains(weights: Sequence[np.ndarray], metrics: Sequence[Metric]) -> np.ndarray:
    """What each further rank takes off the error: `[min(in, out)]`, descending.

    With two loops, LoRAs of rank R take the leading 2R components of the weights' difference
    (`low_rank.split_spectrum`), here in the mean metric. With more, each takes the leading R of
    what the shared weight leaves of its own weight.

    Args:
      weights: `[in, out]` of each loop's source layer.
      metrics: of each loop.
    """
    side = min(weights[0].shape)
    if len(weights) == 2:
        both = Metric(*(Moment.mean([getattr(m, name) for m in metrics])
                        for name in ("inputs", "outputs")))  # fmt: skip
        spectrum = _spectrum(both.weigh(np.float64(weights[0]) - weights[1])) / 2
        pairs = np.zeros(2 * side)
        pairs[:side] = spectrum
        return pairs.reshape(side, 2).sum(axis=1)
    base = joint.fit(weights, metrics, 0, np.random.default_rng(0)).base
    left = (m.weigh(np.float64(w) - base) for w, m in zip(weights, metrics, strict=True))
    return sum(map(_spectrum, left))


def _spectrum(matrix: np.ndarray) -> np.ndarray:
    """Squared singular values, descending."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    with low_rank.one_blas_thread():
        values = scipy.linalg.eigvalsh(gram, overwrite_a=True, check_finite=False)
    return np.maximum(values[::-1], 0)


def deal(
    cfg: DecoderConfig, found: Mapping[str, np.ndarray], share: float
) -> tuple[dict[str, int], int]:
    """Rank by projection, and the parameters that all LoRAs then have.

    Greedy by gain per parameter, which is optimal up to the last rank: gains only fall. No rank
    goes above the break-even rank, where untying the matrix is as small, and exact.

    Args:
      cfg: of the recursive model; its ranks do not count.
      found: `gains` of each projection, summed over the layers of the block.
      share: of the parameters that the source's layers have in their projections.
    """
    sizes = cfg.projections
    whole = cfg.depth * sum(n * m for n, m in sizes.values())
    left = budget = int(share * whole)
    ranks = dict.fromkeys(sizes, 0)
    cost = {name: cfg.depth * sum(sizes[name]) for name in sizes}
    most = {name: min(int(break_even_rank(*sizes[name], cfg.num_loops)), min(sizes[name]))
            for name in sizes}  # fmt: skip
    heap = [(-found[name][0] / cost[name], name) for name in sizes if most[name]]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        if cost[name] > left:
            continue  # a smaller projection may still fit
        ranks[name] += 1
        left -= cost[name]
        if ranks[name] < most[name]:
            heapq.heappush(heap, (-found[name][ranks[name]] / cost[name], name))
    return ranks, budget - left
