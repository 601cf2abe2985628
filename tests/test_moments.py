"""Moments of calibration text, against sums over all labels, and the conversion that uses them."""

import functools
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import recursive_jax as rj
from recursive_jax import calibration
from recursive_jax.evaluation import moments, refit
from recursive_jax.models.attention import Context, rope_tables
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder, Layer, layer_tables
from recursive_jax.models.layers import Linear
from recursive_jax.models.parameters import init_params
from recursive_jax.training.data import Batch
from recursive_jax.weights import hf, joint, tying
from recursive_jax.weights.source import ASSETS
from recursive_jax.weights.stored import ArrayWeights
from recursive_jax.weights.tie_config import TieConfig

LLAMA = DecoderConfig(
    family="llama", vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, num_kv_heads=1,
    head_dim=4, num_layers=4,
)  # fmt: skip
NEOX = DecoderConfig(
    family="gpt_neox", vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, num_kv_heads=2,
    head_dim=4, num_layers=4, norm="layer", parallel_residual=True, activation="gelu",
    gated_mlp=False, qkv_bias=True, o_bias=True, mlp_bias=True, rotary_fraction=0.5,
    tied_head=False,
)  # fmt: skip
GEMMA = DecoderConfig(
    family="gemma3", vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, num_kv_heads=1,
    head_dim=4, num_layers=4, norm_offset=1.0, post_norms=True, qk_norm=True,
    activation="gelu_tanh", windows=(2, 0, 2, 0), final_softcap=9.0, embed_scale=3.0,
)  # fmt: skip
CONFIGS = {"llama": LLAMA, "gpt_neox": NEOX, "gemma3": GEMMA}
COPIES = 128  # of one row's documents: the mean over sampled labels is near the expectation


def random_params(cfg):
    noise = jax.random.split(jax.random.key(1), 100)
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(noise[x.size % 100], x.shape),
        init_params(cfg, jax.random.key(0)),
    )


def source_of(cfg, params):
    return ArrayWeights(params).as_source(cfg, None, {})


def rows(number=1, copies=1):
    """`[number, 5 * copies + 1]`: two documents, some times over, and padding."""
    tokens = np.array([*[1, 5, 3, 2, 7] * copies, 0], np.int32)
    segments = np.repeat(np.arange(2 * copies), [3, 2] * copies) + 1
    row = Batch(
        tokens=tokens,
        targets=np.zeros_like(tokens),
        weights=np.zeros(len(tokens), np.float32),
        positions=np.array([*[0, 1, 2, 0, 1] * copies, 0], np.int32),
        segment_ids=np.array([*segments, 0], np.int32),
    )
    return jax.tree.map(lambda x: np.repeat(x[None], number, 0), row)


def expected_moments(cfg, params):
    """The same expectations: the whole model at once, and every label instead of samples."""
    model, row = Decoder(cfg), rows()
    context = Context(*rope_tables(cfg, row.positions), row.positions, row.segment_ids)

    def run(shifts):
        inputs = {}
        x = model.apply({"params": params}, row.tokens, method="embed")
        for depth in range(cfg.depth):

            def intercept(call, args, kwargs, context, depth=depth):
                if not isinstance(context.module, Linear) or context.method_name != "__call__":
                    return call(*args, **kwargs)
                name = context.module.projection
                inputs[name, depth] = args[0][0]
                return call(*args, **kwargs) + shifts[name, depth]

            layer = cfg.at_depths([depth])
            tables = jax.tree.map(lambda table: table[0], layer_tables(layer))
            block = jax.tree.map(lambda leaf, d=depth: leaf[d], params["block"])
            with nn.intercept_methods(intercept):
                (x, _), _ = Layer(layer).apply(
                    {"params": block}, (x, None), jnp.int32(0), context, tables
                )
        logits = model.apply({"params": params}, x, method="unembed")
        return jax.nn.log_softmax(logits)[0], inputs

    shifts = {
        (name, depth): jnp.zeros((1, 6, out_dim))
        for name, (_, out_dim) in cfg.projections.items()
        for depth in range(cfg.depth)
    }
    log_p, taps = jax.jit(run)(shifts)
    jacobian = jax.jit(jax.jacrev(lambda s: run(s)[0]))(shifts)  # [T, V, 1, T', out]
    real = row.segment_ids[0] > 0
    out = {}
    for (name, depth), g in jacobian.items():
        g = g[real][:, :, 0]
        out[f"G/{name}", depth] = jnp.einsum("tv,tvsi,tvsj->ij", jnp.exp(log_p[real]), g, g)
    for (name, depth), x in taps.items():
        out[f"C/{name}", depth] = x[real].T @ x[real]
        out[f"mean/{name}", depth] = x[real].sum(0)
    return jax.tree.map(lambda x: np.asarray(x) / real.sum(), out)


