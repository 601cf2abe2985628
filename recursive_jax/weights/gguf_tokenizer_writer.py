"""The metadata of a GGUF file for a tokenizer of transformers; the inverse of `gguf_tokenizer`.

A file names the rule by which text is cut before merging. llama.cpp refuses an unknown name. With a
wrong one it makes other ids, and tells nobody. So the tokenizer's own rules are compared with the
known ones, and the tokenizer that our reader makes of the metadata must give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recursive_jax import text
from recursive_jax.weights.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    STOP_TOKENS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PreTokenizer,
    build_tokenizer,
    spelled_merges,
)

# GPT-2's rule, which a byte-level step applies itself unless it is told not to.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Other spellings of a part of a rule -> ours.
SPELLINGS = {
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "'(?i:[sdmt]|ll|ve|re)": "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "[^\\r\\n\\p{L}\\p{N}]?+": "[^\\r\\n\\p{L}\\p{N}]?",
    "[^\\s\\p{L}\\p{N}]++": "[^\\s\\p{L}\\p{N}]+",
}
INSTEAD = "Export the model as hf, or give it a tokenizer that llama.cpp has"
# Texts on which the tokenizer of the file must agree: they tell rules apart.
PROBES = (
    "Hello, world!",
    "don't I'LL 'Title' we've",
    "a1 22 333 4444 x12345y",
    "x  y   z\n\n  w\n\n\nv",
    "\tdef f(x):\n\t\treturn x**2  # two\r\n",
    "(a)[b]{c}...!! 1,234.5e-10",
    "naïve Ångström 日本語 Привет 🙂 ²³½ ٣",
    "a \n b camelCase snake_case",
    "https://example.org/a?b=c&d=%20",
)


def tokenizer_metadata(
    tokenizer: Any,
    architecture: str,
    vocab_size: int,
    generation_config: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The `tokenizer.*` entries of a file, without that prefix.

    Args:
      tokenizer: a fast tokenizer of transformers.
      architecture: of the file.
      vocab_size: rows of the embedding; ids beyond the tokenizer's are marked as unused.
      generation_config: of the model, whose stop ids are written too.
      say: takes one line about what llama.cpp does otherwise.

    Raises:
      ValueError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"the tokenizer is a {type(tokenizer).__name__} without tokenizer.json; a GGUF file "
            "needs a fast tokenizer of transformers"
        )
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a GGUF file holds BPE tokenizers, not {model['type']}. {INSTEAD}")
    tokens, types = _vocabulary(rules, vocab_size)
    steps = _steps(rules["pre_tokenizer"], "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in steps):
        out = {"ggml.model": "gpt2", "ggml.pre": _pre(rules, steps)}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        out |= {"ggml.tokens": tokens, "ggml.token_type": types, "ggml.merges": merges}
        if PRE_TOKENIZERS[out["ggml.pre"]].nfc:
            say("llama.cpp does not compose characters: text that is not in NFC gets other ids")
    else:
        out = _sentencepiece(rules, steps, tokens, types, tokenizer.unk_token_id, architecture)
        if architecture.startswith("gemma"):
            say("llama.cpp cuts a run of more than 31 spaces into other tokens")
        if any(step["type"] == "Metaspace" and out["ggml.add_space_prefix"] for step in steps):
            say(
                "llama.cpp puts a space before every text: a text that begins with a space gets "
                "other ids there"
            )
    out |= _special(tokenizer, tokens, types, generation_config, say)
    _check(tokenizer, out, architecture, rules)
    return out


def _vocabulary(rules: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id."""
    by_id = {i: token for token, i in rules["model"]["vocab"].items()}
    added = {token["id"]: token for token in rules["added_tokens"]}
    by_id |= {i: token["content"] for i, token in added.items()}
    if max(by_id) >= vocab_size:
        raise ValueError(
            f"the tokenizer has id {max(by_id)} and the model only {vocab_size} embedding rows"
        )
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    twice = (
        sorted({token for token in tokens if tokens.count(token) > 1})
        if len(set(tokens)) < len(tokens)
        else []
    )
    if twice:
        raise ValueError(f"the tokenizer has a token twice, which a GGUF file cannot: {twice[:3]}")
    types = [NORMAL if token != f"[PAD{i}]" else UNUSED for i, token in enumerate(tokens)]
    for i, token in added.items():
        types[i] = CONTROL if token["special"] else USER_DEFINED
    return tokens, types


