"""Tying against the paper's laws; `check_N` are the project's numbered acceptance checks.

Models are small, random and with non-trivial norms: a Llama (GQA), a Gemma 3 (unit-offset norms,
post-norms, qk-norm, softcaps, windows, two ropes) and a GPT-NeoX (LayerNorm, biases, parallel).
"""

import functools
import tracemalloc
import weakref
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recursive_jax.models.config import DecoderConfig, Rope
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params, parameter_counts
from recursive_jax.weights import low_rank, names, tie_config, tying
from recursive_jax.weights.tie_config import TieConfig

SMALL = dict(
    vocab_size=53, embed_dim=24, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=6
)
FAMILIES = {
    "llama": DecoderConfig("llama", **SMALL, tied_head=False),
    "gemma": DecoderConfig(
        "gemma3",
        **{**SMALL, "num_kv_heads": 1},
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        activation="gelu_tanh",
        ropes=(Rope(), Rope(theta=1e6)),
        rope_of_depth=(0, 0, 1, 0, 0, 1),
        windows=(4, 4, 0, 4, 4, 0),
        query_scale=0.4,
        attn_softcap=20.0,
        final_softcap=30.0,
        embed_scale=24**0.5,
    ),
    "neox": DecoderConfig(
        "gpt_neox",
        **{**SMALL, "num_kv_heads": 4},
        norm="layer",
        parallel_residual=True,
        activation="gelu",
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rotary_fraction=0.25,
        tied_head=False,
    ),
}
# Models here are compiled to be run once or twice, so XLA's backend need not optimise them.
QUICK = {"xla_backend_optimization_level": 0}
TOKENS = np.random.default_rng(0).integers(0, 53, (2, 12)).astype(np.int32)


def tie_by(params, cfg, *how, on_projection=None, **options):
    """`tying.tie` with the fields of `TieConfig` as arguments."""
    return tying.tie(params, cfg, TieConfig(*how, **options), on_projection)


def make_params(cfg, seed=0):
    """Random params in which every vector matters."""
    rng = np.random.default_rng(seed)
    out = {}
    for path, leaf in names.flat(abstract_params(cfg)).items():
        noise = rng.standard_normal(leaf.shape, dtype=np.float32)
        if path.endswith("/scale"):
            out[path] = 1 - np.float32(cfg.norm_offset) + 0.4 * noise
        elif path.endswith(("/b", "/bias")):
            out[path] = 0.3 * noise
        else:
            out[path] = noise * np.float32(leaf.shape[-2] ** -0.5)
    return names.nested(out)


@functools.cache
def vanilla(family):
    return make_params(FAMILIES[family]), FAMILIES[family]


def run(cfg, params):
    """Hidden state after every loop `[L, B, T, D]` and logits `[B, T, V]`."""
    model = Decoder(cfg)
    positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    hidden = model.apply({"params": params}, TOKENS, positions, all_loops=True)
    return hidden, model.apply({"params": params}, hidden[-1], method="unembed")


@functools.cache
def forward(cfg):
    return jax.jit(functools.partial(run, cfg), compiler_options=QUICK)


@functools.cache
def gradients(cfg):
    """Gradients of a fixed random functional of the logits."""
    target = np.random.default_rng(0).standard_normal((*TOKENS.shape, cfg.vocab_size))

    def loss(params):
        return (run(cfg, params)[1] * target.astype(np.float32)).sum()

    return jax.jit(jax.grad(loss), compiler_options=QUICK)


def logits(params, cfg):
    return np.asarray(forward(cfg)(params)[1])


def distance(x, reference):
    """Largest difference in units of the reference's largest value."""
    return np.abs(np.asarray(x) - reference).max() / np.abs(reference).max()


