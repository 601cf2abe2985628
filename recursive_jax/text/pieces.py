"""Long documents in pieces that are tokenised apart and give the ids of the whole document.

A tokenizer needs about 150 bytes of memory for every character of a call. Documents are therefore
cut, and every cut is checked with the tokenizer itself: in the text around the cut, the ids of the
whole must be the ids of the left part followed by the ids of the right part.

Why that suffices: tokenizers cut a text into words by rules that look at few characters, and never
merge tokens of two words. Where no words are cut (SentencePiece), merges are never undone. A token
boundary in the ids of the whole then means that no merge crossed it, so that both sides have been
merged independently of each other. The same holds for the best path of a unigram model. The check
reads `CONTEXT` characters on either side. A tokenizer in which more distant characters decide
could still differ.

A tokenizer that puts a space in front of every text changes the first ids of a right part. The
right part then begins some characters earlier, and the ids of these characters are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

PIECE_CHARS = 250_000
# Characters on either side that are read to check a cut. A prime number: in a run of one character
# whose tokens have 2, 3 or 64 of them, the left part does not end where a token happens to end.
CONTEXT = 1009
SEARCH = 4096  # a cut is searched for in so many characters
TRIES = 16  # of each kind of position
SPACES = re.compile(r"\s+")

EncodeBatch = Callable[[list[str]], Sequence[Sequence[int]]]


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
      text: what to tokenise.
      overlap: leading characters of `text` that belong to the previous piece.
      skip: leading ids of `text` that belong to the previous piece.
      last: whether the document ends here.
    """

    text: str
    overlap: int = 0
    skip: int = 0
    last: bool = True


def pieces(
    document: str | Iterable[str], encode_batch: EncodeBatch, size: int = PIECE_CHARS
) -> Iterator[Piece]:
    """The pieces of one document; their ids without the skipped ones are those of the document.

    Args:
      document: a text, or its parts in order.
      encode_batch: texts -> ids, without BOS.
      size: characters per piece, roughly. A text that cannot be cut stays in one piece.
    """
    text, overlap, skip = "", 0, 0
    for part in [document] if isinstance(document, str) else document:
        for start in range(0, len(part), size):
            text += part[start : start + size]
            if len(text) - overlap <= size + 2 * CONTEXT:
                continue
            cut = _find_cut(text, max(overlap + 1, len(text) - CONTEXT - SEARCH), encode_batch)
            if cut is not None:
                end, next_overlap, next_skip = cut
                yield Piece(text[:end], overlap, skip, last=False)
                text, overlap, skip = text[end - next_overlap :], next_overlap, next_skip
    yield Piece(text, overlap, skip)


def _find_cut(text: str, low: int, encode_batch: EncodeBatch) -> tuple[int, int, int] | None:
    """Where to cut `text` behind `low`: (end, overlap of the next piece, ids it skips), or None."""
    for at in _positions(text, low, len(text) - CONTEXT):
        left, right = text[max(at - CONTEXT, 0) : at], text[at : at + CONTEXT]
        word = left.rstrip().rfind(" ") + 1
        for overlap in (0, len(left) - word):
            parts = [left + right, left, left[len(left) - overlap :] + right]
            whole, before, after = (list(ids) for ids in encode_batch(parts))
            skip = len(before) + len(after) - len(whole)
            if skip >= 0 and before + after[skip:] == whole:
                return at, overlap, skip
    return None


def _positions(text: str, low: int, high: int) -> Iterator[int]:
    """Positions to try, from the right: edges of line breaks, then of other spaces, then any."""
    spaces = [match.span() for match in SPACES.finditer(text, low, high)][::-1]
    lines = [span for span in spaces if "\n" in text[span[0] : span[1]]]
    for spans in (lines[:TRIES], spaces[:TRIES]):
        for start, end in spans:
            yield start
            yield end
    yield from range(high, max(high - 4 * TRIES, low), -1)