def _steps(rule: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer that may be a sequence."""
    if rule is None:
        return []
    if rule["type"] != "Sequence":
        return [rule]
    return [step for part in rule[inner] for step in _steps(part, inner)]


def _pre(rules: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """llama.cpp's name for the rule of a byte-level tokenizer."""
    normalizers = [step["type"] for step in _steps(rules["normalizer"], "normalizers")]
    model, splits, digits = rules["model"], [], False
    for step in steps[:-1]:
        if step["type"] == "Digits" and step["individual_digits"]:
            digits = True
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            splits.append(step["pattern"].get("Regex"))
        else:
            splits.append(None)
    last = steps[-1]
    plain = last["type"] == "ByteLevel" and not last["add_prefix_space"]
    if splits[:1] == [r"\p{N}"] and not digits:
        digits, splits = True, splits[1:]
    if plain and last["use_regex"]:
        splits.append(GPT2_SPLIT)
    simple = not any(
        (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    ) and normalizers in ([], ["NFC"])
    if plain and simple and len(splits) == 1 and splits[0] is not None:
        regex = splits[0]
        for theirs, ours in SPELLINGS.items():
            regex = regex.replace(theirs, ours)
        found = PreTokenizer(
            None if regex == GPT2_SPLIT else regex,
            digits,
            normalizers == ["NFC"],
            bool(model["ignore_merges"]),
        )
        for name, known in PRE_TOKENIZERS.items():
            if known == found:
                return name
    shown = [step["pattern"] if step["type"] == "Split" else step["type"] for step in steps]
    raise ValueError(
        "llama.cpp has no name for how this tokenizer cuts text: "
        f"normalizer {normalizers or 'none'}, steps {shown}, "
        f"ignore_merges={bool(model['ignore_merges'])}; it would give other ids. Known: "
        f"{', '.join(PRE_TOKENIZERS)}. {INSTEAD}"
    )


def _sentencepiece(rules, steps, tokens, types, unknown, architecture) -> dict[str, Any]:
    """The entries of a SentencePiece tokenizer: scores take the place of merges."""
    model, normalizers = rules["model"], _steps(rules["normalizer"], "normalizers")
    gemma = architecture.startswith("gemma")
    prefix = _space_prefix(normalizers, steps)
    if prefix is None or not model["byte_fallback"] or (gemma and prefix):
        raise ValueError(
            "llama.cpp has no such tokenizer: a BPE that is neither byte-level nor SentencePiece "
            f"of a {'Gemma' if gemma else 'Llama'} (normalizer {[s['type'] for s in normalizers]}, "
            f"steps {[s['type'] for s in steps]}, byte_fallback={model['byte_fallback']}). "
            f"{INSTEAD}"
        )
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    scores = _scores(tokens, types, merges)
    types = [
        BYTE if t == NORMAL and len(token) == 6 and token.startswith("<0x") else t
        for token, t in zip(tokens, types, strict=True)
    ]
    if unknown is not None:
        types[unknown] = UNKNOWN
    if gemma:  # these files spell runs of spaces with real spaces, and match them first
        runs = [i for i, t in enumerate(tokens) if len(t) > 1 and not t.strip("▁")]
        tokens = list(tokens)
        for i in runs:
            tokens[i], types[i] = " " * len(tokens[i]), USER_DEFINED
    return {
        "ggml.model": "llama",
        "ggml.tokens": list(tokens),
        "ggml.token_type": types,
        "ggml.scores": scores,
        "ggml.add_space_prefix": prefix,
    }


def _space_prefix(normalizers, steps) -> bool | None:
    """Whether a space is put before the text; None if this is no SentencePiece tokenizer."""
    kinds = [step["type"] for step in normalizers]
    replaced = any(s["type"] == "Replace" and s["pattern"] == {"String": " "} for s in normalizers)
    if not kinds and len(steps) == 1 and steps[0]["type"] == "Metaspace":
        scheme, split = steps[0]["prepend_scheme"], steps[0]["split"]
        return None if split else scheme != "never"
    # Nothing is left to cut once every space is replaced.
    if any(s["type"] != "Split" or s["pattern"] != {"String": " "} for s in steps) or not replaced:
        return None
    return {("Replace",): False, ("Prepend", "Replace"): True}.get(tuple(kinds))


def _scores(tokens, types, merges) -> list[float]:
    """Scores that put the merges into their order: earlier tokens first, or earlier results."""
    special = {t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)}
    kept = [merge for merge in merges if "".join(merge) not in special]
    ranks = {}
    for rank, merge in enumerate(kept):
        ranks.setdefault("".join(merge), rank)
    for scores in (
        [-float(i) for i in range(len(tokens))],
        [-float(ranks.get(token, len(merges))) for token in tokens],
    ):
        found = [m for m in spelled_merges(tokens, scores) if "".join(m) not in special]
        order = list(dict.fromkeys("".join(merge) for merge in found))
        if order == list(ranks) and set(found) == set(kept):
            return scores
    raise ValueError(
        "llama.cpp has no such tokenizer: its merges are not those of a SentencePiece vocabulary, "
        f"where every token is merged from all pairs that spell it. {INSTEAD}"
    )


def _special(tokenizer, tokens, types, generation_config, say) -> dict[str, Any]:
    """Ids of special tokens, the BOS flag and the chat template."""
    prefix = text.bos_prefix(tokenizer)
    if len(prefix) > 1:
        raise ValueError(
            f"the tokenizer puts {len(prefix)} tokens before a text ({prefix}); a GGUF file can "
            f"say one. {INSTEAD}"
        )
    stop = list(text.stop_ids(tokenizer, generation_config))
    bos = prefix[0] if prefix else tokenizer.bos_token_id
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stop), None)
    if eos is None:
        say("the tokenizer has no end-of-text token; llama.cpp then takes id 11 for it")
    # Both llama.cpp and our reader know these by their text.
    known = {i for i in stop if types[i] == CONTROL and tokens[i] in STOP_TOKENS}
    others = [i for i in stop if i != eos and i not in known]
    ids = {
        "bos": bos,
        "eos": eos,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        **dict(zip(("eot", "eom"), others, strict=False)),
    }
    if others[2:]:
        say(f"a GGUF file has no place for the stop ids {others[2:]}; llama.cpp goes on after them")
    out = {f"ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    out["ggml.add_bos_token"] = bool(prefix)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return out | ({"chat_template": template} if template else {})


def _check(tokenizer, metadata, architecture, rules) -> None:
    """Raise ValueError unless the tokenizer that is read back gives the same ids."""
    again = build_tokenizer(metadata, architecture, 1)
    added = [token["content"] for token in rules["added_tokens"]]
    added = added[:20] + added[-20:]
    if metadata["ggml.model"] == "gpt2":
        probes = [*PROBES, *(f"x{token}y {token} " for token in added)]
    else:  # after a special token, SentencePiece versions differ in the space that they put
        probes = list(PROBES)
    pairs = zip(*(text.encode_batch(t, probes) for t in (tokenizer, again)), strict=True)
    for probe, (expected, found) in zip(probes, pairs, strict=True):
        if expected != found:
            raise ValueError(
                f"llama.cpp would give the text {probe!r} other ids than this tokenizer ({found}, "
                f"expected {expected}); it has rules that a GGUF file cannot express. {INSTEAD}"
            )
