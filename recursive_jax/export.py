"""Export a model into a form that other tools read: Hugging Face, GGUF, Orbax, or our own.

    python -m recursive_jax.export --checkpoint=CKPT --out=DIR --format=hf
    python -m recursive_jax.export --checkpoint=CKPT --out=DIR --format=hf --layout=looped
    python -m recursive_jax.export --checkpoint=CKPT --out=FILE.gguf --format=gguf --type=q8_0
    python -m recursive_jax.export --checkpoint=CKPT --out=DIR --format=orbax
    python -m recursive_jax.export --checkpoint=CKPT --out=DIR --format=recursive --dtype=bfloat16

Format hf is an ordinary model: loops unrolled, LoRAs merged. transformers loads it, and so does all
that builds on transformers. docs/export.md says which form is for whom. An export is whole or not
there.
"""

from __future__ import annotations

import functools
import sys
import time

from absl import flags

from recursive_jax import exporting
from recursive_jax import model as model_lib
from recursive_jax.console import app, output, stop, tables


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    kinds = (flags.DEFINE_string, flags.DEFINE_enum, flags.DEFINE_integer)
    string, choice, integer = (functools.partial(x, flag_values=values) for x in kinds)
    string("checkpoint", None, "ours, a Hugging Face directory, .gguf, hub id, or 'tiny'")
    string("out", None, "directory to write, or a .gguf file; must not exist or be empty")
    choice("format", "hf", exporting.FORMATS, "form of the files")
    choice(
        "layout", None, exporting.LAYOUTS,
        "of hf and gguf: ordinary layers (default), or the shared block stored once",
    )  # fmt: skip
    choice("dtype", None, exporting.DTYPES, "of the stored weights, default float32; not of gguf")
    choice("type", None, exporting.GGUF_TYPES, "of the stored weights of gguf; default f32")
    integer("step", None, "of a checkpoint with several saved steps; default the newest")
    flags.DEFINE_bool(
        "strict", False, "stop where the newest step is damaged, instead of using the one before",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "ema", None, "the averaged weights of a run, or with --noema the others; default: averaged "
        "where the run keeps them", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "max_shard_gb", 5.0, "a larger model is split into files of this size", flag_values=values
    )
    flags.mark_flags_as_required(["checkpoint", "out"], values)


def main() -> None:
    with stop.on_signals():
        try:
            export(flags.FLAGS)
        except stop.Stopped as signal:
            output.note(f"\n{signal}: stopped; nothing was written")
            sys.exit(signal.exit_code)


def export(options: flags.FlagValues) -> None:
    """Run the job. A ValueError or OSError is a mistake of the user."""
    dtype = _dtype(options)
    if options["max_shard_gb"].present and options.format in ("gguf", "orbax"):
        raise ValueError(f"--max_shard_gb beside --format={options.format}, which has no shards")
    exporting.check_options(options.format, options.layout, dtype, options.max_shard_gb)
    exporting.check_target(options.out, options.format)  # before anything is read
    model = model_lib.load(options.checkpoint, options.step, options.ema, options.strict)
    plan = exporting.plan(
        model, options.out, options.format, options.layout, dtype, options.max_shard_gb
    )
    output.say(tables.table(exporting.describe(plan)))
    for left in exporting.leftovers(plan.out):
        output.note(f"{left} is left of an export that was killed, or that runs; remove it")
    began = time.time()
    plan.write()
    output.say(f"wrote {plan.out} in {time.time() - began:.0f} s; load it:\n{plan.how_to_load}")


def _dtype(options: flags.FlagValues) -> str | None:
    """--dtype, or --type of GGUF; ValueError for the flag of another format."""
    wrong, right = ("dtype", "type") if options.format == "gguf" else ("type", "dtype")
    if options[wrong].value is not None:
        raise ValueError(
            f"--{wrong}={options[wrong].value} beside --format={options.format}; use --{right}"
        )
    return options[right].value


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
