"""Long texts are cut into pieces whose ids are those of the whole text, whatever the tokenizer."""

import functools
import random

import pytest
from test_gguf_tokenizer import train_byte_level, varied_strings
from test_text import TINY
from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from recursive_jax import text
from recursive_jax.text import pieces as pieces_lib
from recursive_jax.text.pieces import pieces


def long_text(seed=0):
    """60,000 characters: lines, blank lines, runs of spaces, code, scripts, digits, emoji."""
    rng = random.Random(seed)
    strings = [s for s in varied_strings() if s]
    ends = ["\n", "\n\n", "\r\n", " ", "  ", "\n    ", ". ", ".\n\n", "\t", "", "\n\n\n\n"]
    parts, size = [], 0
    while size < 60_000:
        parts.append(rng.choice(strings) + rng.choice(ends))
        size += len(parts[-1])
    return "".join(parts)


def trained(model, trainer, normalizer=None, pre_tokenizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.train_from_iterator(varied_strings() * 2, trainer)
    return tokenizer


def bpe(vocab_size=900, **options):
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", *alphabet], show_progress=False
    )
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    words = pre_tokenizers.Metaspace(prepend_scheme="never")
    return trained(model, trainer, options.pop("normalizer", None), words)


def sentencepiece_prefix():
    """Llama's: a space is put in front of every text, and words are not cut."""
    tokenizer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def sentencepiece_normalizer():
    """Llama's as older versions of transformers wrote it: a normalizer and no pre-tokenizer."""
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = None
    return tokenizer


def gemma():
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def unigram():
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, normalizers.NFKC(), pre_tokenizers.Metaspace())


def wordpiece():
    trainer = trainers.WordPieceTrainer(
        vocab_size=700, special_tokens=["[UNK]"], show_progress=False
    )
    bert = normalizers.BertNormalizer(lowercase=True)
    return trained(
        models.WordPiece(unk_token="[UNK]"), trainer, bert, pre_tokenizers.BertPreTokenizer()
    )


def prefix_space():
    """A byte-level tokenizer that puts a space in front of every text, as RoBERTa's may."""
    tokenizer = train_byte_level("gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


TOKENIZERS = {
    "prefix_space": prefix_space,
    "sentencepiece_prefix": sentencepiece_prefix,
    "sentencepiece_normalizer": sentencepiece_normalizer,
    "gemma": gemma,
    "unigram": unigram,
    "wordpiece": wordpiece,
} | {
    name: functools.partial(train_byte_level, name)
    for name in ("gpt-2", "smollm", "llama-bpe", "qwen2")
}


def check(tokenizer, document, least, size=2000):
    """The ids of the pieces are those of the whole, and there are at least so many pieces."""
    encode_batch = functools.partial(text.encode_batch, tokenizer)
    found = list(pieces(document, encode_batch, size))
    whole = document if isinstance(document, str) else "".join(document)
    assert "".join(p.text[p.overlap :] for p in found) == whole
    assert [p.last for p in found] == [False] * (len(found) - 1) + [True]
    ids = encode_batch([p.text for p in found])
    joined = sum((i[p.skip :] for p, i in zip(found, ids, strict=True)), [])
    assert joined == encode_batch([whole])[0]
    assert len(found) >= least
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_the_pieces_are_those_of_the_whole(name):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[name]())
    check(tokenizer, long_text(), least=10)
    check(tokenizer, " ".join(long_text().split()), least=10)  # a single line
    check(tokenizer, "日本語のテキスト。中文测试，标点。" * 2000, least=8)  # no spaces at all


def test_the_embedded_tokenizer():
    document = long_text()
    parts = [document[i : i + 777] for i in range(0, len(document), 777)]
    check(text.load_tokenizer(TINY), parts, least=10)


def test_an_alphabet_without_spaces():
    """A sequence of letters in which nothing but the merges decides where tokens end."""
    sequence = "".join(random.Random(1).choices("ACGT", k=40_000))
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator([sequence[:5000]], trainer)
    check(PreTrainedTokenizerFast(tokenizer_object=tokenizer), sequence, least=10)


def test_a_text_that_cannot_be_cut_stays_whole():
    """One token for the whole run: a cut anywhere gives other ids."""

    def runs(texts):
        return [[len(t)] if t else [] for t in texts]

    (piece,) = pieces("x" * 20_000, runs, size=1000)
    assert (len(piece.text), piece.skip, piece.last) == (20_000, 0, True)
    assert [p.text for p in pieces("", runs)] == [""]
    assert pieces_lib.PIECE_CHARS > 10 * pieces_lib.CONTEXT
