"""The two layouts of the cache hold the same rows, whatever is done to them."""

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.kv_cache import KVCache, RowCache

CFG = DecoderConfig(
    "llama", 32, 64, 32, num_heads=4, num_kv_heads=2, head_dim=4, num_layers=2, num_loops=3
)
SLOTS, LENGTH = 4, 6


def filled(cache_class):
    """Two rows of K and V at mixed loops of slots 2, 0, 3; one row beyond the cache."""
    rng = np.random.default_rng(0)
    cache = cache_class.zeros(CFG, SLOTS, LENGTH)
    for layer in range(CFG.num_layers):
        k, v = (jnp.asarray(rng.normal(size=(6, 2, 4)), jnp.float32) for _ in "kv")
        loop, slots = jnp.array([0, 0, 2, 2, 1, 1]), jnp.array([2, 2, 0, 0, 3, 3])
        positions = jnp.array([0, 1, 3, LENGTH, 4, 5])
        cache = cache.write(k, v, loop, np.int32(layer), slots, positions)
    return cache


def rows_of(cache):
    """[loop, layer, slot] -> k [K, H, N], v [K, N, H], as read."""
    slots = jnp.arange(SLOTS)
    return {
        (loop, layer): jax.tree.map(
            np.asarray,
            cache.read(jnp.full(SLOTS, loop), np.int32(layer), slots, jnp.zeros(SLOTS, int))[:2],
        )
        for loop in range(CFG.num_loops)
        for layer in range(CFG.num_layers)
    }


def same(one, other):
    for at, parts in rows_of(one).items():
        for a, b in zip(parts, rows_of(other)[at], strict=True):
            np.testing.assert_array_equal(a, b)


def test_written_rows_are_read_back():
    ours, rows = filled(KVCache), filled(RowCache)
    assert (ours.length, ours.num_slots, ours.num_kv_heads) == (LENGTH, SLOTS, 2)
    assert (rows.length, rows.num_slots, rows.num_kv_heads) == (LENGTH, SLOTS, 2)
    same(ours, rows)
    k, v = rows_of(ours)[1, 1]
    assert (k[3, :, :, 4:] != 0).all() and (v[3, :, 4:] != 0).all()
    assert (k[3, :, :, :4] == 0).all() and (k[:3] == 0).all()


def test_blocks_hold_the_rows_one_after_another(monkeypatch):
    """40 rows in blocks of at most 16 (three, filled up to whole vectors), as in one of all."""
    length = 40
    monkeypatch.setattr(KVCache, "BLOCK", length)
    whole = KVCache.zeros(CFG, SLOTS, length)
    monkeypatch.setattr(KVCache, "BLOCK", 16)
    monkeypatch.setattr(RowCache, "BLOCK", 16)
    parts, rows = KVCache.zeros(CFG, SLOTS, length), RowCache.zeros(CFG, SLOTS, length)
    assert (whole.block_length, whole.length) == (40, 40)
    assert (parts.block_length, parts.length) == (16, 48)
    assert (rows.block_length, rows.length) == (16, 40)
    k, v = np.random.default_rng(1).normal(size=(2, 2, length, 2, 4)).astype(np.float32)
    where = jnp.array([2, 0]), np.int32(1), jnp.array([3, 1])  # loop, layer, slots
    every = jnp.repeat(where[0], length), where[1], jnp.repeat(where[2], length)
    positions = jnp.tile(jnp.arange(length), 2)
    k, v = (x.reshape(2 * length, 2, 4) for x in (k, v))
    caches = [c.write(k, v, *every, positions) for c in (whole, parts, rows)]
    for block, first in enumerate((0, 16, 32)):
        expected_k, expected_v, _ = caches[0].read(*where, jnp.zeros(2, int))
        for cache, start in ((caches[1], first), (caches[2], min(first, 24))):
            k, v, found = cache.read(*where, jnp.full(2, block))
            assert (found == start).all()
            until = min(start + 16, length)
            np.testing.assert_array_equal(k[..., : until - start], expected_k[..., start:until])
            np.testing.assert_array_equal(v[:, :, : until - start], expected_v[:, :, start:until])


def test_copied_and_wiped_rows():
    loops, slots, positions = jnp.array([1, 2]), jnp.array([2, 3]), jnp.array([1, 5])
    ours, rows = (filled(c).copy_deeper(loops, slots, positions) for c in (KVCache, RowCache))
    same(ours, rows)
    k = {at: parts[0] for at, parts in rows_of(ours).items()}
    for loop in (1, 2):  # slot 2 left after loop 1
        np.testing.assert_array_equal(k[loop, 0][2, ..., 1], k[0, 0][2, ..., 1])
        assert (k[loop, 0][2, ..., 0] == 0).all()
    np.testing.assert_array_equal(k[2, 1][3, ..., 5], k[1, 1][3, ..., 5])
    assert (k[0, 1][3] == 0).all()

    ours, rows = ours.wipe(jnp.int32(2)), rows.wipe(jnp.int32(2))
    same(ours, rows)
    for (loop, layer), (k, v) in rows_of(ours).items():
        assert (k[2] == 0).all() and (v[2] == 0).all(), (loop, layer)
    assert (rows_of(ours)[1, 0][0][3] != 0).any()
