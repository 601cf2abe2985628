"""What a model is measured with: the part of `Model` that changes no weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from recursive_jax import evaluating, generation
from recursive_jax import text as text_lib
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.exit_measures import Measure, TopProbability
from recursive_jax.decoding.requests import check_number
from recursive_jax.evaluation_settings import Settings
from recursive_jax.placed import Placed
from recursive_jax.text.documents import documents

if TYPE_CHECKING:
    from recursive_jax.model import Model


class Measures:
    """Methods of `Model`."""

    def perplexity(
        self,
        text: str | os.PathLike | Iterable[str],
        tokens: int = 20_000,
        context_length: int = 512,
        batch_size: int = 8,
        dtype: str = "auto",
    ) -> dict[str, Any]:
        """The perplexity of every exit on a text, as `evaluation.perplexity` returns it.

        Args:
          text: as `text.documents` takes it, or the texts themselves.
          tokens: scored, at most.
          context_length: tokens per window.
          batch_size: windows per call of the model, over all devices.
          dtype: compute dtype.
        """
        check_number("batch_size", batch_size, True, 1, 2**31 - 1)
        windows = self.windows(text, tokens, context_length)
        return Placed(self, dtype).perplexity(windows, batch_size)

    def evaluate(
        self,
        text: str | os.PathLike | None = None,
        *,
        source: Model | str | None = "auto",
        out: str | os.PathLike | None = None,
        quiet: bool = False,
        **settings: Any,
    ) -> dict[str, Any]:
        """The report of this model, and of its source by the same settings, as JSON.

        Args:
          text: to measure perplexity on, as `text.documents` takes it.
          source: vanilla model or its name; 'auto': what this model was converted from, if it is
            still there; None leaves it out. A vanilla model has none.
          out: file of the report. While it is made, results are kept in OUT.part, and the same call
            goes on from there. The source's report is kept in OUT.source.json.
          quiet: show no progress.
          settings: fields of `evaluation_settings.Settings`: `tasks`, `task_dir`, `text_tokens`,
            `context_length`, `limit`, `batch_size`, `dtype`, `exits` and how tokens exit.

        Raises:
          FileNotFoundError, ValueError: a setting, text or task that cannot be used; by name.
        """
        text = text if text is None else os.fspath(text)
        how = one_of("settings", None, Settings, {"text": text, **settings})
        return evaluating.evaluate(self, how, source, out, quiet)

    def harness(
        self, *, context_length: int | None = None, batch_size: int = 8, dtype: str = "auto"
    ) -> Any:
        """The model as lm-eval calls it, for `lm_eval.simple_evaluate(model=...)`.

        Args:
          context_length: longest context; None: that of the model's config.
          batch_size: rows per call of the model.
          dtype: compute dtype.

        Raises:
          ValueError: lm-eval is not installed.
        """
        evaluating.check_lm_eval()
        longest = min(context_length or self.cfg.max_length, self.cfg.max_length)
        return evaluating.language_model(self, Placed(self, dtype), longest, batch_size)

    def exits(
        self,
        text: str | os.PathLike | Iterable[str],
        tokens: int = 20_000,
        context_length: int = 512,
        *,
        measure: Measure | None = None,
        missing_kv: str = "complete",
        batch_size: int = 8,
        dtype: str = "auto",
        quiet: bool = False,
    ) -> dict[str, Any]:
        """Quality, depth and arithmetic of early exits, as `early_exits.measure_exits` returns it.

        Args:
          measure: decides which tokens leave, such as `TopProbability(0.9)`; None: the top
            probability. Without a threshold of its own it takes that of `thresholds` if they are
            for it, and is else measured at five of them.
          missing_kv: source of the keys and values of skipped loops, as in `EngineConfig`.
          quiet: show no bars.
          Others as `perplexity`.

        Raises:
          ValueError: a model of one loop, or a bad setting.
        """
        from recursive_jax.early_exits import Subject, measure_exits

        config = EngineConfig(measure=measure or TopProbability(), missing_kv=missing_kv)
        config = generation.with_thresholds(config, self)
        windows = self.windows(text, tokens, context_length)
        subject = Subject(self, windows, config.measure, missing_kv, dtype, batch_size, quiet)
        return measure_exits(subject, config.thresholds)

    def calibrate(
        self,
        text: str | os.PathLike,
        tokens: int = 50_000,
        context_length: int = 128,
        *,
        measure: Measure | None = None,
        bound: float = 0.05,
        confidence: float = 0.9,
        risk: str = "disagreement",
        missing_kv: str = "complete",
        batch_size: int = 8,
        dtype: str = "auto",
        quiet: bool = False,
    ) -> Model:
        """This model with `thresholds` that keep a bound on other text of the same kind.

        Args:
          text: held out, as `text.documents` takes it; windows are drawn from all over it.
          measure: to find thresholds for; None: the top probability.
          bound: of the risk.
          confidence: probability that the bound holds (see `evaluation.risk` for what it assumes).
          risk: 'disagreement', the share of tokens that differ from full depth, or 'perplexity',
            its relative rise.
          Others as `exits`.

        Raises:
          ValueError: too little text, no thresholds that keep the bound, or a bad setting.
        """
        from recursive_jax import early_exits

        windows, documents = early_exits.read_windows(self, text, tokens, context_length, quiet)
        measure = TopProbability() if measure is None else measure
        subject = early_exits.Subject(self, windows, measure, missing_kv, dtype, batch_size, quiet)
        thresholds = early_exits.calibrate(
            subject, bound, confidence, risk, os.fspath(text), documents
        )
        return dataclasses.replace(self, thresholds=thresholds)

    def windows(
        self, source: str | os.PathLike | Iterable[str], tokens: int, context_length: int
    ) -> text_lib.Windows:
        """Windows of a text, to score `tokens` tokens of it."""
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        texts = (t for _, t in documents(source)) if isinstance(source, str) else source
        length = min(context_length, self.cfg.max_length)
        return text_lib.eval_windows(self.tokenizer, texts, length, tokens, self.cfg.vocab_size)


def one_of(name: str, given: Any, kind: type, options: dict[str, Any]) -> Any:
    """A config object, given whole or by its fields."""
    if given is None:
        known = [field.name for field in dataclasses.fields(kind)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"unknown options {unknown}; expected some of {', '.join(known)}")
        return kind(**options)
    if options:
        raise ValueError(f"{name} beside {', '.join(options)}; give one or the other")
    if not isinstance(given, kind):
        raise ValueError(f"{name}={given!r}; expected a {kind.__name__}")
    return given