def perturbed(params, seed=1):
    """As if trained: every leaf moved, so nothing is zero or equal by construction."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


def weight(params, path):
    return names.flat(params)[path]


# ---------------------------------------------------------------- checks 1-3: which layer is where


@pytest.mark.parametrize("norms", ["tied", "per_loop", "folded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_1_one_loop_is_the_vanilla_model(family, norms):
    params, cfg = vanilla(family)
    reference = logits(params, cfg)
    for method in ("stepwise", "average", "lower", "upper"):
        tied, tied_cfg = tie_by(params, cfg, 1, method, norms=norms)
        assert tied_cfg.num_loops == 1 and tied_cfg.num_layers == cfg.depth
        assert distance(logits(tied, tied_cfg), reference) < 1e-5


def test_check_2_cycle_sharing():
    params, cfg = vanilla("llama")
    stack = np.ones((6, 24, 32), np.float32) * np.arange(6, dtype=np.float32).reshape(6, 1, 1)
    params = {**params, "block": {**params["block"]}}
    params["block"]["attention"] = {**params["block"]["attention"], "q": {"w": stack}}
    for loops, cycle in ((2, "012012"), (3, "010101"), (6, "000000")):
        tied, tied_cfg = tie_by(params, cfg, loops, "lower")
        unrolled, _ = tying.untie(tied, tied_cfg)
        used = weight(unrolled, "block/attention/q/w")[:, 0, 0].astype(int)
        assert "".join(map(str, used)) == cycle  # SEQUENCE: 001122, CYCLE(REV): 012210


@pytest.mark.parametrize("loops", [0, -1, 4, 7])
def test_check_2_loop_counts_must_divide_the_depth(loops):
    with pytest.raises(ValueError, match="6 layers; possible: 1, 2, 3, 6"):
        tie_by(*vanilla("llama"), loops)


@pytest.mark.parametrize(
    "depth, loops, expected",
    [
        (6, 2, "0 2 5"),
        (12, 2, "0 2 4 7 9 11"),
        (16, 2, "0 2 4 6 9 11 13 15"),
        (18, 2, "0 2 4 6 8 11 13 15 17"),
        (18, 3, "0 3 7 10 14 17"),
        (22, 2, "0 2 4 6 8 10 13 15 17 19 21"),
        (24, 2, "0 2 4 6 8 10 13 15 17 19 21 23"),
    ],
)
def test_check_3_stepwise_golden_table(depth, loops, expected):
    selected = tie_config.selected_depths("stepwise", depth, depth // loops)
    assert " ".join(map(str, selected)) == expected


def test_check_3_rounding_is_a_parameter():
    def table(*args):
        return " ".join(map(str, tie_config.selected_depths("stepwise", *args)))

    assert table(18, 9, "floor") == "0 2 4 6 8 10 12 14 17"
    assert table(6, 3, "half_up") == "0 3 5"
    params, cfg = vanilla("llama")
    q = weight(params, "block/attention/q/w")
    for rounding, source in (("even", 2), ("half_up", 3)):
        tied, _ = tie_by(params, cfg, 2, "stepwise", rounding=rounding)
        np.testing.assert_array_equal(weight(tied, "block/attention/q/w")[1], q[source])


@given(st.integers(1, 12), st.integers(2, 40), st.sampled_from(sorted(tie_config.ROUNDINGS)))
def test_check_3_stepwise_keeps_first_and_last(loops, layers, rounding):
    selected = tie_config.selected_depths("stepwise", loops * layers, layers, rounding)
    assert len(selected) == layers
    assert selected[0] == 0 and selected[-1] == loops * layers - 1
    assert (np.diff(selected) > 0).all()


def test_lower_and_upper_copy_their_layers():
    params, cfg = vanilla("gemma")
    for method, part in (("lower", slice(0, 2)), ("upper", slice(4, 6))):
        tied, tied_cfg = tie_by(params, cfg, 3, method, norms="tied")
        assert tied_cfg.windows == cfg.windows and tied_cfg.rope_of_depth == cfg.rope_of_depth
        for path, leaf in names.flat(tied).items():
            original = weight(params, path)
            expected = original[part] if path.startswith("block/") else original
            np.testing.assert_array_equal(leaf, expected, err_msg=path)


# ----------------------------------------------------------------- checks 4-6: shared weights, zero


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loops", [2, 3])
def test_check_4_average(family, loops):
    params, cfg = vanilla(family)
    tied, tied_cfg = tie_by(params, cfg, loops, "average", "svd", 5, norms="tied")
    for path, leaf in names.flat(tied).items():
        if path.startswith("block/") and "lora" not in path:
            original = weight(params, path)
            by_loop = original.reshape(loops, -1, *original.shape[1:])
            np.testing.assert_allclose(leaf, by_loop.mean(axis=0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose((by_loop - leaf).sum(axis=0), 0, atol=2e-6)
    if loops == 2:
        for name in cfg.projections:
            module = "mlp" if name in ("gate", "up", "down") else "attention"
            a, b = (weight(tied, f"block/{module}/{name}/lora_{x}") for x in "ab")
            np.testing.assert_array_equal(a[:, 0] @ b[:, 0], -(a[:, 1] @ b[:, 1]))
            assert np.abs(b).min(axis=(0, 1, 3)).max() > 0


@pytest.mark.parametrize("family", ["gemma", "neox"])
def test_check_5_lower_prefix(family):
    params, cfg = vanilla(family)
    tied, tied_cfg = tie_by(params, cfg, 2, "lower", "svd", 4)
    first = cfg.replace(num_layers=3, windows=cfg.windows[:3], rope_of_depth=cfg.rope_of_depth[:3])
    prefix = {**params, "block": jax.tree.map(lambda x: x[:3], params["block"])}
    reference = forward(first)(prefix)[0][0]
    assert distance(forward(tied_cfg)(tied)[0][0], reference) < 1e-5
    for path, leaf in names.flat(tied).items():
        if path.endswith("lora_b"):
            assert not leaf[:, 0].any() and leaf[:, 1].any(axis=(1, 2)).all()


def test_check_6_zero_lora_is_the_recursive_model():
    params, cfg = vanilla("llama")
    for method in ("stepwise", "average"):
        tie = functools.partial(tie_by, params, cfg, 2, method, norm_start="choice")
        plain = logits(*tie("none"))
        for rank in (0, 4, "full"):
            relaxed = tie("zero", rank)
            assert ("lora_a" in relaxed[0]["block"]["mlp"]["up"]) == (rank != 0)
            np.testing.assert_array_equal(logits(*relaxed), plain)
        # and LoRA that is not zero does something
        assert distance(logits(*tie("svd", 4)), plain) > 1e-2


# --------------------------------------------------------------- checks 7-11: SVD, split, exactness


@pytest.mark.parametrize(
    "family, loops, norms",
    [
        ("llama", 2, "per_loop"),
        ("llama", 2, "folded"),
        ("gemma", 3, "per_loop"),
        ("gemma", 2, "folded"),
        ("neox", 2, "folded"),
        ("neox", 3, "per_loop"),
    ],
)
def test_check_7_full_rank_is_the_original_model(family, loops, norms):
    params, cfg = vanilla(family)
    reference = logits(params, cfg)
    for method, lora in (
        ("average", "svd"),
        ("stepwise", "svd"),
        ("lower", "svd"),
        ("upper", "svd"),
        ("average", "split"),
    ):
        tied, tied_cfg = tie_by(params, cfg, loops, method, lora, "full", norms)
        assert distance(logits(tied, tied_cfg), reference) < 1e-5, (method, lora)
        # not by luck: the LoRAs carry it
        without = jax.tree.map(np.copy, tied)
        without["block"]["mlp"]["up"]["lora_b"][:] = 0
        assert distance(logits(without, tied_cfg), reference) > 1e-2


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_check_7_negative_control_tied_norms_are_not_exact(family):
    params, cfg = vanilla(family)
    for start in ("average", "choice"):
        tied = tie_by(params, cfg, 2, "average", "svd", "full", "tied", norm_start=start)
        assert distance(logits(*tied), logits(params, cfg)) > 1e-2


SHAPES = st.tuples(st.integers(2, 24), st.integers(2, 24))


def random_weights(shape, loops, seed):
    rng = np.random.default_rng(seed)
    decay = np.float32(0.8) ** np.arange(shape[1], dtype=np.float32)
    return [
        rng.standard_normal(shape, dtype=np.float32) @ np.diag(decay[rng.permutation(shape[1])])
        for _ in range(loops)
    ]


def squared_error(weights, base, factors):
    products = (a.astype(np.float64) @ b.astype(np.float64) for a, b in factors)
    return sum(np.square(w - base - p).sum() for w, p in zip(weights, products, strict=True))


@settings(deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_check_8_tail_identity(shape, seed):
    (residual,) = random_weights(shape, 1, seed)
    sigma = np.linalg.svd(residual.astype(np.float64), compute_uv=False)
    previous = np.inf
    for rank in range(1, min(shape) + 1):
        a, b = low_rank.truncated_svd(residual, rank)
        left = residual.astype(np.float64) - a.astype(np.float64) @ b
        tail = np.append(sigma, 0)[rank]
        np.testing.assert_allclose(np.linalg.norm(left, 2), tail, rtol=1e-4, atol=2e-6 * sigma[0])
        error = np.square(left).sum()
        np.testing.assert_allclose(
            error, np.square(sigma[rank:]).sum(), rtol=1e-4, atol=1e-11 * sigma[0] ** 2
        )
        assert error < previous
        previous = error
        np.testing.assert_allclose(a.T @ a, np.eye(rank), atol=2e-6)
        np.testing.assert_allclose(
            b @ b.T, np.diag(sigma[:rank] ** 2), rtol=1e-5, atol=1e-6 * sigma[0] ** 2
        )
        assert (np.take_along_axis(a, np.abs(a).argmax(0)[None], 0) > 0).all()


@pytest.mark.parametrize("shape", [(80, 30), (30, 80)])
def test_check_8_hard_spectra(shape):
    """Five decades of singular values, and a residual of rank 7: no accuracy lost by squaring."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 30)))[0] for n in shape)
    for sigma in (10.0 ** np.linspace(0, -5, 30), np.where(np.arange(30) < 7, 1.0, 0.0)):
        residual = ((u * sigma) @ v.T).astype(np.float32)
        a, b = low_rank.truncated_svd(residual, 30)
        assert np.linalg.norm(residual - a @ b, 2) < 1e-6
        np.testing.assert_allclose(a.T @ a, np.eye(30), atol=2e-6)
        reference = np.linalg.svd(residual.astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(np.linalg.norm(b, axis=1), reference, rtol=1e-4, atol=1e-7)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 99), st.data())
