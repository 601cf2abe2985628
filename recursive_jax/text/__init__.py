"""Text conventions that every job shares: tokenizers, evaluation windows, documents."""

from recursive_jax.text.tokenizer import (
    Detokenizer,
    apply_chat,
    bos_prefix,
    check_ids,
    check_vocabulary,
    encode,
    encode_batch,
    fingerprint,
    load_tokenizer,
    stop_ids,
)
from recursive_jax.text.windows import Windows, eval_windows

__all__ = [
    "Detokenizer",
    "Windows",
    "apply_chat",
    "bos_prefix",
    "check_ids",
    "check_vocabulary",
    "encode",
    "encode_batch",
    "eval_windows",
    "fingerprint",
    "load_tokenizer",
    "stop_ids",
]
