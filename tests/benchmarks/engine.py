"""The depth-wise engine against its own bound and the sequence-wise baseline.

    python tests/benchmarks/engine.py PART --model=DIR

bound: engine / bound, and depth-wise / sequence-wise; arrivals: time to first token under Poisson
arrivals; memory: what executables and process need; lora: LoRA per tick, Gemma-2B-shaped layers;
growth: slots, context and loops. DIR is a Hugging Face directory (SmolLM2-135M in docs/results).

Every row of output is JSON for docs/results.jsonl; what is compared takes turns in one run, and
medians are compared. Speeds do not depend on which tokens come out, so answers have a fixed length
and exits are recorded ones.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import itertools
import json
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.analysis import simulation, timing
from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.exit_measures import Recorded
from recursive_jax.decoding.requests import Request
from recursive_jax.decoding.scheduler import Scheduler
from recursive_jax.decoding.session import Session
from recursive_jax.models.parameters import init_params
from recursive_jax.weights import hf_config, tying
from recursive_jax.weights.source import open_source
from recursive_jax.weights.tie_config import TieConfig


def recursive(model: str, num_loops: int, rank: int, depth: int | None = None):
    """(model, prepared params) of a source folded into `num_loops` loops; 1: the source itself.

    `depth`: its first layers only.
    """
    source = open_source(model)
    params, cfg = source.params, source.cfg
    if depth is not None:
        cfg, block = source.layers(range(depth))
        params = {**source.outer_params(), **block}
    if num_loops > 1:
        # a Gaussian LoRA: what it holds does not change the speed, and an SVD takes a minute
        lora = "zero" if rank else None
        params, cfg = tying.tie(params, cfg, TieConfig(num_loops, "average", lora, rank))
    else:
        params = source.load_params()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    model = CpuModel(cfg)
    return model, model.prepare(params, donate=True)


def requests(count: int, prompt: int, new: int, vocab: int, loops=None) -> list[Request]:
    """`loops`: recorded exits int [count, new]; None for full depth."""
    tokens = np.random.default_rng(1).integers(0, vocab, (count, prompt))

    def exits(i):
        return () if loops is None else tuple(int(n) for n in loops[i])

    return [Request(i, tokens[i].tolist(), new, recorded_loops=exits(i)) for i in range(count)]


def trace(count: int, new: int, shares: list[float]) -> np.ndarray:
    """Exits int [count, new] with these shares of tokens leaving after loop 1, 2, …"""
    rng = np.random.default_rng(2)
    total = count * new
    exits = np.repeat(np.arange(1, len(shares) + 1), np.round(np.array(shares) * total).astype(int))
    exits = np.resize(exits, total)
    rng.shuffle(exits)
    exits = exits.reshape(count, new)
    exits[:, 0] = len(shares)  # the last prompt token runs all loops
    return exits


EVERY = 7  # round trips of an engine before the next one's turn


def serve(engine: Engine, todo: list[Request]):
    """Answer all; (tokens/s, stats)."""
    ((rate, stats),) = serve_in_turn([engine], todo)
    return rate, stats


def serve_in_turn(
    engines: list[Engine], todo: list[Request], watches: Sequence[timing.Stopwatch] = ()
):
    """All answer all, (tokens/s, stats) of each by its own seconds.

    Whoever is behind goes on for a few round trips; before that `watches` time the parts of a tick:
    when the machine is busy for a while, it is for all of them alike. Parts are warm when they are
    timed, but an engine's first tick after other work is not, so its turn has more than one trip.
    """
    sessions, total = [Session(engine) for engine in engines], sum(r.max_new_tokens for r in todo)
    for session, request in itertools.product(sessions, todo):
        session.submit(request)
    seconds, tokens, mine = [0.0] * len(engines), [0] * len(engines), 0
    for trip in itertools.count():
        working = [i for i, session in enumerate(sessions) if not session.idle]
        if trip % EVERY == 0 or not working:
            for watch in watches:
                watch.run()
        if not working:
            break
        if trip % EVERY == 0 or mine not in working:
            mine = min(working, key=tokens.__getitem__)
        began = time.perf_counter()
        events, _ = sessions[mine].round()
        seconds[mine] += time.perf_counter() - began
        tokens[mine] += sum(len(e.tokens) for e in events)
    assert tokens == [total] * len(engines)
    return [(total / s, session.stats) for s, session in zip(seconds, sessions, strict=True)]


def make(
    model, params, args, loops=None, missing_kv="propagate", compile=True, **settings
) -> Engine:
    """`loops`: recorded exits; without them no token leaves early, unless `settings` say so."""
    if loops is not None:
        settings["measure"] = Recorded()
    if settings.get("lossless"):
        missing_kv = "complete"
    sizes = {"num_slots": args.slots, "context_length": args.context, "chunk_length": args.chunk}
    engine = Engine(model, params, EngineConfig(**sizes, missing_kv=missing_kv, **settings))
    if compile:
        engine.compile()
    return engine


@contextlib.contextmanager
def stopwatch(model, params, args, loops=None, sampling=timing.GREEDY, **options):
    """For the parts of a tick of an engine as `make` makes it, while such engines serve."""
    engine = make(model, params, args, loops, **options, compile=False)
    exits = None if loops is None else collections.Counter(loops.ravel().tolist())
    watch = timing.Stopwatch(engine, sampling, exits)
    try:
        yield watch
    finally:
        watch.close()


def bound(args):
    """Benchmarks 1 and 2: share of the bound, and depth-wise against sequence-wise."""
    for num_loops, name, shares in (
        (2, "full depth", None),
        (2, "80 % leave after loop 1", [0.8, 0.2]),
        (3, "3 loops, E[loops] 1.75", [0.5, 0.25, 0.25]),
    ):
        if num_loops not in args.loops:
            continue
        model, params = recursive(args.model, num_loops, args.rank)
        loops = None if shares is None else trace(args.requests, args.new, shares)
        todo = requests(args.requests, args.prompt, args.new, model.cfg.vocab_size, loops)
        options = {"depthwise": {}, "sequencewise": {"depthwise": False}}
        if loops is not None:
            options["complete"] = {"missing_kv": "complete"}
        ways = {way: make(model, params, args, loops, **how) for way, how in options.items()}
        # tokens of a batch start together, so each takes as long as the slowest of them
        waves = None if loops is None else loops.reshape(-1, args.slots, args.new).max(axis=1)
        mean = num_loops if loops is None else float(loops.mean())
        slowest = num_loops if loops is None else float(waves.mean())
        rates, bounds = {w: [] for w in ways}, {w: [] for w in ways}
        simulated, once = [], []
        for _ in range(args.rounds):
            with contextlib.ExitStack() as stack:
                watches = [
                    stack.enter_context(stopwatch(model, params, args, loops, **how))
                    for how in options.values()
                ]
                served = serve_in_turn([*ways.values()], todo, watches)
                times, *others = [watch.times() for watch in watches]
            for way, its, (tokens_per_second, _) in zip(
                ways, [times, *others], served, strict=True
            ):
                rates[way].append(tokens_per_second)
                loops_of_token = slowest if way == "sequencewise" else mean
                bounds[way].append(its.bound(args.slots, loops_of_token))
            simulated.append(simulate(args, num_loops, loops, times))
            # without exits all tokens end in one tick, and the head runs in that one only
            ticks = num_loops * times.tick + times.head_of(args.slots) + times.embed
            once.append(args.slots / ticks)
        rate = {w: statistics.median(r) for w, r in rates.items()}
        limit = {w: statistics.median(b) for w, b in bounds.items()}
        ratio = share(rates["depthwise"], rates["sequencewise"])
        predicted = share(bounds["depthwise"], bounds["sequencewise"])
        row(
            args,
            "engine bound",
            trace=name,
            num_loops=num_loops,
            mean_loops={"depthwise": mean, "sequencewise": slowest},
            tokens_per_second={w: round(r, 1) for w, r in rate.items()},
            bound={w: round(b, 1) for w, b in limit.items()},
            share_of_bound=share(rates["depthwise"], bounds["depthwise"]),
            **(
                {}
                if loops is not None
                else {"share_of_bound_with_one_head": share(rates["depthwise"], once)}
            ),
            depthwise_over_sequencewise=ratio,
            predicted=predicted,
            share_of_predicted=round(ratio / predicted, 3),
            simulated={
                n: round(statistics.median(s[n] for s in simulated), 1) for n in simulated[0]
            },
            times=times.to_json(),
            tick_of_batches=others[0].tick,
        )


def share(rates: list[float], limits: list[float]) -> float:
    return round(statistics.median(r / b for r, b in zip(rates, limits, strict=True)), 3)


def simulate(args, num_loops: int, loops, times) -> dict[str, float]:
    """Tokens/s of the same trace by the paper's simulation, and with all that it leaves out."""
    exits = np.full((args.requests, args.new), num_loops) if loops is None else loops
    recordings = [simulation.Recording(row.tolist(), args.prompt - 1) for row in exits]
    whole = simulation.TickTime(
        block=times.tick + times.fill,
        chunk=times.chunk,
        embed=lambda rows: times.embed * rows / args.slots,
        head=lambda rows: times.head_of(rows) if rows else 0.0,
    )
    out = {}
    for name, tick_time in (
        ("block_alone", simulation.TickTime(block=times.tick)),
        ("embedding_head_kv_and_prompts_too", whole),
    ):
        scheduler = Scheduler(args.slots, num_loops, args.chunk, can_exit=loops is not None)
        ticks = simulation.replay(scheduler, recordings, tick_time)
        out[name] = simulation.Totals.of(ticks, tick_time).throughput
    return out


