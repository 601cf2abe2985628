"""Low-rank algebra of one weight: truncated SVD, Gaussian/zero, and split-spectrum starts.

Everything here is one matrix `[in, out]` of one layer at a time, float32 in and out, on the host.
The effective weight of a loop is `base + a @ b` with `a [in, R]`, `b [R, out]` and no scaling
factor (paper arXiv 2410.20672v3 §2.3). In the paper's column-vector notation `B = U Σ`, `A = Vᵀ`;
transposed to `[in, out]` weights that is `a = V` (orthonormal columns) and `b = Σ Uᵀ`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import threadpoolctl

Factors = tuple[np.ndarray, np.ndarray]  # a [in, R], b [R, out]

# Alternating minimisation of `split_spectrum` beyond two loops: most of the gain comes within a
# few sweeps (three random 96 x 64 matrices, rank 8, squared error by sweep: 8160, 7051, 6707,
# 6603, 6554, 6527 ... 6353 after sixty), and every sweep costs one SVD per loop.
_SWEEPS = 8
_SWEEP_GAIN = 0.01  # stop when a sweep removes less than this share of the error

_CHUNK = 4096  # columns taken to float64 at once, so that no float64 copy of a weight is made


def truncated_svd(residual: np.ndarray, rank: int) -> Factors:
    """The best rank-`rank` approximation of a residual, as LoRA factors.

    The spectrum comes from the Gram matrix of the smaller side, in float64, and a partial `eigh`:
    2048 x 16384 at rank 64 takes 2.2 s on two cores where a float32 SVD takes 52 s. Squaring costs
    no accuracy that float32 data have: singular values below 1e-8 of the largest are lost, their
    own rounding is 6e-8. `a @ b` is a projection of the residual, so at full rank it is exact
    however small the tail is, and no second path is needed there.

    Args:
      residual: float32 `[in, out]`.
      rank: 1 .. min(in, out).

    Returns:
      `a [in, R]` with orthonormal columns, each with its largest entry positive, and
      `b [R, out]` with orthogonal rows whose norms are the singular values, descending.
    """
    tall = residual.shape[0] > residual.shape[1]
    directions = _leading_eigenvectors(_gram(residual.T if tall else residual), rank)
    if tall:
        # Columns of `residual @ U` have the norms Σ; dividing by them would ruin the columns of a
        # rank-deficient residual, QR keeps them orthonormal.
        images = _matmul64(directions.T, residual.T).T
        with _one_blas_thread():
            a, triangle = np.linalg.qr(images)
        b = (triangle @ directions.T).astype(np.float32)
    else:
        a = directions
        b = _matmul64(directions.T, residual).astype(np.float32)
    largest = np.take_along_axis(a, np.abs(a).argmax(axis=0)[None], axis=0)[0]
    signs = np.where(largest < 0, -1.0, 1.0)
    return (a * signs).astype(np.float32), b * signs[:, None].astype(np.float32)


def zero_start(in_dim: int, out_dim: int, rank: int, rng: np.random.Generator) -> Factors:
    """The standard LoRA start: `a` normal(in ** -0.5) as in the model's own init, `b` zero."""
    a = rng.standard_normal((in_dim, rank), dtype=np.float32) * np.float32(in_dim**-0.5)
    return a, np.zeros((rank, out_dim), np.float32)


def residual_start(
    weights: Sequence[np.ndarray], base: np.ndarray, rank: int, rng: np.random.Generator
) -> list[Factors]:
    """Truncated SVD of what each loop's source weight has over the shared `base` (paper Eq. 4, 5).

    A loop whose weight is the base itself has nothing to decompose and gets `zero_start`
    (paper App. C).
    """
    return [_start(w - base, rank, rng) for w in weights]


def centred_start(
    weights: Sequence[np.ndarray], base: np.ndarray, rank: int, rng: np.random.Generator
) -> list[Factors]:
    """`residual_start` around the mean; with two loops one SVD serves both, as R₂ = -R₁."""
    if len(weights) != 2:
        return residual_start(weights, base, rank, rng)
    a, b = _start((weights[0] - weights[1]) / 2, rank, rng)
    return [(a, b), (a, -b)]


def split_spectrum(
    weights: Sequence[np.ndarray], rank: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[Factors]]:
    """Base and LoRAs fitted together (not in the paper; same parameters, smaller weight error).

    Around the mean of two weights both LoRAs would span the same subspace. Only the difference of
    the LoRAs matters once the base is refitted, so the best fit gives the 2R leading components of
    the difference half to each loop: the error of the plain SVD at twice the rank. They are dealt
    in turn, so that neither loop gets all the large ones. Beyond two loops: alternating
    minimisation, base = mean(W - LoRA) and LoRA = SVD(W - base), which never raises the error.

    Args:
      weights: one float32 `[in, out]` per loop.
      rank: 1 .. min(in, out).
      rng: for loops that have nothing to decompose.

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
        # When there are fewer than 2R components the rest of the rank takes the other loop's
        # directions with zero weight: an unused, trainable part, like a zero-residual LoRA.
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


def _leading_eigenvectors(gram: np.ndarray, count: int) -> np.ndarray:
    """Eigenvectors `[n, count]` of the largest eigenvalues, descending; overwrites `gram`."""
    n = gram.shape[0]
    with _one_blas_thread():
        _, vectors = scipy.linalg.eigh(
            gram, subset_by_index=(n - count, n - 1), overwrite_a=True, check_finite=False
        )
    return vectors[:, ::-1]


def _one_blas_thread():
    """Context for `eigh` and `qr`: thousands of small steps after each of which threads would wait
    for each other, spinning. On two busy cores one thread needs 0.8 s of one core for 2048 x 2048
    and 64 vectors, two need 20 s.
    """
    return _blas().limit(limits=1, user_api="blas")


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()
