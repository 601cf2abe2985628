"""One conversion from its source to its certificate: calibration, tying, and what was measured."""

from __future__ import annotations

import os
import pathlib
import tempfile
import zlib
from typing import TYPE_CHECKING, Any

import jax

from recursive_jax import calibration
from recursive_jax.console.output import note
from recursive_jax.evaluation import certificate as certify
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.weights import tie_config
from recursive_jax.weights.tie_config import TieConfig

if TYPE_CHECKING:
    from recursive_jax.model import Model


def convert(
    model: Model,
    how: TieConfig,
    text: str | None,
    text_tokens: int,
    context_length: int,
    scratch: str | os.PathLike | None,
    spectra: bool,
    quiet: bool,
) -> tuple[Any, DecoderConfig, dict[str, Any]]:
    """Params, config and certificate; see `Model.convert`, whose arguments these are."""
    progress = not quiet and jax.process_index() == 0
    tie_config.checked_config(model.cfg, how)  # raises before any reading
    source = model.weights.as_source(model.cfg, model.tokenizer, model.facts)
    windows = identity = reference = calibrated = None
    if calibration.needed(how):
        same = text_tokens if text == how.calibrate else 0
        calibrated = calibration.read(
            how.calibrate, how.calibration_tokens, model.tokenizer, model.cfg.vocab_size,
            model.cfg.max_length, skip=2 * same, progress=progress,
        )  # fmt: skip
        if calibrated.tokens < 0.9 * how.calibration_tokens:
            note(f"{how.calibrate} has only {calibrated.tokens:,} tokens to calibrate on")
    with tempfile.TemporaryDirectory(prefix=".recursive_jax-", dir=scratch) as place:
        if text is not None:  # the source runs first: two models are never in memory at once
            windows = model.windows(text, text_tokens, context_length)
            identity = certify.full_rank_identity(source, how, windows)
            rows = pathlib.Path(place) / "log_probabilities.f32"
            reference = certify.Reference(rows, source, windows, progress)
        if calibrated is None:
            params, cfg, certificate = certify.tie_with_certificate(source, how, progress)
        else:
            found = calibration.measure(source, model.weights.content(), calibrated, note, progress)
            params, cfg, certificate = calibration.tie(
                source, how, found, calibrated, pathlib.Path(place), progress, spectra
            )
        if reference is not None:
            certificate |= reference.compare(Decoder(cfg), params)
            certificate |= {"full_rank_identity": identity, "text": text}
            certificate |= {
                "context_length": windows.tokens.shape[1],
                "text_checksum": zlib.crc32(windows.tokens.tobytes()),
            }
    return params, cfg, certificate
