"""The architectures of GGUF files: what their tensors are called, and how the values differ.

Files of the llama architecture store query and key rows in another rope layout, Gemma files store
norm scales with the 1 already added, and GPT-NeoX files fuse query, key and value, one after the
other. Reading and writing use the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights.families import MODEL_TYPES
from recursive_jax.weights.names import AS_IS, TRANSPOSE, Row, Transform


def _interleaved(x: np.ndarray, cfg: DecoderConfig) -> np.ndarray:
    """Rows `[head, 2, head_dim / 2]`, the halves interleaved to `[head, head_dim / 2, 2]`."""
    halves = x.reshape(-1, 2, cfg.head_dim // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def _halves(x: np.ndarray, cfg: DecoderConfig) -> np.ndarray:
    """The inverse of `_interleaved`."""
    pairs = x.reshape(-1, cfg.head_dim // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _third(part: int) -> Transform:
    """One of q, k, v in a projection whose rows are all of q, then all of k, then all of v."""
    return Transform(
        lambda x, cfg: np.split(x, 3)[part].T,
        lambda xs, cfg: np.concatenate([x.T for x in xs]),
        lambda s: (3 * s[-1], *s[:-1]),
    )


ROPE_ROWS = Transform(
    lambda x, cfg: _halves(x, cfg).T, lambda xs, cfg: _interleaved(xs[0].T, cfg), lambda s: s[::-1]
)
PLUS_ONE = Transform(lambda x, cfg: x - 1, lambda xs, cfg: xs[0] + 1, lambda s: s)

_LINEARS = {
    "attention/q": "attn_q",
    "attention/k": "attn_k",
    "attention/v": "attn_v",
    "attention/o": "attn_output",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}
_NORMS = {
    "final_norm": "output_norm",
    "block/attention/q_norm": "blk.{}.attn_q_norm",
    "block/attention/k_norm": "blk.{}.attn_k_norm",
    "block/pre_attention_norm": "blk.{}.attn_norm",
    "block/post_attention_norm": "blk.{}.post_attention_norm",
    "block/pre_mlp_norm": "blk.{}.ffn_norm",
    "block/post_mlp_norm": "blk.{}.post_ffw_norm",
}


def _table(qk: Transform | None = None, norm: Transform = AS_IS, fused: bool = False) -> list[Row]:
    """The rows of an architecture.

    Args:
      qk: of query and key projections, where it is another one than of the other projections.
      norm: of norm scales.
      fused: query, key and value are one tensor.
    """
    rows = [Row("embedding", "token_embd.weight", AS_IS), Row("head", "output.weight", TRANSPOSE)]
    for ours, theirs in _LINEARS.items():
        weight, bias = TRANSPOSE, AS_IS
        if fused and ours[-1] in "qkv" and ours.startswith("attention"):
            theirs, weight = "attn_qkv", _third("qkv".index(ours[-1]))
            bias = weight
        elif qk is not None and ours in ("attention/q", "attention/k"):
            weight = bias = qk
        rows += [
            Row(f"block/{ours}/w", f"blk.{{}}.{theirs}.weight", weight),
            Row(f"block/{ours}/b", f"blk.{{}}.{theirs}.bias", bias),
        ]
    for ours, theirs in _NORMS.items():
        rows.append(Row(f"{ours}/scale", f"{theirs}.weight", norm))
        rows.append(Row(f"{ours}/bias", f"{theirs}.bias", AS_IS))
    return rows


class Architecture(NamedTuple):
    """An architecture of GGUF files.

    Attributes:
      model_type: of the Hugging Face config these files describe.
      table: its tensors.
    """

    model_type: str
    table: list[Row]


_LLAMA = _table(qk=ROPE_ROWS)
_GEMMA = _table(norm=PLUS_ONE)
LOOPED = "nanbeige"  # a llama whose layers run several times; the weights are stored once
ARCHITECTURES = {
    "llama": Architecture("llama", _LLAMA),
    "gemma": Architecture("gemma", _GEMMA),
    "gemma2": Architecture("gemma2", _GEMMA),
    "gemma3": Architecture("gemma3_text", _GEMMA),
    "qwen2": Architecture("qwen2", _table()),
    "qwen3": Architecture("qwen3", _table()),
    "gptneox": Architecture("gpt_neox", _table(fused=True)),
    LOOPED: Architecture("llama", _LLAMA),
}
# Family -> architecture. A Mistral without windows is a llama.
BY_FAMILY: Mapping[str, str] = {
    MODEL_TYPES[row.model_type].name: name for name, row in ARCHITECTURES.items() if name != LOOPED
} | {"mistral": "llama"}
