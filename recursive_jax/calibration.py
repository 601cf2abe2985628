"""Calibration of a conversion: moments of the source on a text, cached, and held-out windows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from recursive_jax import text
from recursive_jax.evaluation import moments
from recursive_jax.evaluation import refit as refit_lib
from recursive_jax.evaluation.certificate import Reference, tie_with_certificate
from recursive_jax.evaluation.moments import Moments
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.text.documents import documents
from recursive_jax.training import data
from recursive_jax.weights import rank_budget, tying
from recursive_jax.weights.source import Source
from recursive_jax.weights.tie_config import TieConfig, tied_config

CONTEXT_LENGTH = 512  # of the packed rows, at most
HELD_OUT_TOKENS = 2048  # scored, to choose between fits
REFIT_TOKENS = 8192  # at most
HELD_OUT_LENGTH = 128  # tokens per held-out window, at most: many documents are short
KEPT, KEPT_SECONDS = 4, 86_400  # moments in the cache: the newest, and what was used lately
VALID_FRACTION = 0.01  # held out by `train`, with its default; not calibrated on


@dataclasses.dataclass(frozen=True)
class Text:
    """Calibration text, tokenised.

    Attributes:
      name: as `text.documents` takes it.
      rows: packed, `[N, T]` arrays.
      held_out: windows of other documents.
      key: of this text in caches.
      apart: without the tokens at the beginning, which the certificate is measured on.
    """

    name: str
    rows: data.Batch
    held_out: text.Windows
    key: str
    apart: bool

    @property
    def tokens(self) -> int:
        """Positions that count."""
        return int((self.rows.segment_ids > 0).sum())


def read(
    spec: str, tokens: int, tokenizer: Any, vocab_size: int, max_length: int,
    skip: int = 0, progress: bool = True,
) -> Text:  # fmt: skip
    """Some of a text: pieces of many of its documents, packed as `train` packs them.

    Args:
      spec: as `text.documents` takes it.
      tokens: to calibrate on; fewer where the text is shorter.
      tokenizer, vocab_size, max_length: of the model.
      skip: leave out so many tokens at the beginning, which the certificate is measured on. They
        are not left out where they are half of the text, or more.
      progress: show a bar while a text is tokenised.

    Raises:
      ValueError: the text has too few tokens.
    """
    docs = documents(spec)
    fingerprint = f"{text.fingerprint(tokenizer)} {vocab_size}"

    def encode(texts):
        return text.encode_batch(tokenizer, texts, vocab_size)

    found = data.tokenize(docs, encode, fingerprint, progress=progress)
    apart = skip < found.num_tokens // 2
    found = found.without_first(skip) if apart else found
    prefix = text.bos_prefix(tokenizer)
    length = min(CONTEXT_LENGTH, max_length)
    pieces = found.split("train", VALID_FRACTION).pieces(length - len(prefix))
    held_length = min(HELD_OUT_LENGTH, length)
    held_pieces = (piece[: held_length - len(prefix)] for piece in pieces)
    wanted = min(HELD_OUT_TOKENS, max(min(tokens, found.num_tokens) // 8, 32))
    held_out = text.eval_windows(tokenizer, held_pieces, held_length, wanted)
    kept, count = [], 0
    for piece in pieces:
        kept.append(piece)
        count += len(piece) + len(prefix)
        if count >= tokens:
            break
    if not kept:
        raise ValueError(
            f"{spec} has {found.num_tokens:,} tokens, which is too little text to calibrate on; "
            "give --calibrate another text, or --lora_init=svd, which needs none"
        )
    lengths = np.array([len(piece) for piece in kept])
    ids = np.concatenate(kept).astype(np.int32)
    one = data.TokenizedDocuments(
        ids, np.cumsum(lengths) - lengths, lengths, np.arange(len(kept), dtype=np.uint64)
    )
    packed = data.PackedRows(one, prefix, length)
    rows = [packed[i] for i in range(min(len(packed), -(-tokens // length)))]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *rows)
    key = " ".join([docs.fingerprint, fingerprint, str(tokens), str(length), str(skip)])
    return Text(spec, stacked, held_out, key, apart)


def measure(
    source: Source, content: str, calibration: Text, say: Callable[[str], None], progress: bool
) -> Moments:
    """The moments of a model on a calibration text; from the cache if they were measured before.

    Args:
      source: vanilla.
      content: fingerprint of its weights.
      calibration: the text.
      say: is given a line about what is unusual.
      progress: show a bar.

    Raises:
      OSError: the cache has no room, or cannot be written.
      ValueError: a moment is not finite.
    """
    key = " ".join([str(moments.VERSION), str(moments.MAX_BLOCK), content, calibration.key])
    entry = cache_dir() / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    if entry.exists():
        found = Moments.open(entry)
        if found is not None:
            os.utime(entry)
            return found
        say(f"the cached calibration {entry} is damaged; it is measured again")
        shutil.rmtree(entry)
    entry.parent.mkdir(parents=True, exist_ok=True)
    rows = calibration.rows.tokens
    needed = moments.num_bytes(source.cfg)
    needed += 4 * (source.cfg.depth + 1) * rows.size * source.cfg.embed_dim
    free = shutil.disk_usage(entry.parent).free
    if free < needed:
        raise OSError(
            f"the calibration needs {needed / 1e9:.1f} GB in {entry.parent}, which has "
            f"{free / 1e9:.1f} GB free. Set XDG_CACHE_HOME to another disk, lower "
            "--calibration_tokens, or give --lora_init=svd, which needs no calibration"
        )
    found = moments.measure(source, calibration.rows, entry, progress=progress)
    _forget_old(entry.parent)
    return found


def _forget_old(directory: pathlib.Path) -> None:
    """Remove moments that were not used for long: those of a large model have gigabytes."""
    used = {}
    for entry in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has renamed or removed it
            used[entry] = entry.stat().st_mtime
    whole = sorted((entry for entry in used if entry.name[0] != "."), key=used.get, reverse=True)
    killed = [entry for entry in used if entry.name[0] == "."]
    for entry in [*whole[KEPT:], *killed]:
        if time.time() - used[entry] > KEPT_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)


def cache_dir() -> pathlib.Path:
    return data.default_cache_dir().parent / "moments"


def needed(how: TieConfig) -> bool:
    """Whether a conversion is calibrated."""
    how = how.resolved()
    return how.lora_init == "joint" and how.metric != "none" and how.num_loops > 1


def rank_gains(
    source: Source, how: TieConfig, found: Moments, progress: bool = True
) -> dict[str, np.ndarray]:
    """`tying.rank_gains` in the metric of the loss: only there errors of projections compare."""

    def metric(projection, depth, scale, bias):
        return found.metric(projection, depth, "fisher", scale, bias)

    total = len(source.cfg.projections)
    with tqdm(total=total, desc="spectra", unit="projection", disable=not progress) as bar:
        return tying.rank_gains(source.params, source.cfg, how, metric, bar.update)


def deal_ranks(
    cfg: DecoderConfig, how: TieConfig, gains: Mapping[str, np.ndarray]
) -> tuple[TieConfig, dict[str, Any]]:
    """`how` with the ranks of its `lora_budget`, and what the certificate says of them.

    `cfg`: of the source; `gains`: as `rank_gains` returns them.
    """
    share, how = how.lora_budget, dataclasses.replace(how, lora_budget=None)
    tied = tied_config(cfg, how)
    ranks, used = rank_budget.deal(tied, gains, share)
    dealt = {"budget": share, "ranks": ranks, "parameters": used}
    return dataclasses.replace(how, lora_rank=ranks), dealt


def refit_rows(calibration: Text) -> data.Batch:
    """The rows of the text that `refit` takes: it holds all of them in memory."""
    count = max(REFIT_TOKENS // calibration.rows.tokens.shape[1], 1)
    return jax.tree.map(lambda x: x[:count], calibration.rows)


def tie(
    source: Source,
    how: TieConfig,
    found: Moments,
    calibration: Text,
    scratch: pathlib.Path,
    progress: bool = True,
    spectra: bool = False,
) -> tuple[Any, DecoderConfig, dict[str, Any]]:
    """Params, config and certificate of the conversion in the metric of the moments.

    Metric 'auto' fits in both metrics, and keeps the result with the smaller KL divergence from the
    source on the held-out windows: with three loops the residuals may be too large for the metric
    of the loss, which is local. Two results are in memory at a time.

    Args:
      source, how: as for `tying.tie`.
      found: of the source.
      calibration: the text.
      scratch: directory for the source's log-probabilities.
      progress: show bars.
      spectra: the certificate also has what each further rank gains (`rank_budget.gains`).
    """
    about = {"text": calibration.name, "tokens": calibration.tokens}
    if how.lora_budget is not None or spectra:
        plain = dataclasses.replace(how, lora_budget=None)
        gains = rank_gains(source, plain, found, progress)
        about["spectra"] = {n: [float(f"{x:.4g}") for x in values] for n, values in gains.items()}
    if how.lora_budget is not None:
        how, about["dealt"] = deal_ranks(source.cfg, how, gains)
    kinds = ("fisher", "activations") if how.metric == "auto" else (how.metric,)
    reference = Reference(scratch / "held_out.f32", source, calibration.held_out, progress)
    best, chosen, kls = None, kinds[0], {}
    for kind in kinds:

        def metric(projection, depth, scale, bias, kind=kind):
            return found.metric(projection, depth, kind, scale, bias)

        result = tie_with_certificate(source, how, progress, metric, f"tying, {kind}")
        kls[kind] = reference.compare(Decoder(result[1]), result[0])["kl"]
        if best is None or kls[kind] < kls[chosen]:
            best, chosen = result, kind
        del result
    params, cfg, certificate = best
    if not calibration.apart:
        certificate["warnings"].append(
            f"{calibration.name} is too short to fit on one part and measure on another: the "
            "values on this text are those of text that was fitted"
        )
    if how.refit and cfg.lora_ranks:
        fitted = refit_lib.refit(
            source, params, cfg, refit_rows(calibration), found, chosen, progress
        )
        kl = reference.compare(Decoder(cfg), fitted)["kl"]
        about["refit_kl"] = kl
        if kl < kls[chosen]:
            params = fitted
        del fitted
    about["metric"] = chosen
    about["kl_by_metric"] = kls
    about["held_out_tokens"] = int(calibration.held_out.scored[:, 1:].sum())
    return params, cfg, certificate | {"calibration": about}