def arrivals(args):
    """Requests come one by one, below what the sequence-wise engine can take."""
    model, params = recursive(args.model, 2, args.rank)
    loops = trace(args.requests, args.new, [0.8, 0.2])
    todo = requests(args.requests, args.prompt, args.new, model.cfg.vocab_size, loops)
    ways = {w: make(model, params, args, loops, depthwise=w == "depthwise") for w in WAYS}
    capacity = serve(ways["sequencewise"], todo)[0] / args.new  # requests per second
    gaps = np.random.default_rng(3).exponential(1 / (args.load * capacity), args.requests)
    due = np.cumsum(gaps) - gaps[0]
    waits = {w: [] for w in ways}
    for _ in range(args.rounds):
        for way, engine in ways.items():
            waits[way].append(first_token(engine, todo, due).mean())
    seconds = {w: statistics.median(x) for w, x in waits.items()}
    row(
        args,
        "engine arrivals",
        load=args.load,
        requests_per_second=round(args.load * capacity, 2),
        seconds_to_first_token={w: round(s, 3) for w, s in seconds.items()},
        ratio=round(seconds["depthwise"] / seconds["sequencewise"], 3),
    )


def first_token(engine: Engine, todo: list[Request], due: np.ndarray) -> np.ndarray:
    """Seconds from each request's arrival to its first token."""
    session, began, came = Session(engine), time.perf_counter(), 0
    first = np.full(len(todo), np.nan)
    while came < len(todo) or not session.idle:
        while came < len(todo) and due[came] <= time.perf_counter() - began:
            session.submit(todo[came])
            came += 1
        if session.idle:
            time.sleep(max(due[came] - (time.perf_counter() - began), 0))
            continue
        events, _ = session.round(max_ticks=2)  # so that arrivals do not wait for long
        for event in events:
            if np.isnan(first[event.index]):
                first[event.index] = time.perf_counter() - began - due[event.index]
    return first


