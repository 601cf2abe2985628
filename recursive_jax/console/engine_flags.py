"""Engine flags, for every job that decodes, and the engine that they describe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
from absl import flags

from recursive_jax import sharding
from recursive_jax.decoding.engine import MISSING_KV, Engine
from recursive_jax.decoding.exit_measures import MEASURE_NAMES, Measure, Static, make_measure
from recursive_jax.decoding.requests import Request, check_number
from recursive_jax.model import Model, Opened

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


def check_sizes(options: flags.FlagValues) -> None:
    """Raises ValueError for wrong sizes, before a model is read."""
    check_number("num_slots", options.num_slots, True, 1, 2**20)
    check_number("chunk_length", options.chunk_length, True, 1, 2**20)
    if options.context_length is not None:
        check_number("context_length", options.context_length, True, 2, 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class ExitChoice:
    """When tokens leave.

    Attributes:
      measure: None: never.
      thresholds: as `Engine` takes them; None: the measure's own.
      origin: where the thresholds come from, in words.
    """

    measure: Measure | None = None
    thresholds: Sequence[float] | None = None
    origin: str = ""


def read_exits(options: flags.FlagValues) -> ExitChoice:
    """The exit choice of the flags, checked as far as possible without a model."""
    name, given = options.exit_measure, options.exit_threshold
    if options.draft_loop is not None and (not options.lossless or name != NO_MEASURE):
        raise ValueError(
            "--draft_loop is for --lossless without --exit_measure; a measure decides by itself "
            "where a token drafts"
        )
    if options.lossless and options.missing_kv != "complete":
        raise ValueError(
            f"--lossless with --missing_kv={options.missing_kv}; it needs 'complete', the exact one"
        )
    if options.lossless and name == NO_MEASURE:
        draft_loop = 1 if options.draft_loop is None else options.draft_loop
        check_number("draft_loop", draft_loop, True, 1, 2**31 - 1)
        name = f"static:{draft_loop}"
    if name == CALIBRATED:
        if given is not None:
            raise ValueError("--exit_threshold with --exit_measure=calibrated; name the measure")
        return ExitChoice()
    if name == NO_MEASURE:
        if given is not None:
            raise ValueError("--exit_threshold without --exit_measure; name one")
        return ExitChoice()
    measure = make_measure(name)
    if options.lossless and not measure.can_exit:
        raise ValueError(f"--lossless with --exit_measure={name}, which never drafts; name another")
    if given is None:
        return ExitChoice(measure)
    try:
        thresholds = tuple(float(value) for value in given)
    except ValueError as error:
        raise ValueError(f"exit_threshold={','.join(given)}; expected numbers") from error
    for value in thresholds:
        measure.check_threshold(value)
    return ExitChoice(measure, thresholds, "--exit_threshold")


def resolve_exits(options: flags.FlagValues, exits: ExitChoice, opened: Opened) -> ExitChoice:
    """Complete the choice by the checkpoint; ValueError if the model cannot serve it."""
    num_loops, calibrated = opened.cfg.num_loops, opened.calibrated
    if options.lossless and num_loops < 2:
        raise ValueError(
            "--lossless drafts from an earlier loop, and this model has one loop only; leave the "
            "flag out"
        )
    for name in ("min_loops", "max_loops"):
        if (options[name].value or 1) > num_loops:
            raise ValueError(f"{name}={options[name].value}; the model has {num_loops} loops")
    if options.exit_measure == CALIBRATED:
        if calibrated is None:
            raise ValueError(
                f"{opened.spec} has no thresholds.json; name an exit measure: "
                f"{', '.join(MEASURE_NAMES)}"
            )
        exits = ExitChoice(make_measure(calibrated.measure))
    if exits.measure is None:
        return exits
    exits.measure.check_loops(num_loops)
    if options.lossless and exits.measure == Static(num_loops):
        raise ValueError(
            f"a draft after loop {num_loops} of {num_loops} is no draft; expected 1 … "
            f"{num_loops - 1}"
        )
    if exits.thresholds is None and calibrated and calibrated.measure == exits.measure.name:
        calibrated.check_current()
        origin = f"thresholds.json, at most {calibrated.bound:.2%} of tokens differ"
        exits = ExitChoice(exits.measure, calibrated.thresholds, origin)
    if exits.thresholds is not None and len(exits.thresholds) not in {1, num_loops - 1}:
        raise ValueError(
            f"{len(exits.thresholds)} exit thresholds ({exits.origin}); expected one, or one after "
            f"each of the first {num_loops - 1} loops"
        )
    return exits


def needed_context(requests: Sequence[Request]) -> int:
    """Cache rows that the longest request needs, in whole tiles of a TPU."""
    longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
    return -(-longest // 128) * 128


def make_engine(
    model: Model,
    options: flags.FlagValues,
    exits: ExitChoice,
    requests: Sequence[Request],
) -> Engine:
    """An engine with room for the longest of `requests`, compiled."""
    shards, mesh = sharding.data_shards(model.mesh), model.mesh
    if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu":
        mesh = None  # on other platforms it also sets the cache's layout in memory
    num_loops = model.decoder.cfg.num_loops
    measure = exits.measure
    if measure is None and any((r.max_loops or num_loops) < num_loops for r in requests):
        measure = Static(num_loops)  # tokens leave only at a request's own bound
    prompt = max(len(r.tokens) for r in requests) - 1
    num_slots = -(-min(options.num_slots, len(requests)) // shards) * shards
    context_length = needed_context(requests)
    try:
        engine = Engine(
            model.decoder,
            model.params,
            num_slots=num_slots,
            context_length=context_length,
            chunk_length=min(options.chunk_length, -(-max(prompt, 1) // 16) * 16),
            num_stop=max([1, *(len(r.stop) for r in requests)]),
            measure=measure,
            thresholds=exits.thresholds,
            missing_kv=options.missing_kv,
            lossless=options.lossless,
            depthwise=options.depthwise,
            mesh=mesh,
            rules=model.rules,
        )
        engine.compile()
    except (jax.errors.JaxRuntimeError, MemoryError) as error:  # the device's, the host's
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"{num_slots} slots of {context_length:,} tokens do not fit into memory beside the "
            f"model ({str(error).splitlines()[0]}); lower num_slots or max_new_tokens"
        ) from error
    return engine


def describe(engine: Engine, options: flags.FlagValues, exits: ExitChoice) -> dict[str, str]:
    """Rows of the start-up table."""
    lanes = engine.num_lanes // engine.num_slots
    words = {
        "slots": f"{engine.num_slots}" + (f", {lanes} lanes each" if lanes > 1 else ""),
        "context": f"{engine.context_length:,} tokens",
        "prompt chunk": f"{engine.chunk_length} tokens",
        "cache": f"{engine.cache_bytes / 2**20:,.0f} MiB",
    }
    words["attention"] = engine.model.attention
    measure = exits.measure
    if measure is None:
        bounded = "where a request's max_loops says" if engine.can_exit else "none"
        loops = f"{engine.num_loops} loop" + "s" * (engine.num_loops > 1)
        words["exits"] = f"{bounded} ({loops})"
    else:
        name = f"static:{measure.loops}" if isinstance(measure, Static) else measure.name
        words["exits"] = f"{name} of {engine.num_loops} loops"
        if exits.thresholds is not None:
            values = ", ".join(f"{value:g}" for value in exits.thresholds)
            words["thresholds"] = f"{values} ({exits.origin})"
        elif measure.default_threshold:
            words["thresholds"] = f"{measure.default_threshold:g} (the measure's own)"
    if options.lossless:
        words["lossless"] = "exits only draft, the last loop decides"
    elif engine.can_exit:
        words["missing KV"] = options.missing_kv
    if not options.depthwise:
        words["batching"] = "sequence-wise"
    return words
