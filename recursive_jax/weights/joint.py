"""Shared weight and LoRAs of one projection, fitted together in a metric of activations and loss.

The loops l share W, and loop l computes with W + a_l b_l. The fit minimises

    sum_l tr[C_l E_l G_l E_lᵀ],   E_l = W + a_l b_l - W_l [in, out]

where C_l = E[xᵀx] is the second moment of the projection's input and G_l = E[gᵀg] that of the
loss's gradient at its output (`evaluation.moments`). To second order this is the rise of the loss,
with C ⊗ G in place of the Fisher matrix of the weight. The paper fits W first, without a metric,
and the LoRAs after it (arXiv 2410.20672v3 §2.3). docs/method.md has the derivation.

Given W, each LoRA is a truncated SVD of the weighted residual. That leaves a function of W alone,
with the gradient 2 sum_l C_l E_l G_l, and L-BFGS minimises it. W is varied in coordinates in which
the loops' moments sum to the identity. Two loops have diagonal moments there: an evaluation costs
hardly more than its SVDs. The search is float32, and the last SVDs are float64, so that full rank
is exact.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import scipy.optimize

from recursive_jax.weights import low_rank
from recursive_jax.weights.low_rank import Factors

RIDGE = 1e-3  # of the mean diagonal, added to the diagonal of every moment
MAX_SWEEPS = 12
SWEEP_GAIN = 0.005  # stop when a sweep removes less than this share of the objective
_HISTORY = 3  # pairs that L-BFGS keeps; 5 and 10 end at the same objective
# Without LoRAs the objective is quadratic, and its minimum is wanted: no sweep is dear.
_RANK_ZERO_GAIN, _RANK_ZERO_SWEEPS = 1e-4, 100


@dataclasses.dataclass(frozen=True)
class Moment:
    """A positive definite matrix `[n, n]`, block-diagonal, with its Cholesky factors.

    Attributes:
      blocks: float64 `[B, n / B, n / B]`. One block is a full matrix.
      lower: its Cholesky factors, `blocks = lower @ lowerᵀ`.
    """

    blocks: np.ndarray
    lower: np.ndarray

    @classmethod
    def of(cls, blocks: np.ndarray, ridge: float = RIDGE) -> Moment:
        """The moment of measured blocks `[B, m, m]`, with the ridge added."""
        blocks = np.asarray(blocks, np.float64)
        size = blocks.shape[1]
        mean = np.trace(blocks, axis1=1, axis2=2).sum() / (len(blocks) * size)
        blocks = blocks + (ridge * mean or 1.0) * np.eye(size)  # all zero: the plain metric
        return cls(blocks, np.linalg.cholesky(blocks))

    @classmethod
    def identity(cls, n: int) -> Moment:
        """The plain metric."""
        ones = np.ones((n, 1, 1))
        return cls(ones, ones)

    @classmethod
    def mean(cls, moments: Sequence[Moment]) -> Moment:
        blocks = sum(m.blocks for m in moments) / len(moments)
        return cls(blocks, np.linalg.cholesky(blocks))

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        return _by_block(self.blocks, x)

    def weigh(self, x: np.ndarray) -> np.ndarray:
        """`lowerᵀ @ x` for x `[n, m]`: its squared norm is that of x in the metric."""
        return _by_block(self.lower.swapaxes(1, 2), x)

    def unweigh(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `weigh`."""
        return self._solve(x, trans=1)

    def inverse(self, x: np.ndarray) -> np.ndarray:
        """`inv(blocks) @ x`."""
        return self.unweigh(self._solve(x, trans=0))

    def _solve(self, x, trans):
        parts = x.reshape(*self.lower.shape[:2], -1)
        return _triangular(self.lower, parts, trans).reshape(x.shape)


def _triangular(lower: np.ndarray, x: np.ndarray, trans: int = 0) -> np.ndarray:
    """The solution of `lower @ y = x` by block, or with `lowerᵀ`; lower `[B, m, m]`."""
    if lower.shape[1] == 1:
        return x / lower
    solve = functools.partial(
        scipy.linalg.solve_triangular, trans=trans, lower=True, check_finite=False
    )
    return np.stack([solve(low, part) for low, part in zip(lower, x, strict=True)])


def _by_block(blocks: np.ndarray, x: np.ndarray) -> np.ndarray:
    if blocks.shape[1] == 1:
        return blocks[:, 0] * x
    return (blocks @ x.reshape(len(blocks), -1, x.shape[1])).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Metric:
    """tr[C E G Eᵀ], the weighted squared norm of an error E `[in, out]` of one loop's weight."""

    inputs: Moment  # C
    outputs: Moment  # G

    @classmethod
    def plain(cls, in_dim: int, out_dim: int) -> Metric:
        """The squared Frobenius norm."""
        return cls(Moment.identity(in_dim), Moment.identity(out_dim))

    def weigh(self, error: np.ndarray) -> np.ndarray:
        """The matrix whose squared Frobenius norm is the error in the metric."""
        return self.outputs.weigh(self.inputs.weigh(error).T).T


