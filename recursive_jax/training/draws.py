"""Ids drawn from the teacher's distribution, in place of its logits.

K ids of every position, drawn with replacement, are an unbiased estimate of the distribution:
p(v) ≈ count(v) / K. The cross-entropy of the student under it, and its gradient, have the same
mean as under the distribution itself (arXiv 2503.16870). The K likeliest ids have not.
"""

from __future__ import annotations

import math
import struct as binary
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

HEADER = binary.Struct("<2sBBIQ")  # b"RD", version, bytes per id, CRC-32 of the tokens, row
MAGIC, VERSION = b"RD", 1
MAX_DRAWS = 255  # of a position; a count is one byte


@struct.dataclass
class Draws:
    """What is known of the teacher's distributions `[...]`; K draws of each.

    Attributes:
      ids: int32 `[..., K]`, the ids that were drawn, each once; 0 behind the last one.
      counts: uint8 `[..., K]`, how often; 0 behind the last one. Their sum is K.
      entropy: f32 `[...]`, of the whole distribution, in nats.
    """

    ids: Any
    counts: Any
    entropy: Any


def draw(logits: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K sorted ids of every distribution, int32 `[..., K]`, and its entropy in nats, f32 `[...]`.

    The k-th draw inverts the cumulative distribution in [k/K, (k+1)/K): the mean of a count is
    K · p as with independent draws, its variance is smaller. The inversion has two steps, block and
    id in its block. A sum over a large vocabulary in float32 would lose unlikely ids.

    Args:
      logits: f32 `[..., V]`.
      uniform: f32 in [0, 1) `[..., 2, K]`.
    """
    vocab, num = logits.shape[-1], uniform.shape[-1]
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.where(p > 0, p * log_p, 0.0).sum(axis=-1)
    width = math.isqrt(vocab - 1) + 1
    pad = [(0, 0)] * (p.ndim - 1) + [(0, -vocab % width)]
    within = jnp.pad(p, pad).reshape(*p.shape[:-1], -1, width).cumsum(axis=-1)
    blocks = within[..., -1].cumsum(axis=-1)
    share = (jnp.arange(num).reshape((1,) * (p.ndim - 1) + (-1,)) + uniform[..., 0, :]) / num
    block = _invert(blocks[..., None, :], share)
    chosen = jnp.take_along_axis(within, block[..., None], axis=-2)  # [..., K, width]
    ids = block * width + _invert(chosen, uniform[..., 1, :])
    return jnp.sort(ids, axis=-1).astype(jnp.int32), entropy


def _invert(cumulative: jax.Array, share: jax.Array) -> jax.Array:
    """Where a cumulative sum `[..., n]` first exceeds a `share` `[...]` of its last value.

    What has no mass is never chosen.
    """
    total = cumulative[..., -1]
    below = jnp.minimum(share * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return (cumulative <= below[..., None]).sum(axis=-1)


def drawn_kl(student: jax.Array, teacher: Draws, temperature: float = 1.0) -> jax.Array:
    """An unbiased estimate of the forward KL divergence, nats: `[..., V]` -> `[...]`.

    As `losses.divergence`, whose gradient is the mean of this one's over many draws.

    Args:
      student: logits f32.
      teacher: draws at the same temperature.
      temperature: divides the logits; the result is multiplied by its square.
    """
    student = student / temperature
    weights = teacher.counts.astype(student.dtype) / teacher.counts.shape[-1]
    drawn = jnp.take_along_axis(student, teacher.ids, axis=-1)
    cross_entropy = jax.nn.logsumexp(student, axis=-1) - (weights * drawn).sum(axis=-1)
    return (cross_entropy - teacher.entropy) * temperature**2


def encode(
    row: int, tokens: np.ndarray, ids: np.ndarray, entropy: np.ndarray, bytes_per_id: int
) -> bytes:
    """The record of a row.

    Args:
      row: its number in the run.
      tokens: int32 `[T]`.
      ids: int32 `[T, K]`, sorted, as `draw` returns them.
      entropy: f32 `[T]`.
      bytes_per_id: 2 or 4.
    """
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = np.diff(np.flatnonzero(first), append=first.size)
    return b"".join(
        [
            HEADER.pack(MAGIC, VERSION, bytes_per_id, _checksum(tokens), row),
            entropy.astype("<f4").tobytes(),
            first.sum(axis=1).astype("u1").tobytes(),
            ids[first].astype(f"<u{bytes_per_id}").tobytes(),
            counts.astype("u1").tobytes(),
        ]
    )


def decode(record: bytes, row: int, tokens: np.ndarray, num: int) -> Draws:
    """The draws of a row, `[T, K]`.

    Args:
      record: as `encode` made it.
      row: its number.
      tokens: of the row.
      num: K.

    Raises:
      ValueError: the record is of another row, of other tokens, or damaged.
    """
    length = len(tokens)
    magic, version, bytes_per_id, checksum, number = HEADER.unpack_from(record)
    if magic != MAGIC or version != VERSION or number != row:
        raise ValueError(f"record {row} is none of row {row} in version {VERSION}")
    if checksum != _checksum(tokens):
        raise ValueError(f"row {row} of the text has other tokens than those the teacher saw")
    at = HEADER.size
    entropy = np.frombuffer(record, "<f4", length, at).astype(np.float32)
    distinct = np.frombuffer(record, "u1", length, at + 4 * length)
    at, total = at + 5 * length, int(distinct.sum())
    there = np.arange(num) < distinct[:, None]
    ids, counts = np.zeros((length, num), np.int32), np.zeros((length, num), np.uint8)
    ids[there] = np.frombuffer(record, f"<u{bytes_per_id}", total, at)
    counts[there] = np.frombuffer(record, "u1", total, at + bytes_per_id * total)
    return Draws(ids, counts, entropy)


def _checksum(tokens: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tokens, "<i4").tobytes())