def test_check_9_factor_two_and_split_spectrum(shape, seed, data):
    first, second = weights = random_weights(shape, 2, seed)
    side = min(shape)
    rank = data.draw(st.integers(1, side))
    rng = np.random.default_rng(0)
    sigma = np.linalg.svd((first.astype(np.float64) - second) / 2, compute_uv=False)
    close = dict(rtol=1e-4, atol=1e-10 * sigma[0] ** 2)

    def tail(r):
        return np.square(sigma[r:]).sum()

    lower = low_rank.residual_start(weights, first, rank, rng)
    average = low_rank.centred_start(weights, low_rank.mean(weights), rank, rng)
    error = squared_error(weights, low_rank.mean(weights), average)
    np.testing.assert_allclose(error, 2 * tail(rank), **close)
    np.testing.assert_allclose(squared_error(weights, first, lower), 2 * error, **close)

    base, split = low_rank.split_spectrum(weights, rank, rng)
    error = squared_error(weights, base, split)
    np.testing.assert_allclose(error, 2 * tail(2 * rank), **close)
    if rank >= -(-side // 2):
        assert error < 1e-10 * sigma[0] ** 2
    for a, b in split:
        assert a.shape == (shape[0], rank) and b.shape == (rank, shape[1])
        np.testing.assert_allclose(a.T @ a, np.eye(rank), atol=2e-6)  # unused rank is trainable


def test_check_9_split_spectrum_of_three_loops():
    weights = [np.random.default_rng(i).standard_normal((96, 64), np.float32) for i in range(3)]
    rng, base = np.random.default_rng(0), low_rank.mean(weights)
    plain = squared_error(weights, base, low_rank.centred_start(weights, base, 8, rng))
    split = squared_error(weights, *low_rank.split_spectrum(weights, 8, rng))
    assert split < 0.82 * plain
    assert squared_error(weights, *low_rank.split_spectrum(weights, 64, rng)) < 1e-8
    base, factors = low_rank.split_spectrum([weights[0]] * 3, 8, rng)  # nothing to decompose
    np.testing.assert_allclose(base, weights[0], atol=1e-6)


def test_check_10_lora_has_no_scale():
    params, cfg = vanilla("llama")
    tied, tied_cfg = tie_by(params, cfg, 2, "average", "svd", "full")
    doubled = jax.tree_util.tree_map_with_path(
        lambda path, x: 2 * x if path[-1].key == "lora_b" else x, tied
    )
    reference = logits(params, cfg)
    assert distance(logits(tied, tied_cfg), reference) < 1e-5
    assert distance(logits(doubled, tied_cfg), reference) > 0.1


@pytest.mark.parametrize(
    "method, zero", [("stepwise", {(0, 0), (1, 2)}), ("lower", {(0, 0), (0, 1), (0, 2)}),
                     ("upper", {(1, 0), (1, 1), (1, 2)}), ("average", set())]
)  # fmt: skip
def test_check_11_zero_residual_modules(method, zero):
    """(loop, layer) of the modules whose B matrices are white in the paper's Figure C.1."""
    params, cfg = vanilla("llama")
    tied, tied_cfg = tie_by(params, cfg, 2, method, "svd", 4, "tied")
    grads = gradients(tied_cfg)(tied)
    for path in (p for p in names.flat(tied) if p.endswith("lora_b")):
        a, b = weight(tied, path[:-1] + "a"), weight(tied, path)
        grad_a, grad_b = weight(grads, path[:-1] + "a"), weight(grads, path)
        found = {(loop, k) for loop in range(2) for k in range(3) if not b[k, loop].any()}
        assert found == zero
        for loop in range(2):
            for layer in range(3):
                assert a[layer, loop].any() and jnp.any(grad_b[layer, loop] != 0)
                assert bool(jnp.any(grad_a[layer, loop] != 0)) == ((loop, layer) not in zero)


# --------------------------------------------------------------------- checks 12, 15: what it costs

GEMMA_2B = DecoderConfig("gemma", 256000, 2048, 16384, 8, 1, 256, 18)
TINYLLAMA = DecoderConfig("llama", 32000, 2048, 5632, 32, 4, 64, 22, tied_head=False)
PYTHIA_1B = DecoderConfig(
    "gpt_neox", 50304, 2048, 8192, 8, 8, 256, 16, gated_mlp=False, tied_head=False
)


def counts(cfg, loops=1, ranks=0):
    ranks = tie_config.resolve_ranks(cfg, ranks)
    tied = cfg.replace(num_layers=cfg.depth // loops, num_loops=loops, lora_ranks=ranks)
    return parameter_counts(abstract_params(tied))


def test_check_12_exact_counts():
    assert counts(GEMMA_2B)["shared"] == 1_981_808_640
    assert counts(GEMMA_2B, 2)["shared"] == 990_904_320
    for rank, added in ((64, 78_446_592), (512, 606_339_072)):  # rank 512 is clamped at K and V
        assert counts(GEMMA_2B, 2, rank)["shared"] == 990_904_320
        assert counts(GEMMA_2B, 2, rank)["lora"] == added
    for cfg, layer in ((GEMMA_2B, 110_100_480), (TINYLLAMA, 44_040_192), (PYTHIA_1B, 50_331_648)):
        assert counts(cfg)["shared"] == layer * cfg.depth


@pytest.mark.parametrize(
    "cfg, loops, billions",
    [
        (GEMMA_2B, 2, (0.99, 1.07, 1.15, 1.30, 1.60)),
        (GEMMA_2B, 3, (0.66, 0.74, 0.82, 0.97, 1.27)),
        (TINYLLAMA, 2, (0.48, 0.53, 0.58, 0.68, 0.86)),
        (PYTHIA_1B, 2, (0.40, 0.44, 0.48, 0.55, 0.70)),
    ],
)
def test_check_12_printed_sizes(cfg, loops, billions):
    for rank, size in zip((0, 64, 128, 256, 512), billions, strict=True):
        count = counts(cfg, loops, rank)
        assert (count["shared"] + count["lora"]) / 1e9 == pytest.approx(size, abs=0.01)


def test_check_12_sizes_by_component():
    """Ranks of Q / KV / Out / FFN in the paper's Table G.1."""
    for ranks, size in {
        (256, 256, 256, 256): 1.30, (128, 256, 128, 256): 1.28, (256, 128, 256, 256): 1.29,
        (256, 256, 256, 128): 1.18, (128, 128, 128, 256): 1.27, (128, 128, 128, 128): 1.15,
        (64, 128, 64, 128): 1.14, (128, 64, 128, 128): 1.14, (128, 128, 128, 64): 1.08,
        (64, 64, 64, 128): 1.13,
    }.items():  # fmt: skip
        q, kv, out, ffn = ranks
        by_name = dict(q=q, k=kv, v=kv, o=out, gate=ffn, up=ffn, down=ffn)
        count = counts(GEMMA_2B, 2, by_name)
        assert (count["shared"] + count["lora"]) / 1e9 == pytest.approx(size, abs=0.01)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 8), st.integers(0, 3000))
