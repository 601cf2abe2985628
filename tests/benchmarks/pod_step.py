"""The training step of `gemma_rrt:paper` compiled for TPU pods that are not here: a JSON row each.

    python tests/benchmarks/pod_step.py v5e:4x4 --rows=64 --accumulate=1 [--gather=layer]

Gemma 2B's sizes, 2 loops and LoRA rank 64 as the config has them, with the teacher. Needs the
extra [tpu], no TPU, and two to ten minutes a row. The row has the compiler's memory, the bytes that
a chip receives in a step by kind of collective and place, and a bound of the MFU by arithmetic:
operations at the peak, and what cannot overlap with them.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from configs.gemma_rrt import get_config  # noqa: E402
from recursive_jax import device_memory, sharding  # noqa: E402
from recursive_jax.analysis.collectives import collectives, wire_bytes  # noqa: E402
from recursive_jax.models.batch_attention import choose  # noqa: E402
from recursive_jax.models.config import DecoderConfig  # noqa: E402
from recursive_jax.models.decoder import Decoder  # noqa: E402
from recursive_jax.models.flops import training_flops  # noqa: E402
from recursive_jax.trainer import Trainer  # noqa: E402
from recursive_jax.training.chips import peak_flops  # noqa: E402
from recursive_jax.training.config import TrainConfig  # noqa: E402
from recursive_jax.training.optimizer import make_optimizer  # noqa: E402
from recursive_jax.training.setup import TrainSetup  # noqa: E402

# Bytes/s of HBM, and of all links of a chip into it, by the beginning of a topology's name.
# cloud.google.com/tpu/docs, pages v5e, v5p and v6e.
BANDWIDTH = {"v5e": (819e9, 180e9), "v5p": (2765e9, 540e9), "v6e": (1640e9, 360e9)}


def setup_of(options, settings: TrainConfig, mesh) -> TrainSetup:
    source = DecoderConfig(
        "gemma", options.vocabulary, 2048, 16_384, num_heads=8, num_kv_heads=1, head_dim=256,
        num_layers=options.layers, embed_scale=2048**0.5, activation="gelu_tanh", norm_offset=1.0,
    )  # fmt: skip
    rank = options.rank
    student = source.replace(
        num_layers=options.layers // options.loops, num_loops=options.loops, norms="tied",
        lora_ranks={n: min(rank, *s) for n, s in source.projections.items()} if rank else {},
    )  # fmt: skip
    device = mesh.devices.flat[0]
    attention = options.attention or choose(
        source, device, jnp.bfloat16, options.length, mesh.shape["tensor"]
    )[0]  # fmt: skip
    student, teacher = (
        Decoder(cfg, jnp.bfloat16, options.remat, sharding.data_shards(mesh), attention=attention)
        for cfg in (student, source)
    )
    tx = make_optimizer(settings.optimizer, settings.num_steps)
    return TrainSetup(
        student, tx, settings.objective, teacher, None, options.accumulate,
        least_chunk=options.chunk,
    )  # fmt: skip


def bound(setup, plan, options, mesh, found) -> dict[str, float]:
    """Seconds of a step and its MFU, by arithmetic: at best 100 % of the peak.

    Operations count at the peak, with the recomputed forward pass. Collectives overlap with the
    products beside them if they are rings of permutes in a loop; all others overlap with nothing.
    XLA's attention moves its scores through the HBM.
    """
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    hbm, links = BANDWIDTH[options.topology.split(":")[0]]
    cfg, teacher = setup.model.cfg, setup.teacher.cfg
    tokens = options.rows * options.length / mesh.size
    model = tokens * training_flops(cfg, options.length, teacher=teacher)
    again = 1 / 4 if options.remat == "full" else 0  # of forward and backward of the block
    block = tokens * (
        training_flops(cfg, options.length) - 6 * cfg.embed_dim * cfg.vocab_size
    )  # fmt: skip
    compute = (model + 4 / 3 * again * block) / peak
    rings = [c for c in found if c.trips and c.kind == "collective-permute"]
    inside = wire_bytes(rings) / links
    outside = wire_bytes(found) / links - inside
    scores = 0.0
    if setup.model.attention == "xla":  # measured: 1.45 KB per token, head and 1,024 tokens
        depth = cfg.depth + teacher.depth / 4
        scores = 2.96e9 / 2048**2 * options.length * tokens * depth / hbm
    optimizer = 7 * (plan.sizes["params"]) / hbm  # params, moments and gradient, read and written
    seconds = compute + outside + max(0.0, inside - compute) + scores + optimizer
    return {
        "compute_s": round(compute, 4),
        "wire_outside_s": round(outside, 4),
        "wire_inside_s": round(inside, 4),
        "scores_s": round(scores, 4),
        "optimizer_s": round(optimizer, 4),
        "mfu_bound": round(model / peak / seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topology")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--gather", default="auto")
    parser.add_argument("--attention", default="")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--layers", type=int, default=18, help="of the source")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--data", type=int, default=-1)
    parser.add_argument("--fsdp", type=int, default=0)
    parser.add_argument("--text", help="a file for the compiled program")
    options = parser.parse_args()
    settings = TrainConfig.from_mapping(get_config("paper"))
    devices = topologies.get_topology_desc(options.topology, platform="tpu").devices
    mesh = sharding.make_mesh(options.data, options.fsdp, devices=devices)
    setup = setup_of(options, settings, mesh)
    plan = device_memory.plan(setup, mesh, options.rows, options.length, options.gather)
    setup = plan.setup
    began = time.perf_counter()
    compiled = Trainer(setup, mesh).lower(options.rows, options.length).compile()
    row = {k: v for k, v in vars(options).items() if k != "text"}
    row |= {"mesh": dict(mesh.shape), "attention": setup.model.attention, "plan": plan.words}
    row["chunk"] = setup.least_chunk
    row["compile_s"] = round(time.perf_counter() - began)
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    row["gb"] = {name: round(size / 1e9, 2) for name, size in sizes.items()}
    row["gb_total"] = round(sum(sizes.values()) / 1e9, 2)
    row["gb_predicted"] = round(sum(plan.sizes.values()) / 1e9, 2)
    row["gb_predicted_by_kind"] = {k: round(v / 1e9, 2) for k, v in plan.sizes.items()}
    text = compiled.as_text()
    if options.text:
        with open(options.text, "w") as file:
            file.write(text)
    found = collectives(text, mesh.size)
    row["wire_gb"] = round(wire_bytes(found) / 1e9, 2)
    row["wire_gb_per_row"] = round(row["wire_gb"] / (options.rows / mesh.size), 2)
    by_kind: dict[str, list[float]] = {}
    for c in found:
        place = "teacher" if "teacher" in c.label else "student"
        key = f"{c.kind} of the {place}, {'in loops' if c.trips else 'outside'}"
        count, size = by_kind.get(key, (0, 0.0))
        by_kind[key] = [count + c.arrays * c.times, size + c.wire_bytes * c.times / 1e9]
    row["collectives"] = {k: [n, round(gb, 2)] for k, (n, gb) in sorted(by_kind.items())}
    row["weights_in_loops"] = sorted(  # of the student: none, or reductions by micro-batch
        {f"{c.kind} {list(c.trips)}" for c in found
         if c.trips and c.whole >= 1 << 20 and "teacher" not in c.label}
    )  # fmt: skip
    row["kernels"] = text.count('custom_call_target="tpu_custom_call"')
    print(json.dumps(row | bound(setup, plan, options, mesh, found)))


if __name__ == "__main__":
    main()