def memory(args):
    """Benchmark 6: what is allocated beside the weights and the cache.

    `resident`: what the process has of its own after each stage, beyond interpreter and libraries;
    compiling leaves the compiler's own memory behind.
    """
    before = resident()
    for num_loops in (2, 3):
        stages = {}
        model, params = recursive(args.model, num_loops, args.rank)
        loops = trace(args.requests, args.new, [1 / num_loops] * num_loops)
        todo = requests(args.requests, args.prompt, args.new, model.cfg.vocab_size, loops)
        stages["weights"] = resident() - before
        engine = make(model, params, args, loops)
        stages["compiled"] = resident() - before
        serve(engine, todo)
        stages["served"] = resident() - before
        weights = sum(x.nbytes for x in jax.tree.leaves(params))
        temporaries = {n: m.temp_size_in_bytes for n, m in engine.memory().items()}
        most = max(temporaries.values())
        row(
            args,
            "engine memory",
            num_loops=num_loops,
            mib={
                "weights": weights >> 20,
                "cache": engine.cache_bytes >> 20,
                "temporaries": {n: round(t / 2**20, 1) for n, t in temporaries.items()},
                "resident": {stage: size >> 20 for stage, size in stages.items()},
            },
            over=round(most / (weights + engine.cache_bytes), 4),
        )
        del engine, model, params
        jax.clear_caches()
        gc.collect()


