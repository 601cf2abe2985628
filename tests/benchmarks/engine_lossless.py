"""Drafts from loop 1, verified by the last loop, against full depth.

    python tests/benchmarks/engine_lossless.py --model=DIR        made to agree, see `agreeing`
    python tests/benchmarks/engine_lossless.py --checkpoint=CKPT  one of ours

Prints a JSON row for 1, 4 and 16 slots: the gain, and its share of what the parts of a tick,
measured alone in the same run, predict.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import pydoc_data.topics
import statistics

import jax
import jax.numpy as jnp
from engine import make, parser, requests, row, serve, serve_in_turn, stopwatch

from recursive_jax import text
from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.decoding.exit_measures import Static
from recursive_jax.decoding.requests import Request, Sampling
from recursive_jax.weights import checkpoint, tying
from recursive_jax.weights.source import open_source
from recursive_jax.weights.tie_config import TieConfig


def lossless(args):
    """Benchmark 4: drafts from loop 1, verified by the last, against full depth."""
    if args.checkpoint:
        params, cfg = checkpoint.load_params(args.checkpoint)
        tokenizer = text.load_tokenizer(pathlib.Path(args.checkpoint) / "tokenizer")
        model = CpuModel(cfg)
        cases = [(model, model.prepare(params, donate=True), args.checkpoint)]
    else:
        cases = [(*agreeing(args, n, 0.8), args.model) for n in args.loops]
    for model, params, name in cases:
        for slots in args.slot_counts:
            # with one slot, too, all requests on which `agreeing` measured
            args.slots, args.requests = slots, max(4 * slots, 16)
            todo = sampled(args.requests, args, model.cfg.vocab_size)
            if args.checkpoint:
                todo = on_text(todo, tokenizer)
            pieces = [todo[i : i + 4 * slots] for i in range(0, len(todo), 4 * slots)]
            exact = make(model, params, args)
            drafting = make(model, params, args, measure=Static(1), lossless=True)
            serve(exact, todo[:slots]), serve(drafting, todo[:slots])  # warm up
            gains, predictions, rates, all_stats = [], [], {"lossless": [], "full": []}, []
            for _ in range(args.rounds):
                with stopwatch(
                    model,
                    params,
                    args,
                    sampling=Sampling(args.temperature),
                    measure=Static(1),
                    lossless=True,
                ) as watch:
                    for piece in pieces:
                        (full, _), (rate, stats) = serve_in_turn([exact, drafting], piece, [watch])
                        rates["lossless"].append(rate), rates["full"].append(full)
                        gains.append(rate / full)
                        all_stats.append(stats)
                    times = watch.times()
                predictions += [
                    times.lossless_gain(
                        slots,
                        model.cfg.num_loops,
                        stats.ticks_per_token,
                        stats.head_rows / stats.ticks,
                    )
                    for stats in all_stats[-len(pieces) :]
                ]
            shares = [gain / predicted for gain, predicted in zip(gains, predictions, strict=True)]
            drafted = sum(stats.drafted for stats in all_stats)
            row(
                args,
                "engine lossless",
                source=pathlib.Path(name).name,
                num_loops=model.cfg.num_loops,
                agreement=round(sum(accepted(s, model) for s in all_stats) / max(drafted, 1), 3),
                ticks_per_token=round(
                    statistics.mean(stats.ticks_per_token for stats in all_stats), 3
                ),
                rank="full, o and down" if args.checkpoint is None else "its own",
                temperature=args.temperature,
                tokens_per_second={w: round(statistics.median(r), 1) for w, r in rates.items()},
                gain=round(statistics.median(gains), 3),
                share_of_predicted=round(statistics.median(shares), 3),
            )


def sampled(count: int, args, vocab: int) -> list[Request]:
    """At temperature 1 by default: greedy answers of such models repeat themselves."""
    return [
        dataclasses.replace(r, sampling=Sampling(temperature=args.temperature, seed=i))
        for i, r in enumerate(requests(count, args.prompt, args.new, vocab))
    ]


def on_text(todo: list[Request], tokenizer) -> list[Request]:
    """A trained model is at home in texts: passages of Python's manual, as long as the prompts."""
    manual = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = tokenizer(manual)["input_ids"]
    apart = len(tokens) // len(todo)
    passages = [tokens[i * apart :][: len(r.tokens)] for i, r in enumerate(todo)]
    return [dataclasses.replace(r, tokens=p) for r, p in zip(todo, passages, strict=True)]


def accepted(stats, model) -> int:
    return sum(n for loops, n in stats.exit_loops.items() if loops < model.cfg.num_loops)


def agreeing(args, num_loops: int, wanted: float):
    """A source folded so that this share of tokens is the same after loop 1 and after all.

    What loops 2, 3, … add is scaled through their o and down projections, by full-rank LoRA:
    the smaller the scale, the more often the loops agree. Bisected on measured agreement.
    """
    opened = open_source(args.model)
    full = {"o": "full", "down": "full"}
    made, cfg = tying.tie(opened.params, opened.cfg, TieConfig(num_loops, "average", "zero", full))
    made = jax.tree.map(jnp.asarray, made)
    model = CpuModel(cfg)
    settings = argparse.Namespace(**vars(args) | {"slots": 16})
    todo = sampled(16, args, cfg.vocab_size)  # they are among those that are measured

    def scaled(scale: float):
        params = jax.tree.map(lambda x: x, made)
        for room, name in (("attention", "o"), ("mlp", "down")):
            weight = made["block"][room][name]["w"]
            a, b = (jnp.zeros_like(made["block"][room][name][f"lora_{x}"]) for x in "ab")
            eye, delta = jnp.eye(weight.shape[2]), (scale - 1) * weight
            # [in, R] times [R, out] with R = out: the change itself, times one
            a, b = a.at[:, 1:].set(delta[:, None]), b.at[:, 1:].set(eye)
            params["block"][room][name] = {"w": weight, "lora_a": a, "lora_b": b}
        return model.prepare(params)

    engine = make(model, scaled(0.5), settings, measure=Static(1), lossless=True)
    low, high = 0.0, 1.0
    for _ in range(10):
        scale = (low + high) / 2
        engine.params = scaled(scale)
        _, stats = serve(engine, todo)
        share = accepted(stats, model) / max(stats.drafted, 1)
        if 0 <= share - wanted < 0.01:
            break
        low, high = (scale, high) if share > wanted else (low, scale)
    return model, engine.params


def main():
    options = parser(__doc__)
    options.add_argument("--checkpoint", help="of ours")
    options.add_argument("--temperature", type=float, default=1.0)
    options.add_argument("--loops", type=int, nargs="*", default=(2, 3), help="with --model")
    options.add_argument("--slot_counts", type=int, nargs="*", default=(1, 4, 16), help="in turn")
    lossless(options.parse_args())


if __name__ == "__main__":
    main()
