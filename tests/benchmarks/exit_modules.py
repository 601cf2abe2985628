"""Exits on a frozen model: what a module behind the first loop could give, and what it costs.

    python -m tests.benchmarks.exit_modules CHECKPOINT [--tokens=196608] [--text=docstrings:6] \\
        [--modules=none,low-rank,mlp,layer]

Trains three modules on the states after the first loop of a model that stays as it is: a low-rank
update, a gated MLP, and a whole layer that starts as the model's last. Each has its own final norm,
and learns the last loop's distribution (forward KL). Prints a JSON row per module: its cost in
multiply-adds of one loop, what it predicts on held-out text, and the nats that are lost where the
surest tokens leave (their keys and values are those of full depth).
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_jax.model import load
from recursive_jax.models.attention import Context, rope_tables
from recursive_jax.models.decoder import Decoder, Layer, layer_tables
from recursive_jax.models.layers import normalise
from recursive_jax.training.config import DataConfig
from recursive_jax.training.corpus import open_corpus
from recursive_jax.weights import tying

RATES = {"none": 0.0, "low-rank": 4e-3, "mlp": 2e-3, "layer": 1e-3}
RANK, ROWS = 32, 8
SHARES = (0.1, 0.2, 0.3)


class Frozen:
    """A model whose weights stay: states, logits, and the modules that read its states."""

    def __init__(self, checkpoint: str):
        model = load(checkpoint)
        if model.cfg.num_loops != 2 or not model.cfg.gated_mlp or model.cfg.norm != "rms":
            raise ValueError(f"{checkpoint}: expected two loops, RMSNorm and a gated MLP")
        self.model, self.cfg, self.params = model, model.cfg, model.params
        vanilla, self.plain = tying.untie(model.params, model.cfg)
        self.last = jax.tree.map(lambda x: jnp.asarray(x[-1]), vanilla["block"])
        self.plain = self.plain.at_depths([self.plain.depth - 1])

    @functools.cached_property
    def states(self):
        """Jitted (tokens, positions, segments) -> states after both loops `[2, B, T, D]`."""
        decoder = Decoder(self.cfg)
        return jax.jit(lambda *x: decoder.apply({"params": self.params}, *x, all_loops=True))

    def logits(self, x, scale=None):
        scale = self.params["final_norm"]["scale"] if scale is None else scale
        head = self.params["embedding"].T if self.cfg.tied_head else self.params["head"]
        return normalise(x, scale, None, self.cfg) @ head

    def start(self, kind: str, rng: np.random.Generator) -> dict:
        dim, wide = self.cfg.embed_dim, self.cfg.mlp_dim
        ones = jnp.ones(dim) - self.cfg.norm_offset

        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape, scale=shape[0] ** -0.5), jnp.float32)

        module = {"norm": self.params["final_norm"]["scale"]}
        if kind == "low-rank":
            module |= {"pre": ones, "a": normal(dim, RANK), "b": jnp.zeros((RANK, dim))}
        elif kind == "mlp":
            module |= {"pre": ones, "gate": normal(dim, wide), "up": normal(dim, wide)}
            module["down"] = jnp.zeros((wide, dim))
        elif kind == "layer":
            module["layer"] = self.last
        return module

    def run(self, kind: str, module: dict, x, positions, segments):
        """The module's state of x, the states after the first loop."""
        if kind == "layer":
            tables = jax.tree.map(lambda table: table[0], layer_tables(self.plain))
            context = Context(*rope_tables(self.plain, positions), positions, segments)
            carry = x, None
            return Layer(self.plain).apply(
                {"params": module["layer"]}, carry, jnp.int32(0), context, tables
            )[0][0]
        if kind == "none":
            return x
        h = normalise(x, module["pre"], None, self.cfg)
        if kind == "low-rank":
            return x + h @ module["a"] @ module["b"]
        return x + (jax.nn.silu(h @ module["gate"]) * (h @ module["up"])) @ module["down"]

    def cost(self, kind: str) -> float:
        """Multiply-adds of a token, in those of one loop; attention scores and norms left out."""
        cfg = self.cfg
        layer = sum(a * b for a, b in cfg.projections.values())
        lora = sum(r * sum(cfg.projections[name]) for name, r in cfg.lora_ranks)
        mine = {
            "none": 0,
            "low-rank": 2 * cfg.embed_dim * RANK,
            "mlp": 3 * cfg.embed_dim * cfg.mlp_dim,
        }
        return mine.get(kind, layer) / (cfg.num_layers * (layer + lora))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=196_608)
    parser.add_argument("--text", default="docstrings:6")
    parser.add_argument("--modules", default=",".join(RATES))
    parser.add_argument("--held_out", type=int, default=20_000)
    args = parser.parse_args()
    frozen = Frozen(args.checkpoint)
    data = DataConfig(args.text, context_length=256, batch_size=ROWS, eval_tokens=args.held_out)
    model = frozen.model
    corpus = open_corpus(data, model.tokenizer, model.cfg.vocab_size, 0, progress=False)
    for kind in args.modules.split(","):
        began = time.time()
        module = train(frozen, kind, corpus, args.tokens // (256 * ROWS))
        found = measure(frozen, kind, module, corpus.windows)
        size = sum(x.size for x in jax.tree.leaves(module))
        settings = {"tokens": args.tokens, "parameters": size, "cost": frozen.cost(kind)}
        seconds = round(time.time() - began, 1)
        row = {"result": "exit module", "module": kind, **settings, **found, "seconds": seconds}
        print(json.dumps(row), flush=True)


def train(frozen: Frozen, kind: str, corpus, steps: int) -> dict:
    module = frozen.start(kind, np.random.default_rng(0))
    if not RATES[kind]:
        return module
    rate = optax.warmup_cosine_decay_schedule(
        0, RATES[kind], min(20, steps // 5), steps, 0.05 * RATES[kind]
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95, weight_decay=0))

    def loss(module, x, weights, positions, segments):
        state = frozen.run(kind, module, x[0], positions, segments)
        log_p = jax.nn.log_softmax(frozen.logits(x[1]))
        log_q = jax.nn.log_softmax(frozen.logits(state, module["norm"]))
        return (weights * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)).sum() / weights.sum()

    @jax.jit
    def step(module, state, *batch):
        grads = jax.grad(loss)(module, *batch)
        updates, state = tx.update(grads, state, module)
        return optax.apply_updates(module, updates), state

    state = tx.init(module)
    for n in range(steps):
        rows = [corpus.rows[n * ROWS + i] for i in range(ROWS)]
        names = ("tokens", "positions", "segment_ids", "weights")
        tokens, positions, segments, weights = (
            np.stack([getattr(row, name) for row in rows]) for name in names
        )
        x = frozen.states(tokens, positions, segments)
        module, state = step(module, state, x, weights, positions, segments)
    return module


