"""Pretrains our own small Llama (12 layers, 2.9M parameters), the embedded default.

    python -m recursive_jax.train --config=configs/tiny_pretrain.py --workdir=runs/tiny \
        --config.data.train=TEXT_DIRECTORY,docstrings

Without TEXT_DIRECTORY it trains on the docstrings of the installed packages alone.

Hardware: two CPU cores make 3,000 to 4,000 tokens a second, so the default 21M take about 1:45
hours. Expect a loss of 3.2 on novels and docstrings (perplexity 46 on a held-out novel).
Argument: tokens=N.
"""

from configs import common

TOKENS_PER_STEP = 16 * 256


def get_config(arg=None):
    args = common.parse_arg(arg, tokens=21_000_000)
    c = common.get_config()
    c.scratch = dict(
        family="llama",
        vocab_size=4096,
        embed_dim=128,
        mlp_dim=384,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        num_layers=12,
        max_length=512,
        norm_eps=1e-5,
        tied_head=True,
    )
    c.tokenizer = "tiny"
    c.objective.kd = 0.0
    c.data.context_length = 256
    c.data.batch_size = 16
    c.optimizer.learning_rate = 3e-3
    c.optimizer.final_fraction = 0.02
    c.optimizer.b2 = 0.98
    c.tokens = args.tokens
    c.log_every = 20
    c.eval_every = 500
    c.checkpoint_every = 100
    return c
