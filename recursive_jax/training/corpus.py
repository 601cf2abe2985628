"""The text of a run: packed rows to train on, and windows held out for perplexity."""

from __future__ import annotations

import dataclasses
from typing import Any

from recursive_jax import text
from recursive_jax.text.documents import documents
from recursive_jax.training import data
from recursive_jax.training.config import DataConfig
from recursive_jax.training.draw_files import DrawDirectory
from recursive_jax.training.token_rows import Mixture, open_mixture


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Attributes:
    rows: to train on.
    windows: held out.
    mixture: of tokenised directories that the rows come from; None: the text was read.
    draws: from the teacher, of every row; None: there are none.
    """

    rows: data.Rows
    windows: text.Windows
    mixture: Mixture | None = None
    draws: DrawDirectory | None = None

    @property
    def draws_fingerprint(self) -> str:
        """Of the draws; '' where there are none."""
        return "" if self.draws is None else self.draws.job.fingerprint

    def check_enough(self, wanted: int, epochs: int) -> None:
        """Raise ValueError if a run of `wanted` rows repeats a directory more than `epochs` times.

        Text that was read directly is repeated as often as needed.
        """
        if self.mixture is not None:
            self.mixture.check_enough(self.rows, wanted, epochs)


def open_corpus(
    config: DataConfig, tokenizer: Any, vocab_size: int, seed: int, progress: bool = True
) -> Corpus:
    """The tokenised text of `config`: of `recursive_jax.tokenize`, from the cache, or made now.

    Args:
      config: which text, and the sizes of rows.
      tokenizer: any tokenizer of `transformers`.
      vocab_size: of the model; every token id is below it.
      seed: of the order of documents.
      progress: show a progress bar.

    Raises:
      ValueError: there is no text, none is left to train on or to hold out, or a tokenised
        directory is damaged or of another tokenizer.
    """

    def tokens(spec):
        return data.tokenize(
            documents(spec),
            lambda texts: text.encode_batch(tokenizer, texts, vocab_size),
            f"{text.fingerprint(tokenizer)} {vocab_size}",
            config.cache_dir or None,
            progress=progress,
        )

    def mixture(spec):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        fingerprint, cache = text.fingerprint(tokenizer), config.cache_dir or None
        return open_mixture(spec, fingerprint, name, vocab_size, cache, progress)

    prefix = text.bos_prefix(tokenizer)
    length = config.context_length - len(prefix)  # each piece becomes one window
    stored, stored_valid = mixture(config.train), mixture(config.valid)
    pieces = None
    if stored_valid is not None:
        pieces = stored_valid.valid(length)
    elif config.valid:
        pieces = tokens(config.valid).pieces(length)
    if stored is not None:
        rows = stored.rows(prefix, config.context_length, seed)
        if pieces is None:
            stored.check_held_out(config.valid_fraction)
            pieces = stored.valid(length)
    else:
        train = tokens(config.train)
        if pieces is None:
            pieces = train.split("valid", config.valid_fraction).pieces(length)
            train = train.split("train", config.valid_fraction)
        rows = data.PackedRows(train, prefix, config.context_length, seed)
    windows = text.eval_windows(tokenizer, pieces, config.context_length, config.eval_tokens)
    return Corpus(rows, windows, stored)
