"""Low-rank algebra of one weight: truncated SVD, Gaussian/zero, and split-spectrum starts.

The functions work on one matrix `[in, out]` of one layer at a time, on the host. Their arguments
and results are float32. The effective weight of a loop is `base + a @ b` with `a [in, R]`,
`b [R, out]` and no scaling factor (paper arXiv 2410.20672v3 §2.3). The paper writes column vectors:
`B = U Σ`, `A = Vᵀ`. For weights `[in, out]` this is `a = V` (orthonormal columns) and `b = Σ Uᵀ`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import threadpoolctl

Factors = tuple[np.ndarray, np.ndarray]  # a [in, R], b [R, out]

# Sweeps of `split_spectrum` for more than two loops. Each costs one SVD per loop, and a few bring
# most of the gain. Squared error by sweep, three random 96 x 64 matrices at rank 8: 8160, 7051,
# 6707, 6603, 6554, 6527 ... 6353 after sixty.
_SWEEPS = 8
_SWEEP_GAIN = 0.01  # stop when a sweep removes less than this share of the error

_CHUNK = 4096  # columns converted to float64 at a time: no weight is copied to float64 whole


def truncated_svd(residual: np.ndarray, rank: int) -> Factors:
    """The best rank-`rank` approximation of a residual, as LoRA factors.

    The spectrum comes from a partial `eigh` of the Gram matrix of the smaller side, in float64.
    2048 x 16384 at rank 64 takes 2.2 s on two cores; a float32 SVD takes 52 s. Squaring loses
    singular values below 1e-8 of the largest, and float32 data are rounded at 6e-8 already.
    `a @ b` is a projection of the residual. At full rank it is therefore exact, however small the
    last singular values are.

    Args:
      residual: float32 `[in, out]`.
      rank: 1 .. min(in, out).

    Returns:
      `a [in, R]` with orthonormal columns, each with its largest entry positive, and
      `b [R, out]` with orthogonal rows whose norms are the singular values, descending.
    """
    tall = residual.shape[0] > residual.shape[1]
    directions = leading_eigenvectors(_gram(residual.T if tall else residual), rank)
    if tall:
        # Columns of `residual @ U` have the norms Σ. Where the residual is rank-deficient, dividing
        # by Σ would give meaningless columns; QR gives orthonormal ones.
        images = _matmul64(directions.T, residual.T).T
        with one_blas_thread():
            a, triangle = np.linalg.qr(images)
        b = (triangle @ directions.T).astype(np.float32)
    else:
        a = directions
        b = _matmul64(directions.T, residual).astype(np.float32)
    largest = np.take_along_axis(a, np.abs(a).argmax(axis=0)[None], axis=0)[0]
    signs = np.where(largest < 0, -1.0, 1.0)
    return (a * signs).astype(np.float32), b * signs[:, None].astype(np.float32)


def zero_start(in_dim: int, out_dim: int, rank: int, rng: np.random.Generator) -> Factors:
    """The standard LoRA start: `a` normal(in ** -0.5), as in the model's init, and `b` zero."""
    a = rng.standard_normal((in_dim, rank), dtype=np.float32) * np.float32(in_dim**-0.5)
    return a, np.zeros((rank, out_dim), np.float32)


def residual_start(
    weights: Sequence[np.ndarray], base: np.ndarray, rank: int, rng: np.random.Generator
) -> list[Factors]:
    """Truncated SVD of each loop's residual `weight - base` (paper Eq. 4, 5).

    A loop whose weight is the base has no residual and gets `zero_start` (paper App. C).
    """
    return [_start(w - base, rank, rng) for w in weights]


def centred_start(
    weights: Sequence[np.ndarray], base: np.ndarray, rank: int, rng: np.random.Generator
) -> list[Factors]:
    """`residual_start` around the mean. Two loops need one SVD: their residuals are R and -R."""
    if len(weights) != 2:
        return residual_start(weights, base, rank, rng)
    a, b = _start((weights[0] - weights[1]) / 2, rank, rng)
    return [(a, b), (a, -b)]


