"""The whole method in a few minutes on a laptop: our own small Llama, folded in two.

    bash launch/quickstart.sh
    python -m recursive_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Source: recursive_jax/assets/tiny (12 layers) -> 2 loops × 6 layers with LoRAs of rank 16, fitted
together, then uptrained with distillation on the docstrings of the installed packages.

Hardware: any laptop; on two CPU cores the training took 4:16 minutes. Expect a perplexity on
held-out docstrings of about 14.1 (source), 17 (converted) and 15 (uptrained).
Arguments, after a colon and separated by commas: loops=N rank=N tokens=N, and `paper`: start and
loss of the paper (average + SVD, cross-entropy beside the distillation), at their best rate.
"""

from configs import common


def get_config(arg=None):
    args = common.parse_arg(arg, loops=2, rank=16, tokens=450_000, paper=False)
    c = common.get_config()
    c.source = "tiny"
    c.model.num_loops = args.loops
    c.model.lora_rank = args.rank
    c.data.train = c.model.calibrate = "docstrings:6"
    c.data.context_length = 256
    c.data.batch_size = 8
    c.data.eval_tokens = 10_000
    if args.paper:
        c.model.lora_init = "svd"
    c.optimizer.learning_rate = 1e-3  # the joint start is near: `c.near` halves it
    c.optimizer.warmup_steps = 20
    c.optimizer.final_fraction = 0.05
    c.tokens = args.tokens
    c.remat = "dots"
    c.eval_every = 50
    c.checkpoint_every = 50
    return c
