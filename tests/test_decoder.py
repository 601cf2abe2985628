"""Laws of the decoder: causality, packing, caching, lanes at different loops, unrolling."""

import functools

import chex
import float64_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax.models.attention import attend, attend_cached, attention_mask
from recursive_jax.models.config import DecoderConfig, Rope
from recursive_jax.models.decoder import Decoder, split_layers
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


@functools.partial(jax.jit, static_argnames=("cfg", "method", "all_loops", "together"))
def apply(cfg, *args, method=None, **kwargs):
    return Decoder(cfg).apply({"params": params_of(cfg)}, *args, method=method, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, tokens, positions=None, segment_ids=None):
    positions = positions_of(tokens) if positions is None else positions
    hidden, _ = apply(cfg, tokens, positions, segment_ids)
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
            x, _ = apply(cfg, x, jnp.int32(loop), positions_of(tokens), method="run_loop")
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


@pytest.mark.parametrize("name", ["gemma", "neox"])
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
@pytest.mark.parametrize("name", ["gemma", "neox", "local"])
def test_cached_decoding_equals_forward(name, cache_class, small_blocks):
    """A prompt in two chunks, then token by token, loops in lock step."""
    cfg = CONFIGS[name]
    tokens = tokens_of(cfg, batch=2)
    expected = forward(cfg, tokens)
    # slots in another order, one unused; stale rows from an earlier request must not be seen
    cache = cache_class.zeros(cfg, num_slots=3, length=LENGTH)
    cache = jax.tree.map(lambda array: array + 7.0, cache)
    slots = jnp.array([2, 0])

    @jax.jit
    def step(tokens, positions, cache):
        hidden, cache = apply(cfg, tokens, positions, cache=cache, slots=slots)
        return apply(cfg, hidden, method="unembed"), cache

    start = 0
    for n in (5, 5, 1, 1):
        chunk = slice(start, start + n)
        logits, cache = step(tokens[:, chunk], positions_of(tokens)[:, chunk], cache)
        np.testing.assert_allclose(logits, expected[:, chunk], atol=2e-5)
        start += n
    assert start == LENGTH
    for array in jax.tree.leaves(cache):
        assert (array[:, :, 1] == 7.0).all()  # the unused slot was left alone


@pytest.mark.parametrize("cache_class", [KVCache, RowCache])
@pytest.mark.parametrize("name", ["gemma", "neox"])
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
    def tick(x, loop, positions, cache):
        embedded = apply(cfg, tokens[jnp.arange(lanes)[:, None], positions], method="embed")
        x = jnp.where((loop == 0)[:, None, None], embedded, x)
        x, cache = apply(cfg, x, loop, positions, cache=cache, slots=slots, method="run_loop")
        return x, apply(cfg, x, method="unembed"), cache

    x = jnp.zeros((lanes, 1, cfg.embed_dim))
    loop, position = np.zeros(lanes, int), np.zeros(lanes, int)
    mixed = False
    for now in range(LENGTH * cfg.num_loops + max(starts)):
        busy = (now >= np.array(starts)) & (position < LENGTH)
        mixed |= len(set(loop[busy])) > 1
        rows = np.where(busy, position, LENGTH)  # out of range: nothing is written
        x, logits, cache = tick(x, jnp.asarray(loop), jnp.asarray(rows)[:, None], cache)
        for lane in np.flatnonzero(busy):
            loop[lane] += 1
            if loop[lane] == cfg.num_loops:
                at = lane, position[lane]
                np.testing.assert_allclose(logits[lane, 0], expected[at], atol=2e-5)
                apart = 2e-5 if sound[at] else 1e-5 * np.abs(expected).max()
                np.testing.assert_allclose(logits[lane, 0], by_forward[at], atol=apart)
                loop[lane], position[lane] = 0, position[lane] + 1
    assert mixed and (position == LENGTH).all()


