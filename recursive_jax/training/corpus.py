"""The text of a run: packed rows to train on, and windows held out for perplexity."""

from __future__ import annotations

import dataclasses
from typing import Any

from recursive_jax import text
from recursive_jax.text.documents import documents
from recursive_jax.training import data
from recursive_jax.training.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Attributes:
    rows: to train on.
    windows: held out.
    """

    rows: data.PackedRows
    windows: text.Windows


def open_corpus(
    config: DataConfig, tokenizer: Any, vocab_size: int, seed: int, progress: bool = True
) -> Corpus:
    """The tokenised text of `config`; from the cache where it was tokenised before.

    Args:
      config: which text, and the sizes of rows.
      tokenizer: any tokenizer of `transformers`.
      vocab_size: of the model; every token id is below it.
      seed: of the order of documents.
      progress: show a progress bar.

    Raises:
      ValueError: there is no text, or none is left to train on or to hold out.
    """

    def tokens(spec):
        return data.tokenize(
            documents(spec),
            lambda texts: text.encode_batch(tokenizer, texts, vocab_size),
            f"{text.fingerprint(tokenizer)} {vocab_size}",
            config.cache_dir or None,
            progress=progress,
        )

    train = tokens(config.train)
    if config.valid:
        valid = tokens(config.valid)
    else:
        valid = train.split("valid", config.valid_fraction)
        train = train.split("train", config.valid_fraction)
    prefix = text.bos_prefix(tokenizer)
    rows = data.PackedRows(train, prefix, config.context_length, seed)
    pieces = valid.pieces(config.context_length - len(prefix))  # each becomes one window
    windows = text.eval_windows(tokenizer, pieces, config.context_length, config.eval_tokens)
    return Corpus(rows, windows)