@pytest.mark.parametrize("family", CONFIGS)
def test_moments_are_those_of_the_whole_model(family, tmp_path):
    """On eight devices, layer by layer, with sampled labels; padding and other documents apart."""
    cfg = CONFIGS[family]
    params = random_params(cfg)
    found = moments.measure(
        source_of(cfg, params), rows(30, COPIES), tmp_path / "moments", progress=False
    )
    assert found.tokens == 30 * 5 * COPIES
    assert [p.name for p in tmp_path.iterdir()] == ["moments"]
    want = expected_moments(cfg, params)
    for depth in range(cfg.depth):
        for name in cfg.projections:
            metric = found.metric(name, depth, "fisher")
            c, g = metric.inputs.blocks[0], metric.outputs.blocks[0]
            ridged = [
                m + 1e-3 * np.trace(m) / len(m) * np.eye(len(m))
                for m in (want[f"C/{name}", depth], want[f"G/{name}", depth])
            ]
            np.testing.assert_allclose(c, ridged[0], rtol=1e-4, atol=1e-5)
            scale = np.abs(ridged[1]).max()
            np.testing.assert_allclose(g / scale, ridged[1] / scale, atol=0.1)
            metric = found.metric(name, depth, "activations")
            assert (metric.outputs.blocks == 1).all()


def test_a_wide_moment_is_kept_in_blocks():
    assert moments.block_shape(1536) == (1, 1536, 1536)
    assert moments.block_shape(16_384) == (8, 2048, 2048)
    assert moments.block_shape(5632) == (4, 1408, 1408)


def test_folded_norms_see_the_moment_of_the_plain_norm(tmp_path):
    """LayerNorm: the moment of x̂ from that of `x̂ * scale + bias`, against x̂ itself."""
    params = random_params(NEOX)
    found = moments.measure(source_of(NEOX, params), rows(), tmp_path / "a", progress=False)
    norm = params["block"]["pre_mlp_norm"]
    plain = {"scale": jnp.ones_like(norm["scale"]), "bias": jnp.zeros_like(norm["bias"])}
    up, scale, bias = params["block"]["mlp"]["up"], norm["scale"], norm["bias"]
    folded_up = {
        "w": up["w"] * scale[:, :, None],
        "b": up["b"] + jnp.einsum("li,lio->lo", bias, up["w"]),
    }
    block = {**params["block"], "pre_mlp_norm": plain}
    block["mlp"] = {**block["mlp"], "up": folded_up}
    other = moments.measure(
        source_of(NEOX, {**params, "block": block}), rows(), tmp_path / "b", progress=False
    )
    ours = found.metric("up", 2, "fisher", np.asarray(scale[2]), np.asarray(bias[2]))
    want = other.metric("up", 2, "fisher")
    np.testing.assert_allclose(ours.inputs.blocks, want.inputs.blocks, rtol=1e-3, atol=1e-4)


def test_a_moment_that_rounding_has_spoilt_is_named(tmp_path):
    params = random_params(LLAMA)
    found = moments.measure(source_of(LLAMA, params), rows(), tmp_path / "a", progress=False)
    file = tmp_path / "a" / "layer_001.npz"
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["C/q"] = arrays["C/q"] - np.eye(8, dtype=np.float32)
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match="of projection k in layer 1 are not positive definite"):
        found.metric("k", 1, "fisher")
    found.metric("k", 2, "fisher")


