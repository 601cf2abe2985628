"""What the engine must do, one request at a time: plain Python around `Decoder.run_block`.

Every token runs loop after loop at batch size one; after each loop `leaves` decides on the host
whether its successor is chosen there. What the skipped loops lack is then seen to by policy:
run them all the same, project the exit state with NumPy, or copy rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from float64_reference import Layer

from recursive_jax.decoding.requests import Sampling
from recursive_jax.decoding.sampling import SamplingParams, sample
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.interface import Rows
from recursive_jax.models.kv_cache import RowCache

TIE = 1e-5  # of the logit scale: closer than that, rounding may decide


@dataclasses.dataclass
class Look:
    """What `leaves` may look at."""

    index: int  # of the new token, from 0
    loops: int  # executed
    before: np.ndarray  # [D]
    after: np.ndarray
    logits: list[np.ndarray]  # [V] after each loop so far
    doubt: bool = False  # set by `leaves` when rounding may decide


@dataclasses.dataclass
class Answer:
    tokens: list[int]
    exit_loops: list[int]
    logprobs: list[float]
    doubts: list[bool]  # rounding may decide this token, so it and what follows say nothing


@functools.partial(jax.jit, static_argnums=0)
def _embed(cfg, params, token):
    return Decoder(cfg).apply({"params": params}, token[None], method="embed")


@functools.partial(jax.jit, static_argnums=0)
def _run_loop(cfg, params, x, loop, position, cache):
    rows = Rows(loop[None], position[None], jnp.zeros(1, jnp.int32))
    return Decoder(cfg).apply({"params": params}, x, rows, cache, method="run_block")


@functools.partial(jax.jit, static_argnums=0)
def _unembed(cfg, params, x):
    return Decoder(cfg).apply({"params": params}, x, method="unembed")


_sample = jax.jit(sample)


def sample_one(logits, sampling, prompt, text):
    """The token behind `text` (which begins with `prompt`), its log-probability; logits f32 [V]."""
    position, scores = len(text), logits.copy()
    for token in set(text):
        factor = sampling.repetition_penalty
        scores[token] *= 1 / factor if scores[token] > 0 else factor
    for token in text[len(prompt) :]:
        scores[token] -= sampling.frequency_penalty
    for token in set(text[len(prompt) :]):
        scores[token] -= sampling.presence_penalty
    tokens, _ = _sample(
        scores[None],
        SamplingParams.stack([sampling]),
        np.asarray([sampling.seed], np.uint32),
        np.asarray([position], np.int32),
    )
    raw = logits.astype(np.float64)
    return int(tokens[0]), raw[tokens[0]] - raw.max() - np.log(np.exp(raw - raw.max()).sum())


def answer(
    cfg,
    params,
    prompt,
    count,
    context,
    leaves=lambda look: False,
    policy="complete",
    sampling=None,
    stop=(),
) -> Answer:
    """`count` new tokens, or up to and with the first one in `stop`.

    leaves(look) -> bool is asked after every loop; the answer does not matter after the last one,
    nor for the first new token, which comes from the prompt: prompt tokens run all loops.
    """
    sampling = sampling or Sampling()
    cache = RowCache.zeros(cfg, 1, context)
    text, out = list(prompt), Answer([], [], [], [])
    for position in range(len(prompt) - 1 + count):
        x = _embed(cfg, params, np.int32(text[position]))
        decodes, logits, exit_loop, doubt = position >= len(prompt) - 1, [], 0, False
        for loop in range(cfg.num_loops):
            before = x
            x, cache = _run_loop(cfg, params, x, np.int32(loop), np.int32(position), cache)
            if not decodes or exit_loop:
                continue
            logits.append(np.asarray(_unembed(cfg, params, x))[0])
            index = position - len(prompt) + 1
            states = (np.asarray(state)[0] for state in (before, x))
            look = Look(index, loop + 1, *states, logits)
            wants = leaves(look)
            doubt |= look.doubt
            if loop == cfg.num_loops - 1 or (index and wants):
                exit_loop, exit_x = loop + 1, np.asarray(x)[0]
                if policy != "complete":
                    break
        if not decodes:
            continue
        if policy == "propagate":
            cache = _project(cfg, params, cache, exit_x, exit_loop, position)
        elif policy == "copy":
            rows = np.array(cache.rows)
            rows[exit_loop:, :, 0, position] = rows[exit_loop - 1, :, 0, position]
            cache = RowCache(jnp.asarray(rows))
        token, logprob = sample_one(logits[-1], sampling, prompt, text)
        text.append(token)
        out.tokens.append(token)
        out.exit_loops.append(exit_loop)
        out.logprobs.append(logprob)
        top = np.sort(logits[-1])[-2:]
        close = top[1] - top[0] < TIE * np.abs(logits[-1]).max()
        out.doubts.append(bool(close or doubt))
        if token in stop:
            break
    return out


def _project(cfg, params, cache, x, exit_loop, position):
    """K and V of the loops from `exit_loop` on (0-based), every layer's from the same state x."""
    rows = np.array(cache.rows)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)[None]
    for loop in range(exit_loop, cfg.num_loops):
        for i in range(cfg.num_layers):
            layer = Layer(cfg, params, loop, i)
            k, v = layer.keys_and_values(layer.norm("pre_attention_norm", x), [position])
            rows[loop, i, 0, position] = np.stack([k[0], v[0]], axis=1)
    return RowCache(jnp.asarray(rows))