@dataclasses.dataclass
class Fit:
    """Attributes:
    base: W, float32 `[in, out]`.
    factors: (a, b) by loop, float32 `[in, R]` and `[R, out]`; empty with rank 0.
    objective: by sweep, the first before the first sweep.
    residual: sum_l of `W_l - W` in the metric; the LoRAs take it down to `objective[-1]`.
    """

    base: np.ndarray
    factors: list[Factors]
    objective: list[float]
    residual: float


def fit(
    weights: Sequence[np.ndarray],
    metrics: Sequence[Metric],
    rank: int,
    rng: np.random.Generator,
    max_sweeps: int | None = None,
    gain: float | None = None,
    dtype: type = np.float32,
) -> Fit:
    """The shared weight and LoRAs of one projection of one layer of the block.

    Args:
      weights: float `[in, out]` of each loop's source layer.
      metrics: of each loop.
      rank: of the LoRAs, 0 .. min(in, out). 0 fits the shared weight only.
      rng: for LoRAs that start at zero, where all loops have one weight.
      max_sweeps, gain: stop after so many sweeps, or when one removes a smaller share. The
        defaults are those of the module, by rank.
      dtype: of the search; all else is float64.
    """
    in_dim, out_dim = weights[0].shape
    if all(np.array_equal(w, weights[0]) for w in weights[1:]):  # one loop, too
        zero = [low_rank.zero_start(in_dim, out_dim, rank, rng) for _ in weights if rank]
        return Fit(np.asarray(weights[0], np.float32), zero, [0.0], 0.0)
    if max_sweeps is None:
        max_sweeps = MAX_SWEEPS if rank else _RANK_ZERO_SWEEPS
    if gain is None:
        gain = SWEEP_GAIN if rank else _RANK_ZERO_GAIN
    if rank == min(in_dim, out_dim):  # LoRAs alone are exact
        base, objective = sum(map(np.float64, weights)) / len(weights), [0.0]
    else:
        base, objective = _search(weights, metrics, rank, max_sweeps, gain, dtype)
    base = base.astype(np.float32)
    residual = error = 0.0
    factors = []
    for weight, metric in zip(weights, metrics, strict=True):
        left = np.asarray(weight, np.float64) - base
        if rank:
            a, b, size, lost = low_rank_step(left, metric, rank)
            factors.append(normal_form(a, b))
        else:
            size = lost = float(np.square(metric.weigh(left)).sum())
        residual, error = residual + size, error + lost
    return Fit(base, factors, [*objective[:-1], error], residual)


