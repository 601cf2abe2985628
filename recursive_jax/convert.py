"""Convert a pretrained model into a relaxed recursive one, with a certificate.

    python -m recursive_jax.convert --source=MODEL_DIR_OR_GGUF --out=CKPT --num_loops=2 \
        --lora_rank=64 --text=FILE

Shared weights and LoRAs are fitted together on calibration text (--calibrate). Training (python -m
recursive_jax.train) closes the rest of the gap to the source. The certificate lists what the
conversion preserved. It also proves that the code path is exact: with full-rank LoRA the recursive
model must give the source's logits.
"""

from __future__ import annotations

import functools
import shlex
import sys
import time

from absl import flags
from ml_collections import config_flags

from recursive_jax import conversion_memory as memory
from recursive_jax import model as model_lib
from recursive_jax import paths
from recursive_jax.console import app, certificate_report, output, spectra, stop
from recursive_jax.models.config import SHARINGS
from recursive_jax.start import tie_config
from recursive_jax.weights import tie_config as tie_options
from recursive_jax.weights.tie_config import TieConfig, checked_config

HOW = (
    *("num_loops", "sharing", "method", "lora_init", "lora_rank", "prefix_length"),
    *("norms", "rounding", "seed"),
    *("metric", "calibrate", "calibration_tokens", "lora_budget", "refit"),
)


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    kinds = (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_enum)
    string, integer, number, choice = (functools.partial(x, flag_values=values) for x in kinds)
    string("source", None, "Hugging Face directory, .gguf, hub id, or 'tiny'")
    string("out", None, "checkpoint directory to write; must not exist")
    config_flags.DEFINE_config_file(
        "config", None, "take source and config.model from here: a file, or a name of configs/",
        values,
    )  # fmt: skip
    integer("num_loops", 2, "loops; must divide the source's depth")
    choice("sharing", "cycle", SHARINGS, "order of the shared layers; generate needs cycle")
    choice(
        "method", None, tie_options.METHODS,
        "shared weights; default stepwise, or average with an SVD LoRA",
    )  # fmt: skip
    choice("lora_init", None, tie_options.LORA_STARTS, "default by method")
    string("lora_rank", "0", "N for every projection, clamped; or full")
    number(
        "lora_budget", None,
        "instead of --lora_rank: share of the source's layers for all LoRAs, such as 0.15; ranks "
        "by projection follow from the calibration",
    )  # fmt: skip
    integer("prefix_length", 0, "learnable vectors of each layer and loop, seen by all queries")
    choice("norms", "per_loop", ("tied", "per_loop", "folded"), "norms and biases")
    choice("rounding", "even", tuple(tie_options.ROUNDINGS), "of stepwise positions")
    string("plot", None, "picture of what each further rank gains, such as ranks.svg")
    string("text", "docstrings:1", "text the certificate is measured on")
    integer("text_tokens", 2048, "scored tokens of it; 0 = no measurement")
    integer("context_length", 512, "tokens per window")
    integer("seed", 0, "of random starts")
    choice("metric", "auto", tie_options.METRICS, "of lora_init=joint; auto: the better one")
    flags.DEFINE_bool(
        "refit", False, "then fit the LoRAs anew on the tied model's own inputs", flag_values=values
    )
    string("calibrate", "docstrings:1", "text for lora_init=joint: files, directories, tfds:NAME …")
    integer("calibration_tokens", 16_384, "tokens of it")
    flags.mark_flag_as_required("out", flag_values=values)


def main() -> None:
    with stop.on_signals():
        try:
            convert(flags.FLAGS)
        except stop.Stopped as signal:
            output.note(f"\n{signal}: stopped")
            sys.exit(signal.exit_code)


def convert(options: flags.FlagValues) -> None:
    """Run the job. A ValueError or OSError is a mistake of the user."""
    spec, how = arguments(options)
    out = paths.path_of(options.out)
    model_lib.check_free(out)
    if options.plot is not None:
        spectra.check(options.plot, how)
    source = model_lib.load(spec)
    cfg = checked_config(source.cfg, how)
    needed = memory.num_bytes(source.cfg, cfg, how)
    output.say(certificate_report.start(source, cfg, how, needed) + "\n")
    began = time.time()
    scratch = None if paths.is_remote(out) else out.parent  # large, and /tmp may be in memory
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    model = source.convert(
        how,
        text=options.text if options.text_tokens else None,
        text_tokens=options.text_tokens,
        context_length=options.context_length,
        scratch=scratch,
        spectra=options.plot is not None,
    )
    model.certificate["seconds"] = round(time.time() - began, 1)
    model.save(out)
    if options.plot is not None:
        spectra.save(options.plot, model.certificate, model.cfg)
    output.say("\n" + certificate_report.table(model.certificate))
    family = cfg.family
    name = "gemma" if family.startswith("gemma") else "llama"
    config = "pythia" if family == "gpt_neox" else name
    output.say(
        f"wrote {out} ({model.certificate['seconds']:.0f} s); next: python -m recursive_jax.train "
        f"--config={config}_rrt --workdir=DIR --config.init_from={shlex.quote(str(out))} "
        f"--config.source={shlex.quote(model.certificate['source'])}"
    )


def arguments(options: flags.FlagValues) -> tuple[str, TieConfig]:
    """The source and how to convert it, from --config if given, else from flags."""
    if options.config is not None:
        given = [f"--{name}" for name in HOW if options[name].present]
        if given:
            raise ValueError(
                f"{', '.join(given)} beside --config, which sets how to convert; use "
                "--config.model.NAME=VALUE (and --config.seed) instead"
            )
        if not options.source and not options.config.source:
            raise ValueError("nothing to convert: the config names no source; give --source=MODEL")
        return options.source or options.config.source, tie_config(options.config)
    if options.source is None:
        raise ValueError("nothing to convert: give --source=MODEL, or --config=FILE")
    values = {name: options[name].value for name in HOW}
    if values["lora_rank"] != "full":
        try:
            values["lora_rank"] = int(values["lora_rank"])
        except ValueError:
            raise ValueError(
                f"--lora_rank={values['lora_rank']!r}; expected a number or 'full'"
            ) from None
    return options.source, TieConfig(**values)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