def split_spectrum(
    weights: Sequence[np.ndarray], rank: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[Factors]]:
    """Base and LoRAs fitted together (not in the paper; same parameters, smaller weight error).

    Two loops: around the mean of the weights both LoRAs would span the same subspace. The base is
    refitted, so only the difference of the LoRAs matters. The best fit takes the 2R leading
    components of the weights' difference, half for each loop: the error of a plain SVD at twice the
    rank. The loops take components in turn, so that neither gets all the large ones.
    More loops: alternating minimisation, base = mean(W - LoRA), LoRA = SVD(W - base). A sweep never
    raises the error.

    Args:
      weights: one float32 `[in, out]` per loop.
      rank: 1 .. min(in, out).
      rng: for loops whose residual is zero.

    Returns:
      The shared base `[in, out]` and one (a, b) per loop.
    """
    if len(weights) == 2:
        return _split_in_two(*weights, rank, rng)
    base, error = mean(weights), np.inf
    for _ in range(_SWEEPS):
        factors = residual_start(weights, base, rank, rng)
        left = [w - base - a @ b for w, (a, b) in zip(weights, factors, strict=True)]
        previous, error = error, sum(map(squared_norm, left))
        if error >= (1 - _SWEEP_GAIN) * previous or error == 0:
            break
        base = base + mean(left)  # = mean(W - LoRA)
    return base, factors


def _split_in_two(first, second, rank, rng):
    side = min(first.shape)
    difference = first - second
    if not difference.any():
        return first, [zero_start(*first.shape, rank, rng) for _ in range(2)]
    a, b = truncated_svd(difference, min(2 * rank, side))
    component = np.arange(a.shape[1])
    factors = []
    for loop, sign in ((0, 1), (1, -1)):
        mine = component % 2 == loop
        # With fewer than 2R components, the rest of the rank takes the other loop's directions with
        # zero weight. This part is unused but trainable, as after `zero_start`.
        chosen = np.argsort(~mine, kind="stable")[:rank]
        factors.append((a[:, chosen], np.where(mine[chosen, None], sign * b[chosen], 0)))
    (a1, b1), (a2, b2) = factors
    return mean([first - a1 @ b1, second - a2 @ b2]), factors


def _start(residual: np.ndarray, rank: int, rng: np.random.Generator) -> Factors:
    if not residual.any():
        return zero_start(*residual.shape, rank, rng)
    return truncated_svd(residual, rank)


def mean(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Arithmetic mean of float32 matrices, without stacking them."""
    total = matrices[0].copy()
    for matrix in matrices[1:]:
        total += matrix
    total /= np.float32(len(matrices))
    return total


def squared_norm(matrix: np.ndarray) -> float:
    """Squared Frobenius norm, summed in float64 over the rows."""
    return float(np.einsum("ij,ij->i", matrix, matrix).sum(dtype=np.float64))


def _gram(x: np.ndarray) -> np.ndarray:
    """`x @ x.T` in float64, x float32 `[n, m]`."""
    total = np.zeros((x.shape[0], x.shape[0]))
    for start in range(0, x.shape[1], _CHUNK):
        part = x[:, start : start + _CHUNK].astype(np.float64)
        total += part @ part.T
    return total


def _matmul64(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`left @ right` in float64, right float32 `[n, m]`."""
    out = np.empty((left.shape[0], right.shape[1]))
    for start in range(0, right.shape[1], _CHUNK):
        stop = start + _CHUNK
        out[:, start:stop] = left @ right[:, start:stop].astype(np.float64)
    return out


def leading_eigenvectors(gram: np.ndarray, count: int) -> np.ndarray:
    """Eigenvectors `[n, count]` of the largest eigenvalues, descending; overwrites `gram`."""
    n = gram.shape[0]
    with one_blas_thread():
        _, vectors = scipy.linalg.eigh(
            gram, subset_by_index=(n - count, n - 1), overwrite_a=True, check_finite=False
        )
    if vectors.shape[1] < count or not np.isfinite(vectors).all():
        raise ValueError("a weight holds NaN or infinity, so its residual has no SVD")
    return vectors[:, ::-1]


def one_blas_thread():
    """A context in which BLAS uses one thread, for `eigh` and `qr`.

    They take thousands of small steps, and threads would spin after each until all are done. For
    2048 x 2048 and 64 vectors on two busy cores, one thread needs 0.8 s and two need 20 s.
    """
    return _blas().limit(limits=1, user_api="blas")


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()
