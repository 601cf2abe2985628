"""One query per lane by our kernel for a CPU, against a slow loop in float64."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_models import make_engine

from recursive_jax.cpu import build
from recursive_jax.cpu.cache import CpuCache
from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.decoding.donation import copies
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.interface import Rows
from recursive_jax.models.kv_cache import KVCache
from recursive_jax.models.parameters import init_params

LOOPS, LAYERS, SLOTS, LAYER = 2, 2, 3, 1
SCALE = 0.3


@pytest.fixture(autouse=True)
def kernel():
    if not any(map(shutil.which, ["c++", "g++", "clang++"])):
        pytest.skip("no C++ compiler on this machine")
    assert build.has("DecodeAttention")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(kv_heads: int, size: int, length: int):
    """A cache, and its k and v `[loop, layer, slot, length, kv heads, size]`."""
    cfg = tiny(heads=kv_heads, kv_heads=kv_heads, size=size)
    cache = CpuCache.zeros(cfg, SLOTS, length)
    k, v = (draw(LOOPS, LAYERS, SLOTS, length, kv_heads, size, seed=s) for s in (1, 2))
    slots, positions = jnp.repeat(jnp.arange(SLOTS), length), jnp.tile(jnp.arange(length), SLOTS)
    for loop in range(LOOPS):
        for layer in range(LAYERS):
            rows = (x[loop, layer].reshape(-1, kv_heads, size) for x in (k, v))
            cache = cache.write(*rows, loop, layer, slots, positions)
    return cache, k, v


def tiny(heads=2, kv_heads=1, size=8) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        vocab_size=11,
        embed_dim=8,
        num_layers=LAYERS,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        mlp_dim=8,
        num_loops=LOOPS,
    )


def attend(q, cache, loop, slots, positions, window, softcap=None):
    """The cache's own rows of the lanes are taken out, and handed over as the new ones."""
    return _attend(q, cache, loop, slots, positions, window, softcap)[0]