def test_check_15_break_even(in_dim, out_dim, loops, rank):
    shared, untied = in_dim * out_dim, loops * in_dim * out_dim
    costs_more = shared + loops * rank * (in_dim + out_dim) > untied
    assert costs_more == (rank > tie_config.break_even_rank(in_dim, out_dim, loops))


def test_check_15_table_and_costly_projections():
    for cfg, name, loops, expected in (
        (GEMMA_2B, "k", 2, 114), (GEMMA_2B, "k", 3, 152), (GEMMA_2B, "q", 2, 512),
        (GEMMA_2B, "o", 3, 683), (TINYLLAMA, "up", 2, 751), (TINYLLAMA, "down", 3, 1001),
        (GEMMA_2B, "gate", 2, 910), (GEMMA_2B, "down", 3, 1214),
    ):  # fmt: skip
        assert round(tie_config.break_even_rank(*cfg.projections[name], loops)) == expected
    tied = GEMMA_2B.replace(num_layers=9, num_loops=2)

    def rank(r):
        return tied.replace(lora_ranks=tie_config.resolve_ranks(GEMMA_2B, r))

    assert tie_config.costly_projections(rank(64)) == {}
    costly = tie_config.costly_projections(rank(128))
    assert {n: (r, round(limit)) for n, (r, limit) in costly.items()} == {
        "k": (128, 114), "v": (128, 114)
    }  # fmt: skip
    # the same verdict by counting what is stored
    for r, outweighs in ((113, False), (114, True)):
        count = counts(GEMMA_2B, 2, {"k": r})
        saved = counts(GEMMA_2B)["shared"] - count["shared"]
        share = saved * (2048 * 256) // 110_100_480  # of K in what sharing saves
        assert (count["lora"] > share) == outweighs


