"""The TPU kernel's reference implementation on our cache's rows against our own attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from recursive_jax import sharding
from recursive_jax.models import tpu
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.interface import Rows
from recursive_jax.models.kv_cache import RowCache
from recursive_jax.models.parameters import init_params, logical_axes
from recursive_jax.models.scanned import ScannedModel

LENGTH, SLOTS, LANES = 48, 3, 3
BASE = DecoderConfig(
    "llama", 32, 64, 32, num_heads=4, num_kv_heads=2, head_dim=16, num_layers=2, num_loops=3
)
CONFIGS = {
    "gqa": BASE,
    "mqa": BASE.replace(num_kv_heads=1, query_scale=0.3),
    "mha": BASE.replace(num_kv_heads=4),
    "window": BASE.replace(windows=(7,) * 6),
    "softcap": BASE.replace(attn_softcap=2.0),
}


def drawn(cfg, dtype):
    """Random queries and a random cache; lanes at mixed loops and positions, two of one slot."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q = normal(LANES, cfg.num_heads, cfg.head_dim)
    shape = (cfg.num_loops, cfg.num_layers, SLOTS, LENGTH, cfg.num_kv_heads, 2, cfg.head_dim)
    loop = np.asarray([0, 2, 1], np.int32)
    slots = np.asarray([0, 2, 2], np.int32)
    positions = np.asarray([0, 47, 16], np.int32)
    return q, RowCache(normal(*shape)), loop, np.int32(1), slots, positions


def ours(cfg, q, cache, loop, layer, slots, positions):
    """`RowCache` attends without the kernel."""
    window = None if cfg.window_table() is None else jnp.asarray(cfg.window_table())[layer][loop]
    rows = Rows(loop, positions, slots)
    return cache.look(q, rows, layer, window, cfg.attention_scale, cfg.attn_softcap)


def options(cfg):
    """The kernel's static arguments for a model."""
    window = cfg.windows[0] if cfg.windows else None
    return dict(sm_scale=cfg.attention_scale, soft_cap=cfg.attn_softcap, sliding_window=window)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in CONFIGS), ("mqa", "bfloat16")]
)
def test_the_kernels_reference_agrees_on_our_rows(name, dtype):
    cfg = CONFIGS[name]
    q, *rows = drawn(cfg, dtype)
    with jax.numpy_rank_promotion("allow"):
        theirs = ref_ragged_paged_attention(q, *tpu.pages_of(*rows), **options(cfg))
    np.testing.assert_allclose(
        np.asarray(theirs, np.float32),
        np.asarray(ours(cfg, q, *rows), np.float32),
        atol={"float32": 1e-5, "bfloat16": 2e-2}[dtype],
    )


