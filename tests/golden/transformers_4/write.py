"""Prints the configs of all families as the installed transformers 4.x writes them.

    python tests/golden/transformers_4/write.py        (in an environment with transformers 4.x)

`configs.json` holds its output for the oldest 4.x that has a family (GPT-NeoX: since 4.28), for
4.57, the last one, and for GPT-NeoX from 4.45, the first that wrote its rope settings twice.
"""

import json

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, max_position_embeddings=128,
)  # fmt: skip
LOCAL = dict(num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=8)
QWEN = dict(num_key_value_heads=2, rope_theta=1e6)
WINDOWS = dict(use_sliding_window=True, sliding_window=8, max_window_layers=3)
# label -> model type, config class, settings besides SIZES
CONFIGS = {
    "llama": ("llama", "LlamaConfig", dict(rms_norm_eps=1e-5)),
    "llama linear": ("llama", "LlamaConfig", dict(rope_scaling=dict(type="linear", factor=2.0))),
    "gpt_neox": ("gpt_neox", "GPTNeoXConfig", dict(rotary_pct=0.5, rotary_emb_base=5000)),
    "mistral": ("mistral", "MistralConfig", dict(num_key_value_heads=2, sliding_window=8)),
    "gemma": ("gemma", "GemmaConfig", dict(num_key_value_heads=1, head_dim=16)),
    "gemma2": ("gemma2", "Gemma2Config", LOCAL),
    "gemma3": ("gemma3_text", "Gemma3TextConfig", LOCAL),
    "qwen2": ("qwen2", "Qwen2Config", QWEN),
    "qwen2 windows": ("qwen2", "Qwen2Config", QWEN | WINDOWS),
    "qwen3": ("qwen3", "Qwen3Config", QWEN | dict(head_dim=16)),
}


def main():
    import transformers

    for label, (_, name, settings) in CONFIGS.items():
        if hasattr(transformers, name):
            config = getattr(transformers, name)(**SIZES, **settings)
            written = json.dumps(json.loads(config.to_json_string()))
            print(f'"{label} {transformers.__version__}": {written}')


if __name__ == "__main__":
    main()
