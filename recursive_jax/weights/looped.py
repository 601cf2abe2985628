"""The stored-once layout that other engines run: a Llama block, and how often it runs.

SGLang, llama.cpp and mlx-lm have the architecture `nanbeige`. It runs a Llama-shaped block
`num_loops` times, with a key/value slot for each loop and layer. The final norm must be left out
between the loops (`skip_loop_final_norm`). Nothing may differ from loop to loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import leaves

MODEL_TYPE = "nanbeige"
ARCHITECTURE = "NanbeigeForCausalLM"
_LLAMA = dict(
    norm="rms", norm_offset=0.0, post_norms=False, qk_norm=False, parallel_residual=False,
    activation="silu", gated_mlp=True, qkv_bias=False, o_bias=False, mlp_bias=False,
    rotary_fraction=1.0, query_scale=None, attn_softcap=None, final_softcap=None, embed_scale=1.0,
)  # fmt: skip


def block(cfg: DecoderConfig, scalings: Sequence[str] = ("none", "linear")) -> DecoderConfig:
    """The vanilla Llama config of the tensors that are stored: the block, once.

    Args:
      cfg: of a looped model.
      scalings: of the rotary embedding, which the engines of a format have.

    Raises:
      ValueError: the layout cannot express the model; the message says why, and what to do.
    """
    reason = _why_not(cfg, scalings)
    if reason is not None:
        raise ValueError(
            f"layout=looped cannot express this model: {reason}. Use layout=unrolled, or convert a "
            "Llama-shaped source again with lora_rank=0, norms=tied and sharing=cycle"
        )
    return cfg.replace(family="llama", num_loops=1, norms="tied", windows=(), rope_of_depth=())


def _why_not(cfg: DecoderConfig, scalings: Sequence[str]) -> str | None:
    """The reason why the layout cannot express a model, in words; None if it can."""
    if cfg.prefix_length:
        return f"it has prefixes (prefix_length={cfg.prefix_length})"
    if cfg.lora_ranks:
        ranks = " ".join(f"{name} {rank}" for name, rank in cfg.lora_ranks)
        return f"its LoRAs differ from loop to loop (ranks: {ranks})"
    if cfg.sharing != "cycle":
        return f"its layers run in the order sharing={cfg.sharing!r}, not loop after loop"
    own = [leaf.path for leaf in leaves(cfg).values() if "loop" in leaf.axes]
    if own:
        return f"{own[0]} and {len(own) - 1} other vectors differ from loop to loop"
    odd = [
        f"{name}={getattr(cfg, name)!r}" for name in _LLAMA if getattr(cfg, name) != _LLAMA[name]
    ]
    if odd:
        return f"its layers are not those of a Llama ({', '.join(odd)})"
    if any(0 < window < cfg.max_length for window in cfg.windows):
        return "its attention has a sliding window"
    if len(cfg.ropes_in_use()) > 1 or cfg.ropes_in_use()[0].scaling not in scalings:
        return "its rotary embedding is scaled in a way that the engines do not have"
    return None
