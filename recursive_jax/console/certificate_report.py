"""What a person sees of a conversion: the start-up table, and the certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recursive_jax.console import tables


def start(source: Any, cfg: Any, how: Any, memory: float) -> str:
    """The table of what is about to happen.

    `source`: a `model.Model`; `cfg`: the config of the result; `how`: a `TieConfig`; `memory`:
    bytes, as `conversion_memory.num_bytes` counts them.
    """
    before, order = source.cfg, "" if cfg.sharing == "cycle" else f" in order {cfg.sharing}"
    rows = [
        ("source", f"{source.name} ({before.family}, {before.depth} layers, "
                   f"width {before.embed_dim})"),
        ("recursive", f"{cfg.num_loops} loops × {cfg.num_layers} layers{order}, "
                      f"{_ranks(how)}, norms {cfg.norms}"),
        ("memory", f"at most {memory / 1e9:.1f} GB"),
    ]  # fmt: skip
    return tables.table(rows)


def _ranks(how: Any) -> str:
    if how.lora_budget is not None:
        return f"LoRAs of {how.lora_budget:.1%} of the source's layers"
    return f"LoRA rank {how.lora_rank}"


def table(certificate: Mapping[str, Any]) -> str:
    """Sizes, and what was preserved, as text."""
    sizes, kept = certificate["parameters"], certificate["energy_kept"]
    source = {"shared": sizes["source"], "total": sizes["source_total"]}
    rows = [
        (group, f"{source[group]:,}" if group in source else "", f"{sizes[group]:,}")
        for group in ("shared", "lora", "prefix", "vectors", "embedding", "total")
        if group != "prefix" or sizes.get("prefix")
    ]
    random = certificate["recipe"]["method"] == "random"
    used = "those of the layers not kept" if random else "every one consumed"
    lines = [
        tables.table(rows, ("parameters", "source", "recursive")),
        f"{sizes['ratio_to_source']:.1%} of the source's size "
        f"(layers alone {sizes['block_ratio_to_source']:.1%}); "
        f"{certificate['tensors']:,} tensors of the source's decoder, {used}",
    ]
    if kept:
        shares = "  ".join(f"{name} {share:.1%}" for name, share in kept.items())
        lines.append(f"energy of the residual kept: {shares}")
    if "calibration" in certificate:
        lines.append(_calibration(certificate["calibration"]))
    if "perplexity" in certificate:
        lines += _measured(certificate)
    lines += [f"warning: {warning}" for warning in certificate["warnings"]]
    return "\n".join(lines)


def _measured(c: Mapping[str, Any]) -> list[str]:
    lines = [
        f"on {c['text_tokens']:,} tokens of {c['text']}: perplexity "
        f"{c['source_perplexity']:,.2f} -> {c['perplexity']:,.2f}, "
        f"KL {max(c['kl'], 0):.3f} nats, top-1 agreement {c['top1_agreement']:.1%}"
    ]
    error = c["full_rank_identity"].get("max_logit_error")
    if error is not None:
        lines.append(f"full-rank identity holds: max |Δlogit| {error:.1e} of scale")
    gap = c["nll"] - c["source_nll"]
    if gap > 0.01:
        lines.append(f"{gap:.2f} nats per token behind the source; training closes this gap")
    return lines


def _calibration(c: Mapping[str, Any]) -> str:
    line = (
        f"fitted on {c['tokens']:,} tokens of {c['text']}, in the metric of {_METRICS[c['metric']]}"
    )
    if "kl_by_metric" in c:
        kls = ", ".join(f"{kind} {kl:.3f}" for kind, kl in c["kl_by_metric"].items())
        if "refit_kl" in c:
            better = c["refit_kl"] < c["kl_by_metric"][c["metric"]]
            kls += f"; LoRAs fitted anew {c['refit_kl']:.3f}{'' if better else ', left out'}"
        line += f" (KL on {c['held_out_tokens']:,} other tokens: {kls})"
    if "dealt" in c:
        dealt = c["dealt"]
        ranks = " ".join(f"{name} {rank}" for name, rank in dealt["ranks"].items())
        line += f"\nranks for {dealt['budget']:.1%} of the source's layers: {ranks}"
    return line


_METRICS = {"fisher": "activations and gradients", "activations": "activations"}
