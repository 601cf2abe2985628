"""Trains the tokenizer of `assets/tiny`: byte-level BPE, 4096 entries, BOS in front of a text.

    python tests/assets/make_tokenizer.py --text=NOVELS_DIR --out=recursive_jax/assets/tiny

learns from up to 12 MB of each of: the given text files, and the docstrings of the installed
packages. Training and serving only ever read the result; this script is how it was made.
"""

import argparse
import pathlib

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recursive_jax.text import documents

VOCAB_SIZE = 4096
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>"]
CHARS_PER_SOURCE = 12_000_000
# Pieces that merges never cross: contractions; a word with the space before it; single digits
# (numbers then have one spelling); punctuation; line ends; indentation, whose last space is left
# to the word behind it.
PIECES = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\r?\n+|[^\S\r\n]+(?!\S)|[^\S\r\n]+|\s+"
)


def train(sources: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that round-trips every text, for the mix of the given sources."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,  # keeps rulers of dashes from taking vocabulary
    )
    texts = [text for source in sources for text in _sample(source)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


def _sample(source: str) -> list[str]:
    """An equal share from the start of every document, `CHARS_PER_SOURCE` in all."""
    texts = [text for _, text in documents.documents(source)]
    share = CHARS_PER_SOURCE / sum(map(len, texts))
    return [text[: int(len(text) * share) + 1] for text in texts] if share < 1 else texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="files or directories of prose")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    tokenizer = train([args.text, "docstrings:40"])
    tokenizer.save_pretrained(args.out)
    print(f"{len(tokenizer)} entries, {sum(f.stat().st_size for f in args.out.iterdir())} bytes")


if __name__ == "__main__":
    main()
