"""Serve: checkpoint -> an HTTP server with OpenAI's API, through the depth-wise engine.

    python -m recursive_jax.serve --checkpoint=CKPT
    python -m recursive_jax.serve --checkpoint=CKPT --exit_measure=top1 --exit_threshold=0.9
    python -m recursive_jax.serve --checkpoint=CKPT --host=0.0.0.0 --api_key=KEY

It answers on http://127.0.0.1:8000 until Ctrl-C or SIGTERM. Requests that run then have
--drain_seconds to end. `/docs` has the description of all routes, docs/serve.md has examples.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from recursive_jax import generation, sharding
from recursive_jax.console import app, engine_flags, report, stop, tables
from recursive_jax.console.output import note
from recursive_jax.decode_model import OnDevices
from recursive_jax.decoding.engine import Engine
from recursive_jax.model import Model, load

PASSES = 1e9  # of the block: a server runs for long
KEY = "RECURSIVE_JAX_API_KEY"


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    string, integer, number, boolean = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_bool,
        )
    )
    string("checkpoint", None, "ours, a Hugging Face directory, .gguf, hub id, or 'tiny'")
    integer("step", None, "of a checkpoint with several saved steps; default the newest")
    boolean("strict", False, "stop where the newest step is damaged, instead of the one before")
    string("model_name", None, "in requests and answers; default: the last part of --checkpoint")
    string("host", "127.0.0.1", "address; 0.0.0.0: reachable from other machines")
    integer("port", 8000, "0 takes a free one")
    string("api_key", None, f"that clients must send; better: the environment variable {KEY}")
    number("drain_seconds", 30, "that running requests have after SIGTERM")
    integer("max_body_mb", 4, "MiB of a request's body, at most")
    integer("max_choices", 128, "prompts of a request times its n, at most")
    integer("max_stops", 16, "stop texts of a request, at most")
    integer("max_logprobs", 5, "most likely tokens listed beside a token, at most")
    integer("max_queue", 1024, "choices that wait for a slot, at most; more get 429")
    number("max_seconds", 600, "of a request, at most; then it gets 504")
    engine_flags.define_flags(values)
    flags.adopt_module_key_flags(engine_flags, values)
    flags.mark_flag_as_required("checkpoint", flag_values=values)


def run(options: flags.FlagValues) -> None:
    """Run the job. A ValueError or OSError is a mistake of the user."""
    try:
        from recursive_jax.serving import limits as limits_lib
        from recursive_jax.serving import server as server_lib
    except ImportError as error:
        raise ValueError(
            f"serve needs {error.name}, which is not installed; pip install 'recursive_jax[serve]'"
        ) from error

    limits = limits_lib.ServerLimits(
        max_body_bytes=options.max_body_mb << 20,
        **{f.name: options[f.name].value for f in dataclasses.fields(limits_lib.ServerLimits)
           if f.name in options},
    )  # fmt: skip
    read = engine_flags.read_config(options)
    dtype = sharding.compute_dtype(options.dtype)
    mesh = sharding.make_mesh(options.data, 1, options.tensor)
    key = options.api_key or os.environ.get(KEY)
    with server_lib.bind(options.host, options.port) as listener:
        model = load(options.checkpoint, options.step, strict=options.strict)
        num_stop = len(model.stop) + limits.max_stops
        read = dataclasses.replace(read, num_stop=num_stop)
        config, origin = engine_flags.complete(options, read, model)
        length = config.context_length or model.cfg.max_length
        placed = generation.put_on_devices(model, mesh, dtype, length, PASSES)
        began = time.perf_counter()
        engine = generation.make_engine(placed, config)
        name = options.model_name or os.path.basename(os.path.normpath(options.checkpoint))
        server = make_server(engine, model, placed, name, limits)
        where = server_lib.address(listener)
        rows = {
            **report.describe_model(options.checkpoint, placed),
            **engine_flags.describe(engine, config, origin),
            "lossless requests": lossless_words(engine, config.lossless),
            "compiled in": f"{time.perf_counter() - began:.1f} s",
            "key": "needed" if key else "none",
        }
        note(tables.table(list(rows.items())))
        if not key and not server_lib.is_local(listener):
            note(f"warning: {where} is reachable from other machines without a key; set {KEY}")
        server.key, server.drain_seconds = key, options.drain_seconds
        server.warmed = functools.partial(note, f"serving {name!r} on {where}/v1")
        if step_of(model) is not None:
            server.load = functools.partial(reload, options, read, placed, model)
        server.run(listener)
    note("stopped")


def make_server(engine: Engine, model: Model, placed: OnDevices, name: str, limits: Any) -> Any:
    """The server of an engine."""
    from recursive_jax.serving.scoring import LoopScorer, Scorer
    from recursive_jax.serving.served import Served
    from recursive_jax.serving.server import Server

    precision = functools.partial(sharding.matmul_precision, placed.decoder.dtype)
    scorer = loop_scorer = None
    if placed.mesh.size == 1:
        length = engine.config.context_length
        parts = placed.decoder, lambda: engine.params, length, precision
        scorer, loop_scorer = Scorer(*parts, num_top=limits.max_logprobs), LoopScorer(*parts)
    served = Served(
        name, step_of(model), model.tokenizer, model.stop, engine.limits,
        engine.config.lossless, scorer is not None,
    )  # fmt: skip
    return Server(engine, served, limits, scorer=scorer, loop_scorer=loop_scorer)


def step_of(model: Model) -> int | None:
    """The step of a checkpoint's weights; None for other models."""
    return getattr(model.weights, "step", None)


def lossless_words(engine: Engine, lossless: bool) -> str:
    if lossless:
        return "all of them: exits only draft"
    return "run all loops" if engine.can_exit else "all of them: nothing exits"


def reload(
    options: flags.FlagValues, read: Any, placed: OnDevices, old: Model, step: int | None
) -> tuple[int | None, Any]:
    """Load a step of the checkpoint; returns it, and the change of the engine.

    Raises:
      ValueError, OSError: there is no such step, it is damaged, or it is another model.
    """
    model = load(options.checkpoint, step, strict=True)
    if model.cfg != old.cfg:
        raise ValueError("the checkpoint has a model of other sizes; start the server again")
    config, _ = engine_flags.complete(options, read, model)
    length = config.context_length or model.cfg.max_length
    params = generation.put_on_devices(
        model, placed.mesh, placed.decoder.dtype, length, PASSES, note
    ).params
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    if not finite:
        raise ValueError(f"step {step_of(model)} has weights that are not finite")

    def change(engine: Engine) -> None:
        engine.params, engine.thresholds = params, config.thresholds

    return step_of(model), change


def main(options: flags.FlagValues = flags.FLAGS) -> None:
    try:
        with stop.on_signals():
            run(options)
    except stop.Stopped:
        note("stopped")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
