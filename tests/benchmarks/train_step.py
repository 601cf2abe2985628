"""Training step against transformers on torch: same shape, weights, batch, threads, in one run.

    python tests/benchmarks/train_step.py [--dtype=float32] [--rounds=5] [--account]

Vanilla SmolLM2-135M shape, random weights, AdamW without clipping on both sides. Prints one JSON
row: medians of tokens per second, and the ratio of the medians. The two sides take turns, so a
machine whose speed drifts slows both. --account adds where our step's time goes, by kind of
operation: seconds by the profiler, whose sum is more than the step's as operations overlap.
"""

import argparse
import collections
import json
import pathlib
import platform
import re
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import init_params
from recursive_jax.training.data import Batch
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig, make_optimizer
from recursive_jax.training.setup import TrainSetup
from recursive_jax.weights import checkpoint, hf_config


def ours(cfg, params, tokens, dtype, remat, unroll):
    """() -> seconds of one step."""
    length = tokens.shape[1] - 1
    shape = (tokens.shape[0], length)
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.ones(shape, np.float32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        segment_ids=np.ones(shape, np.int32),
    )
    tx = make_optimizer(OptimizerConfig(clip_norm=0.0), 1000)
    model = Decoder(cfg, dtype=jnp.dtype(dtype), remat_policy=remat, unroll_layers=unroll)
    setup = TrainSetup(model, tx, Objective(kd=0.0))
    step = jax.jit(setup.step, donate_argnums=0)
    state = setup.init(jax.tree.map(jnp.asarray, params))
    step = step.lower(state, batch, None).compile()

    def run():
        nonlocal state
        began = time.perf_counter()
        state, metrics = step(state, batch, None)
        run.loss = float(metrics["loss"])
        jax.block_until_ready(state)
        return time.perf_counter() - began

    run.hlo = step.as_text()
    return run


def account(run):
    """Seconds of one step by kind of operation."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        trace = next(pathlib.Path(directory).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    seconds = collections.Counter()
    for line in (line for plane in planes for line in plane.lines if "python" not in line.name):
        for event in line.events:
            seconds[event.name] += event.duration_ns / 1e9
    kinds = collections.Counter()
    for name, spent in seconds.items():
        found = re.search(rf'%?{re.escape(name)} = .*?op_name="([^"]*)"', run.hlo)
        if found:  # else it is no operation of the step
            kinds[_kind(name, found[1])] += spent
    return {kind: round(spent, 3) for kind, spent in kinds.most_common()}


def _kind(name, where):
    product = name.startswith(("ynn", "dot"))
    if "head_and_loss" in where:
        return "head: products" if product else "head and loss: the rest"
    if "optimizer" in where:
        return "optimizer"
    if "attend" in where:
        return "attention between its projections"
    if product:
        return "layers: products"
    if "broadcast" in name:
        return "zero-filling what the scan keeps"
    if "slice" in name:
        return "copies into and out of the scan"
    return "norms, rope, activations, residuals"


def theirs(cfg, params, tokens, dtype):
    """The same for transformers + torch, from the same weights through a directory."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM

    from recursive_jax.weights import hf

    with tempfile.TemporaryDirectory() as directory:
        hf.save_params(params, cfg, f"{directory}/model", dtype=np.float32)
        model = AutoModelForCausalLM.from_pretrained(
            f"{directory}/model", dtype=getattr(torch, dtype)
        )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    ids = torch.from_numpy(tokens.astype(np.int64))

    def run():
        began = time.perf_counter()
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.loss = float(loss.detach())
        return time.perf_counter() - began

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--unroll", type=int, default=1)
    parser.add_argument("--account", action="store_true", help="where the time goes")
    args = parser.parse_args()
    cfg = hf_config.preset("smollm2_135m")
    params = checkpoint.as_numpy(jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (args.batch, args.length + 1))
    tokens = tokens.astype(np.int32)
    runs = {
        "ours": ours(cfg, params, tokens, args.dtype, args.remat, args.unroll),
        "torch": theirs(cfg, params, tokens, args.dtype),
    }
    first = {name: run() and run.loss for name, run in runs.items()}  # compiles
    assert abs(first["ours"] - first["torch"]) < 0.05, f"not the same model: {first}"
    seconds = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    rate = {name: args.batch * args.length / statistics.median(s) for name, s in seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "train_step",
                **vars(args),
                "jax": jax.__version__,
                "machine": f"{platform.machine()}, {jax.default_backend()}",
                "first_loss": first,
                "tokens_per_second": {k: round(v, 1) for k, v in rate.items()},
                "ratio": round(rate["ours"] / rate["torch"], 3),
                **({"seconds_by_operation": account(runs["ours"])} if args.account else {}),
            }
        )
    )


if __name__ == "__main__":
    main()
