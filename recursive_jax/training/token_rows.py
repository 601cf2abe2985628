"""Rows of directories of tokenised text, and mixtures of several; no array over all documents.

The order is arithmetic: the n-th row of a run follows from n, the seed and the manifests. Grain
shuffles the rows of a directory by an index permutation. The documents of a row come from one group
of consecutive documents, which is shuffled and packed like a whole corpus (`data.PackedRows`). A
corpus of one group has the very rows that the same text has when it is read directly.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from recursive_jax import paths
from recursive_jax.training.data import Batch, PackedRows, Rows, TokenizedDocuments
from recursive_jax.training.token_copy import local_copy
from recursive_jax.training.token_manifest import GROUP_DOCUMENTS, load_manifest
from recursive_jax.training.token_shards import TokenDirectory

GROUPS_IN_MEMORY = 32  # of 16,384 documents; half a MB each


class GroupedRows:
    """The packed rows of one split of a directory; `rows[i]` is a `Batch` of `[T]` arrays.

    Args:
      directory: opened.
      prefix: ids of the BOS rule, may be empty.
      context_length: T.
      seed: of the order of documents in a group.
      part: number of the directory in a mixture; another order for each.
    """

    def __init__(
        self,
        directory: TokenDirectory,
        prefix: Sequence[int],
        context_length: int,
        seed: int,
        part: int = 0,
    ):
        split = directory.manifest.splits["train"]
        self.name, self.num_tokens = str(directory.path), split.tokens
        self._content, self._groups = split.content, len(split.group_tokens)
        self._make = functools.partial(
            _packed, directory, tuple(prefix), context_length, seed, part
        )
        self._packed = functools.lru_cache(GROUPS_IN_MEMORY)(self._make)
        stride = context_length - len(prefix)
        if stride < 1:
            self._make(0)  # raises
        left, ends = split.documents, [0]
        for tokens in split.group_tokens:
            documents = min(left, GROUP_DOCUMENTS)
            left -= documents
            ends.append(ends[-1] + -(-(tokens + documents * len(prefix)) // stride))
        self._ends = ends

    @property
    def content(self) -> str:
        if self._groups == 1:  # the order is that of the text
            return self._content
        return f"{self._content} in {self._groups} groups"

    def endless(self, seed: int) -> grain.MapDataset:
        return grain.MapDataset.source(self).shuffle(seed=seed).repeat()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        group = bisect.bisect_right(self._ends, i) - 1
        return self._packed(group)[i - self._ends[group]]


def _packed(directory, prefix, context_length, seed, part, group) -> PackedRows:
    """The rows of one group."""
    order = seed if not part and not group else [seed, part, group]
    return PackedRows(directory.documents("train", group), prefix, context_length, order)


@dataclasses.dataclass(frozen=True)
class MixedRows:
    """Rows of several directories, mixed by weight; each directory is repeated as needed.

    Attributes:
      parts: rows of the directories.
      weights: shares of the rows; their sum is 1.
    """

    parts: tuple[PackedRows | GroupedRows, ...]
    weights: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def content(self) -> str:
        pairs = zip(self.parts, self.weights, strict=True)
        data = repr([(part.content, weight) for part, weight in pairs])
        return hashlib.blake2b(data.encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def endless(self, seed: int) -> grain.MapDataset:
        # Far apart: an epoch shuffles with seed + its number.
        seeds = [(seed + 0x9E3779B1 * part) % 2**32 for part in range(len(self.parts))]
        datasets = [part.endless(s) for part, s in zip(self.parts, seeds, strict=True)]
        return grain.MapDataset.mix(datasets, self.weights)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Opened directories and the weights that were asked for; None: in proportion to tokens."""

    directories: tuple[TokenDirectory, ...]
    weights: tuple[float, ...] | None

    def rows(self, prefix: Sequence[int], context_length: int, seed: int) -> Rows:
        """The training rows."""
        parts = tuple(
            _rows(directory, prefix, context_length, seed, part)
            for part, directory in enumerate(self.directories)
        )
        if len(parts) == 1:
            return parts[0]
        weights = self.weights or tuple(float(len(part)) for part in parts)
        return MixedRows(parts, tuple(weight / sum(weights) for weight in weights))

    def check_enough(self, rows: Rows, wanted: int, epochs: int) -> None:
        """Raise ValueError if `wanted` rows take more than `epochs` passes over a directory."""
        parts, weights, slack = (rows,), (1.0,), 1.0
        if isinstance(rows, MixedRows):
            parts, weights, slack = rows.parts, rows.weights, 1.01  # grain rounds the weights
        for directory, part, weight in zip(self.directories, parts, weights, strict=True):
            passes = wanted * weight / len(part)
            if passes > epochs * slack:
                raise ValueError(
                    f"{directory.path} has {part.num_tokens:,} tokens to train on, {len(part):,} "
                    f"rows; the run takes {round(wanted * weight):,} rows of it, {passes:.2f} "
                    f"epochs. Tokenise more text, lower config.tokens, or set data.epochs="
                    f"{math.ceil(passes)} to repeat the text"
                )

    def check_held_out(self, valid_fraction: float) -> None:
        """Raise ValueError for a directory that held another share out, or none."""
        for directory in self.directories:
            found = directory.manifest.job.valid_fraction
            if not found:
                raise ValueError(
                    f"{directory.path} holds no documents out; set data.valid, or tokenise the "
                    "text with --valid_fraction=0.01"
                )
            if found != valid_fraction:
                raise ValueError(
                    f"{directory.path} holds a share of {found} out, data.valid_fraction is "
                    f"{valid_fraction}; set data.valid_fraction={found}, or tokenise the text again"
                )

    def valid(self, length: int) -> Iterator[np.ndarray]:
        """Held-out ids in pieces of at most `length`, from the directories in turn."""
        for pieces in itertools.zip_longest(*(_valid(d).pieces(length) for d in self.directories)):
            yield from (piece for piece in pieces if piece is not None)


