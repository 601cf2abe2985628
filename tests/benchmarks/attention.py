"""How long lanes of SmolLM2 keep a row and attend to their texts: our kernel for a CPU, and XLA.

    python tests/benchmarks/attention.py

One new row and one query per lane of a `KVCache` of 2 loops x 15 layers, every layer's rows once,
and nothing else: `cpu_cache.attend`; `Cache.write` and `attention.attend_cached`; in turn. Prints
a JSON row of medians for every number of lanes and rows.
"""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.cpu import build
from recursive_jax.cpu.cache import CpuCache
from recursive_jax.models.interface import Rows
from recursive_jax.models.kv_cache import KVCache

LOOPS, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 15, 9, 3, 64
ROUNDS, SECONDS = 15, 0.05


def timed(cache_class, lanes: int, rows: int):
    """A function that attends for about `SECONDS`, and gives microseconds of a layer."""
    blocks = -(-rows // KVCache.BLOCK)
    shape = (LOOPS, LAYERS, lanes, blocks, KV_HEADS)
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    cache = cache_class(
        draw(*shape, HEAD_DIM, KVCache.BLOCK),
        draw(*shape, KVCache.BLOCK, HEAD_DIM),
    )
    slots = jnp.arange(lanes, dtype=jnp.int32)
    positions = jnp.full(lanes, rows - 1, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache, q, count):
        # Each layer feeds the next, so that none is left out or moved, and new rows come from the
        # query, as in a model: were they there before, XLA would write early, into copies.
        def once(_, carry):
            q, cache = carry
            for layer in range(LAYERS):
                places = Rows(slots % LOOPS, positions, slots)
                k, v = q[:, :KV_HEADS], q[:, -KV_HEADS:]
                scale = HEAD_DIM**-0.5
                y, cache = cache.attend(q, k, v, places, jnp.int32(layer), None, scale, None)
                q = 0.5 * (q + y)
            return q, cache

        return jax.lax.fori_loop(0, count, once, (q, cache))

    q, box = draw(lanes, HEADS, HEAD_DIM), [cache]
    count = 1

    def call():
        began = time.perf_counter()
        out, kept = run(box.pop(), q, np.int32(count))
        box.append(kept)
        out.block_until_ready()
        return (time.perf_counter() - began) / count / LAYERS * 1e6

    call()
    count = max(1, int(SECONDS / (call() * LAYERS / 1e6)))
    return call


def main():
    ways = {"decode_attention.cc": CpuCache, "XLA": KVCache}
    if not build.has("DecodeAttention"):  # it has said why
        del ways["decode_attention.cc"]
    for lanes, rows in ((1, 64), (2, 64), (16, 64), (32, 64), (1, 1024), (16, 1024)):
        calls = {name: timed(cache_class, lanes, rows) for name, cache_class in ways.items()}
        times = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(call())
        medians = {name: round(statistics.median(t), 1) for name, t in times.items()}
        sizes = {"lanes": lanes, "rows": rows, "microseconds": medians}
        print(json.dumps({"result": "attention", **sizes, "jax": jax.__version__}), flush=True)


if __name__ == "__main__":
    main()
