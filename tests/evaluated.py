"""A small looped model and small task files, for the tests of evaluation."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.model import Model
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params
from recursive_jax.text import load_tokenizer
from recursive_jax.weights.source import ASSETS
from recursive_jax.weights.stored import ArrayWeights

CFG = DecoderConfig(
    "llama", 4096, 16, 32, num_heads=4, num_kv_heads=2, head_dim=4, num_layers=1, num_loops=2,
    norms="per_loop", lora_ranks={"q": 2}, tied_head=True, max_length=64,
)  # fmt: skip

CHOICES = [
    {"query": "Question: Which one returns a list?", "choices": ["the function", "No"], "gold": 0},
    {"query": "Question: What does the argument name?", "choices": ["a", "an array of"], "gold": 1},
    {"query": "Question: What is raised?", "choices": ["ValueError", "nothing"], "gold": 0},
    {"query": "Question: What comes first?", "choices": ["the last", "one"], "gold": 1},
]  # fmt: skip
PAIRS = [
    {"context_options": ["The list is", "The dict is"], "continuation": "sorted.", "gold": 0},
    {"context_options": ["A new", "An old"], "continuation": "array", "gold": 1},
]
LAST_WORDS = [
    {"context": "Return the name of the", "continuation": "file"},
    {"context": "Raise an error if the value is", "continuation": "None"},
]


@functools.cache
def make_model(num_loops=2, max_length=64):
    cfg = dataclasses.replace(CFG, num_loops=num_loops, max_length=max_length)
    if num_loops == 1:
        cfg = dataclasses.replace(cfg, lora_ranks={}, norms="tied")
    rng = np.random.default_rng(1)
    shapes = abstract_params(cfg)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("f"), shapes)
    tokenizer = load_tokenizer(ASSETS / "tiny")
    return Model(cfg, tokenizer, ArrayWeights(params, "a small model"), "a small model")


def tokenizer_without(*roles):
    """The tiny tokenizer without its BOS or EOS token."""
    tokenizer = load_tokenizer(ASSETS / "tiny")
    for role in roles:
        setattr(tokenizer, role, None)
    return tokenizer


def write_tasks(directory):
    """Three tasks of the three forms: arc_easy, winogrande and lambada_openai."""
    directory.mkdir(exist_ok=True)
    named = {"arc_easy": CHOICES, "winogrande": PAIRS, "lambada_openai": LAST_WORDS}
    for name, items in named.items():
        text = "".join(json.dumps(item) + "\n" for item in items)
        (directory / f"{name}.jsonl").write_text(text)
    return directory


LONGEST = 96


@functools.cache
def every_logit(decoder):
    """Jitted `(params, ids [1, LONGEST]) -> logits of each exit`; padding follows the text."""

    @jax.jit
    def run(params, ids):
        params, every = {"params": params}, decoder.cfg.has_exits
        positions = jnp.arange(LONGEST, dtype=jnp.int32)[None]
        hidden = decoder.apply(params, ids, positions, all_loops=every)
        states = hidden if every else hidden[None]
        return [decoder.apply(params, x, method="unembed") for x in states]

    return run


def reference(model, context, continuation):
    """Log-likelihoods, and whether every token is the likeliest, by loops: one pair alone."""
    ids = np.zeros((1, LONGEST), np.int32)
    ids[0, : len(context) + len(continuation)] = [*context, *continuation]
    out = []
    for logits in every_logit(Decoder(model.cfg))(model.params, ids):
        rows = logits[0, len(context) - 1 :][: len(continuation)]
        logprobs = np.asarray(jax.nn.log_softmax(rows, -1), np.float64)
        wanted = np.asarray(continuation)
        chosen = logprobs[np.arange(len(wanted)), wanted].sum()
        out.append((chosen, bool((logprobs.argmax(-1) == wanted).all())))
    return [x for x, _ in out], [x for _, x in out]