def test_a_chunk_beside_lanes_equals_it_alone(small_blocks):
    """Three tokens of slot 1 at loop 1, after two lanes at loops 0 and 1 of slots 0 and 2."""
    cfg = GEMMA
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(5, 1, cfg.embed_dim)), jnp.float32)
    filled = lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32)  # noqa: E731
    cache = jax.tree.map(filled, KVCache.zeros(cfg, 3, LENGTH))
    loop, slots = jnp.array([0, 1, 1, 1, 1]), jnp.array([0, 2, 1, 1, 1])
    positions = jnp.array([7, 2, 4, 5, 6])[:, None]
    run = functools.partial(apply, cfg, method="run_loop")
    y, written = run(x, loop, positions, cache=cache, slots=slots, together=3)
    lanes, cache = run(x[:2], loop[:2], positions[:2], cache=cache, slots=slots[:2])
    chunk, cache = run(
        x[2:, 0][None], jnp.int32(1), positions[2:].T, cache=cache, slots=slots[2:3]
    )  # fmt: skip
    np.testing.assert_allclose(y, jnp.concatenate([lanes, chunk[0][:, None]]), atol=1e-5)
    chex.assert_trees_all_close(written, cache, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma", "neox", "tied", "uneven"])
def test_split_layers_equal_scanned_ones(name):
    """'uneven': of the weights that are joined, one has no LoRA."""
    uneven = GEMMA.replace(lora_ranks=dict(k=3, v=2, up=4))
    cfg = uneven if name == "uneven" else CONFIGS[name]
    tokens, expected = tokens_of(cfg, batch=2), forward(cfg, tokens_of(cfg, batch=2))
    stacked = jax.tree.map(jnp.copy, params_of(cfg))
    params = split_layers(stacked)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stacked["block"]))
    decoder = Decoder(cfg, scan_layers=False)
    hidden, _ = decoder.apply({"params": params}, tokens, positions_of(tokens))
    logits = decoder.apply({"params": params}, hidden, method="unembed")
    np.testing.assert_allclose(logits, expected, atol=2e-5)

    # lanes at loops of their own take other products: joint ones, and of all loops' LoRA
    x = np.random.default_rng(1).normal(size=(4, 1, cfg.embed_dim)).astype(np.float32)
    loops, cache = jnp.array([1, 0, 0, 1]), KVCache.zeros(cfg, num_slots=4, length=LENGTH)
    run = lambda decoder, params: decoder.apply(  # noqa: E731
        {"params": params}, x, loops, jnp.full((4, 1), 3), cache=cache, method="run_loop"
    )
    ours, theirs = run(decoder, params), run(Decoder(cfg), params_of(cfg))
    chex.assert_trees_all_close(ours, theirs, atol=5e-6)


def test_a_lora_larger_than_its_product_is_kept_as_that():
    """Of a joined weight, too; a loop whose product is zero keeps none."""
    full = {name: min(GEMMA.projections[name]) for name in ("q", "o", "down")}
    cfg = GEMMA.replace(lora_ranks=full | dict(k=2))
    stacked = jax.tree.map(jnp.copy, params_of(cfg))
    o = stacked["block"]["attention"]["o"]
    o["lora_b"] = o["lora_b"].at[:, 0].set(0)
    params = split_layers(jax.tree.map(jnp.copy, stacked))
    attention, mlp = params["layers_0"]["attention"], params["layers_0"]["mlp"]
    assert set(attention["o"]) == {"wt", "lora_wt_1"}
    assert set(mlp["down"]) == {"wt", "lora_wt_0", "lora_wt_1"}
    assert set(attention["qkv"]) == {"wt", "lora_at"} and set(attention["k"]) == {"lora_bt"}
    ours, theirs = Decoder(cfg, scan_layers=False), Decoder(cfg)
    x = np.random.default_rng(1).normal(size=(4, 1, cfg.embed_dim)).astype(np.float32)
    cache = KVCache.zeros(cfg, num_slots=4, length=LENGTH)
    for loop in (jnp.array([1, 0, 0, 1]), jnp.array([0, 0, 0, 0]), jnp.int32(0), jnp.int32(1)):
        results = [
            model.apply(
                {"params": given}, x, loop, jnp.full((4, 1), 3), cache=cache, method="run_loop"
            )
            for model, given in ((ours, params), (theirs, stacked))
        ]
        chex.assert_trees_all_close(*results, atol=5e-6)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("cache_class", [KVCache, RowCache])