def measure(frozen: Frozen, kind: str, module: dict, windows) -> dict:
    """Means over the scored tokens of held-out windows; the surest leave first."""

    @jax.jit
    def score(x, targets, positions, segments):
        log_q = jax.nn.log_softmax(
            frozen.logits(frozen.run(kind, module, x[0], positions, segments), module["norm"])
        )
        log_p = jax.nn.log_softmax(frozen.logits(x[1]))
        nll = [-jnp.take_along_axis(y, targets[..., None], -1)[..., 0] for y in (log_q, log_p)]
        kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        return *nll, kl, log_q.argmax(-1) == log_p.argmax(-1), log_q.max(-1)

    parts = []
    for tokens, scored in zip(windows.tokens, windows.scored, strict=True):
        inputs = tokens[None, :-1]
        positions = np.arange(inputs.shape[1], dtype=np.int32)[None]
        segments = np.ones_like(positions)
        x = frozen.states(inputs, positions, segments)
        found = score(x, tokens[None, 1:], positions, segments)
        parts.append(np.stack([np.float64(y[0]) for y in found])[:, scored[1:]])
    nll, final, kl, agrees, sure = np.concatenate(parts, axis=1)
    order = np.argsort(-sure)
    lost = {
        f"{s:.0%}": (nll - final)[order[: int(s * len(order))]].sum() / len(order) for s in SHARES
    }
    agree = {f"{s:.0%}": agrees[order[: int(s * len(order))]].mean() for s in SHARES}
    return {
        "nll": nll.mean(), "nll_last_loop": final.mean(), "kl": kl.mean(),
        "agreement": agrees.mean(), "agreement_of_the_surest": agree, "nats_lost": lost,
        "held_out_tokens": len(order),
    }  # fmt: skip


if __name__ == "__main__":
    main()
