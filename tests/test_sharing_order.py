"""The orders in which shared layers run (paper App. B): CYCLE, SEQUENCE, CYCLE(REV)."""

import functools

import jax
import numpy as np
import pytest
import test_moments
from test_model import source, words  # noqa: F401
from test_tying import FAMILIES, QUICK, TOKENS, distance, make_params, perturbed, tie_by, weight

from recursive_jax import load
from recursive_jax.evaluation import moments, refit
from recursive_jax.models.config import SHARINGS, DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.losses import Objective
from recursive_jax.weights import joint, names, tie_config, tying

OTHERS = [sharing for sharing in SHARINGS if sharing != "cycle"]
WINDOWS = dict(windows=(4, 0, 3, 5, 0, 2))
CFGS = {
    "llama": FAMILIES["llama"].replace(**WINDOWS),
    "gemma": FAMILIES["gemma"],  # it has windows, and two ropes
    "neox": FAMILIES["neox"].replace(**WINDOWS),
}


@functools.cache
def vanilla(family):
    return make_params(CFGS[family]), CFGS[family]


def run(model, params):
    positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    hidden = model.apply({"params": params}, TOKENS, positions)
    return model.apply({"params": params}, hidden, method="unembed")


@functools.cache
def forward(cfg):
    return jax.jit(functools.partial(run, Decoder(cfg)), compiler_options=QUICK)


@functools.cache
def gradients(cfg, remat="none"):
    target = np.random.default_rng(0).standard_normal((*TOKENS.shape, cfg.vocab_size))
    model = Decoder(cfg, remat_policy=remat)

    def loss(params):
        return (run(model, params) * target.astype(np.float32)).sum()

    return jax.jit(jax.grad(loss), compiler_options=QUICK)