def resident() -> int:
    """Bytes of this process's own, without mapped files and what the allocator keeps."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10


def lora(args):
    """Benchmark 5: what the LoRAs of mixed loops add to a tick."""
    cfg = hf_config.preset("gemma_2b").replace(num_layers=2, num_loops=2, vocab_size=1024)
    ticks: dict[int, list[float]] = {}
    engines = {}
    for rank in (0, 64, 512):
        ranks = {n: min(rank, *shape) for n, shape in cfg.projections.items()} if rank else {}
        relaxed = cfg.replace(lora_ranks=ranks)
        params = jax.jit(init_params, static_argnums=0)(relaxed, jax.random.key(0))
        model = CpuModel(relaxed)
        params = model.prepare(params, donate=True)
        engines[rank] = make(model, params, args, loops=(), compile=False)
        ticks[rank] = []
    for _ in range(args.rounds):
        for rank, engine in engines.items():
            ticks[rank].append(timing.measure(engine, {2: 1}).tick)  # as many lanes at both loops
    seconds = {rank: statistics.median(t) for rank, t in ticks.items()}
    row(
        args,
        "engine lora",
        tick_ms={str(r): round(1e3 * s, 2) for r, s in seconds.items()},
        added={str(r): round(seconds[r] / seconds[0] - 1, 3) for r in (64, 512)},
    )


def growth(args):
    """A tick and the head alone as slots, context and loops grow; one at a time.

    The source's first 24 layers: 2, 3 and 4 divide them.
    """
    base = {"slots": args.slots, "context": args.context, "num_loops": 2}
    wanted = [("slots", base | {"slots": n}) for n in (1, 2, 4, 8, 16, 32, 64)]
    wanted += [("context", base | {"context": n}) for n in (128, 512, 1024, 2048, 4096)]
    wanted += [("num_loops", base | {"num_loops": n}) for n in (2, 3, 4)]
    models = {n: recursive(args.model, n, args.rank, depth=24) for n in (2, 3, 4)}
    for grown, sizes in wanted:
        model, params = models[sizes["num_loops"]]
        args.slots, args.context = sizes["slots"], sizes["context"]
        times = timing.measure(make(model, params, args, compile=False))
        depth = sizes["num_loops"]
        row(
            args,
            "engine growth",
            grown=grown,
            num_loops=depth,
            layers=24,
            tick_ms=round(1e3 * times.tick, 2),
            head_ms=round(1e3 * times.head_of(sizes["slots"]), 2),
            full_depth_bound=round(times.bound(sizes["slots"], depth), 1),
        )


def row(args, result: str, **facts) -> None:
    setting = {n: getattr(args, n) for n in ("slots", "requests", "prompt", "new", "context")}
    facts = {"result": result, "rank": args.rank, **setting, "jax": jax.__version__} | facts
    print(json.dumps(facts), flush=True)


WAYS = ("depthwise", "sequencewise")
PARTS = {
    "bound": bound,
    "arrivals": arrivals,
    "memory": memory,
    "lora": lora,
    "growth": growth,
}


def parser(description: str) -> argparse.ArgumentParser:
    """Sizes that all benchmarks of the engine share."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--model", help="Hugging Face directory")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def main():
    options = parser(__doc__)
    options.add_argument("part", choices=PARTS)
    options.add_argument("--loops", type=int, nargs="*", default=(2, 3), help="bound: only these")
    options.add_argument("--load", type=float, default=0.7, help="arrivals: share of the capacity")
    args = options.parse_args()
    if args.part == "memory":  # what is compiled is not to be kept
        return memory(args)
    with tempfile.TemporaryDirectory() as directory:  # the parts are compiled once, not every round
        jax.config.update("jax_compilation_cache_dir", directory)
        PARTS[args.part](args)


if __name__ == "__main__":
    main()