# ------------------------------------------------------------------ checks 13, 14: real sharing


def test_check_13_one_array_per_shared_weight():
    base = DecoderConfig("llama", 64, 96, 384, 4, 4, 24, 2)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    usage = {}
    for loops in (2, 8):
        params = abstract_params(base.replace(num_loops=loops))
        assert params["block"]["mlp"]["up"]["w"].shape == (2, 96, 384)
        step = jax.jit(Decoder(base.replace(num_loops=loops)).apply)
        memory = step.lower({"params": params}, tokens, tokens).compile().memory_analysis()
        usage[loops] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        weights = 4 * parameter_counts(params)["total"]
        assert abs(memory.argument_size_in_bytes - weights) < 4096
        assert memory.temp_size_in_bytes < 0.5 * weights  # no second copy among the live buffers
    assert usage[2][0] == usage[8][0]
    assert abs(usage[2][1] - usage[8][1]) < 4096


def test_check_14_gradient_of_a_tied_weight_is_the_sum_over_loops():
    params, cfg = vanilla("llama")
    tied, tied_cfg = tie_by(params, cfg, 2, "average", "svd", 4, "tied")
    tied = perturbed(tied)
    untied, untied_cfg = tying.untie(tied, tied_cfg)  # a separate copy for every loop
    separate = names.flat(gradients(untied_cfg)(untied))
    for path, grad in names.flat(gradients(tied_cfg)(tied)).items():
        if not path.startswith("block/"):
            expected = np.asarray(separate[path])
        elif "/lora_" in path:  # the chain rule through w + a @ b
            prefix, x = path.rsplit("_", 1)
            of_merged = np.asarray(separate[prefix.replace("lora", "w")])
            of_merged = of_merged.reshape(2, 3, *of_merged.shape[1:]).swapaxes(0, 1)
            a, b = (weight(tied, f"{prefix}_{y}").swapaxes(-1, -2) for y in "ab")
            expected = of_merged @ b if x == "a" else a @ of_merged
        else:
            expected = np.asarray(separate[path])
            expected = expected.reshape(2, 3, *expected.shape[1:]).sum(axis=0)
        assert distance(grad, expected) < 1e-4, path


