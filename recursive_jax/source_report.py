"""The source's numbers beside those of a recursive model, and whether they may be compared."""

from __future__ import annotations

import json
import pathlib
import zlib
from typing import Any

import jax

from recursive_jax import files
from recursive_jax.evaluating import WINDOW, WINDOWS, measure
from recursive_jax.evaluation_settings import Settings
from recursive_jax.model import Model, load
from recursive_jax.placed import Placed
from recursive_jax.text.documents import documents

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # nats per token between two runs of one model


def find(model: Model, source: Model | str) -> tuple[Model | None, str]:
    """The source, or None and the reason.

    Raises:
      FileNotFoundError, ValueError: a source that was named, not 'auto', cannot be used.
    """
    if source == "auto":
        if model.facts.get("source") is None:
            return None, "the model does not name its source"
        try:
            source = load(model.facts["source"])
        except (OSError, ValueError) as error:
            return None, f"no source to measure: {error}"
    found = load(source) if isinstance(source, str) else source
    if found.cfg.num_loops > 1:
        raise ValueError(f"the source {found.name} is recursive; expected a vanilla model")
    return found, ""


def measured(
    model: Model,
    settings: Settings,
    source: Model,
    out: pathlib.Path | None,
    quiet: bool,
) -> dict[str, Any]:
    """The source's numbers by the same settings, and whether they may be compared.

    Returns:
      `from`: 'measured', or 'stored' in an earlier report beside `out`. `perplexity` and `tasks` as
      `measure` returns them. `check`: of the source against the certificate (`check_source`).
    """
    asked = {"content": source.weights.content(), "settings": settings.to_json()}
    asked["items"] = _checksums(settings)
    stored = None if out is None else pathlib.Path(f"{out}.source.json")
    report = _stored_report(stored, asked)
    if report is None:
        part = None if stored is None else pathlib.Path(f"{stored}.part")
        report = {"key": asked, "from": "stored"} | measure(source, settings, part, quiet)
        report["check"] = check_source(model, source, settings)
        if stored is not None and jax.process_index() == 0:
            files.write_whole(stored, json.dumps(report, indent=1) + "\n")
            part.unlink(missing_ok=True)
        report["from"] = "measured"
    else:
        report["check"] = check_source(model, source, settings)
    del report["key"]
    return report


def _stored_report(path: pathlib.Path | None, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The source's report in a file, if it is of these weights and settings."""
    if path is None or not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report if report["key"] == asked else None
    except (ValueError, TypeError, KeyError, RecursionError):  # a file of something else
        return None


def _checksums(settings: Settings) -> list[Any]:
    """What changes when the text or the local tasks do, though their names stay."""
    out: list[Any] = []
    if settings.text is not None:
        out.append(documents(settings.text).fingerprint)
    if settings.task_dir is not None:
        paths = sorted(pathlib.Path(settings.task_dir).expanduser().glob("*.jsonl"))
        out += [[path.name, zlib.crc32(path.read_bytes())] for path in paths]
    return out


def certified(model: Model, settings: Settings) -> dict[str, Any]:
    """The source's perplexity as the conversion measured it, where text and settings are equal."""
    certificate = model.certificate or {}
    stored = [certificate.get(name) for name in ("text", "text_tokens", "context_length")]
    asked = [settings.text, settings.text_tokens, settings.context_length or WINDOW]
    if "source_nll" not in certificate or stored != asked:
        return {"from": "nowhere"}
    windows = {
        "definition": WINDOWS,
        "context_length": certificate["context_length"],
        "tokens": certificate["text_tokens"],
        "nll": certificate["source_nll"],
        "nll_stderr": None,
        "perplexity": certificate["source_perplexity"],
    }
    return {"from": "certificate", "perplexity": {"windows": windows}}


def check_source(model: Model, source: Model, settings: Settings) -> dict[str, Any]:
    """Whether the source still gives the nll that the model's certificate stores.

    If not, it is another model, or is computed otherwise: numbers must not be compared with it.

    Returns:
      `agrees`: True, False, or None where it cannot be told, with the `reason`; `text`, `stored`
      and `measured` nll in nats per token, and the `tolerance`.
    """
    certificate = model.certificate or {}
    if "source_nll" not in certificate:
        return {"agrees": None, "reason": "the certificate has no measurement of the source"}
    text, tokens = certificate["text"], certificate["text_tokens"]
    try:
        windows = source.windows(text, tokens, certificate.get("context_length", WINDOW))
    except (OSError, ValueError) as error:
        return {"agrees": None, "reason": f"the certificate's text cannot be read: {error}"}
    checksum = zlib.crc32(windows.tokens.tobytes())
    if certificate.get("text_checksum", checksum) != checksum:
        return {"agrees": None, "reason": f"{text} is another text than the certificate's"}
    placed = Placed(source, settings.dtype)
    found = placed.perplexity(windows, settings.batch_size)["nll"]
    stored, tolerance = certificate["source_nll"], TOLERANCE[settings.dtype]
    return {
        "agrees": abs(found - stored) <= tolerance,
        "text": text,
        "stored": stored,
        "measured": found,
        "tolerance": tolerance,
    }
