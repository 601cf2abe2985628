"""Prefix relaxation (paper App. H). `test_decoder` compares it with a float64 reference."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_model import source  # noqa: F401
from test_sharing_order import CFGS, forward, gradients, vanilla
from test_tying import GEMMA_2B, TINYLLAMA, distance, perturbed, tie_by, weight

from recursive_jax import load
from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params, parameter_counts
from recursive_jax.weights import names, tie_config, tying
from recursive_jax.weights.stored import ArrayWeights


@pytest.mark.parametrize(
    "cfg, length, expected",
    [(GEMMA_2B, 256, 9_437_184), (TINYLLAMA, 256, 11_534_336), (GEMMA_2B, 2048, 75_497_472)],
)
def test_parameters_are_length_times_width_times_depth(cfg, length, expected):
    """The paper's Table H.1."""
    how = tie_config.TieConfig(2, prefix_length=length)
    counts, without = (
        parameter_counts(abstract_params(tie_config.tied_config(cfg, h)))
        for h in (how, tie_config.TieConfig(2))
    )
    assert counts["prefix"] == expected
    gates = cfg.depth * cfg.num_heads
    assert counts["total"] == without["total"] + expected + gates


@pytest.mark.parametrize("family", ["gemma", "neox"])
def test_new_prefixes_change_nothing_and_can_learn(family):
    """The logits are bitwise those of the model without them; then the gate moves first."""
    params, cfg = vanilla(family)
    tie = functools.partial(tie_by, params, cfg, 2, "average", "svd", 3)
    plain, plain_cfg = tie()
    tied, tied_cfg = tie(prefix_length=5)
    np.testing.assert_array_equal(forward(tied_cfg)(tied), forward(plain_cfg)(plain))
    prefix, gate = (weight(tied, f"block/attention/{name}") for name in ("prefix", "prefix_gate"))
    assert prefix.shape == (3, 2, 5, 24) and not gate.any()
    assert prefix.std() == pytest.approx(1, abs=0.15)
    other, _ = tie(prefix_length=5, seed=1)
    assert not np.array_equal(weight(other, "block/attention/prefix"), prefix)
    grads = gradients(tied_cfg)(tied)["block"]["attention"]
    assert not np.any(grads["prefix"]) and np.abs(grads["prefix_gate"]).min() > 0
    moved = perturbed(tied)
    assert (np.abs(gradients(tied_cfg)(moved)["block"]["attention"]["prefix"]) > 0).all()
    opened = jax.tree.map(np.copy, tied)
    opened["block"]["attention"]["prefix_gate"][:] = 1.0
    assert distance(forward(tied_cfg)(opened), forward(plain_cfg)(plain)) > 1e-2


@pytest.mark.parametrize("family, sharing", [("gemma", "cycle"), ("neox", "cycle_rev")])
def test_the_untied_model_has_the_same_logits(family, sharing):
    params, cfg = vanilla(family)
    how = dict(prefix_length=3, sharing=sharing, norms="folded")
    tied, tied_cfg = tie_by(params, cfg, 3, "average", "svd", 2, **how)
    tied = perturbed(tied)
    untied, untied_cfg = tying.untie(tied, tied_cfg)
    assert (untied_cfg.num_loops, untied_cfg.prefix_length) == (1, 3)
    assert {p: x.shape for p, x in names.flat(untied).items()} == names.shapes(untied_cfg)
    assert distance(forward(untied_cfg)(untied), forward(tied_cfg)(tied)) < 1e-5
    with pytest.raises(ValueError, match="prefix_length=3; untie it first"):
        tie_by(untied, untied_cfg, 2)
    with pytest.raises(ValueError, match=r"prefixes \(prefix_length=3\), which no other format"):
        names.leaf_shapes(untied_cfg)


def test_a_model_is_converted_saved_and_decoded(source, tmp_path):  # noqa: F811
    """Greedy decoding takes the most likely token of the whole text's forward pass."""
    model = source.convert(num_loops=2, lora_rank=4, lora_init="svd", prefix_length=6, quiet=True)
    params = jax.tree.map(np.array, model.params)
    params["block"]["attention"]["prefix_gate"] += 2
    opened = dataclasses.replace(model, weights=ArrayWeights(params, "opened gates"))
    opened.save(tmp_path / "saved")
    model = load(tmp_path / "saved")
    done = model.generate("the loop runs", max_new_tokens=5)[0]
    tokens = np.array([[*model.tokenizer("the loop runs").input_ids, *done.tokens]])
    decoder, variables = Decoder(model.cfg), {"params": model.params}
    hidden = decoder.apply(variables, tokens, np.arange(tokens.shape[1])[None])
    scores = np.asarray(decoder.apply(variables, hidden, method="unembed"))[
        0, -1 - len(done.tokens) : -1
    ]
    assert done.tokens == scores.argmax(-1).tolist()
    params["block"]["attention"]["prefix_gate"][:] = 0
    shut = decoder.apply({"params": params}, tokens, np.arange(tokens.shape[1])[None])
    assert np.abs(shut - hidden).max() > 1e-3, "the prefix has a part in it"


def test_impossible_requests():
    with pytest.raises(ValueError, match="prefix_length must be at least 0, got -1"):
        tie_by(*vanilla("llama"), 2, prefix_length=-1)
    with pytest.raises(ValueError, match="prefix_length=1.5; expected an integer"):
        tie_config.TieConfig(2, prefix_length=1.5)
    with pytest.raises(ValueError, match="CpuModel has no prefixes"):
        CpuModel(CFGS["llama"].replace(prefix_length=2))