# ---------------------------------------------------------------- checks 27, 28: round trip, norms


@pytest.mark.parametrize(
    "family, norms",
    [("llama", "tied"), ("gemma", "per_loop"), ("neox", "folded")],
)
def test_check_27_untied_model_has_the_same_logits(family, norms):
    params, cfg = vanilla(family)
    ranks = {"q": 3, "v": "full", "up": 2, "down": 5}
    tied, tied_cfg = tie_by(params, cfg, 2, "average", "svd", ranks, norms)
    tied = perturbed(tied)
    back, back_cfg = tying.untie(tied, tied_cfg)
    assert (back_cfg.num_loops, back_cfg.num_layers, back_cfg.lora_ranks) == (1, 6, ())
    assert {path: leaf.shape for path, leaf in names.flat(back).items()} == names.shapes(back_cfg)
    reference = logits(tied, tied_cfg)
    assert distance(logits(back, back_cfg), reference) < 1e-5
    if norms != "folded":
        assert back_cfg == cfg
    assert distance(logits(params, cfg), reference) > 1e-2


def test_check_28_zero_norms():
    params, cfg = vanilla("gemma")  # (1 + w) norms: zero is unit scale
    tied, tied_cfg = tie_by(params, cfg, 2, "average", norms="tied", norm_start="zero")
    unit = jax.tree_util.tree_map_with_path(
        lambda path, x: np.ones_like(x) if path[-1].key == "scale" and len(path) > 2 else x, tied
    )
    assert distance(logits(unit, tied_cfg.replace(norm_offset=0.0)), logits(tied, tied_cfg)) > 1e-2
    unit["final_norm"] = {"scale": 1 + tied["final_norm"]["scale"]}
    assert distance(logits(unit, tied_cfg.replace(norm_offset=0.0)), logits(tied, tied_cfg)) < 1e-6

    params, cfg = vanilla("llama")  # plain norms: a bias-free block becomes the identity
    tied, tied_cfg = tie_by(params, cfg, 2, "average", norms="tied", norm_start="zero")
    hidden, _ = forward(tied_cfg)(tied)
    np.testing.assert_array_equal(hidden[-1], np.asarray(params["embedding"])[TOKENS])

    params, cfg = vanilla("neox")  # LayerNorm's bias goes too, linear biases stay
    tied, _ = tie_by(params, cfg, 2, "average", norms="tied", norm_start="zero")
    assert not tied["block"]["pre_mlp_norm"]["bias"].any()
    assert tied["block"]["mlp"]["up"]["b"].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_check_28_folded_norms_are_identities(family):
    params, cfg = vanilla(family)
    tied, tied_cfg = tie_by(params, cfg, 1, norms="folded")
    for norm in ("pre_attention_norm", "pre_mlp_norm"):
        scale = tied["block"][norm]["scale"]
        np.testing.assert_array_equal(scale, np.full((6, 24), 1 - cfg.norm_offset, np.float32))
        assert not tied["block"][norm].get("bias", np.zeros(1)).any()
    assert distance(logits(tied, tied_cfg), logits(params, cfg)) < 1e-5


def test_folding_a_layer_norm_makes_the_biases_it_needs():
    cfg = FAMILIES["neox"].replace(qkv_bias=False, o_bias=False, mlp_bias=False)
    params = make_params(cfg)
    tied, tied_cfg = tie_by(params, cfg, 2, lora_rank="full", norms="folded")
    assert tied_cfg.qkv_bias and tied_cfg.mlp_bias and not tied_cfg.o_bias
    assert (
        tied["block"]["attention"]["q"]["b"].any() and not tied["block"]["mlp"]["down"]["b"].any()
    )
    assert distance(logits(tied, tied_cfg), logits(params, cfg)) < 1e-5


# ------------------------------------------------------------------------- defaults and starts


def test_defaults_follow_the_paper():
    params, cfg = vanilla("llama")

    def same(x, y):
        return jax.tree.all(jax.tree.map(np.array_equal, x[0], y[0]))

    tie = functools.partial(tie_by, params, cfg, 2)
    assert same(tie(), tie("stepwise", "none"))
    assert same(tie(lora_rank=3), tie("average", "joint", 3))
    assert same(tie(lora_rank="full"), tie("average", "svd", "full"))
    assert same(tie("stepwise", lora_rank=3), tie("stepwise", "zero", 3))
    assert same(tie("lower", lora_rank=3), tie("lower", "svd", 3))
    assert same(tie(lora_init="svd", lora_rank=0), tie())
    assert not same(tie(lora_rank=3), tie(lora_rank=3, seed=0, norm_start="average"))
    a = tie("stepwise", lora_rank=3)[0]["block"]["mlp"]["up"]["lora_a"]
    other = tie("stepwise", lora_rank=3, seed=1)[0]["block"]["mlp"]["up"]["lora_a"]
    assert not np.array_equal(a, other) and not np.array_equal(a[0, 0], a[0, 1])
    assert a.std() == pytest.approx(24**-0.5, rel=0.2)


