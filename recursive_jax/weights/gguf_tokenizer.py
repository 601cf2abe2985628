"""A transformers tokenizer from the metadata of a GGUF file.

The file has the vocabulary, the special ids and either byte-level merges ('gpt2') or SentencePiece
scores ('llama'). How text is cut before merging is only a name, `tokenizer.ggml.pre`; the regexes
behind the names are those of the models' published tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Token types of a GGUF vocabulary.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class PreTokenizer(NamedTuple):
    """How text is cut before merging.

    Attributes:
      regex: of the pieces; None: GPT-2's own.
      digits: cut out one by one first.
      nfc: compose characters first. llama.cpp itself never does.
      whole_tokens: a piece that is a token is not merged from its parts.
    """

    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_tokens: bool = False


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "olmo": PreTokenizer(nfc=True),  # also Pythia
    "llama-bpe": PreTokenizer(_LLAMA3_SPLIT, whole_tokens=True),
    "dbrx": PreTokenizer(_LLAMA3_SPLIT),
    "qwen2": PreTokenizer(_QWEN2_SPLIT, nfc=True),
    "stablelm2": PreTokenizer(_QWEN2_SPLIT),
}
PRE_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}

# Tokens that end a turn or a text, for files that name only one of them.
STOP_TOKENS = (
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|>"
).split()


def build_tokenizer(metadata: Mapping[str, Any], architecture: str, max_length: int):
    """A `PreTrainedTokenizerFast`.

    Its `init_kwargs["stop_token_ids"]` are the ids that end a generation; they are saved and
    loaded with it.

    Args:
      metadata: the file's `tokenizer.*` entries, without that prefix.
      architecture: `general.architecture`.
      max_length: tokens the model was trained for.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokens = metadata.get("ggml.tokens")
    if not tokens:
        raise ValueError("the file has no vocabulary (tokenizer.ggml.tokens)")
    kind = metadata.get("ggml.model")
    if kind == "gpt2":
        backend = _byte_level(tokens, metadata)
    elif kind == "llama" and architecture.startswith("gemma"):
        backend = _gemma(tokens, metadata)
    elif kind == "llama":
        backend = _sentencepiece(tokens, metadata)
    else:
        raise ValueError(
            f"tokenizer.ggml.model={kind!r} is not implemented; expected 'gpt2' (byte-level) or "
            "'llama' (SentencePiece)"
        )
    types = metadata.get("ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens but {len(types)} token types")
    vocab = backend.get_vocab()  # lacks Gemma's runs of spaces, which are spelled anew
    for add, special, wanted in (
        (backend.add_special_tokens, True, CONTROL),
        (backend.add_tokens, False, USER_DEFINED),
    ):
        marked = [token for token, t in zip(tokens, types, strict=True) if t == wanted]
        add([AddedToken(t, normalized=False, special=special) for t in marked if t in vocab])

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: metadata.get(f"ggml.{theirs}_token_id") for ours, theirs in names.items()}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    add_bos = metadata.get("ggml.add_bos_token", _adds_bos(metadata))
    add_eos = metadata.get("ggml.add_eos_token", False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": None, "eos_token": None} | special,
        add_bos_token=bool(add_bos) and ids["bos"] is not None,
        add_eos_token=bool(add_eos) and ids["eos"] is not None,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        stop_token_ids=_stop_ids(metadata, tokens, types),
        chat_template=metadata.get("chat_template"),
    )


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a file that does not say so begins texts with BOS; llama.cpp's rule."""
    pre = metadata.get("ggml.pre")
    return metadata["ggml.model"] == "llama" or PRE_ALIASES.get(pre, pre) == "llama-bpe"


def _stop_ids(metadata: Mapping[str, Any], tokens: Sequence[str], types) -> list[int]:
    ids = {metadata.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
    ids |= {i for i, t in enumerate(types) if t == CONTROL and tokens[i] in STOP_TOKENS}
    return sorted(ids)


def _byte_level(tokens: Sequence[str], metadata: Mapping[str, Any]):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("ggml.pre")
    if pre in (None, "default"):  # GPT-2's rule would be a guess, and wrong for Llama 3
        raise ValueError(
            "the file does not say how text is split into words (tokenizer.ggml.pre); use the "
            "model's Hugging Face directory, or a GGUF converted anew"
        )
    name = PRE_ALIASES.get(pre, pre)
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre={pre!r} names a pre-tokenizer that is not implemented; expected "
            f"one of {sorted(PRE_TOKENIZERS | PRE_ALIASES)}. Use the model's Hugging Face directory"
        )
    if "ggml.merges" not in metadata:
        raise ValueError("the file has no merges (tokenizer.ggml.merges)")
    regex, digits, nfc, whole_tokens = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in metadata["ggml.merges"]],
            ignore_merges=whole_tokens,
        )
    )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if regex:
        steps.append(pre_tokenizers.Split(Regex(regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gemma(tokens: Sequence[str], metadata: Mapping[str, Any]):
    """Gemma: spaces are ▁, none is put before the text, and earlier tokens merge first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    # runs of spaces are spelled with real spaces in these files
    tokens = ["▁" * len(t) if " " in t and not t.strip() else t for t in tokens]
    order = [-i for i in range(len(tokens))]
    tokenizer = Tokenizer(_merging(models, tokens, order, metadata))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _sentencepiece(tokens: Sequence[str], metadata: Mapping[str, Any]):
    """Llama: spaces are ▁, one may be put before the text, and better scores merge first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = metadata.get("ggml.scores")
    if not scores and "ggml.merges" not in metadata:
        raise ValueError("the file has no scores (tokenizer.ggml.scores)")
    prefix = metadata.get("ggml.add_space_prefix", True)
    tokenizer = Tokenizer(_merging(models, tokens, scores, metadata))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merging(models, tokens: Sequence[str], scores, metadata: Mapping[str, Any]):
    """SentencePiece BPE, with unknown characters as bytes."""
    unknown = metadata.get("ggml.unknown_token_id")
    return models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(m.split(" ")) for m in metadata.get("ggml.merges", ())]
        or spelled_merges(tokens, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )


def spelled_merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges a scored vocabulary implies: best token first, its longest left part first."""
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = ((token[:i], token[i:]) for i in range(len(token) - 1, 0, -1))
        found += [
            (-score, -len(left), -len(right), left, right)
            for left, right in cuts
            if left in ids and right in ids
        ]
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]