def test_pages_of_idle_lanes_and_of_any_length():
    for length, page in ((128, 128), (1024, 128), (96, 32), (48, 16)):
        cache = RowCache(jnp.zeros((2, 3, 4, length, 1, 2, 8)))
        loop, slots = np.asarray([1, 0], np.int32), np.asarray([2, 3], np.int32)
        positions = np.asarray([length, length - 1], np.int32)
        pages = tpu.pages_of(cache, loop, np.int32(2), slots, positions)
        assert pages.kv_pages.shape == (24 * length // page, page, 2, 8)
        assert pages.kv_lens.tolist() == [1, length]
        first = (np.asarray([(1 * 3 + 2) * 4 + 2, 2 * 4 + 3]) * length) // page
        assert pages.page_indices.tolist() == [list(range(f, f + length // page)) for f in first]


FITS = BASE.replace(num_heads=8, num_kv_heads=1, head_dim=256)


@pytest.mark.parametrize(
    ("cfg", "dtype", "length", "shards", "reason"),
    [
        (FITS, "bfloat16", 1024, 1, None),
        (FITS, "bfloat16", 1024, 8, None),  # one kv head goes with all of them
        (FITS.replace(windows=(64,) * 6), "bfloat16", 1024, 1, None),
        (BASE.replace(head_dim=128), "bfloat16", 1024, 2, None),
        (FITS.replace(windows=(64, 0) * 3), "bfloat16", 1024, 1, "window is static"),
        (BASE.replace(head_dim=64), "bfloat16", 1024, 1, "head_dim=64 is not a multiple of 128"),
        (FITS, "float16", 1024, 1, "float16"),
        (FITS, "bfloat16", 1000, 1, "context_length=1000 is not a multiple of 16"),
        (FITS.replace(num_kv_heads=2), "bfloat16", 1024, 1, "2 kv heads of head_dim=256"),
        (FITS.replace(num_kv_heads=2), "bfloat16", 1024, 4, "2 kv heads do not divide over 4"),
        (
            BASE.replace(num_heads=9, num_kv_heads=3, head_dim=128),
            "bfloat16", 1024, 1, "3 kv heads in bfloat16",
        ),
    ],
)  # fmt: skip
def test_what_the_kernel_refuses(cfg, dtype, length, shards, reason):
    said = tpu.PagedCache.unsupported(cfg, jnp.dtype(dtype), length, shards)
    assert (said is None) if reason is None else reason in said


def stand_in(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *, sm_scale, soft_cap,
             sliding_window, num_kv_pages_per_block, num_queries_per_block):  # fmt: skip
    """The kernel's arithmetic for one query per lane, traceable on a CPU."""
    assert 0 < num_kv_pages_per_block <= page_indices.shape[1] and num_queries_per_block > 0
    keys_values = kv_pages[page_indices]  # [B, pages, page length, 2·K, H]
    keys_values = keys_values.reshape(q.shape[0], -1, *kv_pages.shape[2:])
    copies = q.shape[1] // (kv_pages.shape[2] // 2)
    k, v = (jnp.repeat(keys_values[:, :, i::2], copies, axis=2) for i in (0, 1))
    scores = jnp.einsum("bnh,bsnh->bns", q, k) * sm_scale
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    distance = kv_lens[:, None] - 1 - jnp.arange(k.shape[1])[None]
    mask = (distance >= 0) & (distance < (sliding_window or k.shape[1]))
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bns,bsnh->bnh", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("name", ["gqa", "window", "softcap"])
def test_the_stand_in_is_the_kernels_reference(name):
    cfg = CONFIGS[name]
    q, *rows = drawn(cfg, "float32")
    pages = tpu.pages_of(*rows)
    blocks = dict(num_kv_pages_per_block=1, num_queries_per_block=1)
    with jax.numpy_rank_promotion("allow"):
        theirs = ref_ragged_paged_attention(q, *pages, **options(cfg))
    np.testing.assert_allclose(stand_in(q, *pages, **options(cfg), **blocks), theirs, atol=1e-5)


def decode(cfg, params, is_paged):
    """Lanes at two loops for a few tokens: their states."""
    model = ScannedModel(Decoder(cfg), tpu.PagedCache if is_paged else RowCache)
    cache = model.new_cache(2, 32)
    x = np.random.default_rng(1).normal(size=(2, cfg.embed_dim)).astype(np.float32)
    loop, slots = np.asarray([0, 1], np.int32), np.asarray([1, 0], np.int32)
    run = jax.jit(model.run_block)

    states = []
    for position in range(3):
        x, cache = run(params, x, Rows(loop, np.full(2, position, np.int32), slots), cache)
        states.append(np.asarray(x))
    return np.stack(states)


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_model_gives_the_kernel_what_it_should(tensor, monkeypatch):
    """On a mesh too, where each device runs it on its own heads."""
    cfg = BASE.replace(windows=(2,) * 6)
    params = init_params(cfg, jax.random.key(0))
    expected = decode(cfg, params, False)
    heads = []

    def kernel(q, *arguments, **options):
        heads.append(q.shape[1])
        return stand_in(q, *arguments, **options)

    monkeypatch.setattr(library, "ragged_paged_attention", kernel)
    if tensor == 1:
        states = decode(cfg, params, True)
    else:
        mesh = sharding.make_mesh(1, 1, 2, devices=jax.devices()[:2])
        rules = sharding.rules_for(mesh, cfg)
        where = sharding.shardings(logical_axes(cfg), mesh, rules)
        with sharding.use(mesh, rules):
            states = decode(cfg, sharding.put_global(params, where), True)
    assert set(heads) == {cfg.num_heads // tensor}
    np.testing.assert_allclose(states, expected, atol=1e-5)
