"""Text to token ids and back: the conventions that all jobs share.

Every document, window and prompt starts with the ids that the tokenizer itself puts first (its BOS
rule). Nothing is appended. *Content ids* are a text's ids without that prefix. A `tokenizer` is any
tokenizer of `transformers`, which is imported only when one is loaded from disk.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pathlib
import reprlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Ids = Sequence[int] | np.ndarray


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """The tokenizer stored in a directory; the network is never used.

    Raises:
      FileNotFoundError: there is no such directory, or it has no tokenizer files.
      ValueError: the files cannot be read as a tokenizer, or sentencepiece is needed and not
        installed.
    """
    directory = pathlib.Path(path).expanduser()
    if not directory.is_dir():
        raise FileNotFoundError(f"no tokenizer directory {directory}; expected a directory")
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((directory / name).exists() for name in files):
        raise FileNotFoundError(
            f"no tokenizer in {directory}; expected one of {', '.join(files)}. Copy the tokenizer "
            "files of the model there"
        )
    if _needs_sentencepiece(directory):
        raise ValueError(
            f"{directory / 'tokenizer.model'}: reading a SentencePiece model needs sentencepiece, "
            "which is not installed; pip install sentencepiece"
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds
        reason = textwrap.shorten(str(error) or repr(error), 400)
        if isinstance(error, StrictDataclassError):  # of the model's config, which it reads, too
            reason = f"transformers refuses {directory / 'config.json'}: {reason}; correct it there"
        raise ValueError(f"the tokenizer in {directory} cannot be loaded: {reason}") from error


def _needs_sentencepiece(directory: pathlib.Path) -> bool:
    """Whether the only tokenizer here is a SentencePiece model, and sentencepiece is missing.

    Without this check transformers takes the file for one of tiktoken's, and asks for tiktoken.
    """
    model = directory / "tokenizer.model"
    if importlib.util.find_spec("sentencepiece") is not None or not model.is_file():
        return False
    if any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return False
    with open(model, "rb") as file:
        return file.read(1) == b"\n"  # the tag of a vocabulary entry; tiktoken's begin with base64


def bos_prefix(tokenizer: Any) -> list[int]:
    """The tokenizer's BOS rule: the ids it puts in front of a text, `[]` when it has none.

    Found by encoding a text. `bos_token` is no guide: many tokenizers define one and never add it.
    """
    for probe in _probes(tokenizer):
        content = encode_batch(tokenizer, [probe])[0]
        if not content:
            continue
        whole = list(tokenizer.encode(probe, add_special_tokens=True))
        places = range(len(whole) - len(content) + 1)
        found = [at for at in places if whole[at : at + len(content)] == content]
        if not found:
            raise ValueError(
                f"cannot tell the BOS rule of {type(tokenizer).__name__}: {probe!r} is {whole} "
                f"with special tokens and {content} without; expected the second inside the first"
            )
        if len(found) == 1:  # an unknown token may be the BOS token, too
            return whole[: found[0]]
    raise ValueError(
        f"cannot tell the BOS rule of {type(tokenizer).__name__}: no token of its vocabulary can "
        "be written as a text. The tokenizer is damaged; copy it again"
    )


def _probes(tokenizer: Any) -> Iterator[str]:
    """Short texts; a tokenizer of a small alphabet has no id for most of them."""
    yield "a"
    special = set(tokenizer.all_special_ids)
    for i in range(len(tokenizer)):
        token = None if i in special else tokenizer.convert_ids_to_tokens(i)
        if token:
            yield tokenizer.decode([i])  # " the"
            yield token  # "Ġthe": the alphabet may have this and lack the space


def encode(tokenizer: Any, text: str, vocab_size: int | None = None) -> list[int]:
    """Ids of a prompt or document: the BOS rule, then the text; nothing after it.

    With `vocab_size`, ValueError for a text that contains a token without an embedding row (see
    `check_vocabulary`). Such an id would read a wrong row. ValueError, too, for a text of which the
    tokenizer drops every character.
    """
    prefix, content = bos_prefix(tokenizer), encode_batch(tokenizer, [text], vocab_size)[0]
    if not content and text.strip():
        raise ValueError(
            f"nothing is left of the text {reprlib.repr(text)}: the tokenizer drops characters "
            "that are not in its alphabet. Use characters that the model was trained with"
        )
    return prefix + content


def encode_batch(
    tokenizer: Any, texts: Sequence[str], vocab_size: int | None = None
) -> list[list[int]]:
    """Content ids of many texts, in parallel where the tokenizer can; `vocab_size` as `encode`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if backend is None:
            batch = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        else:
            # The Rust tokenizer needs half the time of `tokenizer(texts)`, which tracks offsets.
            backend.no_truncation()
            backend.no_padding()
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
            batch = [encoding.ids for encoding in encodings]
    except (TypeError, UnicodeError) as error:
        raise ValueError(
            "the text cannot be written as UTF-8: it holds half of a surrogate pair, or bytes that "
            "were no UTF-8; mend it"
        ) from error
    if vocab_size is not None:
        for ids in batch:
            check_ids(tokenizer, ids, vocab_size)
    return batch


