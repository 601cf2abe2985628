"""Evaluate a model: perplexity and lm-eval tasks after every loop, with its source beside it.

    python -m recursive_jax.evaluate --checkpoint=CKPT --text=FILES
    python -m recursive_jax.evaluate --checkpoint=CKPT --tasks=all --task_dir=DIR
    python -m recursive_jax.evaluate --checkpoint=CKPT --tasks=arc_easy,piqa --limit=500
    python -m recursive_jax.evaluate --checkpoint=CKPT --text=FILES --exits
    python -m recursive_jax.evaluate --checkpoint=CKPT --text=FILES --calibrate=top1 --bound=0.05

The model is a checkpoint of ours, a Hugging Face directory, a .gguf file, a hub id or 'tiny'. The
report is written to evaluation.json in a checkpoint of ours, or to --out. While it is made, results
of requests grow in OUT.part: after Ctrl-C, SIGTERM or a crash the same command goes on from there.
For a checkpoint in a bucket, only with --out.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys

import jax
from absl import flags

from recursive_jax import paths
from recursive_jax.console import (
    app,
    evaluation_plots,
    evaluation_report,
    exit_flags,
    exit_report,
    output,
    stop,
)
from recursive_jax.decoding.answers import check_writable
from recursive_jax.evaluating import evaluate
from recursive_jax.evaluation_settings import Settings
from recursive_jax.model import load
from recursive_jax.weights import checkpoint

REPORT = "evaluation.json"


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    string("checkpoint", None, "ours, a Hugging Face directory, .gguf, hub id, or 'tiny'")
    integer("step", None, "of a checkpoint with several saved steps; default the newest")
    flags.DEFINE_bool(
        "strict", False, "stop where the newest step is damaged, instead of using the one before",
        flag_values=values,
    )  # fmt: skip
    string("text", None, "measure perplexity on it: files, directories, tfds:NAME, docstrings[:N]")
    integer("text_tokens", 20_000, "tokens of it, at most")
    string("tasks", None, "lm-eval tasks, separated by commas; all: the paper's seven")
    string("task_dir", None, "directory of local tasks NAME.jsonl; default: from a hub")
    integer("limit", None, "items of every task, at most; default all")
    integer(
        "context_length", None,
        "default: 512 for windows, up to 2,048 for rolling perplexity, the model's own for tasks",
    )  # fmt: skip
    integer("batch_size", 8, "rows per call of the model")
    flags.DEFINE_enum(
        "dtype", "auto", ("auto", "float32", "bfloat16"), "compute dtype", flag_values=values
    )
    string(
        "source", "auto",
        "vanilla model to put beside a recursive one; auto: what it was converted from; none",
    )  # fmt: skip
    string("out", None, "report; default evaluation.json in a checkpoint of ours")
    string("plots", None, "directory: pictures of quality and perplexity over loops, and others")
    exit_flags.define_flags(values)
    flags.adopt_module_key_flags(exit_flags, values)  # --help lists them too
    flags.mark_flag_as_required("checkpoint", flag_values=values)


def run(options: flags.FlagValues) -> None:
    """Run the job. A ValueError or OSError is a mistake of the user."""
    if options.calibrate:
        return exit_flags.calibrate(options)
    names = ("text", "text_tokens", "tasks", "task_dir", "context_length", "limit", "batch_size")
    given = {name: options[name].value for name in names}
    if options["text_tokens"].present and options.text is None:
        raise ValueError("--text_tokens without --text; give a text")
    settings = Settings(**given, dtype=options.dtype, **exit_flags.read(options))
    out = report_file(options)
    if out is not None:
        check_writable(out)
    if options.plots:
        evaluation_plots.check(options.plots)
    model = load(options.checkpoint, options.step, strict=options.strict)
    remote = None
    if out is None and paths.is_remote(options.checkpoint):
        remote = paths.path_of(options.checkpoint) / REPORT
    output.note(evaluation_report.start(model, settings, out or remote) + "\n")
    source = None if options.source == "none" else options.source
    report = evaluate(model, settings, source, out)
    output.say(evaluation_report.table(report))
    if "exits" in report:
        output.say("\n" + exit_report.table(report["exits"]))
    written = [] if out is None else [out]
    if remote is not None and jax.process_index() == 0:
        written.append(remote)
        paths.write_whole(remote, json.dumps(report, indent=1) + "\n")
    if options.plots and jax.process_index() == 0:
        metrics = paths.path_of(options.checkpoint) / "metrics.jsonl"
        written += evaluation_plots.save(options.plots, report, model.certificate, metrics)
    if written:
        output.say("\nwrote " + ", ".join(map(str, written)))


def report_file(options: flags.FlagValues) -> str | None:
    """The file of the report: --out, or one in a checkpoint of ours; None: nowhere."""
    if options.out:
        return options.out
    if paths.is_remote(options.checkpoint):
        return None  # no file that grows; `run` writes the report when it is complete
    if checkpoint.is_checkpoint(options.checkpoint):
        return str(pathlib.Path(options.checkpoint) / REPORT)
    return None


def main(options: flags.FlagValues = flags.FLAGS) -> None:
    # Its tokenizers warn, on standard error, when they are used on both sides of a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with stop.on_signals():
        try:
            run(options)
        except stop.Stopped as signal:
            kept = report_file(options)
            kept = f"{kept}.part" if kept and os.path.exists(f"{kept}.part") else None
            more = f"; results are in {kept}, the same command goes on" if kept else ""
            output.note(f"\n{signal}: stopped{more}")
            sys.exit(signal.exit_code)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