@functools.partial(jax.jit, static_argnums=6)
def _attend(q, cache, loop, slots, positions, window, softcap):
    layer = jnp.int32(LAYER)
    at = jnp.minimum(positions, cache.length - 1)
    k, v, start = cache.read(loop, layer, slots, at // cache.block_length)
    row = (at - start)[:, None, None, None]
    k = jnp.take_along_axis(k, row, axis=3)[..., 0]  # [B, K, H]
    v = jnp.take_along_axis(v, row, axis=2)[:, :, 0]
    gone = cache.write(k * jnp.nan, v * jnp.nan, loop, layer, slots, positions)
    rows = Rows(loop, positions, slots)
    return gone.attend(q, k, v, rows, layer, window, SCALE, softcap)


def slowly(q, k, v, loop, slots, positions, window=None, softcap=None):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    y = np.zeros_like(q)
    group = q.shape[1] // k.shape[4]
    for lane, (n, slot, last) in enumerate(zip(loop, slots, positions, strict=True)):
        if last >= k.shape[3]:
            continue
        first = max(0, last - window[lane] + 1) if window is not None and window[lane] else 0
        for head in range(q.shape[1]):
            keys, values = (x[n, LAYER, slot, first : last + 1, head // group] for x in (k, v))
            scores = keys @ q[lane, head] * SCALE
            if softcap:
                scores = np.tanh(scores / softcap) * softcap
            weights = np.exp(scores - scores.max())
            y[lane, head] = weights @ values / weights.sum()
    return y


@pytest.mark.parametrize("length", [5, 20, 32, 77, 130])
@pytest.mark.parametrize(
    ("group", "kv_heads", "size"), [(1, 2, 8), (2, 1, 64), (3, 3, 16), (4, 1, 80), (7, 2, 24)]
)
def test_it_is_attention(group, kv_heads, size, length):
    """Blocks that are full and not, one and several; windows; idle lanes; groups of any size."""
    cache, k, v = filled(kv_heads, size, length)
    rng = np.random.default_rng(length)
    lanes = 7
    loop, slots = rng.integers(0, LOOPS, lanes), rng.integers(0, SLOTS, lanes)
    positions = rng.integers(0, length, lanes)
    positions[:3] = 0, length - 1, cache.length  # the third is idle
    q = 3 * draw(lanes, group * kv_heads, size)
    window = np.array([0, 3, 3, 0, 1, 40, length])
    for windows in (None, window):
        y = np.asarray(attend(q, cache, loop, slots, positions, windows))
        expected = slowly(q, k, v, loop, slots, positions, windows)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        assert not y[2].any()


@pytest.mark.parametrize("size", [8, 256])
@pytest.mark.parametrize("length", [20, 77])
def test_new_rows_are_written(length, size):
    """As by `ArrayCache.write`, bitwise: of lanes and of rows without queries; not beyond."""
    cache, *_ = filled(2, size, length)
    rng = np.random.default_rng(0)
    rows, lanes = 12, 5
    places = rng.permutation(LOOPS * SLOTS * length)[:rows]
    loop, slots, positions = np.unravel_index(places, (LOOPS, SLOTS, length))
    positions[[2, 8]] = cache.length, cache.length + 5
    k, v, q = draw(rows, 2, size), draw(rows, 2, size, seed=1), draw(lanes, 4, size, seed=2)
    rows_ = Rows(loop, positions, slots)
    y, now = cache.attend(q, k, v, rows_, jnp.int32(LAYER), None, SCALE, None)
    expected = cache.write(k, v, loop, jnp.int32(LAYER), slots, positions)
    jax.tree.map(np.testing.assert_array_equal, now, expected)
    assert (np.asarray(now.keys) != np.asarray(cache.keys)).any(axis=5).sum() == 2 * (rows - 2)
    at = loop[:lanes], slots[:lanes], positions[:lanes]
    np.testing.assert_array_equal(y, attend(q, expected, *at, None))


@pytest.mark.parametrize("prompt", [0, 5])
@pytest.mark.parametrize("windowed", [False, True])
def test_it_equals_the_plain_cache(prompt, windowed):
    """Lanes, a prompt and backfill in one call: attention and rows as of `KVCache`."""
    ours, *_ = filled(2, 16, 77)
    plain = KVCache(ours.keys, ours.values)
    rng = np.random.default_rng(3)
    lanes, backfill = 6, 4
    queries = lanes + prompt
    loop = jnp.array([0, 1, 0, 1, 1, 0, *[1] * prompt, *[1] * backfill])
    slot = jnp.array([0, 0, 1, 1, 2, 2, *[2] * prompt, 0, 0, 1, 1])
    places = [70, 71, 3, 50, 76, ours.length, *range(20, 20 + prompt), 10, 11, ours.length + 1, 12]
    rows = Rows(loop, jnp.array(places), slot, prompt)
    q = jnp.asarray(rng.normal(size=(queries, 6, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(len(places), 2, 16)), jnp.float32) for _ in "kv")
    window = jnp.array([0, 9, 40, 0, 33, 5, *[17] * prompt]) if windowed else None
    results = [
        jax.jit(type(c).attend, static_argnums=(7, 8))(
            c, q, k, v, rows, jnp.int32(LAYER), window, SCALE, 2.0
        )
        for c in (ours, plain)
    ]
    (y, now), (expected, then) = results
    busy = np.arange(queries) != 5
    np.testing.assert_allclose(y[busy], expected[busy], atol=1e-5)
    for name in ("keys", "values"):
        np.testing.assert_array_equal(getattr(now, name), getattr(then, name))


def test_a_copy_of_the_cache_is_seen_in_the_compiled_text():
    """The kernel cannot see it: XLA hands it one buffer as argument and result in any case."""
    cache, *_ = filled(2, 16, 77)
    q, k = draw(3, 6, 16), draw(3, 2, 16)
    rows = Rows(np.array([0, 1, 0]), np.array([5, 6, 7]), np.array([0, 1, 2]))

    def step(cache):
        y, new = cache.attend(q, k, k, rows, jnp.int32(LAYER), None, SCALE, None)
        return new, y

    def old_rows_are_needed(cache):
        new, y = step(cache)
        return new, jnp.sin(cache.keys + y.sum()).sum()

    def copied(function, **options):
        return copies(jax.jit(function, **options).lower(cache).compile(), cache)

    shape = ",".join(map(str, cache.keys.shape))
    assert copied(step, donate_argnums=0) == []
    assert copied(old_rows_are_needed, donate_argnums=0) == [f"a copy of f32[{shape}]"]
    assert "result 0 is not the donated buffer" in copied(step)


def test_softcap():
    cache, k, v = filled(1, 16, 40)
    q, lanes = 5 * draw(2, 2, 16), np.array([0, 1])
    positions = np.array([39, 7])
    y = attend(q, cache, lanes, lanes, positions, None, 1.5)
    expected = slowly(q, k, v, lanes, lanes, positions, softcap=1.5)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert np.abs(expected - slowly(q, k, v, lanes, lanes, positions)).max() > 0.01


@pytest.mark.parametrize("size", [16, 256])
def test_a_lane_does_not_depend_on_the_others(size):
    """To the bit, alone or among 48 (by threads, where heads are large); not even on NaN."""
    cache, *_ = filled(2, size, 100)
    rng = np.random.default_rng(0)
    lanes = 48
    loop, slots = rng.integers(0, LOOPS, lanes), rng.integers(0, SLOTS, lanes)
    positions, q = rng.integers(0, 100, lanes), draw(lanes, 6, size)
    together = np.asarray(attend(q, cache, loop, slots, positions, None))
    for i in range(lanes):
        one = slice(i, i + 1)
        alone = attend(q[one], cache, loop[one], slots[one], positions[one], None)
        np.testing.assert_array_equal(alone[0], together[i])
    q[5, 1] = np.nan
    broken = np.asarray(attend(q, cache, loop, slots, positions, None))
    assert np.isnan(broken[5, 1]).all()
    np.testing.assert_array_equal(np.delete(broken, 5, 0), np.delete(together, 5, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_to_be_seen_may_hold_anything(bad):
    """Stale ones after the query, and those that its window has left; one within it is seen."""
    cache, k, v = filled(1, 16, 70)
    q, zero = draw(1, 2, 16), np.array([0])

    def now(at, which, position, window):
        rows = [np.array(x[:1, LAYER, :1, at : at + 1]) for x in (k, v)]
        rows[which][:] = bad
        put = cache.write(rows[0][0, :, 0], rows[1][0, :, 0], 0, LAYER, zero, np.array([at]))
        window = None if window is None else np.array([window])
        return np.asarray(attend(q, put, zero, zero, np.array([position]), window))

    for which in (0, 1):
        for at, position, window in ((41, 40, None), (40, 39, None), (9, 40, 31), (3, 40, 31)):
            limits = None if window is None else np.array([window])
            expected = slowly(q, k, v, zero, zero, np.array([position]), limits)
            np.testing.assert_allclose(now(at, which, position, window), expected, atol=1e-5)
        assert not np.isfinite(now(40, which, 40, None)).all()
        assert not np.isfinite(now(10, which, 40, 31)).all()


@pytest.mark.parametrize("logit", [1e3, 1e30])
def test_large_scores_are_no_overflow(logit):
    """The largest is subtracted, also if a later block brings it."""
    cache, k, v = filled(1, 8, 70)
    q, zero = draw(1, 1, 8), np.array([0])
    key = np.sign(q[0]) * logit
    put = cache.write(key[None], v[0, LAYER, 0, 66:67], 0, LAYER, zero, np.array([66]))
    y = attend(q, put, zero, zero, np.array([69]), None)
    np.testing.assert_allclose(y[0, 0], v[0, LAYER, 0, 66, 0], rtol=1e-6)


def test_blocks_that_it_has_no_room_for_are_an_error():
    cache = CpuCache(
        *(np.zeros((LOOPS, LAYERS, 1, 1, 1, *s), np.float32) for s in ((8, 40), (40, 8)))
    )
    zero = np.array([0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="no room for such heads or blocks"):
        attend(draw(1, 1, 8), cache, zero, zero, zero, None).block_until_ready()


def test_engines_use_it_where_it_can_be_used(monkeypatch):
    def engine(cfg, dtype=jnp.float32):
        model = CpuModel(cfg, dtype)
        return make_engine(model, model.prepare(init_params(cfg, jax.random.key(0))), 2, 32)

    moved = []
    monkeypatch.setattr(build, "use_huge_pages", moved.extend)
    used = engine(tiny())
    assert any(leaf is used.params.embedding for leaf in moved), "its weights"
    assert used.model.attention == "decode_attention.cc kernel"
    used.compile()
    text = used.executables["tick"].as_text()
    assert text.count(f'custom_call_target="{build.target("DecodeAttention")}"') == LAYERS
    assert f'custom_call_target="{build.target("Top1")}"' in text
    refused = {
        "head_dim=12 is not a multiple of 8 up to 512": engine(tiny(size=12)),
        "it does not take bfloat16": engine(tiny(), jnp.bfloat16),
    }
    for why, one in refused.items():
        assert one.model.attention == f"XLA (decode_attention.cc: {why})"
