"""The families as data: one row each, the keys of `config.json`, and published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# HF key -> DecoderConfig fields that take its value. Every family has these.
COMMON_KEYS = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("embed_dim",),
    "intermediate_size": ("mlp_dim",),
    "num_hidden_layers": ("num_layers",),
    "num_attention_heads": ("num_heads",),
    "max_position_embeddings": ("max_length",),
    "tie_word_embeddings": ("tied_head",),
}
RMS = {"rms_norm_eps": ("norm_eps",)}
HEADS = {"num_key_value_heads": ("num_kv_heads",), "head_dim": ("head_dim",)}
ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "o_bias")}
FINAL_SOFTCAP = {"final_logit_softcapping": ("final_softcap",)}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family: the fields its models share, and the keys of `config.json` for the others."""

    name: str
    model_type: str  # written to config.json
    architecture: str
    keys: Mapping[str, tuple[str, ...]]  # HF key -> DecoderConfig fields, besides COMMON_KEYS
    fields: Mapping[str, Any]  # DecoderConfig fields that are the same for the whole family
    defaults: Mapping[str, Any]  # values that transformers takes for absent keys
    act_key: str = "hidden_act"
    # Which layers are local: 'none', 'all', 'every n-th is not' (pattern) or 'the last' (tail).
    local: str = "none"
    rope_by_layer_type: bool = False
    theta_keys: tuple[str, ...] = ("rope_theta",)  # old keys of the (full, sliding) base
    default_thetas: tuple[float, ...] = (1e4,)
    fraction_key: str | None = None  # old key of the rotated share of head_dim
    default_fraction: float = 1.0
    # Key -> the key whose value it repeats. It says nothing of its own; another value is refused.
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    query_scalar: bool = False  # query_pre_attn_scalar replaces head_dim in the query scale
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    fixed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)  # other values refused


_GEMMA = dict(norm_offset=1.0)
_SANDWICH = dict(norm_offset=1.0, post_norms=True)
_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}
_TAIL_DEFAULTS = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)

FAMILIES = {
    row.name: row
    for row in (
        Family(
            "gemma",
            model_type="gemma",
            architecture="GemmaForCausalLM",
            keys=RMS | HEADS | ATTENTION_BIAS,
            fields=_GEMMA,
            defaults=dict(
                head_dim=256, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False,
                hidden_act="gelu_pytorch_tanh",
            ),
            scaled_embedding=True,
        ),
        Family(
            "gemma2",
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            keys=RMS
            | HEADS
            | ATTENTION_BIAS
            | FINAL_SOFTCAP
            | {"attn_logit_softcapping": ("attn_softcap",)},
            fields=_SANDWICH,
            defaults=dict(
                head_dim=256, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False,
                hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
                sliding_window=4096, sliding_window_pattern=2, final_logit_softcapping=30.0,
                attn_logit_softcapping=50.0,
            ),
            act_key="hidden_activation",
            local="pattern",
            copies={"sliding_window_size": "sliding_window"},  # published 9B and 27B
            query_scalar=True,
            scaled_embedding=True,
        ),
        Family(
            "gemma3",
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            keys=RMS | HEADS | ATTENTION_BIAS | FINAL_SOFTCAP,
            fields=_SANDWICH | dict(qk_norm=True),
            # Published multimodal configs omit even the sizes of their text_config.
            defaults=dict(
                vocab_size=262208, hidden_size=2304, intermediate_size=9216,
                num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
                max_position_embeddings=131072, rms_norm_eps=1e-6, tie_word_embeddings=True,
                attention_bias=False, hidden_activation="gelu_pytorch_tanh",
                query_pre_attn_scalar=256, sliding_window=4096, sliding_window_pattern=6,
                final_logit_softcapping=None,
            ),
            act_key="hidden_activation",
            local="pattern",
            rope_by_layer_type=True,
            theta_keys=("rope_theta", "rope_local_base_freq"),
            default_thetas=(1e6, 1e4),
            query_scalar=True,
            scaled_embedding=True,
            fixed={"attn_logit_softcapping": ()},  # transformers ignores it in Gemma 3
        ),
        Family(
            "llama",
            model_type="llama",
            architecture="LlamaForCausalLM",
            keys=RMS
            | HEADS
            | ATTENTION_BIAS
            | {"mlp_bias": ("mlp_bias",)},
            fields={},
            defaults=dict(
                rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
                mlp_bias=False, hidden_act="silu",
            ),
            fixed={"rope_interleaved": (False,), "is_llama_config": (True,)},
        ),
        Family(
            "mistral",
            model_type="mistral",
            architecture="MistralForCausalLM",
            keys=RMS | HEADS,
            fields={},
            defaults=dict(
                num_key_value_heads=8, rms_norm_eps=1e-6, tie_word_embeddings=False,
                hidden_act="silu", sliding_window=4096,
            ),
            local="all",
            fixed=_NO_BIAS,
        ),
        Family(
            "qwen2",
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            keys=RMS | HEADS,
            fields=dict(qkv_bias=True),
            defaults=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, hidden_act="silu")
            | _TAIL_DEFAULTS,
            local="tail",
            fixed={"mlp_bias": (False,), "use_mrope": (False,)},
        ),
        Family(
            "qwen3",
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            keys=RMS | HEADS | ATTENTION_BIAS,
            fields=dict(qk_norm=True),
            defaults=dict(
                head_dim=128, rms_norm_eps=1e-6, tie_word_embeddings=False, hidden_act="silu",
                attention_bias=False,
            )
            | _TAIL_DEFAULTS,
            local="tail",
            fixed={"mlp_bias": (False,)},
        ),
        Family(
            "gpt_neox",
            model_type="gpt_neox",
            architecture="GPTNeoXForCausalLM",
            keys=ATTENTION_BIAS
            | {
                "layer_norm_eps": ("norm_eps",),
                "use_parallel_residual": ("parallel_residual",),
            },
            fields=dict(norm="layer", gated_mlp=False, mlp_bias=True),
            defaults=dict(
                layer_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=True,
                hidden_act="gelu", use_parallel_residual=True,
            ),
            theta_keys=("rotary_emb_base",),
            fraction_key="rotary_pct",
            default_fraction=0.25,
            # transformers 4.45 to 4.57 wrote both; it reads the old keys only.
            copies={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        ),
    )
}  # fmt: skip
MODEL_TYPES = {row.model_type: row for row in FAMILIES.values()} | {"gemma3": FAMILIES["gemma3"]}