def test_lanes_of_any_length_share_passes_over_the_cache(cache_class, windowed, monkeypatch):
    """Texts of 1 to 8 blocks, an idle lane, windows of their own; NaN stays in its lane."""
    monkeypatch.setattr(cache_class, "BLOCK", 8)
    cfg, rng, length = GEMMA, np.random.default_rng(3), 60
    cache = cache_class.zeros(cfg, num_slots=4, length=length)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    k, v = (draw(4, length, cfg.num_kv_heads, cfg.head_dim) for _ in "kv")
    loops, slots = jnp.array([0, 1, 1, 0]), jnp.array([2, 0, 1, 3])
    every = jnp.broadcast_to(jnp.arange(length), (4, length))
    cache = cache.write(k, v, loops, np.int32(1), slots, every)
    positions = jnp.array([[3], [length - 1], [cache.length + 2], [17]])
    windows = jnp.array([2, 20, 5, 0]) if windowed else None
    q = jnp.asarray(draw(4, 1, cfg.num_heads, cfg.head_dim))
    how = windows, 0.3, 5.0
    where = loops, np.int32(1), slots
    ours = jax.jit(attend_cached, static_argnums=(5, 6))(q, cache, where, positions, *how)
    mask = attention_mask(positions, every, None, windows)
    expected = attend(q, k, v, mask, *how[1:])
    busy = np.array([0, 1, 3])
    np.testing.assert_allclose(ours[busy], expected[busy], atol=1e-5)
    assert np.isfinite(ours).all()

    nan = v[:1, :1] * np.nan
    bad = cache.write(nan, nan, 1, np.int32(1), jnp.array([0]), jnp.array([[length - 20]]))
    after = attend_cached(q, bad, where, positions, *how)
    assert np.isnan(after[1]).all()
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(after[others], ours[others], atol=1e-6)


def test_a_prompt_chunk_runs_beside_others_at_another_loop():
    """Several tokens per lane, one loop per lane."""
    cfg = GEMMA
    tokens = tokens_of(cfg, batch=2)
    run = functools.partial(apply, cfg, method="run_loop")
    positions = positions_of(tokens)
    cache = KVCache.zeros(cfg, 2, LENGTH)
    x0 = apply(cfg, tokens, method="embed")
    # lane 0 is one loop ahead of lane 1
    first, cache = run(x0[:1], jnp.int32(0), positions[:1], cache=cache, slots=jnp.array([0]))
    both, cache = run(
        jnp.concatenate([first, x0[1:]]), jnp.array([1, 0]), positions, cache=cache,
        slots=jnp.array([0, 1]),
    )  # fmt: skip
    last, cache = run(both[1:], jnp.int32(1), positions[1:], cache=cache, slots=jnp.array([1]))
    hidden = jnp.concatenate([both[:1], last])
    logits = apply(cfg, hidden, method="unembed")
    np.testing.assert_allclose(logits, forward(cfg, tokens), atol=2e-5)


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
        delta = lambda d, k: 0 if a is None else a[k, d] @ b[k, d]  # noqa: E731
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
        hidden, _ = model.apply({"params": params}, tokens, positions_of(tokens))
        return model.apply({"params": params}, hidden, method="unembed")

    np.testing.assert_allclose(forward(cfg, tokens), run(unrolled), atol=2e-5)


def test_every_loop_on_request_and_loops_differ():
    cfg = GEMMA
    tokens = tokens_of(cfg)
    each, _ = apply(cfg, tokens, positions_of(tokens), all_loops=True)
    assert each.shape == (2, 1, LENGTH, cfg.embed_dim)
    last, _ = apply(cfg, tokens, positions_of(tokens))
    np.testing.assert_array_equal(each[-1], last)
    first, _ = apply(
        cfg, apply(cfg, tokens, method="embed"), jnp.int32(0), positions_of(tokens),
        method="run_loop",
    )  # fmt: skip
    np.testing.assert_allclose(each[0], first, atol=1e-6)
    other, _ = apply(
        cfg, apply(cfg, tokens, method="embed"), jnp.int32(1), positions_of(tokens),
        method="run_loop",
    )  # fmt: skip
    assert np.abs(other - first).max() > 1e-2


def test_cache_takes_no_segments():
    cfg = NEOX
    tokens = tokens_of(cfg)
    with pytest.raises(ValueError, match="segment_ids"):
        apply(cfg, tokens, positions_of(tokens), jnp.zeros_like(tokens), KVCache.zeros(cfg, 1, 16))
