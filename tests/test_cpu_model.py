"""Laws of the CPU model: it equals the scanned model, whatever the pass holds."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_models import scanned

from recursive_jax.cpu import build
from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.models.interface import Backfill, Rows
from recursive_jax.models.parameters import abstract_params
from recursive_jax.models.scanned import ScannedModel
from recursive_jax.weights import hf_config

SLOTS, LENGTH = 3, 40
RANKS = dict(q=2, k=3, v=2, o=3, gate=3, up=4, down=2)


def shrunk(cfg, **changes):
    """A config of the same family and switches, small enough for a test."""
    sizes = dict(
        vocab_size=29, embed_dim=16, mlp_dim=24, head_dim=8, num_heads=4,
        num_kv_heads=min(cfg.num_kv_heads, 2), num_layers=2, num_loops=2, max_length=LENGTH,
        windows=(3, 0, 5, 4) if any(cfg.windows) else (), query_scale=cfg.query_scale and 0.3,
        rope_of_depth=(1, 0, 1, 1) if len(cfg.ropes) > 1 else (), norms="per_loop",
    )  # fmt: skip
    ranks = {name: rank for name, rank in RANKS.items() if name in cfg.projections}
    return cfg.replace(**sizes | {"lora_ranks": ranks} | changes)


def configs():
    """Every family with its own shape of block, and LoRAs of all kinds."""
    presets = ("gemma_2b", "gemma2_2b", "gemma3_270m", "tinyllama_1_1b", "pythia_1b")
    gemma, gemma2, gemma3, llama, neox = (shrunk(hf_config.preset(name)) for name in presets)
    full = {name: min(gemma3.projections[name]) for name in ("q", "o", "down")}
    return {
        "gemma": gemma,
        "gemma2": gemma2,
        "gemma3": gemma3,
        "llama": llama,
        "mistral": llama.replace(windows=(6,) * 4),
        "qwen2": llama.replace(qkv_bias=True),
        "qwen3": llama.replace(qk_norm=True, tied_head=False),
        "gpt_neox": neox,
        "tied norms": neox.replace(norms="tied"),
        "some LoRAs": gemma3.replace(lora_ranks=dict(k=3, v=2, up=4)),
        "no LoRA": gemma3.replace(lora_ranks=()),
        "LoRAs larger than their product": gemma3.replace(lora_ranks=full | dict(k=2)),
    }


CONFIGS = configs()


@functools.cache
def params_of(cfg):
    """Random params, nothing at its neutral value."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape) * 0.3
        if path[-1].key == "scale" and not cfg.norm_offset:
            x = 1 + x
        return x.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def states(count, cfg, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, cfg.embed_dim))
    return jnp.asarray(x, jnp.float32)


def a_pass(cfg, prompt: int, with_backfill: bool):
    """Lanes at mixed loops, one idle and zero; a prompt chunk; backfill, some of it idle."""
    last = cfg.num_loops - 1
    loop = [0, last, 0, last, 0, *[last] * prompt]
    position = [7, 2, 33, 39, LENGTH + 1, *range(10, 10 + prompt)]
    slot = [0, 0, 1, 1, 2, *[2] * prompt]
    rows = Rows(jnp.array(loop), jnp.array(position), jnp.array(slot), prompt)
    x = states(len(loop), cfg).at[4].set(0)
    backfill = None
    if with_backfill:
        at = jnp.array([20, LENGTH + 2, 21])
        backfill = Backfill(states(3, cfg, 1), jnp.full(3, last), at, jnp.array([0, 0, 1]))
    return x, rows, backfill


def run(model, params, x, rows, backfill, filled=0.0):
    cache = model.new_cache(SLOTS, LENGTH)
    cache = jax.tree.map(lambda a: a + filled, cache)
    return jax.jit(model.run_block)(params, x, rows, cache, backfill)


# Of every config the smallest pass and the largest; of two unlike ones those in between.
PASSES = [(name, *size) for name in CONFIGS for size in ((0, False), (3, True))]
PASSES += [(name, *size) for name in ("gemma3", "gpt_neox") for size in ((3, False), (0, True))]


