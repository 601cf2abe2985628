"""Convert a pretrained model into a relaxed recursive one, with a certificate.

    python -m recursive_jax.convert --source=MODEL_DIR_OR_GGUF --out=CKPT --num_loops=2 \
        --lora_rank=64 --text=FILE

A converted model generates noise until it is uptrained (python -m recursive_jax.train). The
certificate lists what the conversion preserved. It also proves that the code path is exact: with
full-rank LoRA the recursive model must give the source's logits.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from recursive_jax import text
from recursive_jax.console import app, output, tables
from recursive_jax.evaluation import certificate as certify
from recursive_jax.models.decoder import Decoder
from recursive_jax.text.documents import documents
from recursive_jax.weights import checkpoint, tying
from recursive_jax.weights.source import Source, open_source

SOURCE = flags.DEFINE_string("source", None, "Hugging Face directory, .gguf, hub id, or 'tiny'")
OUT = flags.DEFINE_string("out", None, "checkpoint directory to write; must not exist")
CONFIG = config_flags.DEFINE_config_file("config", None, "take source and config.model from here")
NUM_LOOPS = flags.DEFINE_integer("num_loops", 2, "loops; must divide the source's depth")
METHOD = flags.DEFINE_enum(
    "method", None, tying.METHODS, "shared weights; default stepwise, or average with an SVD LoRA"
)
LORA_INIT = flags.DEFINE_enum("lora_init", None, tying.LORA_STARTS, "default by method")
LORA_RANK = flags.DEFINE_string("lora_rank", "0", "N for every projection, clamped; or full")
NORMS = flags.DEFINE_enum("norms", "per_loop", ("tied", "per_loop", "folded"), "norms and biases")
ROUNDING = flags.DEFINE_enum("rounding", "even", tuple(tying.ROUNDINGS), "of stepwise positions")
TEXT = flags.DEFINE_string("text", "docstrings:1", "text the certificate is measured on")
TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 2048, "scored tokens of it; 0 = no measurement")
CONTEXT_LENGTH = flags.DEFINE_integer("context_length", 512, "tokens per window")
SEED = flags.DEFINE_integer("seed", 0, "of random starts")


def convert(
    source: Source,
    out: str | pathlib.Path,
    recipe: Mapping[str, Any],
    text_source: str = "docstrings:1",
    text_tokens: int = 2048,
    context_length: int = 512,
) -> dict[str, Any]:
    """The certificate of a conversion, which is written to `out`.

    Args:
      source: the model to convert.
      out: checkpoint directory to write.
      recipe: arguments of `tying.tie`.
      text_source: text to measure on, see `text.documents`.
      text_tokens: scored tokens of it; 0 = no measurement.
      context_length: tokens per window.
    """
    out = checkpoint.local(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out={out} is not empty; choose another directory, or remove it")
    tying.tied_config(source.cfg, **recipe)  # raises for an impossible recipe before any reading
    tokenizer = source.load_tokenizer()
    text.check_vocabulary(tokenizer, source.cfg.vocab_size)
    windows = None
    if text_tokens:
        context_length = min(context_length, source.cfg.max_length)
        windows = text.eval_windows(
            tokenizer,
            (t for _, t in documents(text_source)),
            context_length,
            text_tokens,
            source.cfg.vocab_size,
        )
    output.say(tables.table(overview(source, recipe)) + "\n")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        began = time.time()
        reference = None
        if windows is not None:  # the source runs first: two models are never in memory at once
            identity = certify.full_rank_identity(source, recipe, windows)
            rows = pathlib.Path(scratch) / "log_probabilities.f32"
            reference = certify.Reference(rows, source, windows)
        params, cfg, certificate = certify.tie_with_certificate(source, recipe)
        if reference is not None:
            certificate |= reference.compare(Decoder(cfg), params)
            certificate |= {"full_rank_identity": identity, "text": text_source}
        certificate["seconds"] = round(time.time() - began, 1)
    facts = {
        "source": str(source.path),
        "generation_config": source.generation_config,
        "tying": dict(recipe),
    }
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as partial:
        made = pathlib.Path(partial) / out.name  # moved to `out` when it is complete
        checkpoint.create(made, cfg, tokenizer, **facts)
        checkpoint.write_json(made / checkpoint.CERTIFICATE, certificate)
        writer = checkpoint.Writer(made)
        writer.save(0, params, wait=True)
        writer.close()
        os.replace(made, out)
    return certificate


def overview(source: Source, recipe) -> list[tuple[str, str]]:
    """Rows of the start-up table."""
    cfg = source.cfg
    return [
        ("source", f"{source.path} ({cfg.family}, {cfg.depth} layers, width {cfg.embed_dim})"),
        ("recursive", f"{recipe['num_loops']} loops × {cfg.depth // recipe['num_loops']} layers, "
                      f"LoRA rank {recipe['lora_ranks'] or 0}, norms {recipe['norms']}"),
    ]  # fmt: skip


def print_certificate(certificate: Mapping[str, Any], out) -> None:
    sizes, kept = certificate["parameters"], certificate["energy_kept"]
    source = {"shared": sizes["source"], "total": sizes["source_total"]}
    rows = [
        (group, f"{source[group]:,}" if group in source else "", f"{sizes[group]:,}")
        for group in ("shared", "lora", "vectors", "embedding", "total")
    ]
    output.say("\n" + tables.table(rows, ("parameters", "source", "recursive")))
    random = certificate["recipe"]["method"] == "random"
    used = "those of the layers not kept" if random else "every one consumed"
    output.say(
        f"{sizes['ratio_to_source']:.1%} of the source's size "
        f"(layers alone {sizes['block_ratio_to_source']:.1%}); "
        f"{certificate['tensors']:,} tensors of the source's decoder, {used}"
    )
    if kept:
        output.say(
            "energy of the residual kept: " + "  ".join(f"{n} {e:.1%}" for n, e in kept.items())
        )
    if "perplexity" in certificate:
        c = certificate
        output.say(
            f"on {c['text_tokens']:,} tokens of {c['text']}: perplexity "
            f"{c['source_perplexity']:,.2f} -> {c['perplexity']:,.2f}, "
            f"KL {max(c['kl'], 0):.3f} nats, top-1 agreement {c['top1_agreement']:.1%}"
        )
        identity = c["full_rank_identity"]
        if "max_logit_error" in identity:
            output.say(
                f"full-rank identity holds: max |Δlogit| {identity['max_logit_error']:.1e} of scale"
            )
        if c["kl"] > 0.1:
            output.say("expected: a converted model has to be uptrained before it is of use")
    for warning in certificate["warnings"]:
        output.say(f"warning: {warning}")
    family = certificate["family"]
    config = (
        "gemma" if family.startswith("gemma") else "pythia" if family == "gpt_neox" else "llama"
    )
    output.say(
        f"wrote {out} ({certificate['seconds']:.0f} s); next: python -m recursive_jax.train "
        f"--config=configs/{config}_rrt.py --workdir=DIR --config.init_from={out} "
        f"--config.source={certificate['source']}"
    )


def main() -> None:
    spec, recipe = arguments()
    certificate = convert(
        open_source(spec),
        OUT.value,
        recipe,
        TEXT.value,
        TEXT_TOKENS.value,
        CONTEXT_LENGTH.value,
    )
    print_certificate(certificate, OUT.value)


def arguments() -> tuple[str, dict[str, Any]]:
    """The source and the arguments of `tying.tie`, from --config if given, else from flags."""
    if CONFIG.value is not None:
        config = CONFIG.value
        holders = (NUM_LOOPS, METHOD, LORA_INIT, LORA_RANK, NORMS, ROUNDING, SEED)
        given = [f"--{holder.name}" for holder in holders if holder.present]
        if given:
            raise ValueError(
                f"{', '.join(given)} beside --config, which sets how to convert; use "
                "--config.model.NAME=VALUE (and --config.seed) instead"
            )
        if not SOURCE.value and not config.source:
            raise ValueError("nothing to convert: the config names no source; give --source=MODEL")
        return SOURCE.value or config.source, tying.recipe_from(config.model, config.seed)
    if SOURCE.value is None:
        raise ValueError("nothing to convert: give --source=MODEL, or --config=FILE")
    rank = LORA_RANK.value
    if rank != "full":
        try:
            rank = int(rank)
        except ValueError:
            raise ValueError(f"--lora_rank={rank!r}; expected a number or 'full'") from None
    return SOURCE.value, {
        "num_loops": NUM_LOOPS.value,
        "method": METHOD.value,
        "lora": LORA_INIT.value,
        "lora_ranks": rank,
        "norms": NORMS.value,
        "rounding": ROUNDING.value,
        "seed": SEED.value,
    }


if __name__ == "__main__":
    app.run(main, required=("out",))