def test_weights_that_overflow_are_named(tmp_path):
    params = random_params(LLAMA)
    params["block"]["mlp"]["up"]["w"] = params["block"]["mlp"]["up"]["w"].at[1].mul(1e30)
    with pytest.raises(ValueError, match=r"calibration moment \S+ of layer \d is not finite"):
        moments.measure(source_of(LLAMA, params), rows(), tmp_path / "a", progress=False)
    assert not any(tmp_path.iterdir())


# The conversion


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    rng = np.random.default_rng(0)
    kinds = "the loop runs a block of layers twice and then returns its state to you".split()
    path.write_text("\n".join(" ".join(rng.choice(kinds, 40)) for _ in range(200)))
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random Llama with our tokenizer."""
    cfg = LLAMA.replace(vocab_size=4096, embed_dim=16, mlp_dim=24, head_dim=8, max_length=64)
    directory = tmp_path_factory.mktemp("source") / "llama"
    hf.save_params(jax.tree.map(np.asarray, random_params(cfg)), cfg, directory, dtype=np.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((ASSETS / "tiny" / name).read_bytes())
    return rj.load(directory)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recursive_jax" / "moments"


def test_a_conversion_is_calibrated_once_and_beats_the_paper_s_start(
    source, words, cache, capfd, monkeypatch
):
    options = dict(calibrate=words, calibration_tokens=500, text=words, text_tokens=300,
                   context_length=32)  # fmt: skip
    model = source.convert(lora_rank=4, refit=True, **options)
    about = model.certificate["calibration"]
    assert about["text"] == words and about["tokens"] >= 500
    kls = about["kl_by_metric"]
    assert set(kls) == {"fisher", "activations"}
    assert about["metric"] == min(kls, key=kls.get)
    assert about["refit_kl"] == pytest.approx(kls[about["metric"]], rel=0.3)  # the better is kept
    paper = source.convert(lora_rank=4, lora_init="svd", **options, quiet=True)
    assert model.certificate["kl"] < 0.7 * paper.certificate["kl"]
    assert "calibration:" in capfd.readouterr().err

    (entry,) = cache.iterdir()
    other = source.convert(lora_rank=2, metric="fisher", **options)  # no pass
    assert "calibration:" not in capfd.readouterr().err
    assert other.certificate["calibration"]["metric"] == "fisher"
    file = sorted(entry.glob("*.npz"))[1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    again = source.convert(lora_rank=4, refit=True, **options)
    shown = capfd.readouterr()
    assert "is damaged; it is measured again" in shown.out + shown.err
    assert again.certificate["calibration"] == about
    assert again.certificate["kl"] == pytest.approx(model.certificate["kl"], rel=1e-5)


def test_certificate_and_calibration_have_no_token_in_common(source, tmp_path):
    """Of one text, the certificate is measured on the beginning, the fit on the rest."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(n) for n in range(1000, 4000)))
    windows = source.windows(str(path), 200, 32)
    found = calibration.read(
        str(path), 400, source.tokenizer, 4096, 64, skip=2 * 200, progress=False
    )
    assert found.tokens >= 400

    def numbers(tokens):
        text = " ".join(source.tokenizer.decode(row) for row in tokens)
        return set(re.findall(r"\b\d{4}\b", text))

    measured, rows, held_out = map(
        numbers, (windows.tokens, found.rows.tokens, found.held_out.tokens)
    )
    assert len(measured) > 20 and len(rows) > 40 and len(held_out) > 5
    assert not measured & rows and not measured & held_out and not rows & held_out


def test_a_certificate_on_text_that_was_fitted_says_so(source, words, cache):
    options = dict(calibrate=words, calibration_tokens=64, text=words, metric="fisher", lora_rank=2)
    for text_tokens, count in ((100, 0), (100_000, 1)):
        model = source.convert(text_tokens=text_tokens, context_length=64, quiet=True, **options)
        found = [w for w in model.certificate["warnings"] if "text that was fitted" in w]
        assert len(found) == count


