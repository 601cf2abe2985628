"""How long lanes of SmolLM2 attend to their texts, by our kernel for a CPU and by XLA.

    python tests/benchmarks/attention.py

One query per lane over a `KVCache` of 2 loops x 15 layers, every layer's rows once, and nothing
else: `few_queries.attend` and `attention.attend_cached` in turn. Prints a JSON row of medians for
every number of lanes and rows.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models import few_queries, native
from recursive_jax.models.attention import attend_cached
from recursive_jax.models.kv_cache import KVCache

LOOPS, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 15, 9, 3, 64
ROUNDS, SECONDS = 15, 0.05


def timed(attend, lanes: int, rows: int):
    """A function that attends for about `SECONDS`, and gives microseconds of a layer."""
    blocks = -(-rows // KVCache.BLOCK)
    shape = (LOOPS, LAYERS, lanes, blocks, KV_HEADS)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    cache = KVCache(
        draw(*shape, HEAD_DIM, KVCache.BLOCK),
        draw(*shape, KVCache.BLOCK, HEAD_DIM),
    )
    slots = jnp.arange(lanes, dtype=jnp.int32)
    positions = jnp.full((lanes, 1), rows - 1, jnp.int32)

    @jax.jit
    def run(cache, q, count):
        def once(_, q):  # each layer feeds the next, so that none is left out or moved
            for layer in range(LAYERS):
                where = slots % LOOPS, jnp.int32(layer), slots
                how = positions, None, HEAD_DIM**-0.5, None
                q = q + attend(q, cache, where, *how)
            return q

        return jax.lax.fori_loop(0, count, once, q)

    q = draw(lanes, 1, HEADS, HEAD_DIM)
    count = 1

    def call():
        began = time.perf_counter()
        run(cache, q, np.int32(count)).block_until_ready()
        return (time.perf_counter() - began) / count / LAYERS * 1e6

    call()
    count = max(1, int(SECONDS / (call() * LAYERS / 1e6)))
    return call


def main():
    ways = {"few_queries.cc": few_queries.attend, "XLA": attend_cached}
    if not native.has("FewQueries"):  # it has said why
        del ways["few_queries.cc"]
    for lanes, rows in ((1, 64), (2, 64), (16, 64), (32, 64), (1, 1024), (16, 1024)):
        calls = {name: timed(attend, lanes, rows) for name, attend in ways.items()}
        times = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(call())
        medians = {name: round(statistics.median(t), 1) for name, t in times.items()}
        sizes = {"lanes": lanes, "rows": rows, "microseconds": medians}
        print(json.dumps({"result": "attention", **sizes, "jax": jax.__version__}), flush=True)


if __name__ == "__main__":
    main()
