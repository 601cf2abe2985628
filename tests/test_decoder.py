"""Laws of the decoder: causality, packing, caching, lanes at different loops, unrolling."""

import functools

import chex
import float64_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax.models.attention import attend, attention_mask
from recursive_jax.models.cached_attention import attend_cached
from recursive_jax.models.config import DecoderConfig, Rope
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.interface import Backfill, Rows
from recursive_jax.models.kv_cache import KVCache, RowCache
from recursive_jax.models.parameters import abstract_params

LENGTH = 12
_TINY = dict(vocab_size=29, embed_dim=16, mlp_dim=24, num_layers=2, num_loops=2, max_length=32)
_RANKS = dict(q=2, k=3, v=2, o=3, up=4, down=2)

# Windows and rope kinds differ between the loops of a layer, as they do in a folded Gemma 3.
GEMMA = DecoderConfig(
    family="gemma3", num_heads=4, num_kv_heads=2, head_dim=8, norm_offset=1.0, post_norms=True,
    qk_norm=True, activation="gelu_tanh", windows=(3, 0, 5, 4), rope_of_depth=(1, 0, 1, 1),
    ropes=(Rope(theta=1e4, scaling="linear", factor=8.0), Rope(theta=100.0)), query_scale=0.2,
    attn_softcap=3.0, final_softcap=9.0, embed_scale=4.0, norms="per_loop",
    lora_ranks=_RANKS | {"gate": 3}, **_TINY,
)  # fmt: skip
NEOX = DecoderConfig(
    family="gpt_neox", num_heads=2, num_kv_heads=2, head_dim=8, norm="layer", norm_eps=1e-5,
    parallel_residual=True, activation="gelu", gated_mlp=False, qkv_bias=True, o_bias=True,
    mlp_bias=True, rotary_fraction=0.5, tied_head=False, norms="per_loop", lora_ranks=_RANKS,
    **_TINY,
)  # fmt: skip
LOCAL = GEMMA.replace(windows=(3, 3, 3, 3))
CONFIGS = {"gemma": GEMMA, "neox": NEOX, "local": LOCAL, "tied": NEOX.replace(norms="tied")}
CONFIGS |= {"prefix": GEMMA.replace(prefix_length=3), "neox prefix": NEOX.replace(prefix_length=2)}