def test_norms_start_with_the_weights_that_a_loop_uses():
    params, cfg = vanilla("gemma")
    path = "block/attention/q_norm/scale"
    source = weight(params, path)
    own = source.reshape(2, 3, -1).swapaxes(0, 1)

    def start(*args, **kwargs):
        return weight(tie_by(params, cfg, 2, *args, **kwargs)[0], path)

    def both(table):
        return np.repeat(table[:, None], 2, axis=1)

    np.testing.assert_array_equal(start("stepwise"), both(source[[0, 2, 5]]))
    np.testing.assert_array_equal(start("upper", "zero", 2), both(source[3:]))
    np.testing.assert_allclose(start("average"), both(own.mean(axis=1)), rtol=1e-6)
    for method, lora in (("average", "svd"), ("average", "split"), ("stepwise", "svd")):
        np.testing.assert_array_equal(start(method, lora, 2), own)
    np.testing.assert_array_equal(start("lower", norm_start="own"), own)
    np.testing.assert_array_equal(start("average", norm_start="choice"), both(source[:3]))
    np.testing.assert_array_equal(start("lower", norms="tied"), source[:3])
    np.testing.assert_array_equal(start("average", "svd", 2, norms="tied"), own.mean(axis=1))


def test_random_keeps_no_layer_of_the_source():
    params, cfg = vanilla("neox")
    fresh, fresh_cfg = tie_by(params, cfg, 2, "random", lora_rank={"up": 4}, seed=3)
    assert fresh_cfg.num_loops == 2 and fresh_cfg.rank("up") == 4
    assert jax.tree.map(lambda x: x.shape, fresh) == jax.tree.map(
        lambda x: x.shape, abstract_params(fresh_cfg)
    )

    def outside(tree):
        return {name: x for name, x in tree.items() if name != "block"}

    assert set(outside(fresh)) == {"embedding", "head", "final_norm"}
    chex.assert_trees_all_equal(outside(fresh), outside(params))
    assert (fresh["block"]["pre_mlp_norm"]["scale"] == 1).all()
    assert not fresh["block"]["mlp"]["up"]["lora_b"].any()
    up = weight(fresh, "block/mlp/up/w")
    assert up.std() == pytest.approx(0.02, rel=0.1)
    assert weight(fresh, "block/mlp/down/w").std() == pytest.approx(0.02 / 12**0.5, rel=0.1)
    again, _ = tie_by(params, cfg, 2, "random", lora_rank={"up": 4}, seed=3)
    other, _ = tie_by(params, cfg, 2, "random", lora_rank={"up": 4}, seed=4)
    np.testing.assert_array_equal(up, weight(again, "block/mlp/up/w"))
    assert not np.array_equal(up, weight(other, "block/mlp/up/w"))


@pytest.mark.parametrize("loops", [2, 3])
def test_energy_kept_is_the_share_of_the_squared_residual(loops):
    params, cfg = vanilla("llama")
    stack = weight(params, "block/mlp/down/w").astype(np.float64).reshape(loops, -1, 40, 24)
    for method, base in (("average", stack.mean(axis=0)), ("lower", stack[0])):
        squares = np.square(np.linalg.svd(stack - base, compute_uv=False))
        for rank in (0, 3, 24):
            energy = {}

            def note(name, kept, by_layer, energy=energy):
                energy[name] = kept, by_layer

            tie_by(params, cfg, loops, method, "svd", rank, on_projection=note)
            expected = squares[..., :rank].sum() / squares.sum()
            assert energy["down"][0] == pytest.approx(expected, abs=1e-5)
            layers = squares[..., :rank].sum((0, 2)) / squares.sum((0, 2))
            np.testing.assert_allclose(energy["down"][1], layers, atol=1e-5)
            assert sorted(energy) == ["down", "gate", "k", "o", "q", "up", "v"]
    kept = {}

    def only_kept(name, share, by_layer):
        kept[name] = share

    tie_by(params, cfg, loops, "average", "split", 3, on_projection=only_kept)
    squares = np.square(np.linalg.svd(stack - stack.mean(axis=0), compute_uv=False))
    assert kept["down"] > squares[..., :3].sum() / squares.sum() + 0.05
    if loops == 2:
        assert kept["down"] == pytest.approx(squares[..., :6].sum() / squares.sum(), abs=1e-5)


# -------------------------------------------------------------------------------- one stack a time


class LazyParams(Mapping):
    """Makes every leaf on access and remembers, weakly, which ones are still alive."""

    def __init__(self, flat):
        self._flat, self.reads, self._alive = flat, [], {}

    def __getitem__(self, path):
        if path.endswith("/w"):
            alive = [p for p, ref in self._alive.items() if ref() is not None]
            assert not alive, f"{alive} still in memory while reading {path}"
        leaf = self._flat[path].astype(ml_dtypes.bfloat16)
        if path.endswith("/w"):
            self._alive[path] = weakref.ref(leaf)
        self.reads.append(path)
        return leaf

    def __iter__(self):
        return iter(self._flat)

    def __len__(self):
        return len(self._flat)