def low_rank_step(
    residual: np.ndarray, metric: Metric, rank: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The best `a [in, R]`, `b [R, out]` for a residual in the metric; its size, and what is left.

    The residual is float64, and so are the results.
    """
    weighted = metric.weigh(residual)
    left, right = _leading(weighted, rank)
    size = float(np.square(weighted).sum())
    error = max(size - float(np.square(right).sum()), 0.0)
    if rank == min(residual.shape):
        error = 0.0  # exact; the difference of two large numbers is rounding
    return metric.inputs.unweigh(left), metric.outputs.unweigh(right.T).T, size, error


def _leading(matrix: np.ndarray, rank: int) -> Factors:
    """`left @ right`, the truncated SVD of a matrix; one of the two is orthonormal.

    From the Gram matrix of the smaller side, as `low_rank.truncated_svd`: a projection of the
    matrix, exact at full rank. `right` has the singular values as the norms of its rows.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        left = low_rank.leading_eigenvectors(matrix @ matrix.T, rank)
        return left, left.T @ matrix
    directions = low_rank.leading_eigenvectors(matrix.T @ matrix, rank)
    images = matrix @ directions
    left, triangle = np.linalg.qr(images)
    return left, triangle @ directions.T


def normal_form(a: np.ndarray, b: np.ndarray) -> Factors:
    """The same product in the form of `low_rank.truncated_svd`, float32."""
    orthonormal, triangle = np.linalg.qr(a)
    u, s, v = np.linalg.svd(triangle @ b, full_matrices=False)
    a, b = orthonormal @ u, s[:, None] * v
    largest = np.take_along_axis(a, np.abs(a).argmax(axis=0)[None], axis=0)[0]
    signs = np.where(largest < 0, -1.0, 1.0)
    return (a * signs).astype(np.float32), (b * signs[:, None]).astype(np.float32)


def _search(weights, metrics, rank, max_sweeps, gain, dtype) -> tuple[np.ndarray, list[float]]:
    """W, float64, and the objective before the first sweep and after each."""
    inputs, outputs = (
        _Side([getattr(m, side) for m in metrics], dtype) for side in ("inputs", "outputs")
    )
    theirs = [outputs.enter(inputs.enter(np.float64(w)).T).T.astype(dtype) for w in weights]
    roots = [(c.astype(dtype), g.astype(dtype)) for c, g in zip(inputs.roots, outputs.roots,
                                                                strict=True)]  # fmt: skip
    # By loop, the diagonal of the quadratic part's second derivatives. L-BFGS varies W / scale.
    curved = [np.multiply.outer(*(np.square(x).sum(axis=1).ravel() for x in r)) for r in roots]
    total = sum(curved)
    scale = 1 / np.sqrt(total)
    parts = theirs
    if rank and len(weights) == 2:
        parts = [w - d for w, d in zip(theirs, _deal(*theirs, rank), strict=True)]
    start = sum(c * p for c, p in zip(curved, parts, strict=True)) / total
    # The first step of L-BFGS has length 1, so the objective is brought to about 1.
    size = sum(np.vdot(c, np.square(p - start)) for c, p in zip(curved, parts, strict=True))
    unit = dtype(np.sqrt(size) or 1)
    theirs = [w / unit for w in theirs]
    x = (start / scale / unit).ravel().astype(np.float64)
    del curved, total, parts, start

    objective: list[float] = []

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        base = x.reshape(scale.shape).astype(dtype) * scale
        value, gradient = 0.0, np.zeros_like(base)
        for weight, (c, g) in zip(theirs, roots, strict=True):
            left = _by_block(g, _by_block(c, base - weight).T).T
            if rank:
                a, b = _leading(left, rank)
                left -= a @ b
            value += float(np.vdot(left, left))
            c, g = c.swapaxes(1, 2), g.swapaxes(1, 2)
            gradient += _by_block(g, _by_block(c, left).T).T
        if not objective:
            objective.append(value)
        return value, 2 * (gradient * scale).ravel().astype(np.float64)

    def after(intermediate_result):
        objective.append(float(intermediate_result.fun))
        if objective[-1] >= (1 - gain) * objective[-2]:
            raise StopIteration

    x = scipy.optimize.minimize(
        evaluate, x, jac=True, method="L-BFGS-B", callback=after,
        options={"maxiter": max_sweeps, "maxcor": _HISTORY, "ftol": 0, "gtol": 0},
    ).x  # fmt: skip
    base = outputs.leave(inputs.leave(x.reshape(scale.shape) * scale * unit).T).T
    return base, [value * float(unit) ** 2 for value in objective]


def _deal(first, second, rank) -> list[np.ndarray]:
    """LoRA products that two loops start from: components of their difference, dealt in turn.

    Equal LoRAs of opposite sign are a saddle point: both would span one subspace for ever
    (`low_rank.split_spectrum`). The arguments are in coordinates of the mean metric.
    """
    left, right = _leading(first - second, min(2 * rank, min(first.shape)))
    return [left[:, 0::2] @ right[0::2], -left[:, 1::2] @ right[1::2]]


class _Side:
    """Coordinates of one side of the weights: the loops' moments sum to 1, the first is diagonal.

    So a rotation of the weights changes nothing, and two loops have diagonal moments.

    Attributes:
      roots: by loop, blocks `[B, m, m]`: `rootᵀ @ root` is the moment in these coordinates. Two
        loops have diagonal ones, `[n, 1, 1]`.
    """

    def __init__(self, moments: Sequence[Moment], dtype: type):
        blocks = sum(m.blocks for m in moments)
        self._sum = Moment(blocks, np.linalg.cholesky(blocks))
        needed = moments[:1] if len(moments) == 2 else moments
        whitened = [_triangular(self._sum.lower, m.lower) for m in needed]
        # Rounding is harmless here: the last step of the fit does not use the coordinates.
        first = (whitened[0] @ whitened[0].swapaxes(1, 2)).astype(dtype)
        pairs = [scipy.linalg.eigh(block, driver="evd", check_finite=False) for block in first]
        self._turn = np.stack([vectors for _, vectors in pairs])
        if len(moments) == 2:
            values = np.clip(np.concatenate([v for v, _ in pairs]), 0, 1).reshape(-1, 1, 1)
            self.roots = [np.sqrt(values), np.sqrt(1 - values)]
        else:
            self.roots = [x.swapaxes(1, 2) @ self._turn for x in whitened]

    def enter(self, x: np.ndarray) -> np.ndarray:
        """x `[n, m]` in these coordinates."""
        return _by_block(self._turn.swapaxes(1, 2), self._sum.weigh(x))

    def leave(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `enter`."""
        return self._sum.unweigh(_by_block(self._turn, x))