@functools.cache
def params_of(cfg):
    """Random params, nothing at its neutral value."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape) * 0.3
        if path[-1].key == "scale" and not cfg.norm_offset:
            x = 1 + x
        return x.astype(np.float32)  # numpy: it is made while tracing and kept

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def tokens_of(cfg, batch=1, length=LENGTH, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, cfg.vocab_size)


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)


@functools.partial(jax.jit, static_argnames=("cfg", "method", "all_loops"))
def apply(cfg, *args, method=None, **kwargs):
    return Decoder(cfg).apply({"params": params_of(cfg)}, *args, method=method, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, tokens, positions=None, segment_ids=None):
    positions = positions_of(tokens) if positions is None else positions
    hidden = apply(cfg, tokens, positions, segment_ids)
    return apply(cfg, hidden, method="unembed")


@functools.cache
def exact(cfg, batch):
    """Logits [B, T, V] of `tokens_of(cfg, batch)` in float64."""
    forward = functools.partial(float64_reference.forward, cfg, params_of(cfg))
    return np.stack([forward(row) for row in tokens_of(cfg, batch)])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_forward_equals_float64(name):
    cfg = CONFIGS[name]
    np.testing.assert_allclose(forward(cfg, tokens_of(cfg, 3)), exact(cfg, 3), atol=2e-5)


@pytest.mark.parametrize("name", ["gemma", "neox", "local"])
def test_causal_by_gradients(name):
    """d logits[t] / d input[s] is exactly 0 for s > t, and for what lies beyond all windows."""
    cfg = CONFIGS[name]
    tokens = tokens_of(cfg)
    probe = jax.random.normal(jax.random.key(1), (cfg.vocab_size,))

    def scores(x):  # [1, T, D] -> [T]
        for loop in range(cfg.num_loops):
            x = apply(cfg, x, jnp.int32(loop), positions_of(tokens), method="run_loop")
        return jnp.einsum("BTV,V->T", apply(cfg, x, method="unembed"), probe)

    x = apply(cfg, tokens, method="embed")
    jacobian = np.abs(jax.jit(jax.jacrev(scores))(x)[:, 0]).max(axis=-1)  # [t, s]
    reach = LENGTH
    if name == "local":
        reach = sum(w - 1 for w in cfg.windows)  # every layer looks window - 1 back
        assert reach < LENGTH - 1
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
    seen = (distance >= 0) & (distance <= reach)
    assert (jacobian[~seen] == 0).all()
    assert (jacobian[seen] > 0).all()


@pytest.mark.parametrize("name", ["gemma", "neox", "prefix"])
def test_packed_documents_equal_separate_ones(name):
    cfg = CONFIGS[name]
    lengths = (5, 1, 6)
    tokens = tokens_of(cfg)
    segments = jnp.repeat(jnp.arange(3), jnp.array(lengths), total_repeat_length=LENGTH)[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    packed = forward(cfg, tokens, positions, segments)
    start = 0
    for n in lengths:  # later tokens cannot be seen, so one shape serves all
        rest = jnp.roll(tokens, -start, axis=1)
        alone = forward(cfg, rest)[:, :n]
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-5)
        start += n
    leaky = forward(cfg, tokens, positions)  # and without segments they do see each other
    assert np.abs(leaky - packed).max() > 1e-2


@pytest.fixture
def small_blocks(monkeypatch):
    """Cache rows are attended to five at once; the last block is filled up, or overlaps another."""
    for cache_class in (KVCache, RowCache):
        monkeypatch.setattr(cache_class, "BLOCK", 5)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("cache_class", [KVCache, RowCache])
@pytest.mark.parametrize("name", ["gemma", "neox", "local", "prefix"])
def test_cached_decoding_equals_float64(name, cache_class, small_blocks):
    """Two prompts in two chunks each, then token by token, loops in lock step."""
    cfg = CONFIGS[name]
    tokens = tokens_of(cfg, batch=2)
    expected = exact(cfg, 2)
    # slots in another order, one unused; stale rows from an earlier request must not be seen
    cache = cache_class.zeros(cfg, num_slots=3, length=LENGTH)
    cache = jax.tree.map(lambda array: array + 7.0, cache)
    slots = (2, 0)

    @functools.partial(jax.jit, static_argnames=("prompt",))
    def step(tokens, position, slot, cache, prompt):
        x = apply(cfg, tokens, method="embed")
        for loop in range(cfg.num_loops):
            rows = Rows(jnp.full_like(position, loop), position, slot, prompt)
            x, cache = apply(cfg, x, rows, cache, method="run_block")
        return apply(cfg, x, method="unembed"), cache

    at = jnp.arange(LENGTH)
    for i, slot in enumerate(slots):
        for chunk in (slice(0, 5), slice(5, 10)):
            logits, cache = step(tokens[i, chunk], at[chunk], jnp.full(5, slot), cache, prompt=5)
            np.testing.assert_allclose(logits, expected[i, chunk], atol=2e-5)
    for position in (10, 11):
        logits, cache = step(
            tokens[:, position], jnp.full(2, position), jnp.array(slots), cache, prompt=0
        )
        np.testing.assert_allclose(logits, expected[:, position], atol=2e-5)
    assert position == LENGTH - 1
    for array in jax.tree.leaves(cache):
        assert (array[:, :, 1] == 7.0).all()  # the unused slot was left alone


@pytest.mark.parametrize("cache_class", [KVCache, RowCache])
@pytest.mark.parametrize("name", ["gemma", "neox", "prefix"])
def test_lanes_at_different_loops_equal_float64(name, cache_class):
    """Depth-wise: each tick every lane runs its own loop of its own position, or idles.

    Post norms enlarge what is left where sums cancel, and rounding with it: at one token of
    'gemma' tenfold. Two float32 programs may be further apart there than either is from the truth:
    where the forward pass is itself beyond half the bound, it is met within 1e-5 of the scale.
    """
    cfg = CONFIGS[name]
    lanes, starts = 3, (0, 1, 3)  # the tick each request arrives at: loops are out of step
    tokens = tokens_of(cfg, batch=lanes)
    expected, by_forward = exact(cfg, lanes), forward(cfg, tokens)
    sound = np.abs(by_forward - expected).max(axis=-1) < 1e-5  # [lane, position]
    assert sound.mean() > 0.95
    cache = cache_class.zeros(cfg, num_slots=lanes, length=LENGTH)
    slots = jnp.array([1, 2, 0])

    @jax.jit
    def tick(x, loop, position, cache):
        embedded = apply(cfg, tokens[jnp.arange(lanes), position], method="embed")
        x = jnp.where((loop == 0)[:, None], embedded, x)
        x, cache = apply(cfg, x, Rows(loop, position, slots), cache, method="run_block")
        return x, apply(cfg, x, method="unembed"), cache

    x = jnp.zeros((lanes, cfg.embed_dim))
    loop, position = np.zeros(lanes, int), np.zeros(lanes, int)
    mixed = False
    for now in range(LENGTH * cfg.num_loops + max(starts)):
        busy = (now >= np.array(starts)) & (position < LENGTH)
        mixed |= len(set(loop[busy])) > 1
        rows = np.where(busy, position, LENGTH)  # out of range: nothing is written
        x, logits, cache = tick(x, jnp.asarray(loop), jnp.asarray(rows), cache)
        for lane in np.flatnonzero(busy):
            loop[lane] += 1
            if loop[lane] == cfg.num_loops:
                at = lane, position[lane]
                np.testing.assert_allclose(logits[lane], expected[at], atol=2e-5)
                apart = 2e-5 if sound[at] else 1e-5 * np.abs(expected).max()
                np.testing.assert_allclose(logits[lane], by_forward[at], atol=apart)
                loop[lane], position[lane] = 0, position[lane] + 1
    assert mixed and (position == LENGTH).all()


def test_a_chunk_beside_lanes_equals_it_alone(small_blocks):
    """Three tokens of slot 1 at loop 1, after two lanes at loops 0 and 1 of slots 0 and 2."""
    cfg = GEMMA
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(5, cfg.embed_dim)), jnp.float32)

    def filled(array):
        return jnp.asarray(rng.normal(size=array.shape), jnp.float32)

    cache = jax.tree.map(filled, KVCache.zeros(cfg, 3, LENGTH))
    loop, slot, position = (
        jnp.array(n) for n in ([0, 1, 1, 1, 1], [0, 2, 1, 1, 1], [7, 2, 4, 5, 6])
    )
    run = functools.partial(apply, cfg, method="run_block")
    y, written = run(x, Rows(loop, position, slot, 3), cache)
    lanes, cache = run(x[:2], Rows(loop[:2], position[:2], slot[:2]), cache)
    chunk, cache = run(x[2:], Rows(loop[2:], position[2:], slot[2:], 3), cache)
    np.testing.assert_allclose(y, jnp.concatenate([lanes, chunk]), atol=1e-5)
    chex.assert_trees_all_close(written, cache, atol=1e-5)


def test_backfill_writes_what_the_exit_state_projects_to(small_blocks):
    """Backfill at loop 1 equals a row at loop 1 with the same state, and moves no lane."""
    cfg = GEMMA
    rng = np.random.default_rng(4)
    x, left = (jnp.asarray(rng.normal(size=(n, cfg.embed_dim)), jnp.float32) for n in (2, 1))
    cache = KVCache.zeros(cfg, 3, LENGTH)
    rows = Rows(jnp.array([0, 1]), jnp.array([3, 5]), jnp.array([0, 2]))
    backfill = Backfill(left, jnp.array([1]), jnp.array([4]), jnp.array([1]))
    run = functools.partial(apply, cfg, method="run_block")
    y, filled = run(x, rows, cache, backfill)
    alone, _ = run(x, rows, cache)
    np.testing.assert_allclose(y, alone, atol=1e-6)
    # In the first layer a row has the keys of its own state, whatever it then attends to.
    at_loop = Rows(jnp.array([1]), jnp.array([4]), jnp.array([1]))
    _, expected = run(left, at_loop, cache)
    for ours, theirs in zip(jax.tree.leaves(filled), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours[1, 0, 1], theirs[1, 0, 1], atol=1e-6)
        assert (ours[1, 1, 1] != 0).any() and (ours[0, :, 1] == 0).all()


@pytest.mark.parametrize("block", [8, 64], ids=["blocks", "whole"])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("cache_class", [KVCache, RowCache])
def test_lanes_of_any_length_attend_as_without_a_cache(cache_class, windowed, block, monkeypatch):
    """Texts of 1 to 8 blocks, or a cache read whole; an idle lane; NaN stays in its lane."""
    monkeypatch.setattr(cache_class, "BLOCK", block)
    cfg, rng, length = GEMMA, np.random.default_rng(3), 60
    cache = cache_class.zeros(cfg, num_slots=4, length=length)
    assert (cache.block_length == cache.length) == (block == 64)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    k, v = (draw(4, length, cfg.num_kv_heads, cfg.head_dim) for _ in "kv")
    loops, slots, layer = jnp.array([0, 1, 1, 0]), jnp.array([2, 0, 1, 3]), np.int32(1)
    flat = (x.reshape(-1, cfg.num_kv_heads, cfg.head_dim) for x in (k, v))
    every = jnp.tile(jnp.arange(length), 4)
    cache = cache.write(*flat, jnp.repeat(loops, length), layer, jnp.repeat(slots, length), every)
    positions = jnp.array([[3], [length - 1], [cache.length + 2], [17]])
    windows = jnp.array([2, 20, 5, 0]) if windowed else None
    q = jnp.asarray(draw(4, 1, cfg.num_heads, cfg.head_dim))
    how = windows, 0.3, 5.0
    place = loops, layer, slots, positions
    jax.clear_caches()  # the block's length is no part of a RowCache's shape
    ours = jax.jit(attend_cached, static_argnums=(7, 8))(q, cache, *place, *how)
    mask = attention_mask(positions, every.reshape(4, length), None, windows)
    expected = attend(q, k, v, mask, *how[1:])
    busy = np.array([0, 1, 3])
    np.testing.assert_allclose(ours[busy], expected[busy], atol=1e-5)
    assert (ours[2] == 0).all()

    nan = v[0, :1] * np.nan
    bad = cache.write(nan, nan, 1, layer, jnp.array([0]), jnp.array([length - 20]))
    after = attend_cached(q, bad, *place, *how)
    assert np.isnan(after[1]).all()
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(after[others], ours[others], atol=1e-6)


@pytest.mark.parametrize("name", ["gemma", "neox", "tied"])
def test_loops_equal_the_unrolled_network(name):
    """Depth loop * num_layers + layer has weights w[layer] + a[layer, loop] @ b[layer, loop]."""
    cfg = CONFIGS[name]
    params = params_of(cfg)
    depths = [(loop, layer) for loop in range(cfg.num_loops) for layer in range(cfg.num_layers)]

    def unroll(tree):
        if not isinstance(tree, dict):
            per_loop = tree.ndim == 3  # small vectors: [layer, loop, F] or [layer, F]
            return jnp.stack([tree[k, d] if per_loop else tree[k] for d, k in depths])
        if "w" not in tree:
            return {key: unroll(value) for key, value in tree.items()}
        a, b = tree.get("lora_a"), tree.get("lora_b")

        def delta(d, k):
            return 0 if a is None else a[k, d] @ b[k, d]

        out = {"w": jnp.stack([tree["w"][k] + delta(d, k) for d, k in depths])}
        return out | ({"b": unroll(tree["b"])} if "b" in tree else {})

    vanilla = cfg.replace(num_layers=cfg.depth, num_loops=1, norms="tied", lora_ranks=())
    unrolled = params | {"block": unroll(params["block"])}
    assert jax.tree.map(jnp.shape, unrolled) == jax.tree.map(
        lambda leaf: leaf.shape, abstract_params(vanilla)
    )
    tokens = tokens_of(cfg, batch=2)

    @jax.jit
    def run(params):
        model = Decoder(vanilla)
        hidden = model.apply({"params": params}, tokens, positions_of(tokens))
        return model.apply({"params": params}, hidden, method="unembed")

    np.testing.assert_allclose(forward(cfg, tokens), run(unrolled), atol=2e-5)


def test_every_loop_on_request_and_loops_differ():
    cfg = GEMMA
    tokens = tokens_of(cfg)
    each = apply(cfg, tokens, positions_of(tokens), all_loops=True)
    assert each.shape == (2, 1, LENGTH, cfg.embed_dim)
    last = apply(cfg, tokens, positions_of(tokens))
    np.testing.assert_array_equal(each[-1], last)
    first = apply(
        cfg, apply(cfg, tokens, method="embed"), jnp.int32(0), positions_of(tokens),
        method="run_loop",
    )  # fmt: skip
    np.testing.assert_allclose(each[0], first, atol=1e-6)
    other = apply(
        cfg, apply(cfg, tokens, method="embed"), jnp.int32(1), positions_of(tokens),
        method="run_loop",
    )  # fmt: skip
    assert np.abs(other - first).max() > 1e-2
