"""config.json is read completely or refused by name, and written so that it reads back."""

import json
import pathlib

import numpy as np
import pytest
import transformers
from golden.transformers_4 import write

from recursive_jax.models import parameters
from recursive_jax.models.config import Rope
from recursive_jax.weights import hf_config

GOLDEN = pathlib.Path(__file__).parent / "golden"

# As published on the hub, every key of them (ids of long pattern lists shortened by code).
GEMMA_2B = dict(
    architectures=["GemmaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=2, eos_token_id=1, head_dim=256, hidden_act="gelu", hidden_activation=None,
    hidden_size=2048, initializer_range=0.02, intermediate_size=16384,
    max_position_embeddings=8192, model_type="gemma", num_attention_heads=8,
    num_hidden_layers=18, num_key_value_heads=1, pad_token_id=0, rms_norm_eps=1e-06,
    rope_scaling=None, rope_theta=10000.0, torch_dtype="bfloat16",
    transformers_version="4.38.0.dev0", use_cache=True, vocab_size=256000,
)  # fmt: skip
GEMMA2_2B = dict(
    architectures=["Gemma2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=50.0, bos_token_id=2, cache_implementation="hybrid", eos_token_id=1,
    final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh", hidden_size=2304, initializer_range=0.02,
    intermediate_size=9216, max_position_embeddings=8192, model_type="gemma2",
    num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4, pad_token_id=0,
    query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096,
    torch_dtype="float32", transformers_version="4.42.4", use_cache=True, vocab_size=256000,
)  # fmt: skip
GEMMA3_1B = dict(
    architectures=["Gemma3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=None, bos_token_id=2, cache_implementation="hybrid",
    eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", hidden_size=1152, initializer_range=0.02,
    intermediate_size=6912, max_position_embeddings=32768, model_type="gemma3_text",
    num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1, pad_token_id=0,
    query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000,
    rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
    torch_dtype="bfloat16", transformers_version="4.50.0.dev0", use_cache=True,
    vocab_size=262144,
)  # fmt: skip
GEMMA3_270M = {k: v for k, v in GEMMA3_1B.items() if k != "sliding_window_pattern"} | dict(
    _sliding_window_pattern=6, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
    layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
    use_bidirectional_attention=False,
)  # fmt: skip
LLAMA3_2_1B = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=128000, eos_token_id=[128001, 128008, 128009], head_dim=64, hidden_act="silu",
    hidden_size=2048, initializer_range=0.02, intermediate_size=8192,
    max_position_embeddings=131072, mlp_bias=False, model_type="llama", num_attention_heads=32,
    num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling=dict(
        factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
        original_max_position_embeddings=8192, rope_type="llama3",
    ),
    rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16",
    transformers_version="4.45.0.dev0", use_cache=True, vocab_size=128256,
)  # fmt: skip
SMOLLM2_135M = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=0, eos_token_id=0, hidden_act="silu", hidden_size=576,
    initializer_range=0.041666666666666664, intermediate_size=1536, is_llama_config=True,
    max_position_embeddings=8192, model_type="llama", num_attention_heads=9,
    num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
    torch_dtype="bfloat16", transformers_version="4.40.1", use_cache=True, vocab_size=49152,
    **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
)  # fmt: skip
MISTRAL_7B = dict(
    architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu",
    hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
    max_position_embeddings=32768, model_type="mistral", num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
    sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16",
    transformers_version="4.34.0.dev0", use_cache=True, vocab_size=32000,
)  # fmt: skip
PYTHIA_410M = dict(
    architectures=["GPTNeoXForCausalLM"], bos_token_id=0, eos_token_id=0, hidden_act="gelu",
    hidden_size=1024, initializer_range=0.02, intermediate_size=4096, layer_norm_eps=1e-05,
    max_position_embeddings=2048, model_type="gpt_neox", num_attention_heads=16,
    num_hidden_layers=24, rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False,
    torch_dtype="float16", transformers_version="4.24.0", use_cache=True,
    use_parallel_residual=True, vocab_size=50304,
)  # fmt: skip
QWEN2_0_5B = dict(
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643,
    eos_token_id=151643, hidden_act="silu", hidden_size=896, initializer_range=0.02,
    intermediate_size=4864, max_position_embeddings=131072, max_window_layers=24,
    model_type="qwen2", num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2,
    rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=True,
    torch_dtype="bfloat16", transformers_version="4.40.1", use_cache=True,
    use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
QWEN3_0_6B = dict(
    architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act="silu",
    hidden_size=1024, initializer_range=0.02, intermediate_size=3072,
    max_position_embeddings=40960, max_window_layers=28, model_type="qwen3",
    num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06,
    rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
    torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True,
    use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
PUBLISHED = {
    "gemma_2b": GEMMA_2B,
    "gemma2_2b": GEMMA2_2B,
    "gemma3_1b": GEMMA3_1B,
    "gemma3_270m": GEMMA3_270M,
    "llama3_2_1b": LLAMA3_2_1B,
    "smollm2_135m": SMOLLM2_135M,
    "mistral_7b": MISTRAL_7B,
    "pythia_410m": PYTHIA_410M,
    "qwen2_0_5b": QWEN2_0_5B,
    "qwen3_0_6b": QWEN3_0_6B,
}
# A multimodal config leaves most of its text model to the defaults of transformers.
GEMMA3_4B = dict(
    architectures=["Gemma3ForConditionalGeneration"], boi_token_index=255999,
    eoi_token_index=256000, eos_token_id=[1, 106], image_token_index=262144,
    initializer_range=0.02, mm_tokens_per_image=256, model_type="gemma3",
    text_config=dict(
        hidden_size=2560, intermediate_size=10240, model_type="gemma3_text",
        num_hidden_layers=34, rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    ),
    torch_dtype="bfloat16", transformers_version="4.50.0.dev0",
    vision_config=dict(hidden_size=1152, image_size=896, model_type="siglip_vision_model"),
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_equal_the_presets(name):
    assert hf_config.config_from_hf(PUBLISHED[name]) == hf_config.preset(name)


# Stored numbers of the published models (their model cards; paper Table 1 for Gemma 2B, TinyLlama
# and Pythia 1B without embeddings).
@pytest.mark.parametrize(
    "name, total",
    [
        ("gemma_2b", 2_506_172_416),
        ("gemma2_2b", 2_614_341_888),
        ("gemma3_270m", 268_098_176),
        ("gemma3_1b", 999_885_952),
        ("llama3_2_1b", 1_235_814_400),
        ("tinyllama_1_1b", 1_100_048_384),
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("pythia_410m", 405_334_016),
        ("pythia_1b", 1_011_781_632),
        ("qwen2_0_5b", 494_032_768),
        ("qwen3_0_6b", 596_049_920),
        ("mistral_7b", 7_241_732_096),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, total):
    counts = parameters.parameter_counts(parameters.abstract_params(hf_config.preset(name)))
    assert counts["total"] == total


def test_preset_block_sizes_of_the_paper():
    expected = {
        "gemma_2b": 1_981_808_640,
        "tinyllama_1_1b": 968_884_224,
        "pythia_1b": 805_306_368,
    }
    for name, shared in expected.items():
        params = parameters.abstract_params(hf_config.preset(name))
        assert parameters.parameter_counts(params)["shared"] == shared


def test_multimodal_gemma3_is_its_text_model():
    cfg = hf_config.config_from_hf(GEMMA3_4B)
    assert (cfg.family, cfg.embed_dim, cfg.num_layers) == ("gemma3", 2560, 34)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.vocab_size) == (8, 4, 256, 262208)
    assert cfg.ropes == (Rope(theta=1e6, scaling="linear", factor=8.0), Rope(theta=1e4))
    assert cfg.windows[:7] == (1024,) * 5 + (0, 1024) and cfg.rope_of_depth[:6] == (1,) * 5 + (0,)
    assert cfg.tied_head and cfg.max_length == 131072
    untied = hf_config.config_from_hf(GEMMA3_4B | {"tie_word_embeddings": False})
    assert not untied.tied_head
    with pytest.raises(ValueError, match="new_attention"):
        hf_config.config_from_hf(GEMMA3_4B | {"new_attention": 1})
    with pytest.raises(ValueError, match="hidden_size.*contradicts"):
        hf_config.config_from_hf(GEMMA3_4B | {"hidden_size": 12})


def goldens():
    return sorted(GOLDEN.glob("*.json"))


@pytest.mark.parametrize("file", goldens(), ids=lambda f: f.stem)
def test_configs_written_by_transformers_and_back(file):
    cfg = hf_config.config_from_hf(json.loads(file.read_text())["config"])
    assert hf_config.config_from_hf(hf_config.config_to_hf(cfg)) == cfg


@pytest.mark.parametrize("name", hf_config.PRESETS)
def test_presets_and_back(name):
    cfg = hf_config.preset(name)
    written = json.loads(json.dumps(hf_config.config_to_hf(cfg)))
    assert hf_config.config_from_hf(written) == cfg
    # readers of either generation of rope keys see the same
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    new_only = {"rope_scaling", "rope_theta", "rotary_pct", "rotary_emb_base"}
    new_only |= {"rope_local_base_freq"}
    new = {k: v for k, v in written.items() if k not in new_only}
    assert hf_config.config_from_hf(old) == hf_config.config_from_hf(new) == cfg


# Every value that means something, one at a time.
@pytest.mark.parametrize(
    "base, change, field, value",
    [
        (LLAMA3_2_1B, {"num_key_value_heads": None}, "num_kv_heads", 32),
        (LLAMA3_2_1B, {"head_dim": None}, "head_dim", 64),
        (LLAMA3_2_1B, {"head_dim": 128}, "head_dim", 128),
        (LLAMA3_2_1B, {"tie_word_embeddings": False}, "tied_head", False),
        (LLAMA3_2_1B, {"attention_bias": True}, "o_bias", True),
        (LLAMA3_2_1B, {"attention_bias": True}, "qkv_bias", True),
        (LLAMA3_2_1B, {"mlp_bias": True}, "mlp_bias", True),
        (LLAMA3_2_1B, {"rms_norm_eps": 1e-3}, "norm_eps", 1e-3),
        (LLAMA3_2_1B, {"max_position_embeddings": 77}, "max_length", 77),
        (LLAMA3_2_1B, {"hidden_act": "gelu"}, "activation", "gelu"),
        (LLAMA3_2_1B, {"hidden_act": "gelu_new"}, "activation", "gelu_tanh"),
        (LLAMA3_2_1B, {"rope_scaling": None}, "ropes", (Rope(theta=5e5),)),
        (
            LLAMA3_2_1B,
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "ropes",
            (Rope(theta=5e5, scaling="linear", factor=4.0),),
        ),
        (GEMMA_2B, {}, "activation", "gelu_tanh"),  # says gelu and means tanh
        (GEMMA_2B, {"hidden_activation": "gelu_pytorch_tanh"}, "activation", "gelu_tanh"),
        (GEMMA_2B, {}, "embed_scale", 2048**0.5),
        (GEMMA_2B, {}, "tied_head", True),  # absent
        (GEMMA2_2B, {"query_pre_attn_scalar": 144}, "query_scale", 1 / 12),
        (GEMMA2_2B, {"query_pre_attn_scalar": 256}, "query_scale", None),
        (GEMMA2_2B, {"attn_logit_softcapping": None}, "attn_softcap", None),
        (GEMMA2_2B, {"final_logit_softcapping": 7.0}, "final_softcap", 7.0),
        (GEMMA2_2B, {}, "windows", (4096, 0) * 13),
        (
            GEMMA2_2B,
            {"layer_types": ["full_attention"] * 25 + ["sliding_attention"]},
            "windows",
            (0,) * 25 + (4096,),
        ),
        (GEMMA3_1B, {"sliding_window_pattern": 2}, "windows", (512, 0) * 13),
        (
            GEMMA3_1B,
            {"sliding_window_pattern": None},
            "windows",
            ((512,) * 5 + (0,)) * 4 + (512,) * 2,
        ),
        (GEMMA3_1B, {"sliding_window_pattern": 2}, "rope_of_depth", (1, 0) * 13),
        # layer_types is the newer word and wins over the pattern
        (GEMMA3_270M, {"_sliding_window_pattern": 2}, "windows", ((512,) * 5 + (0,)) * 3),
        (MISTRAL_7B, {"sliding_window": None}, "windows", ()),
        (QWEN2_0_5B, {}, "windows", ()),
        (
            QWEN2_0_5B,
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 22},
            "windows",
            (0,) * 22 + (9, 9),
        ),
        (QWEN2_0_5B, {"use_sliding_window": True, "sliding_window": None}, "windows", ()),
        (QWEN2_0_5B, {}, "qkv_bias", True),
        (QWEN2_0_5B, {}, "o_bias", False),
        (QWEN3_0_6B, {"attention_bias": True}, "o_bias", True),
        (PYTHIA_410M, {}, "rotary_fraction", 0.25),
        (PYTHIA_410M, {"rotary_pct": 1.0}, "rotary_fraction", 1.0),
        (PYTHIA_410M, {"rotary_pct": None}, "rotary_fraction", 0.25),
        (PYTHIA_410M, {"rotary_emb_base": 500}, "ropes", (Rope(theta=500.0),)),
        (PYTHIA_410M, {"use_parallel_residual": False}, "parallel_residual", False),
        (PYTHIA_410M, {"attention_bias": False}, "qkv_bias", False),
        (PYTHIA_410M, {}, "parallel_residual", True),
        (PYTHIA_410M, {}, "activation", "gelu"),
    ],
)
def test_values_that_mean_something(base, change, field, value):
    actual = getattr(hf_config.config_from_hf(base | change), field)
    if isinstance(value, float):
        np.testing.assert_allclose(actual, value, rtol=1e-15)
    else:
        assert actual == value


# What says nothing: the model is that of the same config without these keys.
SAYS_NOTHING = [
    (PYTHIA_410M, {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_scaling": None}),
    (PYTHIA_410M, {"hidden_dropout": 0.1, "attention_dropout": 0.1, "classifier_dropout": 0.1}),
    (GEMMA2_2B, {"sliding_window_size": 4096}),
    (GEMMA2_2B, {"use_sliding_window": False}),
    (GEMMA3_1B, {"sliding_window_pattern": None}),  # 6 is the default too
    (MISTRAL_7B, {"use_sliding_window": False, "layer_types": None}),
    (MISTRAL_7B, {"layer_types": ["sliding_attention"] * 32}),
    (LLAMA3_2_1B, {"quantization_config": None, "auto_map": None, "attention_multiplier": None}),
    (LLAMA3_2_1B, {"layer_types": None}),
    (LLAMA3_2_1B, {"layer_types": ["full_attention"] * 16}),
    (LLAMA3_2_1B, {"use_sliding_window": False}),
    # a Llama made of a Qwen 2
    (LLAMA3_2_1B, {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 21}),
    (LLAMA3_2_1B, {"custom_pipelines": {"text-generation": {"impl": "x.Y"}}}),
    (LLAMA3_2_1B, {"attention_dropout": 0.1, "is_causal": True, "original_x": None}),
    (QWEN2_0_5B, {"rope_scaling": {"type": "default", "original_max_position_embeddings": 9}}),
    (QWEN2_0_5B, {"rope_scaling": {"rope_type": "default", "factor": 1.0}}),
    (QWEN2_0_5B, {"original_max_position_embeddings": 9}),
    (QWEN2_0_5B, {"use_sliding_window": None, "max_window_layers": None, "rms_norm_eps": None}),
    (GEMMA3_4B, {"quantization_config": None, "tie_word_embeddings": None}),
]


@pytest.mark.parametrize("base, keys", SAYS_NOTHING)
def test_keys_that_say_nothing_count_as_absent(base, keys):
    assert hf_config.config_from_hf(base | keys) == hf_config.config_from_hf(base)


def test_rope_settings_saved_again_keep_their_old_name_of_the_type():
    """transformers 5 keeps the `type` of an old file beside its own `rope_type`."""
    old = {"type": "linear", "factor": 4.0}
    new = old | {"rope_type": "linear", "rope_theta": 1e6}
    saved = {k: v for k, v in QWEN2_0_5B.items() if k != "rope_theta"} | {"rope_parameters": new}
    cfg = hf_config.config_from_hf(saved)
    assert cfg.ropes == (Rope(theta=1e6, scaling="linear", factor=4.0),)
    assert cfg == hf_config.config_from_hf(QWEN2_0_5B | {"rope_scaling": old})


# Of every key of every published config; what transformers would compute with them is not defined.
ODD_VALUES = ["1e-05", "", [], ["x"], {}, {"x": []}, True, -1, 0, 2.5, 1e999, float("nan"), 10**400]
NUMBERS = [
    (LLAMA3_2_1B, "rms_norm_eps"),
    (LLAMA3_2_1B, "rope_theta"),
    (PYTHIA_410M, "layer_norm_eps"),
    (PYTHIA_410M, "rotary_emb_base"),
    (PYTHIA_410M, "rotary_pct"),
    (GEMMA2_2B, "query_pre_attn_scalar"),
    (GEMMA2_2B, "attn_logit_softcapping"),
    (GEMMA2_2B, "final_logit_softcapping"),
    (GEMMA3_1B, "rope_local_base_freq"),
    *((LLAMA3_2_1B, f"rope_scaling.{k}") for k in LLAMA3_2_1B["rope_scaling"] if k != "rope_type"),
]


@pytest.mark.parametrize("base, key", NUMBERS, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_no_number_is_refused_by_name(base, key):
    for value in ("1e-05", True, [1.0], {}, -1.0, 1e999, float("nan"), 10**400):
        changed = {key: value}
        if key.startswith("rope_scaling."):
            name = key.removeprefix("rope_scaling.")
            changed = {"rope_scaling": base["rope_scaling"] | {name: value}}
        with pytest.raises(ValueError, match=rf"config\.json: {key} must be a number"):
            hf_config.config_from_hf(base | changed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_value_is_read_or_refused(name):
    """No value of any key ends in another error than ValueError."""
    refused = 0
    keys = {**PUBLISHED[name], "rope_parameters": 0, "layer_types": 0, "text_config": 0}
    for key in keys:
        for value in ODD_VALUES:
            try:
                hf_config.config_from_hf(PUBLISHED[name] | {key: value})
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["false", 0, 1])
def test_a_flag_is_true_or_false(key, value):
    with pytest.raises(ValueError, match=f"config.json: {key} must be true or false"):
        hf_config.config_from_hf(LLAMA3_2_1B | {key: value})


def test_yarn_settings():
    """Defaults as in transformers; what it derives is written out, and reads back the same."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    cfg = hf_config.config_from_hf(QWEN2_0_5B | {"rope_scaling": yarn})
    (rope,) = cfg.ropes
    assert (rope.scaling, rope.factor, rope.original_length) == ("yarn", 4.0, 32768)
    np.testing.assert_allclose(rope.attention_factor, 1.1386294, rtol=1e-7)  # 0.1 ln 4 + 1
    written = hf_config.config_to_hf(cfg)
    assert written["rope_scaling"]["rope_type"] == "yarn"
    assert hf_config.config_from_hf(json.loads(json.dumps(written))) == cfg
    more = dict(mscale=2.0, mscale_all_dim=1.0, beta_fast=16, beta_slow=2, truncate=False)
    (rope,) = hf_config.config_from_hf(QWEN2_0_5B | {"rope_scaling": yarn | more}).ropes
    np.testing.assert_allclose(rope.attention_factor, 1.2772589 / 1.1386294, rtol=1e-7)
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (16, 2, False)
    (rope,) = hf_config.config_from_hf(
        QWEN2_0_5B | {"rope_scaling": yarn | {"attention_factor": 1.0, "finetuned": True}}
    ).ropes
    assert rope.attention_factor == 1.0
    outside = {k: v for k, v in yarn.items() if k != "original_max_position_embeddings"}
    cfg = hf_config.config_from_hf(QWEN2_0_5B | {"rope_scaling": outside})
    assert cfg.ropes[0].original_length == 131072  # max_position_embeddings
    with pytest.raises(ValueError, match="original_max_position_embeddings=9 .* disagree"):
        hf_config.config_from_hf(
            QWEN2_0_5B | {"rope_scaling": yarn, "original_max_position_embeddings": 9}
        )
    with pytest.raises(ValueError, match="rope_scaling.truncate must be true or false"):
        hf_config.config_from_hf(QWEN2_0_5B | {"rope_scaling": yarn | {"truncate": 1}})


def test_llama3_rope_defaults_its_original_length_to_the_model_length():
    rope = dict(rope_type="llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0)
    cfg = hf_config.config_from_hf(LLAMA3_2_1B | {"rope_scaling": rope})
    assert cfg.ropes[0].original_length == 131072


def written_by_transformers_4():
    """label -> config.json; the label ends in the version."""
    return json.loads((GOLDEN / "transformers_4" / "configs.json").read_text())


@pytest.mark.parametrize("label", written_by_transformers_4())
def test_configs_of_transformers_4_are_read(label, tmp_path):
    """They mean what was given to transformers, and what transformers 5 reads in them."""
    config = written_by_transformers_4()[label]
    cfg = hf_config.config_from_hf(config)
    model_type, _, settings = write.CONFIGS[label.rsplit(" ", 1)[0]]
    given = {"model_type": model_type, **write.SIZES, **settings}
    assert cfg == hf_config.config_from_hf(given)
    (tmp_path / "config.json").write_text(json.dumps(config))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    saved_again = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved_again
    assert hf_config.config_from_hf(saved_again) == cfg


# Everything that changes the mathematics and is not implemented is refused, by name and value.
@pytest.mark.parametrize(
    "base, change, words",
    [
        (LLAMA3_2_1B, {"model_type": "mamba"}, ["mamba", "llama"]),
        (LLAMA3_2_1B, {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, ["longrope"]),
        (LLAMA3_2_1B, {"rope_scaling": {"type": "yarn"}}, ["yarn", "miss", "factor"]),
        (LLAMA3_2_1B, {"rope_scaling": {"type": "default", "factor": 4.0}}, ["factor"]),
        (LLAMA3_2_1B, {"rope_scaling": "linear"}, ["rope_scaling", "'linear'"]),
        (LLAMA3_2_1B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
        (LLAMA3_2_1B, {"rope_scaling": {"type": "linear"}}, ["linear", "miss", "factor"]),
        (
            LLAMA3_2_1B,
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}},
            ["mrope_section"],
        ),
        (LLAMA3_2_1B, {"sparse_attention": True}, ["sparse_attention=True"]),
        (LLAMA3_2_1B, {"logit_scale": 0.5}, ["logit_scale=0.5"]),
        (LLAMA3_2_1B, {"attention_multiplier": 2.0}, ["attention_multiplier"]),
        (LLAMA3_2_1B, {"rope_interleaved": True}, ["rope_interleaved=True"]),
        (LLAMA3_2_1B, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        (LLAMA3_2_1B, {"sliding_window": 4096}, ["sliding_window=4096"]),
        (LLAMA3_2_1B, {"use_sliding_window": True}, ["use_sliding_window=True"]),
        (LLAMA3_2_1B, {"layer_types": ["full_attention"] * 15}, ["layer_types", "16"]),
        (LLAMA3_2_1B, {"layer_types": ["sliding_attention"] * 16}, ["layer_types", "no sliding"]),
        (
            LLAMA3_2_1B,
            {"quantization_config": {"bits": 4}},
            ["quantization_config", "bits", "dequantise"],
        ),
        (LLAMA3_2_1B, {"is_causal": False}, ["is_causal=False"]),
        (LLAMA3_2_1B, {"auto_map": {"AutoModel": "x.Y"}}, ["auto_map"]),
        (LLAMA3_2_1B, {"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        (LLAMA3_2_1B, {"pruned_heads": {"0": [1]}}, ["pruned_heads"]),
        (LLAMA3_2_1B, {"hidden_act": "relu2"}, ["hidden_act", "relu2", "silu"]),
        (LLAMA3_2_1B, {"hidden_size": "2048"}, ["embed_dim", "'2048'"]),
        (LLAMA3_2_1B, {"num_hidden_layers": 0}, ["num_layers"]),
        (PYTHIA_410M, {"num_attention_heads": 0}, ["num_heads", "positive"]),
        (GEMMA3_1B, {"sliding_window_pattern": 0}, ["sliding_window_pattern=0"]),
        (LLAMA3_2_1B, {"num_key_value_heads": 5}, ["num_kv_heads"]),
        (LLAMA3_2_1B, {"query_pre_attn_scalar": 64}, ["query_pre_attn_scalar"]),
        (GEMMA_2B, {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        (QWEN3_0_6B, {"head_dim": None}, ["head_dim is null", "qwen3"]),
        (GEMMA_2B, {"hidden_activation": "silu"}, ["hidden_act", "gelu"]),
        (GEMMA2_2B, {"hidden_act": "gelu"}, ["hidden_act", "contradicts"]),
        (GEMMA2_2B, {"sliding_window": None}, ["sliding_window"]),
        (GEMMA2_2B, {"sliding_window_size": 2048}, ["sliding_window_size=2048", "4096"]),
        (GEMMA2_2B, {"layer_types": ["full_attention"]}, ["layer_types", "26"]),
        (GEMMA2_2B, {"layer_types": ["chunked_attention"] * 26}, ["chunked_attention"]),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0"]),
        (
            GEMMA3_1B,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            ["rope_parameters", "full_attention"],
        ),
        (MISTRAL_7B, {"attention_bias": True}, ["attention_bias=True"]),
        (
            MISTRAL_7B,
            {"layer_types": ["sliding_attention", "full_attention"] * 16},
            ["layer_types", "alternating"],
        ),
        (
            QWEN2_0_5B,
            {"layer_types": ["sliding_attention"] * 24},
            ["layer_types", "no sliding_window"],
        ),
        (QWEN2_0_5B, {"use_mrope": True}, ["use_mrope"]),
        (PYTHIA_410M, {"rope_theta": 500}, ["rope_theta=500", "rotary_emb_base=10000"]),
        (
            PYTHIA_410M,
            {"partial_rotary_factor": 0.5},
            ["partial_rotary_factor=0.5", "rotary_pct=0.25"],
        ),
        (PYTHIA_410M, {"rotary_pct": 0.3}, ["rotary_fraction", "0.3"]),
        (
            PYTHIA_410M,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            ["disagree", "10000", "500"],
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(base, change, words):
    with pytest.raises(ValueError) as error:
        hf_config.config_from_hf(base | change)
    for word in words:
        assert word in str(error.value), error.value


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_missing_sizes_are_named(key):
    with pytest.raises(ValueError, match=key):
        hf_config.config_from_hf({k: v for k, v in LLAMA3_2_1B.items() if k != key})


def test_what_a_family_cannot_express_is_not_written():
    llama = hf_config.preset("smollm2_135m")
    with pytest.raises(ValueError, match="Untie it first"):
        hf_config.config_to_hf(llama.replace(num_layers=15, num_loops=2))
    with pytest.raises(ValueError, match="cannot express windows"):
        hf_config.config_to_hf(llama.replace(windows=(7,) * 30))
    with pytest.raises(ValueError, match="cannot express.*attn_softcap=3.0"):
        hf_config.config_to_hf(llama.replace(attn_softcap=3.0))
    with pytest.raises(ValueError, match="cannot express windows"):
        hf_config.config_to_hf(hf_config.preset("mistral_7b").replace(windows=(0, 7) * 16))
    with pytest.raises(ValueError, match="cannot express query_scale"):
        hf_config.config_to_hf(llama.replace(query_scale=0.3))


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="gemma_2b"):
        hf_config.preset("gpt_5")
