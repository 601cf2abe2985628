"""From a model and prompts to an engine that answers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from recursive_jax import sharding
from recursive_jax.console.output import note
from recursive_jax.decode_model import OnDevices, decode_model
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.exit_measures import Static
from recursive_jax.decoding.prompts import OPTIONS, Prompt, to_request
from recursive_jax.decoding.requests import Request
from recursive_jax.models.parameters import logical_axes

if TYPE_CHECKING:
    from recursive_jax.model import Model

Prompts = str | Sequence[str | Request | list[Mapping[str, str]]]


def put_on_devices(
    model: Model,
    mesh: jax.sharding.Mesh,
    dtype: Any,
    context_length: int,
    passes: float = 0,
    say: Callable[[str], None] = note,
) -> OnDevices:
    """The model with its weights in `dtype` on `mesh`; other arguments as `decode_model`."""
    rules = sharding.rules_for(mesh, model.cfg)
    shardings = sharding.shardings(logical_axes(model.cfg), mesh, rules)
    decoder = decode_model(model.cfg, dtype, mesh, context_length, passes, say)
    # `load` returns new arrays, so that they may be given away here.
    params = decoder.prepare(model.weights.load(shardings, dtype), donate=True)
    return OnDevices(decoder, params, mesh, rules)


def make_requests(
    model: Model, prompts: Prompts, options: Mapping[str, Any], context_length: int, chat: bool
) -> list[Request]:
    """The requests of prompts.

    Args:
      model: for its tokenizer and stop ids.
      prompts: a text, or a list of texts, conversations (lists of `{"role", "content"}`) and
        requests.
      options: some of `prompts.OPTIONS`, for all prompts that are not requests. The k-th of them
        (from 0) has the seed `seed + k`, so that equal prompts get different samples.
      context_length: tokens of prompt and answer together, at most.
      chat: apply the chat template to texts too.

    Raises:
      ValueError: an unknown option, or a prompt that cannot be answered; by its number.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown options {unknown}; expected some of {', '.join(OPTIONS)}")
    seed = options.get("seed", 0)
    requests = []
    for k, content in enumerate([prompts] if isinstance(prompts, str) else prompts):
        if isinstance(content, Request):
            content.check_fits(context_length)
            requests.append(content)
            continue
        values = {"max_new_tokens": 128, **options}
        if seed is not None and isinstance(seed, int):
            values["seed"] = (seed + k) % 2**32
        prompt = Prompt(k, content, values, f"prompt {k}: ")
        sizes = model.cfg.vocab_size, model.stop, context_length, chat
        requests.append(to_request(prompt, model.tokenizer, *sizes))
    if not requests:
        raise ValueError("no prompts; expected a text, or a list with at least one")
    return requests


def with_thresholds(config: EngineConfig, model: Model) -> EngineConfig:
    """The config with the model's calibrated thresholds, if they are for a measure without its own.

    Raises:
      ValueError: they were calibrated on other weights or with other keys and values, or are not
        for so many loops.
    """
    calibrated = model.thresholds
    if config.measure is None or config.thresholds is not None or calibrated is None:
        return config
    if calibrated.measure != config.measure.name:
        return config
    calibrated.check_current()
    calibrated.check_missing_kv(config.missing_kv)
    try:
        config = dataclasses.replace(config, thresholds=calibrated.thresholds)
        config.check_loops(model.cfg.num_loops)
    except ValueError as error:
        raise ValueError(f"{model.name}: thresholds.json: {error}; calibrate again") from error
    return config


def needed_context(requests: Sequence[Request]) -> int:
    """Cache rows that the longest request needs, in whole tiles of a TPU."""
    longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
    return -(-longest // 128) * 128


def expected_passes(model: Model, requests: Sequence[Request], num_slots: int) -> float:
    """Passes of the block that answering the requests takes, at most."""
    tokens = sum(request.max_new_tokens for request in requests)
    return model.cfg.num_loops * tokens / min(num_slots, len(requests))


def fit_to(config: EngineConfig, requests: Sequence[Request], placed: OnDevices) -> EngineConfig:
    """The config of an engine that is just large enough for the requests."""
    shards, num_loops = sharding.data_shards(placed.mesh), placed.decoder.cfg.num_loops
    measure = config.measure
    if measure is None and any((r.max_loops or num_loops) < num_loops for r in requests):
        measure = Static(num_loops)  # tokens leave only at a request's own bound
    prompt = max(len(r.tokens) for r in requests) - 1
    return dataclasses.replace(
        config,
        num_slots=-(-min(config.num_slots, len(requests)) // shards) * shards,
        context_length=needed_context(requests),
        chunk_length=min(config.chunk_length, -(-max(prompt, 1) // 16) * 16),
        num_stop=max([1, *(len(r.stop) for r in requests)]),
        measure=measure,
    )


def make_engine(placed: OnDevices, config: EngineConfig) -> Engine:
    """A compiled engine.

    Raises:
      ValueError: it does not fit into memory.
    """
    mesh = placed.mesh
    if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu":
        mesh = None  # on other platforms it also sets the cache's layout in memory
    try:
        with sharding.matmul_precision(placed.decoder.dtype):
            engine = Engine(placed.decoder, placed.params, config, mesh, placed.rules)
            engine.compile()
    except (jax.errors.JaxRuntimeError, MemoryError) as error:  # the device's, the host's
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"{config.num_slots} slots of {config.context_length:,} tokens do not fit into memory "
            f"beside the model ({str(error).splitlines()[0]}); lower num_slots or max_new_tokens"
        ) from error
    return engine
