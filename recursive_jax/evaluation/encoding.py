"""Token ids of texts that are scored, as lm-eval's `hf` model makes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recursive_jax import text as text_lib


class Encoder:
    """Encodes texts for a model.

    Args:
      tokenizer: of transformers.
      vocab_size: of the model.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        given = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._prefix = next((i for i in given if i is not None), None)
        self._prefix_text = "" if self._prefix is None else tokenizer.decode(self._prefix)

    @property
    def prefix(self) -> int:
        """The id before a text without context: BOS, or EOS in a tokenizer without BOS.

        Raises:
          ValueError: the tokenizer has neither.
        """
        if self._prefix is None:
            raise ValueError(
                "the tokenizer has neither a BOS nor an EOS token. A text without a context is "
                "scored behind one; set bos_token or eos_token in tokenizer_config.json"
            )
        return self._prefix

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Ids of a text.

        Args:
          text: to encode.
          special: add what the tokenizer adds, such as BOS; None: unless the text begins with it.

        Raises:
          ValueError: the text has a token without an embedding row.
        """
        if special is None:
            special = not (self._prefix_text and text.startswith(self._prefix_text))
        ids = list(self._tokenizer.encode(text, add_special_tokens=special))
        text_lib.check_ids(self._tokenizer, ids, self._vocab_size)
        return ids

    def first_documents(self, texts: Iterable[str], tokens: int) -> list[str]:
        """The first texts, `tokens` tokens in all at most; the last text may be cut."""
        out: list[str] = []
        for text in texts:
            if tokens <= 0:
                break
            if not text.strip():
                continue
            whole = text[: 16 * tokens]  # characters; a token has fewer
            ids = self.encode(whole)
            kept = whole
            while len(ids) > tokens:
                kept = kept[: max(1, len(kept) * tokens // len(ids))]
                kept = kept.rsplit(None, 1)[0] if len(kept.split()) > 1 else kept[:-1]
                ids = self.encode(kept) if kept else []
            if not kept:
                break
            out.append(kept)
            tokens -= len(ids)
        return out
