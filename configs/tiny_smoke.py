"""The whole of train in under a minute: convert, distil, evaluate, save. Used by the tests.

    python -m recursive_jax.train --config=configs/tiny_smoke.py --workdir=/tmp/smoke

Our embedded 12-layer Llama is folded to 2 loops × 6 layers with rank-4 LoRA and sees 30 steps of
512 tokens of docstrings. Hardware: 2 cores; time: 45 s beside another training run, where
the perplexity fell from 462 to 80 (the source's: 41). A smoke test, not a result.
"""

from configs import common


def get_config(arg=None):
    args = common.parse_arg(arg, steps=30)
    c = common.get_config()
    c.source = "tiny"
    c.model.num_loops = 2
    c.model.lora_rank = 4
    c.model.lora_init = "svd"  # needs no calibration
    c.data.train = "docstrings:1"
    c.data.context_length = 64
    c.data.batch_size = 8
    c.data.eval_tokens = 1000
    c.objective.exit_coefficient = 0.1
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 5
    c.remat = "none"
    c.tokens = args.steps * c.data.batch_size * c.data.context_length
    c.log_every = 1
    c.eval_every = 15
    c.checkpoint_every = 10
    return c