def check_ids(tokenizer: Any, ids: Ids, vocab_size: int) -> None:
    """ValueError if an id has no embedding row (see `check_vocabulary`)."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"the text contains {tokenizer.convert_ids_to_tokens(largest)!r}, id {largest}, which "
            f"this model does not have (vocab_size={vocab_size}); remove it from the text"
        )


def fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's rules; token caches use it as a key."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # settings of the last call, not rules
            rules.pop(state, None)
    else:
        rules = [type(tokenizer).__name__, tokenizer.get_vocab()]
    data = json.dumps([rules, bos_prefix(tokenizer)], sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def stop_ids(tokenizer: Any, generation_config: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Ids that end a generated text, sorted; `()`: generate up to the token limit.

    They are the ids in `generation_config.json`, those in the tokenizer of a GGUF, and EOS. Any of
    these may lack the token that ends a turn of a chat: fine-tuning often adds one in one place.

    Raises:
      ValueError: `generation_config` or the tokenizer names something else than ids.
    """
    named = (generation_config or {}).get("eos_token_id")
    kept = getattr(tokenizer, "init_kwargs", {}).get("stop_token_ids")
    ids = _ids(named, "eos_token_id in generation_config.json")
    ids |= _ids(kept, "stop_token_ids in tokenizer_config.json")
    ids |= _ids(tokenizer.eos_token_id, "the tokenizer's eos_token_id")
    return tuple(sorted(ids))


def _ids(value: Any, where: str) -> set[int]:
    """The ids of a JSON value: an id, or a list of ids; null is absent."""
    values = value if isinstance(value, list | tuple) else [value]
    ids = [i for i in values if i is not None]
    if any(type(i) is not int or i < 0 for i in ids):  # `True` is an int, too
        raise ValueError(
            f"{where} is {json.dumps(value)}; expected a token id, or a list of token ids, "
            "such as 2 or [2, 7]. Correct it there"
        )
    return set(ids)


def apply_chat(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation up to the start of the model's turn, in the tokenizer's template.

    Args:
      tokenizer: must have a chat template; the template includes BOS.
      prompt: text of the user, or messages `{"role": ..., "content": ...}`.

    Raises:
      ValueError: there is no chat template, or the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this tokenizer has no chat template: the model was not trained to chat. "
            "Give it a text to continue ('prompt', without --chat)"
        )
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except (TemplateError, TypeError, UnicodeError) as error:
        raise ValueError(f"the model's chat template refuses the conversation: {error}") from error
    return list(ids)


class Detokenizer:
    """Text of generated ids, in pieces; joined, they are the text that follows the prompt.

    A piece is returned when its characters are complete. A character may take several tokens, and
    in many tokenizers a space depends on the previous token.

    Args:
      tokenizer: decodes the ids; special tokens are left out of the text.
      prompt: ids of the text that is continued.
    """

    def __init__(self, tokenizer: Any, prompt: Ids = ()):
        self._tokenizer = tokenizer
        self._ids = [int(i) for i in prompt]
        self._before, self._text_before = len(self._ids), self._decode()

    def add(self, ids: Ids) -> str:
        """The new text that can no longer change; '' while a character is incomplete."""
        self._ids.extend(int(i) for i in ids)
        text = self._decode()
        # Decoders write U+FFFD for bytes that are not a complete character.
        return "" if text.endswith("\ufffd") else self._release(text)

    def finish(self) -> str:
        """The rest of the text, even if its last character is incomplete."""
        return self._release(self._decode())

    def _release(self, text: str) -> str:
        piece = text[len(self._text_before) :]
        if piece:
            del self._ids[: self._before]
            self._before, self._text_before = len(self._ids), self._decode()
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """ValueError for a tokenizer with ids that have no embedding row in the model.

    A model may have more rows than the tokenizer has tokens (padding for the hardware). Added
    tokens beyond the last row are allowed unless the tokenizer adds them itself: published models
    have them. Gemma 3's text models, for example, lack the row of `<image_soft_token>`. `encode`
    refuses texts that contain such tokens.
    """
    added = set(tokenizer.get_added_vocab())
    ids = {token: i for token, i in tokenizer.get_vocab().items() if token not in added}
    roles = {i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None}
    roles |= set(bos_prefix(tokenizer))
    ids |= {token: i for token, i in tokenizer.get_added_vocab().items() if i in roles}
    outside = sorted((i, token) for token, i in ids.items() if i >= vocab_size)
    if outside:
        examples = ", ".join(f"{token!r} = {i}" for i, token in outside[:3])
        raise ValueError(
            f"tokenizer and model do not belong together: the tokenizer writes ids up to "
            f"{outside[-1][0]}, the model has rows for 0..{vocab_size - 1} ({len(outside)} tokens "
            f"outside: {examples}). Use the tokenizer the model was trained with"
        )
