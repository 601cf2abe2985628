"""Flags of `evaluate` for early exits, and the calibration of their thresholds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from absl import flags

from recursive_jax import paths
from recursive_jax.console import exit_report, output
from recursive_jax.decoding.answers import check_writable
from recursive_jax.decoding.config import MISSING_KV
from recursive_jax.decoding.exit_measures import make_measure
from recursive_jax.decoding.thresholds import Thresholds
from recursive_jax.early_exits import MEASURABLE
from recursive_jax.evaluation.risk import RISKS
from recursive_jax.model import load
from recursive_jax.weights import checkpoint

CALIBRATION_TOKENS, CALIBRATION_LENGTH = 50_000, 128


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing one job adds no flags to another."""
    string, number, choice = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_float, flags.DEFINE_enum)
    )
    flags.DEFINE_bool(
        "exits", False, "measure early exits on --text: quality, loops and arithmetic together",
        flag_values=values,
    )  # fmt: skip
    measures = ", ".join(MEASURABLE)
    string("exit_measure", "top1", f"of --exits: which tokens leave early: {measures}")
    flags.DEFINE_list(
        "exit_threshold", None,
        "of --exits: tokens leave above it: one number, or one after each loop but the last; "
        "default: the checkpoint's calibrated thresholds, or else five of them",
        flag_values=values,
    )  # fmt: skip
    choice(
        "missing_kv", "complete", MISSING_KV,
        "keys and values of the loops that a token skipped, as `generate` has it",
    )  # fmt: skip
    string(
        "calibrate", None,
        "exit measure: find thresholds on --text that keep --bound, store them in the checkpoint, "
        "and measure nothing else",
    )  # fmt: skip
    number("bound", 0.05, "of --calibrate: of the risk")
    choice(
        "risk", "disagreement", RISKS,
        "of --calibrate: share of tokens that differ from full depth, or rise of the perplexity",
    )  # fmt: skip
    number("confidence", 0.9, "of --calibrate: probability that the bound holds on other text")


def read(options: flags.FlagValues) -> dict[str, Any]:
    """Fields of `evaluation_settings.Settings`.

    Raises:
      ValueError: a flag of --exits or --calibrate without it, or a threshold that is no number.
    """
    for name in ("bound", "risk", "confidence"):
        if options[name].present:
            raise ValueError(f"--{name} without --calibrate; name a measure: --calibrate=top1")
    if not options.exits:
        for name in ("exit_measure", "exit_threshold", "missing_kv"):
            if options[name].present:
                raise ValueError(f"--{name} without --exits or --calibrate; add --exits")
        return {}
    given = options.exit_threshold
    try:
        thresholds = None if given is None else tuple(float(value) for value in given)
    except ValueError as error:
        raise ValueError(f"exit_threshold={','.join(given)}; expected numbers") from error
    return {
        "exits": True,
        "exit_measure": options.exit_measure,
        "exit_threshold": thresholds,
        "missing_kv": options.missing_kv,
    }


def calibrate(options: flags.FlagValues) -> None:
    """Calibrate thresholds and store them in the checkpoint."""
    wrong = (
        "exits",
        "exit_measure",
        "exit_threshold",
        "tasks",
        "task_dir",
        "limit",
        "out",
        "plots",
    )
    given = [f"--{name}" for name in (*wrong, "plots") if options[name].present]
    if given:
        raise ValueError(f"{', '.join(given)} beside --calibrate, which measures nothing else")
    if options.text is None:
        raise ValueError("--calibrate needs held-out text; give --text=FILES")
    if not checkpoint.is_checkpoint(options.checkpoint):
        raise ValueError(
            f"{options.checkpoint} is no checkpoint of this package, so it cannot keep thresholds; "
            "make one with python -m recursive_jax.convert"
        )
    path = paths.path_of(options.checkpoint) / Thresholds.FILE
    if not paths.is_remote(path):
        check_writable(path)
    measure = make_measure(options.calibrate)
    tokens = options.text_tokens if options["text_tokens"].present else CALIBRATION_TOKENS
    model = load(options.checkpoint, options.step, strict=options.strict)
    calibrated = model.calibrate(
        options.text, tokens, options.context_length or CALIBRATION_LENGTH, measure=measure,
        bound=options.bound, confidence=options.confidence, risk=options.risk,
        missing_kv=options.missing_kv, batch_size=options.batch_size, dtype=options.dtype,
    )  # fmt: skip
    # of the step that was measured: a training may have saved others since
    step, params = checkpoint.params_checksum(options.checkpoint, model.weights.step)
    kept = dataclasses.replace(calibrated.thresholds, step=step, params=params)
    kept.save(options.checkpoint)
    output.say(exit_report.calibrated(kept))
    output.say(
        f"wrote {path}; use it: python -m recursive_jax.generate "
        f"--checkpoint={options.checkpoint} --exit_measure=calibrated"
        + ("" if kept.missing_kv == "complete" else f" --missing_kv={kept.missing_kv}")
    )