@pytest.mark.parametrize(
    "sharing, loops, used",
    [
        ("cycle", 2, "012012"), ("sequence", 2, "001122"), ("cycle_rev", 2, "012210"),
        ("cycle", 3, "010101"), ("sequence", 3, "000111"), ("cycle_rev", 3, "011001"),
        ("sequence", 6, "000000"), ("cycle_rev", 1, "012345"),
    ],
)  # fmt: skip
def test_which_layer_runs_at_which_depth(sharing, loops, used):
    """Layers are told apart by their weights; each loop has a LoRA that says its number."""
    params, cfg = vanilla("llama")
    tied, tied_cfg = tie_by(params, cfg, loops, "stepwise", "zero", 1, sharing=sharing)
    same = loops in (1, 6)  # as in the order 'cycle', which can be decoded
    assert tied_cfg.sharing == ("cycle" if same else sharing)
    q = tied["block"]["attention"]["q"]
    layers, each = np.arange(6 // loops, dtype=np.float32), np.arange(loops, dtype=np.float32)
    q["w"] = np.ones_like(q["w"]) * layers[:, None, None]
    q["lora_a"], q["lora_b"] = np.ones_like(q["lora_a"]), np.ones_like(q["lora_b"])
    q["lora_b"] *= 10 * each[:, None, None]
    found = weight(tying.untie(tied, tied_cfg)[0], "block/attention/q/w")[:, 0, 0].astype(int)
    assert "".join(str(n % 10) for n in found) == used
    ran = [used[:depth].count(layer) for depth, layer in enumerate(used)]
    assert [n // 10 for n in found] == ran, "a layer's loop is how often it has run before"
    assert tied_cfg.places() == list(zip(ran, map(int, used), strict=True))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(
    "family, loops, norms",
    [("llama", 2, "per_loop"), ("gemma", 3, "folded"), ("neox", 3, "folded")],
)
def test_full_rank_is_the_original_model(family, loops, norms, sharing):
    params, cfg = vanilla(family)
    reference = forward(cfg)(params)
    starts = [("average", "svd"), ("lower", "svd"), ("average", "split"), ("average", "joint")]
    for method, lora in starts:
        tied, tied_cfg = tie_by(params, cfg, loops, method, lora, "full", norms, sharing=sharing)
        assert tied_cfg.sharing == sharing
        assert distance(forward(tied_cfg)(tied), reference) < 1e-5, (method, lora)
    other = tied_cfg.replace(sharing=SHARINGS[SHARINGS.index(sharing) - 1])
    assert distance(forward(other)(tied), reference) > 1e-2, "the order matters"


@pytest.mark.parametrize(
    "family, norms, sharing", [("llama", "tied", "sequence"), ("gemma", "per_loop", "cycle_rev")]
)
def test_logits_and_gradients_are_those_of_the_untied_model(family, norms, sharing):
    """The gradient of a shared weight is the sum over the depths where it runs."""
    params, cfg = vanilla(family)
    tied, tied_cfg = tie_by(params, cfg, 3, "average", "svd", 3, norms, sharing=sharing)
    tied = perturbed(tied)
    untied, untied_cfg = tying.untie(tied, tied_cfg)
    assert untied_cfg == cfg
    assert distance(forward(tied_cfg)(tied), forward(cfg)(untied)) < 1e-5
    separate, depths = names.flat(gradients(cfg)(untied)), tied_cfg.depths()
    for path, grad in names.flat(gradients(tied_cfg, "dots")(tied)).items():
        if path.endswith("/w"):
            expected = np.asarray(separate[path])[depths].sum(axis=1)
        elif path.endswith("/lora_a"):
            of_merged = np.asarray(separate[path.replace("lora_a", "w")])[depths]
            b = weight(tied, path.replace("lora_a", "lora_b"))
            expected = of_merged @ b.swapaxes(-1, -2)
        else:
            continue
        assert distance(grad, expected) < 1e-4, path


@pytest.mark.parametrize("sharing", OTHERS)
def test_a_fit_reads_the_metrics_of_the_depths_that_share(sharing):
    params, cfg = vanilla("llama")
    asked = []

    def metric(projection, depth, scale, bias):
        asked.append((projection, int(depth)))
        return joint.Metric.plain(*cfg.projections[projection])

    how = tie_config.TieConfig(2, lora_init="joint", lora_rank=2, sharing=sharing)
    _, tied_cfg = tying.tie(params, cfg, how, metric=metric)
    groups = {"sequence": "01 23 45", "cycle_rev": "05 14 23"}[sharing].split()
    assert [f"{group[0]}{group[1]}" for group in tied_cfg.depths()] == groups
    assert sorted(depth for name, depth in asked if name == "up") == list(range(6))


@pytest.mark.parametrize("sharing", OTHERS[-1:])
def test_a_refit_leaves_an_exact_model_as_it_is(sharing, tmp_path):
    """LoRAs fitted anew (`evaluation.refit`) to outputs that are right already; with prefixes."""
    cfg = test_moments.GEMMA
    params = test_moments.random_params(cfg)
    model, rows = test_moments.source_of(cfg, params), test_moments.rows(copies=4)
    found = moments.measure(model, rows, tmp_path / "moments", progress=False)
    how = tie_config.TieConfig(2, "average", "svd", "full", sharing=sharing, prefix_length=2)
    tied, tied_cfg = tying.tie(params, cfg, how)
    again = refit.refit(model, tied, tied_cfg, rows, found, "fisher", progress=False)
    lora_b = "block/attention/k/lora_b"
    assert not np.array_equal(weight(again, lora_b), weight(tied, lora_b)), "fitted anew"
    tokens, positions = rows.tokens, rows.positions
    expected = Decoder(cfg).apply({"params": params}, tokens, positions, rows.segment_ids)
    hidden = Decoder(tied_cfg).apply({"params": again}, tokens, positions, rows.segment_ids)
    assert distance(hidden, expected) < 1e-4


@pytest.mark.parametrize("sharing", OTHERS)
def test_what_copies_a_layer_copies_one_that_shares(sharing):
    """'lower' and 'upper' in every order; 'stepwise' in the order 'sequence'."""
    depths = DecoderConfig("llama", 8, 8, 8, 1, 1, 8, 6, num_loops=3, sharing=sharing).depths()
    for method, loop in (("lower", 0), ("upper", -1)):
        found = tie_config.selected_depths(method, 18, 6, sharing=sharing)
        np.testing.assert_array_equal(found, depths[:, loop])
    if sharing == "sequence":
        for rounding in tie_config.ROUNDINGS:
            found = tie_config.selected_depths("stepwise", 18, 6, rounding)
            assert all(depth in group for depth, group in zip(found, depths, strict=True))


@pytest.mark.parametrize("sharing", OTHERS)
def test_the_certificate_proves_the_identity(source, words, sharing):  # noqa: F811
    how = dict(num_loops=2, lora_rank=4, lora_init="svd", sharing=sharing, quiet=True)
    model = source.convert(**how, text=words, text_tokens=64, context_length=16)
    assert model.certificate["full_rank_identity"]["max_logit_error"] < 1e-5


def test_a_model_is_trained_measured_saved_and_untied(source, words, tmp_path):  # noqa: F811
    model = source.convert(num_loops=2, sharing="sequence", quiet=True)
    small = dict(context_length=16, batch_size=8, eval_tokens=50, tokens=2 * 16 * 8, quiet=True)
    trained = model.train(words, **small)
    measured = trained.perplexity(words, tokens=50, context_length=16)
    assert "nll_exits" not in measured and measured["nll"] < 20
    trained.save(tmp_path / "saved")
    again = load(tmp_path / "saved").untie().perplexity(words, tokens=50, context_length=16)
    assert again["nll"] == pytest.approx(measured["nll"], rel=1e-5)
    with pytest.raises(ValueError, match="decoding needs sharing='cycle'.*='sequence'.*untie"):
        model.generate("the loop", max_new_tokens=2)
    with pytest.raises(ValueError, match="a loss of exits needs sharing='cycle'"):
        model.train(words, exit_coefficient=0.1, **small)


def test_what_needs_whole_loops_is_refused():
    cfg = CFGS["llama"].replace(num_layers=3, num_loops=2, sharing="sequence")
    with pytest.raises(ValueError, match="a loss of exits needs sharing='cycle'"):
        TrainConfig(objective=Objective(exit_loss="weighted")).check_fits(cfg)
    with pytest.raises(ValueError, match="loop_curriculum needs sharing='cycle'"):
        TrainConfig(loop_curriculum="growing").check_fits(cfg)
    with pytest.raises(ValueError, match="the state after a loop needs sharing='cycle'"):
        Decoder(cfg).apply({"params": make_params(cfg)}, TOKENS, TOKENS, all_loops=True)
    with pytest.raises(ValueError, match=r"sharing='zigzag'; expected one of .*cycle_rev"):
        tie_config.TieConfig(2, sharing="zigzag")
    with pytest.raises(ValueError, match=r"sharing='zigzag'; expected one of .*cycle_rev"):
        cfg.replace(sharing="zigzag")
    TrainConfig().check_fits(cfg)
