"""Tiny models carrying the oddities of the real ones, and the rule that makes their weights.

Shared by the frozen goldens (`generate.py`, `test_hf.py`) and the live comparison with transformers
(`test_hf_consistency.py`). Windows are shorter than the text, query scales differ from head_dim,
softcaps are low enough to bite, vocabularies are odd, and norms are not near their neutral value.
"""

import zlib

import numpy as np

LENGTH = 24  # tokens; longer than every window below
_TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, max_position_embeddings=64)
_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

# name -> (model_type, settings of its transformers config)
CASES = {
    "gemma_mqa": (
        "gemma",
        _TINY
        | dict(vocab_size=67, num_attention_heads=4, num_key_value_heads=1, head_dim=16)
        | dict(attention_bias=True),
    ),
    "gemma2_softcap_local": (
        "gemma2",
        _TINY
        | dict(vocab_size=71, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        | dict(query_pre_attn_scalar=10, sliding_window=5)
        | dict(attn_logit_softcapping=2.0, final_logit_softcapping=20.0),
    ),
    "gemma3_local_global": (
        "gemma3_text",
        _TINY
        | dict(vocab_size=73, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        | dict(query_pre_attn_scalar=24, sliding_window=4)
        | dict(
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=10000.0),
                "sliding_attention": dict(rope_type="default", rope_theta=100.0),
            },
        ),
    ),
    "llama_gqa_llama3_rope": (
        "llama",
        _TINY
        | dict(vocab_size=61, num_attention_heads=4, num_key_value_heads=2)
        | dict(rope_parameters=_LLAMA3, tie_word_embeddings=False),
    ),
    "llama_mqa_tied_biases": (
        "llama",
        _TINY
        | dict(vocab_size=59, num_attention_heads=3, num_key_value_heads=1, head_dim=12)
        | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-2)
        | dict(
            hidden_size=36, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)
        ),
    ),
    "mistral_window": (
        "mistral",
        _TINY
        | dict(vocab_size=53, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        | dict(sliding_window=5, tie_word_embeddings=False),
    ),
    "qwen2_last_layers_local": (
        "qwen2",
        _TINY
        | dict(vocab_size=47, num_attention_heads=4, num_key_value_heads=2)
        | dict(use_sliding_window=True, sliding_window=6, max_window_layers=2)
        | dict(tie_word_embeddings=True),
    ),
    "qwen3_qk_norm": (
        "qwen3",
        _TINY
        | dict(vocab_size=43, num_attention_heads=4, num_key_value_heads=2, head_dim=24)
        | dict(attention_bias=True, tie_word_embeddings=False),
    ),
    "gpt_neox_parallel": (
        "gpt_neox",
        _TINY
        | dict(vocab_size=41, num_attention_heads=2)
        | dict(
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25
            )
        ),
    ),
    "gpt_neox_sequential": (
        "gpt_neox",
        _TINY
        | dict(vocab_size=37, num_attention_heads=4, use_parallel_residual=False)
        | dict(attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new")
        | dict(
            rope_parameters=dict(rope_type="default", rope_theta=1000.0, partial_rotary_factor=0.5)
        ),
    ),
}
CASES = {name: (kind, settings | _IDS) for name, (kind, settings) in CASES.items()}


def tokens(vocab_size: int, batch: int = 1) -> np.ndarray:
    """Token ids `[batch, LENGTH]`."""
    rng = np.random.default_rng(vocab_size)
    return rng.integers(0, vocab_size, size=(batch, LENGTH))


def weight(name: str, shape: tuple[int, ...], model_type: str) -> np.ndarray:
    """The f32 weight `name` of a tiny model: seeded by its name, so it need not be stored."""
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) == 1:  # norms and biases
        neutral = 1.0 if name.endswith("norm.weight") and "gemma" not in model_type else 0.0
        x = neutral + 0.3 * x
    elif "embed" in name and "embed_out" not in name:
        x = 0.5 * x
    else:
        x = x / shape[1] ** 0.5
    return x.astype(np.float32)
