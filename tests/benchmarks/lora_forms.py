"""What a LoRA of rank 512 costs a training step on a Gemma-2B-shaped layer, merged or per token.

    python tests/benchmarks/lora_forms.py [--batch=2] [--length=2048] [--rank=512] [--rounds=2]

Forward and backward of one layer (full rematerialisation) without LoRA, merged into the weights
once, and applied per token. Prints one JSON row: median seconds, and the share that each form adds
to the step without LoRA. The forms take turns. With R = rank and T tokens, merging should add about
R / T, the other form about R · (in + out) / (in · out), 28 % for these projections.
"""

import argparse
import json
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models import layers
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import init_params
from recursive_jax.weights import hf_config


def step(cfg, form, batch, length, dtype):
    """() -> seconds of forward and backward of the layer at loop 0."""
    model = Decoder(cfg, dtype=jnp.dtype(dtype), remat_policy="full")
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, length, cfg.embed_dim)), dtype)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))

    def loss(params, x):
        y = model.apply({"params": params}, x, jnp.int32(0), positions, method="run_loop")
        return (y.astype(jnp.float32) ** 2).mean()

    with mock.patch.object(layers, "lora_form", lambda *shape: form):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()

    def run():
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, x))
        return time.perf_counter() - began

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    plain = hf_config.preset("gemma_2b").replace(num_layers=1, vocab_size=64, num_loops=2)
    ranks = {name: min(args.rank, *shape) for name, shape in plain.projections.items()}
    relaxed = plain.replace(lora_ranks=ranks)
    runs = {
        "none": step(plain, "merged", args.batch, args.length, args.dtype),
        "merged": step(relaxed, "merged", args.batch, args.length, args.dtype),
        "per_token": step(relaxed, "per_token", args.batch, args.length, args.dtype),
    }
    seconds = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    median = {name: statistics.median(s) for name, s in seconds.items()}
    tokens, sides = args.batch * args.length, plain.projections["up"]
    print(
        json.dumps(
            {
                "benchmark": "lora_forms",
                **vars(args),
                "jax": jax.__version__,
                "seconds": {name: round(s, 2) for name, s in median.items()},
                "added": {
                    name: round(median[name] / median["none"] - 1, 3)
                    for name in ("merged", "per_token")
                },
                "chosen": layers.lora_form(0, tokens, *sides),
            }
        )
    )


if __name__ == "__main__":
    main()
