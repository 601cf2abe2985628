"""How fast this machine multiplies few rows by the weights of SmolLM2, one form beside the other.

    python tests/benchmarks/products.py

All products of a tick and nothing else: by the kernel, by XLA (weight on the left,
rows of zeros up to 4 or a multiple of 8), the same without such rows, the weight on the right, and
torch's `linear` where it is installed. They take turns in random order, since one's threads may
linger in the time of the next; prints a JSON row of medians.
"""

import json
import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.cpu import build
from recursive_jax.cpu.matmul import skinny_matmul, weights_first

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # [out, in]: qkv, o, gate and up, down
LAYERS, ROUNDS = 30, 25


def through(product, layers, x):
    """Each product feeds the next, so that none is left out or moved."""
    for qkv, o, gate_up, down in layers:
        x = product(product(x, qkv)[:, :576], o)
        x = product(product(x, gate_up)[:, :1536], down)
    return x


def forms(weights):
    on_device = jax.tree.map(jnp.asarray, weights)
    ways = {
        "skinny_matmul.cc": skinny_matmul,
        "weight on the left": weights_first,
        "as many rows as there are": lambda x, w: jax.lax.optimization_barrier(w @ x.T).T,
        "weight on the right": lambda x, w: x @ w.T,
    }
    if not build.has("SkinnyMatmul"):  # it has said why
        del ways["skinny_matmul.cc"]
    for name, product in ways.items():
        run = jax.jit(lambda layers, x, product=product: through(product, layers, x))
        yield name, lambda x, run=run: run(on_device, x).block_until_ready()
    try:
        import torch
    except ImportError:
        return
    theirs = [[torch.from_numpy(w) for w in layer] for layer in weights]

    def linear(x, w):
        return torch.nn.functional.linear(x, w).contiguous()

    def run_torch(x):
        with torch.inference_mode():
            through(linear, theirs, torch.from_numpy(x))

    yield "torch", run_torch


def main():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weights = [[draw(*s) * s[1] ** -0.5 for s in SHAPES] for _ in range(LAYERS)]
    ways = dict(forms(weights))
    for rows in (1, 2, 4, 6, 8, 12, 16, 28, 32):
        x, times = draw(rows, 576), {name: [] for name in ways}
        for _ in range(ROUNDS + 1):  # the first compiles
            for name, run in random.sample(list(ways.items()), len(ways)):
                began = time.perf_counter()
                run(x)
                times[name].append(time.perf_counter() - began)
        ms = {name: round(1e3 * statistics.median(t[1:]), 1) for name, t in times.items()}
        print(json.dumps({"result": "products", "rows": rows, "ms": ms, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
