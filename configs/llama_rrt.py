"""Llama, TinyLlama, SmolLM, Mistral or Qwen as a relaxed recursive transformer.

    python -m recursive_jax.train --config=configs/llama_rrt.py --workdir=DIR \
        --config.source=MODEL --config.data.train=TEXT

Arguments, after a colon and separated by commas:
    paper        the paper's exact settings for TinyLlama 1.1B: 60B tokens of 2048, batch 1024
    loops=N rank=N exits=C   loops, LoRA rank (a number, or full; 0: tied only), exit coefficient

What it reproduces (quoted from the paper, Table I.2; not measured here): TinyLlama, 2 loops, 60B
tokens of SlimPajama with distillation, mean accuracy over seven tasks. Tied 44.3 · rank 64 45.1 ·
rank 512 45.9 · the source checkpoint (105B tokens) 43.3. Hardware there: 8 × H100.
Without `paper` it is sized for one small machine. Measured with SmolLM2-135M as the source and
novels as text, on one CPU core (docs/results.md): a held-out perplexity of 49 (source), 102
(converted, calibrated on 32,768 tokens of novels) and 69 after 100k tokens; from the paper's start
229 after 200k tokens.
"""

from configs import common


def get_config(arg=None):
    args = common.parse_arg(arg, paper=False, loops=2, rank=64, exits=0.0)
    c = common.get_config()
    c.source = "TinyLlama/TinyLlama-1.1B-step-50K-105b"
    c.model.num_loops = args.loops
    c.model.lora_rank = args.rank
    c.objective.exit_coefficient = args.exits
    common.paper_training(c) if args.paper else common.small_training(c)
    return c
