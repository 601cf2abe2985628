"""Engine flags, for every job that decodes, and the engine that they describe."""

from __future__ import annotations

import dataclasses
import functools

from absl import flags

from recursive_jax import generation
from recursive_jax.decoding.config import MISSING_KV, EngineConfig
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.exit_measures import MEASURE_NAMES, Measure, Static, make_measure
from recursive_jax.decoding.requests import check_number
from recursive_jax.model import Model

NO_MEASURE, CALIBRATED = "none", "calibrated"


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; a function, so that importing one job adds no flags to another."""
    string, integer, boolean, separated, choice = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_bool,
            flags.DEFINE_list,
            flags.DEFINE_enum,
        )
    )
    string(
        "exit_measure", NO_MEASURE,
        f"which tokens leave early: {NO_MEASURE}, {', '.join(MEASURE_NAMES)}, or {CALIBRATED}: "
        "the one that the checkpoint's thresholds.json is for",
    )  # fmt: skip
    separated(
        "exit_threshold", None,
        "tokens leave above it: one number, or one after each loop but the last; default: the "
        "checkpoint's thresholds.json, or else the measure's own",
    )  # fmt: skip
    choice(
        "missing_kv", "complete", MISSING_KV,
        "keys and values of the loops a token skipped: run them beside its successors (exact), "
        "project them from the state it left with (fastest), or copy the last ones",
    )  # fmt: skip
    boolean(
        "lossless",
        False,
        "exits only draft the next token: the text is that of full depth (in bfloat16 but for "
        "near-ties, as with any other batch)",
    )
    integer(
        "draft_loop", None, "lossless: draft after so many loops, whatever the token; default 1"
    )
    boolean("depthwise", True, "no: all requests start their tokens together, the usual batching")
    integer("num_slots", 16, "prompts answered at once")
    integer("context_length", None, "tokens, prompt and answer together; default: the model's own")
    integer("chunk_length", 64, "tokens of new prompts that run beside the answers in one pass")
    string("dtype", "auto", "float32, bfloat16; auto: float32 on CPU")
    integer("data", -1, "mesh: devices the prompts are spread over; -1 = the rest")
    integer("tensor", 1, "mesh: devices every weight is split over")


def read_config(options: flags.FlagValues) -> EngineConfig:
    """The engine that the flags describe. Raises ValueError; no model is read."""
    measure, thresholds = _read_exits(options)
    return EngineConfig(
        num_slots=options.num_slots,
        context_length=options.context_length,
        chunk_length=options.chunk_length,
        measure=measure,
        thresholds=thresholds,
        missing_kv=options.missing_kv,
        # a calibrated measure is known later: `complete`
        lossless=options.lossless and options.exit_measure != CALIBRATED,
        depthwise=options.depthwise,
    )


def _read_exits(options: flags.FlagValues) -> tuple[Measure | None, tuple[float, ...] | None]:
    """The measure and the thresholds that the flags name."""
    name, given = options.exit_measure, options.exit_threshold
    if options.draft_loop is not None and (not options.lossless or name != NO_MEASURE):
        raise ValueError(
            "--draft_loop is for --lossless without --exit_measure; a measure decides by itself "
            "where a token drafts"
        )
    if options.lossless and name == NO_MEASURE:
        draft_loop = 1 if options.draft_loop is None else options.draft_loop
        check_number("draft_loop", draft_loop, True, 1, 2**31 - 1)
        name = f"static:{draft_loop}"
    if name == CALIBRATED and given is not None:
        raise ValueError("--exit_threshold with --exit_measure=calibrated; name the measure")
    measure = None if name in (NO_MEASURE, CALIBRATED) else make_measure(name)
    if given is None:
        return measure, None
    try:
        return measure, tuple(float(value) for value in given)
    except ValueError as error:
        raise ValueError(f"exit_threshold={','.join(given)}; expected numbers") from error


def complete(
    options: flags.FlagValues, config: EngineConfig, model: Model
) -> tuple[EngineConfig, str]:
    """The config with the checkpoint's thresholds, and where its thresholds come from, in words.

    Raises:
      ValueError: the model cannot decode with it.
    """
    num_loops, calibrated = model.cfg.num_loops, model.thresholds
    for name in ("min_loops", "max_loops"):  # a server has no such flags: requests bring them
        if name in options and (options[name].value or 1) > num_loops:
            raise ValueError(f"{name}={options[name].value}; the model has {num_loops} loops")
    if options.exit_measure == CALIBRATED:
        if calibrated is None:
            raise ValueError(
                f"{model.name} has no thresholds.json; name an exit measure: "
                f"{', '.join(MEASURE_NAMES)}"
            )
        measure = make_measure(calibrated.measure)
        config = dataclasses.replace(config, measure=measure, lossless=options.lossless)
    config.check_loops(num_loops)
    if config.thresholds is not None:
        return config, "--exit_threshold"
    config = generation.with_thresholds(config, model)
    if config.thresholds is None:
        return config, "the measure's own"
    return config, f"thresholds.json: {calibrated.promise}"


def describe(engine: Engine, config: EngineConfig, origin: str) -> dict[str, str]:
    """Rows of the start-up table; `config` and `origin` are those of `complete`."""
    lanes, made = engine.num_lanes // engine.num_slots, engine.config
    words = {
        "slots": f"{engine.num_slots}" + (f", {lanes} lanes each" if lanes > 1 else ""),
        "context": f"{made.context_length:,} tokens",
        "prompt chunk": f"{made.chunk_length} tokens",
        "cache": f"{engine.cache_bytes / 2**20:,.0f} MiB",
    }
    words["attention"] = engine.model.attention
    measure = config.measure
    if measure is None:
        bounded = "where a request's max_loops says" if engine.can_exit else "none"
        loops = f"{engine.num_loops} loop" + "s" * (engine.num_loops > 1)
        words["exits"] = f"{bounded} ({loops})"
    else:
        name = f"static:{measure.loops}" if isinstance(measure, Static) else measure.name
        words["exits"] = f"{name} of {engine.num_loops} loops"
    if measure is not None and measure.takes_threshold:
        values = config.thresholds or (measure.default_threshold,)
        words["thresholds"] = ", ".join(f"{value:g}" for value in values) + f" ({origin})"
    if config.lossless:
        words["lossless"] = "exits only draft, the last loop decides"
    elif engine.can_exit:
        words["missing KV"] = config.missing_kv
    if not config.depthwise:
        words["batching"] = "sequence-wise"
    return words