@pytest.mark.parametrize("norms", ["per_loop", "folded"])
def test_a_lazy_source_is_read_once_and_one_stack_at_a_time(norms):
    params, cfg = vanilla("neox")
    lazy = LazyParams(names.flat(params))
    tied, _ = tie_by(lazy, cfg, 2, lora_rank=3, norms=norms)
    assert sorted(lazy.reads) == sorted(names.flat(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(tied)} == {np.dtype(np.float32)}
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    expected, _ = tie_by(rounded, cfg, 2, lora_rank=3, norms=norms)
    jax.tree.map(np.testing.assert_array_equal, tied, expected)


def test_no_stack_is_read_where_single_layers_can_be():
    class ByLayer(LazyParams):
        def layers(self, path, depths):
            return self._flat[path][list(depths)]

    params, cfg = vanilla("neox")
    lazy = ByLayer(names.flat(params))
    tied, _ = tie_by(lazy, cfg, 2, lora_rank=3)
    assert not [p for p in lazy.reads if p.startswith("block/") and p.endswith("/w")]
    expected, _ = tie_by(params, cfg, 2, lora_rank=3)
    for path, leaf in names.flat(tied).items():
        if path.endswith(("/w", "/lora_a", "/lora_b")):
            np.testing.assert_array_equal(leaf, names.flat(expected)[path])


@pytest.mark.parametrize("lora_init, matrices", [("svd", 8), ("joint", 120)])
def test_memory_is_the_result_and_one_stack(lora_init, matrices):
    """'joint' works on two layers at once, with 30 arrays of each in float64; L-BFGS keeps 13."""
    cfg = DecoderConfig("gpt_neox", 64, 128, 512, 4, 1, 32, 12, gated_mlp=False)
    shapes = names.shapes(cfg)

    class Source(LazyParams):
        def __getitem__(self, path):
            return np.random.default_rng(0).standard_normal(shapes[path], np.float32)

    tracemalloc.start()
    try:
        tied, _ = tie_by(Source(shapes), cfg, 2, lora_rank=8, lora_init=lora_init)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(tied))
    matrix = 4 * 128 * 512
    assert peak < result + (12 + matrices) * matrix  # one stack and a few working matrices


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(method="middle"), "method='middle'; expected one of"),
        (dict(lora_init="qr"), "lora_init='qr'; expected one of"),
        (dict(norms="shared"), "norms='shared'; expected one of"),
        (dict(norm_start="one"), "norm_start='one'; expected one of"),
        (dict(rounding="up"), "rounding='up'; expected one of"),
        (dict(lora_rank=-1), "rank -1 of projection 'q' is impossible"),
        (dict(lora_rank=2.5), "rank 2.5 of projection"),
        (dict(lora_rank="half"), "rank 'half' of projection"),
        (dict(lora_rank={"qkv": 4}), r"unknown projections \['qkv'\].*'q', 'k'"),
        (dict(lora_init="none", lora_rank=4), "contradicts"),
        (dict(method="random", lora_init="svd", lora_rank=4), "keeps nothing of the layers"),
        (dict(method="random", norm_start="zero"), "keeps nothing of the layers"),
        (dict(method="lower", lora_init="split", lora_rank=4), "starts from method='average'"),
        (dict(norms="tied", norm_start="own"), "impossible with norms='tied'"),
        (dict(norms="folded", norm_start="zero"), "impossible with norms='folded'"),
    ],
)
def test_impossible_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        tie_by(*vanilla("llama"), 2, **arguments)


def test_ranks_are_clamped_by_projection():
    cfg = FAMILIES["gemma"]
    assert tie_config.resolve_ranks(cfg, 30) == dict(q=24, k=8, v=8, o=24, gate=24, up=24, down=24)
    assert tie_config.resolve_ranks(cfg, {"k": "full", "up": 3, "q": 0}) == {"k": 8, "up": 3}
    assert tie_config.resolve_ranks(cfg, None) == {}


def test_params_that_do_not_fit_the_config():
    params, cfg = vanilla("llama")
    flat = dict(names.flat(params))
    with pytest.raises(ValueError, match=r"missing \['head'\], left over \['tail'\]"):
        tie_by({**{k: v for k, v in flat.items() if k != "head"}, "tail": 0}, cfg, 2)
    with pytest.raises(ValueError, match=r"block/mlp/up/w has shape \(6, 24, 39\).*\(6, 24, 40\)"):
        tie_by({**flat, "block/mlp/up/w": flat["block/mlp/up/w"][..., 1:]}, cfg, 2)
    tied, tied_cfg = tie_by(params, cfg, 2, lora_rank=2)
    with pytest.raises(ValueError, match="num_loops=2.*untie it first"):
        tie_by(tied, tied_cfg, 2)
