"""Gemma as a relaxed recursive transformer (paper arXiv 2410.20672v3, §3 and App. E).

    python -m recursive_jax.train --config=configs/gemma_rrt.py:paper --workdir=DIR \
        --config.data.train=TEXT --config.remat=full --config.accumulate=16

This is for 16 chips of TPU v5e (docs/pods.md, "Memory and communication").

Arguments, after a colon and separated by commas:
    paper        the paper's exact settings: 60B tokens of 2048, batch 1024, lr 2e-4
    gemma3_270m  Gemma 3 270M instead of Gemma 2B: a machine without accelerators can hold it
    gemma2_2b    Gemma 2 2B (26 layers)
    loops=N rank=N exits=C   loops, LoRA rank (a number, or full; 0: tied only), exit coefficient

What it reproduces (quoted from the paper, Table I.2; not measured here): Gemma 2B, 2 loops, 60B
tokens of SlimPajama with distillation, mean accuracy over seven tasks. Tied 54.9 · rank 64 55.8 ·
rank 256 57.0 · rank 512 58.4 · the source uptrained on the same tokens 58.6. Hardware there: 8 ×
H100. The paper distils from a teacher uptrained on 15B tokens; here the teacher is `source` itself.
The paper's teacher is made by training the source further and exporting it. It is then the source:

    python -m recursive_jax.train --config=gemma_rrt:paper,loops=1,rank=0 --workdir=TEACHER \
        --config.data.train=TEXT --config.objective.kd=0 --config.tokens=15_000_000_000
    python -m recursive_jax.export --checkpoint=TEACHER --out=TEACHER_HF --format=hf
    python -m recursive_jax.train --config=gemma_rrt:paper --workdir=DIR \
        --config.data.train=TEXT --config.source=TEACHER_HF

Measured here (docs/results.md): the conversions only, of Gemma 3 270M and of a directory in Gemma
2B's shapes, on two CPU cores.
"""

from configs import common

SOURCES = {
    "gemma_2b": "google/gemma-2b",
    "gemma2_2b": "google/gemma-2-2b",
    "gemma3_270m": "google/gemma-3-270m",
}


def get_config(arg=None):
    args = common.parse_arg(
        arg, paper=False, gemma3_270m=False, gemma2_2b=False, loops=2, rank=64, exits=0.0
    )
    c = common.get_config()
    name = next((n for n in ("gemma3_270m", "gemma2_2b") if args[n]), "gemma_2b")
    c.source = SOURCES[name]
    c.model.num_loops = args.loops
    c.model.lora_rank = args.rank
    c.objective.exit_coefficient = args.exits
    common.paper_training(c) if args.paper else common.small_training(c)
    return c
