"""Pythia as a relaxed recursive transformer (paper arXiv 2410.20672v3, §3 and App. E).

    python -m recursive_jax.train --config=configs/pythia_rrt.py:paper --workdir=DIR \
        --config.data.train=TEXT

Arguments, after a colon and separated by commas:
    paper        the paper's exact settings for Pythia 1B: 60B tokens of 2048, batch 1024
    loops=N rank=N exits=C   loops, LoRA rank (a number, or full; 0: tied only), exit coefficient

What it reproduces (quoted from the paper, Table I.2; not measured here): Pythia 1B, 2 loops, 60B
tokens of SlimPajama with distillation, mean accuracy over seven tasks. Tied 45.2 · rank 64 46.2 ·
rank 512 47.0 · the source uptrained on the same tokens 48.6. Hardware there: 8 × H100. Nothing of
it was measured here, where no Pythia weights are at hand.
Pythia's LayerNorm biases and linear biases cannot be represented by LoRA, so they are kept per
loop (`model.norms=per_loop`); the paper ties them.
"""

from configs import common


def get_config(arg=None):
    args = common.parse_arg(arg, paper=False, loops=2, rank=64, exits=0.0)
    c = common.get_config()
    c.source = "EleutherAI/pythia-1b"
    c.model.num_loops = args.loops
    c.model.lora_rank = args.rank
    c.objective.exit_coefficient = args.exits
    common.paper_training(c) if args.paper else common.small_training(c)
    return c