@pytest.mark.parametrize(("name", "prompt", "with_backfill"), PASSES)
def test_it_equals_the_scanned_model(name, prompt, with_backfill):
    """States of busy rows, and the cache; the reference attends by XLA."""
    cfg = CONFIGS[name]
    x, rows, backfill = a_pass(cfg, prompt, with_backfill)
    cpu, plain = CpuModel(cfg), ScannedModel(scanned(cfg).decoder)
    params = params_of(cfg)
    prepared = cpu.prepare(params)
    y, cache = run(cpu, prepared, x, rows, backfill, 0.1)
    expected, expected_cache = run(plain, params, x, rows, backfill, 0.1)
    busy = np.asarray(rows.position) < LENGTH
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y[busy] / scale, expected[busy] / scale, atol=3e-6)
    chex.assert_trees_all_close(
        cache.replace(keys=cache.keys / scale, values=cache.values / scale),
        type(cache)(expected_cache.keys / scale, expected_cache.values / scale),
        atol=3e-6,
    )
    tokens = jnp.arange(5)
    np.testing.assert_allclose(cpu.embed(prepared, tokens), plain.embed(params, tokens), atol=1e-6)
    logits = cpu.logits(prepared, y)
    np.testing.assert_allclose(logits, plain.logits(params, y), atol=1e-5)
    for ours, theirs in zip(cpu.top1(logits), plain.top1(logits), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox"])
def test_nan_stays_in_its_row(name):
    cfg = CONFIGS[name]
    x, rows, backfill = a_pass(cfg, 3, True)
    model = CpuModel(cfg)
    params = model.prepare(params_of(cfg))
    healthy, _ = run(model, params, x, rows, backfill)
    y, _ = run(model, params, x.at[2].set(jnp.nan), rows, backfill)
    assert np.isnan(y[2]).all()
    # Rows 2 and 3 are of one slot, but at different loops: they share no keys.
    others = np.arange(len(x)) != 2
    np.testing.assert_array_equal(y[others], healthy[others])


@pytest.mark.parametrize("kind", ["scanned", "cpu"])
def test_rows_of_slots_that_the_cache_does_not_have_are_an_error(kind):
    """Before compilation; in a compiled pass they are NaN, and the other rows are as without."""
    cfg = CONFIGS["llama"]
    model = CpuModel(cfg) if kind == "cpu" else scanned(cfg)
    params = model.prepare(params_of(cfg))
    x, good = states(SLOTS + 2, cfg), np.array([0, 1, 2, 0, 1])
    positions = np.array([3, 4, 5, 6, 7])
    bad = np.arange(SLOTS + 2)

    def rows(slots):
        return Rows(jnp.zeros(len(x), jnp.int32), jnp.asarray(positions), jnp.asarray(slots))

    cache = model.new_cache(SLOTS, LENGTH)
    for slots, backfill in ((bad, None), (bad - 1, None), (good, bad)):
        if backfill is not None:
            backfill = Backfill(x, jnp.ones(len(x), int), jnp.asarray(positions), jnp.asarray(bad))
        with pytest.raises(ValueError, match="and a cache of 3 slots; expected slots in 0 … 2"):
            model.run_block(params, x, rows(slots), cache, backfill)
    y, _ = run(model, params, x, rows(bad), None)
    expected, _ = run(model, params, x[:SLOTS], jax.tree.map(lambda a: a[:SLOTS], rows(bad)), None)
    assert np.isnan(y[SLOTS:]).all()
    np.testing.assert_allclose(y[:SLOTS], expected, atol=1e-5)


def test_bfloat16_runs_by_xla():
    cfg = CONFIGS["gemma3"]
    x, rows, backfill = a_pass(cfg, 3, True)
    cpu, plain = CpuModel(cfg, jnp.bfloat16), ScannedModel(scanned(cfg, dtype=jnp.bfloat16).decoder)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params_of(cfg))
    y, _ = run(cpu, cpu.prepare(params), x.astype(jnp.bfloat16), rows, backfill)
    expected, _ = run(plain, params, x.astype(jnp.bfloat16), rows, backfill)
    busy = np.asarray(rows.position) < LENGTH
    scale = np.abs(np.asarray(expected, np.float32)).max()
    difference = np.abs(np.asarray(y - expected, np.float32)[busy]) / scale
    assert y.dtype == jnp.bfloat16 and difference.max() < 0.05


def test_prepare_leaves_the_callers_arrays_unless_they_are_donated():
    cfg = CONFIGS["gpt_neox"]
    params = jax.tree.map(jnp.array, params_of(cfg))
    model = CpuModel(cfg)
    kept = model.prepare(params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    donated = model.prepare(params, donate=True)
    block = jax.tree.leaves(params["block"])
    assert all(leaf.is_deleted() for leaf in [*block, params["head"]])
    chex.assert_trees_all_equal(kept, donated)


def test_a_lora_larger_than_its_product_is_kept_as_that():
    """Of a joined weight, too; a loop whose product is zero keeps none."""
    cfg = CONFIGS["LoRAs larger than their product"]
    stacked = jax.tree.map(jnp.array, params_of(cfg))
    o = stacked["block"]["attention"]["o"]
    o["lora_b"] = o["lora_b"].at[:, 0].set(0)
    layer = CpuModel(cfg).prepare(stacked).layers[0]
    assert [d is not None for d in layer.o.delta[0]] == [False, True] and layer.o.a is None
    assert all(d is not None for d in layer.down.delta[0])
    q, k, v = layer.qkv.b
    assert (q.shape[1], k.shape[1], v.shape[1]) == (0, 2 * cfg.num_loops, 0)
    assert [len(d) for d in layer.qkv.delta] == [cfg.num_loops, 0, 0]


def test_without_kernels_xla_computes_the_same(monkeypatch):
    cfg = CONFIGS["gemma3"]
    x, rows, backfill = a_pass(cfg, 3, True)
    model = CpuModel(cfg)
    params = model.prepare(params_of(cfg))
    ours, _ = run(model, params, x, rows, backfill)
    monkeypatch.setattr(build, "has", lambda *_: False)
    jax.clear_caches()
    theirs, cache = run(model, params, x, rows, backfill)
    assert type(cache).__name__ == "KVCache"
    busy = np.asarray(rows.position) < LENGTH
    np.testing.assert_allclose(ours[busy], theirs[busy], atol=2e-5)
    jax.clear_caches()