def test_too_little_text_is_told(source, words, cache, tmp_path, capfd):
    short = tmp_path / "short.txt"
    short.write_text("the loop runs a block of layers twice and then returns. " * 12)
    model = source.convert(
        lora_rank=2, calibrate=str(short), calibration_tokens=5000, metric="fisher"
    )
    used = model.certificate["calibration"]["tokens"]
    assert used < 200
    assert not model.certificate["warnings"]
    shown = capfd.readouterr()
    assert f"has only {used} tokens to calibrate on" in shown.out + shown.err


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(metric="hessian"), "metric='hessian'; expected one of"),
        (dict(calibration_tokens=3), "calibration_tokens=3; expected at least 64"),
        (dict(refit=1), "refit=1; expected True or False"),
        (dict(lora_init="joint", method="lower"), "fits the shared weights anew"),
        (dict(lora_init="joint", method="random"), "keeps nothing of the layers"),
        (dict(lora_budget=0.1), "beside lora_rank=4"),
        (dict(lora_budget=15, lora_rank=0), "expected a share of the source's layers"),
        (dict(lora_budget=0.1, lora_rank=0, lora_init="svd"), "deals ranks by calibration"),
        (dict(lora_budget=0.1, lora_rank=0, metric="none"), "deals ranks by calibration"),
        (dict(lora_budget=0.1, lora_rank=0, method="stepwise"), "deals ranks by calibration"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        TieConfig(**({"lora_rank": 4} | options))


@pytest.mark.parametrize("norms", ["per_loop", "folded"])
def test_a_budget_deals_ranks(source, words, cache, norms):
    options = dict(calibrate=words, calibration_tokens=500, metric="fisher", norms=norms)
    measured = dict(text=words, text_tokens=64, context_length=32)
    model = source.convert(lora_budget=0.2, **options, **measured, quiet=True)
    assert model.certificate["full_rank_identity"]["max_logit_error"] < 1e-4
    dealt, sizes = model.certificate["calibration"]["dealt"], model.certificate["parameters"]
    ranks = dict(model.cfg.lora_ranks)
    assert ranks == {n: r for n, r in dealt["ranks"].items() if r} and len(set(ranks.values())) > 1
    assert sizes["lora"] == dealt["parameters"] <= 0.2 * sizes["source"] < sizes["lora"] * 1.1
    assert model.certificate["recipe"]["lora_rank"] == dealt["ranks"]
    with pytest.raises(ValueError, match="less than one rank of the smallest projection"):
        source.convert(lora_budget=0.001, **options | {"calibrate": "/no/such/text"}, quiet=True)


def test_no_room_for_the_moments(source, words, cache, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(calibration.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs \d.* GB in .*moments, which has 0.0 GB free"):
        source.convert(lora_rank=2, calibrate=words, calibration_tokens=500, quiet=True)


def test_moments_that_are_not_used_are_forgotten(source, words, cache, monkeypatch):
    """All but the newest few, and none that was used lately."""
    options = dict(calibrate=words, calibration_tokens=100, metric="fisher", quiet=True)
    cache.mkdir(parents=True)
    for days in range(6):
        (cache / f"{days}").mkdir()
        (cache / f"{days}" / "data").write_text("moments")
        os.utime(cache / f"{days}", (time.time() - 86_400 * days,) * 2)
    source.convert(lora_rank=2, **options)
    assert {entry.name for entry in cache.iterdir() if entry.name.isdigit()} == {"0", "1", "2"}


def test_what_needs_no_calibration_reads_no_text(source, cache):
    for options in (
        dict(lora_init="svd", lora_rank=2),
        dict(lora_rank="full"),
        dict(lora_init="joint", metric="none", lora_rank=2),
        dict(lora_rank=0),
    ):
        source.convert(TieConfig(calibrate="/no/such/text", **options), quiet=True)
    with pytest.raises(FileNotFoundError):
        source.convert(lora_rank=2, calibrate="/no/such/text", quiet=True)


@pytest.mark.parametrize("norms", ["per_loop", "folded"])
@pytest.mark.parametrize("family", CONFIGS)
def test_full_rank_in_a_metric_is_the_source(family, norms, tmp_path):
    cfg = CONFIGS[family]
    params = random_params(cfg)
    found = moments.measure(source_of(cfg, params), rows(), tmp_path / "m", progress=False)

    def metric(projection, depth, scale, bias):
        return found.metric(projection, depth, "fisher", scale, bias)

    how = TieConfig(2, lora_init="joint", lora_rank="full", norms=norms)
    tied, tied_cfg = tying.tie(params, cfg, how, metric=metric)
    row = rows()
    source = source_of(cfg, params)
    again = refit.refit(source, tied, tied_cfg, row, found, "fisher", progress=False)
    logits = []
    for c, p in ((cfg, params), (tied_cfg, tied), (tied_cfg, again)):
        hidden = Decoder(c).apply({"params": p}, row.tokens, row.positions, row.segment_ids)
        logits.append(Decoder(c).apply({"params": p}, hidden, method="unembed"))
    scale = float(jnp.abs(logits[0]).max())
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-4 * scale)


def test_refitted_loras_are_least_squares_on_the_tied_model_s_inputs(tmp_path):
    """One projection behind the second loop's start, by dense algebra; all else is as it was."""
    f64 = functools.partial(np.asarray, dtype=np.float64)
    cfg, row = LLAMA, rows(copies=4)
    params = random_params(cfg)
    source = source_of(cfg, params)
    found = moments.measure(source, row, tmp_path / "m", progress=False)
    tied, tied_cfg = tying.tie(params, cfg, TieConfig(2, lora_init="joint", lora_rank=2))
    again = refit.refit(source, tied, tied_cfg, row, found, "fisher", progress=False)
    for path, leaf in flatten_dict(again).items():
        before = flatten_dict(tied)[path]
        assert (path[-1] in ("lora_a", "lora_b")) != np.array_equal(leaf, before), path

    def inputs(c, p, depth):
        """Of the gate of a layer: what its pre-norm gives, after all earlier layers."""
        vanilla, c = tying.untie(p, c)
        seen = {}

        def tap(call, args, kwargs, context):
            is_call = isinstance(context.module, Linear) and context.method_name == "__call__"
            if is_call and context.module.projection == "gate":
                seen["x"] = args[0]
            return call(*args, **kwargs)

        x = Decoder(c).apply({"params": vanilla}, row.tokens, method="embed")
        context = Context(*rope_tables(c, row.positions), row.positions, row.segment_ids)
        for d in range(depth + 1):
            layer = jax.tree.map(lambda leaf, d=d: leaf[d], vanilla["block"])
            tables = jax.tree.map(lambda table, d=d: table[d], layer_tables(c))
            with nn.intercept_methods(tap):
                (x, _), _ = Layer(c).apply(
                    {"params": layer}, (x, None), jnp.int32(0), context, tables
                )
        return f64(seen["x"])[row.segment_ids > 0]

    depth, loop, layer = 2, 1, 0
    ours, theirs = inputs(tied_cfg, again, depth), inputs(cfg, params, depth)
    assert np.abs(ours - theirs).max() > 0.1, "the tied model's inputs are others"
    gate = again["block"]["mlp"]["gate"]
    base = f64(gate["w"][layer])
    c = ours.T @ ours / len(ours)
    start = flatten_dict(tied)["block", "mlp", "gate", "lora_a"][layer, loop]
    start = base + f64(start) @ flatten_dict(tied)["block", "mlp", "gate", "lora_b"][layer, loop]
    wanted = theirs @ f64(params["block"]["mlp"]["gate"]["w"][depth])
    ridge = refit.RIDGE * np.trace(c) / len(c) * np.eye(len(c))
    best = start + np.linalg.solve(c + ridge, ours.T @ (wanted - ours @ start) / len(ours))
    metric = joint.Metric(joint.Moment.of(c[None]), found.metric("gate", depth, "fisher").outputs)
    a, b, *_ = joint.low_rank_step(best - base, metric, 2)
    got = f64(gate["lora_a"][layer, loop]) @ gate["lora_b"][layer, loop]
    np.testing.assert_allclose(got, a @ b, atol=2e-3 * np.abs(a @ b).max())