# Keys that change nothing in the text model's logits: they concern training, generation or serving.
IRRELEVANT = frozenset(
    """
    _name_or_path _model_name_or_path name_or_path model_type architectures transformers_version
    torch_dtype dtype initializer_range use_cache pretraining_tp classifier_dropout
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    output_hidden_states output_attentions return_dict torchscript is_decoder problem_type
    id2label label2id num_labels finetuning_task task_specific_params gradient_checkpointing
    attention_dropout hidden_dropout attention_probs_dropout_prob hidden_dropout_prob
    attn_pdrop embd_pdrop resid_pdrop
    cache_implementation attn_implementation _attn_implementation _attn_implementation_internal
    _attn_implementation_autoset _experts_implementation experts_implementation
    _flash_attn_2_enabled use_flash_attention_2 transformers.js_config custom_pipelines
    unsloth_version unsloth_fixed prefix trust_remote_code keys_to_ignore_at_inference
    tokenizer_class chunk_size_feed_forward tie_encoder_decoder _commit_hash
    tf_legacy_loss use_bfloat16 bos_id eos_id tie_last_hidden_states
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
# Keys that change nothing while they have one of these values. Null counts as absent everywhere.
FIXED = {
    "is_encoder_decoder": (False,),
    "is_causal": (True,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "quantization_config": ({},),
    "use_bidirectional_attention": (False,),
}
# Keys of a multimodal config outside its text_config; the vision tower is not loaded.
MULTIMODAL = frozenset(
    "vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index "
    "text_config boi_token_id eoi_token_id image_token_id".split()
)


def _published(model_type: str, sizes: str, **settings: Any) -> dict[str, Any]:
    """A config.json; `sizes` is 'vocab embed mlp layers heads kv_heads head_dim max_length'."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim max_position_embeddings"
    ).split()
    return {
        "model_type": model_type,
        **dict(zip(names, map(int, sizes.split()), strict=True)),
        **settings,
    }


_LLAMA3 = dict(
    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
_SMOL = dict(rms_norm_eps=1e-5, rope_theta=100000, tie_word_embeddings=True)
_LOCAL = dict(sliding_window=512)
PRESETS = {
    "gemma_2b": _published("gemma", "256000 2048 16384 18 8 1 256 8192"),
    "gemma2_2b": _published("gemma2", "256000 2304 9216 26 8 4 256 8192", sliding_window=4096),
    "gemma3_270m": _published("gemma3_text", "262144 640 2048 18 4 1 256 32768", **_LOCAL),
    "gemma3_1b": _published("gemma3_text", "262144 1152 6912 26 4 1 256 32768", **_LOCAL),
    "llama3_2_1b": _published(
        "llama", "128256 2048 8192 16 32 8 64 131072", rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling=_LLAMA3, tie_word_embeddings=True,
    ),
    "tinyllama_1_1b": _published("llama", "32000 2048 5632 22 32 4 64 2048", rms_norm_eps=1e-5),
    "smollm2_135m": _published("llama", "49152 576 1536 30 9 3 64 8192", **_SMOL),
    "smollm2_360m": _published("llama", "49152 960 2560 32 15 5 64 8192", **_SMOL),
    "pythia_410m": _published("gpt_neox", "50304 1024 4096 24 16 16 64 2048"),
    "pythia_1b": _published("gpt_neox", "50304 2048 8192 16 8 8 256 2048"),
    "qwen2_0_5b": _published(
        "qwen2", "151936 896 4864 24 14 2 64 131072", rope_theta=1e6, tie_word_embeddings=True
    ),
    "qwen3_0_6b": _published(
        "qwen3", "151936 1024 3072 28 16 8 128 40960", rope_theta=1e6, tie_word_embeddings=True
    ),
    "mistral_7b": _published(
        "mistral", "32000 4096 14336 32 32 8 128 32768", rms_norm_eps=1e-5, sliding_window=4096
    ),
}  # fmt: skip