def _rows(directory, prefix, context_length, seed, part):
    manifest = directory.manifest
    if manifest.held_out != "reader":
        return GroupedRows(directory, prefix, context_length, seed, part)
    docs = directory.documents("train").split("train", manifest.job.valid_fraction)
    return PackedRows(docs, prefix, context_length, [seed, part] if part else seed)


def _valid(directory: TokenDirectory) -> TokenizedDocuments:
    """The held-out documents of a directory; all documents of one that holds none out."""
    manifest = directory.manifest
    if manifest.held_out == "reader":
        return directory.documents("train").split("valid", manifest.job.valid_fraction)
    return directory.documents("valid" if manifest.held_out == "hash" else "train")


def open_mixture(
    spec: str,
    fingerprint: str,
    tokenizer: str,
    vocab_size: int,
    cache_dir: str | None = None,
    progress: bool = False,
) -> Mixture | None:
    """The directories of `spec`, a comma list of DIR or DIR:WEIGHT; None where none is tokenised.

    Args:
      spec: as `data.train`.
      fingerprint, tokenizer: of the model, and its tokenizer's name.
      vocab_size: of the model.
      cache_dir, progress: for the copy of a directory in a bucket, see `token_copy`.

    Raises:
      ValueError: tokenised directories beside text, weights for some of them, another tokenizer, or
        a damaged directory.
    """
    items = [item.strip() for item in spec.split(",") if item.strip()]
    found = [_item(item) for item in items]
    if not any(manifest for _, manifest, _ in found):
        return None
    for item, (_, manifest, _) in zip(items, found, strict=True):
        if manifest is None:
            raise ValueError(
                f"{item} is text, beside directories of tokenised text; tokenise it too "
                f"(python -m recursive_jax.tokenize --data={item})"
            )
    weights = [weight for _, _, weight in found]
    if None in weights and any(weight is not None for weight in weights):
        bare = items[weights.index(None)]
        raise ValueError(f"{bare} has no weight, and others have; write {bare}:WEIGHT, or none")
    for path, manifest, _ in found:
        check_tokenizer(path, manifest, fingerprint, tokenizer, vocab_size)
    directories = tuple(
        TokenDirectory(local_copy(paths.path_of(path), manifest, cache_dir, progress), manifest)
        for path, manifest, _ in found
    )
    return Mixture(directories, None if None in weights else tuple(weights))


def _item(item: str):
    """(path, manifest, weight) of DIR or DIR:WEIGHT; weight None without, manifest None of text."""
    if item.startswith("tfds:"):
        return item, None, None
    manifest = load_manifest(item)
    path, colon, tail = item.rpartition(":")
    if manifest is not None or not colon:
        return item, manifest, None
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if (manifest := load_manifest(path)) is None:
        if item.startswith("docstrings:") or math.isnan(weight) or not paths.path_of(path).exists():
            return item, None, None
        raise ValueError(
            f"{item}: weights are for directories of tokenised text, {path} is text; tokenise it "
            f"(python -m recursive_jax.tokenize --data={path})"
        )
    if not 0 < weight < math.inf:
        raise ValueError(f"{item}: the weight {tail!r} is no number above 0; write {path}:0.5")
    return path, manifest, weight


def check_tokenizer(path, manifest, fingerprint: str, tokenizer: str, vocab_size: int) -> None:
    """Raise ValueError, with both names, for a directory of another tokenizer."""
    job = manifest.job
    if job.fingerprint != fingerprint:
        raise ValueError(
            f"{path} was tokenised with {job.tokenizer} (fingerprint {job.fingerprint}), the model "
            f"has the tokenizer {tokenizer} (fingerprint {fingerprint}); tokenise the text with "
            "that of the model"
        )
    if manifest.max_id >= vocab_size:
        raise ValueError(
            f"{path} has token id {manifest.max_id}, which this model does not have (vocab_size="
            f"{vocab_size}); remove that token from the text"
        )
