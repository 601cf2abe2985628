"""Early exits of a model, measured on a text, and thresholds calibrated on one."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from recursive_jax import generation, sharding, text
from recursive_jax.decode_model import OnDevices
from recursive_jax.decoding.config import MISSING_KV
from recursive_jax.decoding.exit_measures import Measure, Oracle, Recorded, Static
from recursive_jax.decoding.requests import check_number
from recursive_jax.decoding.thresholds import Thresholds
from recursive_jax.evaluation import exits, risk
from recursive_jax.evaluation.loops import loop_report
from recursive_jax.evaluation.perplexity import exp
from recursive_jax.models import flops
from recursive_jax.placed import Placed
from recursive_jax.text.documents import documents
from recursive_jax.training.data import tokenize

if TYPE_CHECKING:
    from recursive_jax.model import Model

MEASURABLE = ("top1", "margin", "stable", "cosine", "oracle")
SHOWN = 400  # tokens of the picture, at most
SWEEP = (0.1, 0.25, 0.5, 0.75, 0.9)  # shares of tokens that leave after the first loop
WALKED = 4  # where every candidate is a walk, one of so many is tried
PATH_SHARE = 1 / 5  # of the calibration windows: they choose candidates, and test none
ORACLE = "teacher-forced oracle: it knows the last loop's answer, so no engine can exit like this"


def check(model: Model, measure: Measure) -> None:
    """Raise ValueError unless exits by this measure can be measured of the model."""
    if model.cfg.num_loops < 2:
        raise ValueError(
            f"{model.name} has one loop, so no token can exit early; make a model of several with "
            "python -m recursive_jax.convert --num_loops=2"
        )
    if isinstance(measure, Static | Recorded):
        raise ValueError(
            f"exit measure {measure.name!r} has no threshold to measure: the table shows every "
            f"loop anyway; expected {', '.join(MEASURABLE)}"
        )
    measure.check_loops(model.cfg.num_loops)
    model.cfg.check_decodes()


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model, windows of text and an exit measure; the trace of it all is made once.

    Attributes:
      model: of two loops or more.
      windows: of the text.
      measure: decides which tokens leave.
      missing_kv: the keys and values of loops that a token skipped, as `EngineConfig` has it.
      dtype: compute dtype.
      batch_size: windows at a time, over all devices.
      quiet: show no bars.
    """

    model: Model
    windows: text.Windows
    measure: Measure
    missing_kv: str = "complete"
    dtype: str = "auto"
    batch_size: int = 8
    quiet: bool = False

    def __post_init__(self):
        check(self.model, self.measure)
        if not self.windows.scored[:, 2:].any():  # the first token of a window runs all loops
            raise ValueError(
                "no token of the text may leave early: expected windows of at least 3 tokens; give "
                "more text or a larger context_length"
            )
        if self.missing_kv not in MISSING_KV:
            raise ValueError(
                f"missing_kv={self.missing_kv!r}; expected one of {', '.join(MISSING_KV)}"
            )
        check_number("batch_size", self.batch_size, True, 1, 2**31 - 1)

    def trace(self, placed: Placed | None = None) -> exits.Trace:
        """All loops on all windows; `placed`: the model's weights, if they are there already."""
        placed = placed or Placed(self.model, self.dtype)
        rows = self._rows(placed.decoder.data_shards)
        with placed.use(), self._bar("all loops") as bar:
            return exits.trace(
                placed.decoder, placed.params, *self.windows, self.measure, rows, placed.put,
                bar.update,
            )  # fmt: skip

    def outcomes(
        self, found: exits.Trace, candidates: Iterable[Any], chosen: np.ndarray | None = None
    ) -> Iterable[exits.Outcome]:
        """What each of the thresholds makes of the windows, or of those that are `chosen`."""
        if self.missing_kv == "complete":
            for thresholds in candidates:
                outcome = found.outcome(found.exit_loops(thresholds))
                keep = slice(None) if chosen is None else chosen[found.window]
                yield exits.Outcome(
                    *(getattr(outcome, f.name)[keep] for f in dataclasses.fields(outcome))
                )
            return
        placed = self._decoding
        windows = self.windows if chosen is None else [x[chosen] for x in self.windows]
        rows = self._rows(sharding.data_shards(placed.mesh))
        for thresholds in candidates:
            with (
                sharding.use(placed.mesh, placed.rules),
                sharding.matmul_precision(placed.decoder.dtype),
                self._bar(self.missing_kv, len(windows[0])) as bar,
            ):
                yield exits.walk(
                    placed.decoder, placed.params, *windows, self.measure, thresholds,
                    self.missing_kv, rows, bar.update,
                )  # fmt: skip

    @functools.cached_property
    def _decoding(self) -> OnDevices:
        """The model as an engine has it, for policies that go token by token."""
        mesh, length = sharding.make_mesh(), self.windows.tokens.shape[1]
        compute = sharding.compute_dtype(self.dtype)
        return generation.put_on_devices(self.model, mesh, compute, length)

    def _rows(self, shards: int) -> int:
        return -(-min(self.batch_size, len(self.windows.tokens)) // shards) * shards

    def _bar(self, what: str, total: int | None = None) -> tqdm:
        total = len(self.windows.tokens) if total is None else total
        hidden = self.quiet or jax.process_index() != 0
        return tqdm(total=total, desc=f"exits, {what}", unit="window", disable=hidden, leave=False)


def measure_exits(
    subject: Subject, thresholds: Sequence[float] | None = None, placed: Placed | None = None
) -> dict[str, Any]:
    """Quality, depth and arithmetic of early exits on the tokens of a text.

    Args:
      subject: model, text and measure.
      thresholds: after loop 1, 2, … or one for all; None: a sweep over the scores' quantiles.
      placed: the model's weights, if they are on the devices already.

    Returns:
      `loops`: every token leaves after the same loop. `by_threshold`: exits by the measure.
      `oracle`: labelled as such. `rates`: how answers change from loop to loop. All of the same
      tokens. `shown`: where the first of them leave, for a picture.
    """
    cfg, found = subject.model.cfg, subject.trace(placed)
    context = subject.windows.tokens.shape[1] / 2
    cost = flops.TokenFlops.of(cfg, context)

    def row(outcome, needs_logits, missing_kv):
        values = exits.qualities(found, outcome)
        spent = cost.per_token(outcome.exit_loops, cfg.num_loops, needs_logits, missing_kv)
        rest = flops.comparison(cfg, context, spent)
        return {"nll": values["nll"], "perplexity": exp(values["nll"]), **values, **rest}

    every = np.ones_like(found.target)
    static = [found.outcome(every * (loop + 1)) for loop in range(cfg.num_loops)]
    report = {
        "tokens": len(found.target),
        "measure": subject.measure.name,
        "missing_kv": subject.missing_kv,
        "tokens_are": "the text's own, teacher-forced; the first of a window runs all loops",
        # with a static exit no token reads a deeper loop's keys: 'copy' costs nothing
        "loops": [row(outcome, False, "copy") for outcome in static],
        "rates": loop_report((found.guess == found.target[:, None]).T),
        "oracle": {
            "is": ORACLE, **row(found.outcome(found.oracle_loops()), True, "complete"),
        },
        "by_threshold": [],
    }  # fmt: skip
    if isinstance(subject.measure, Oracle):
        return report
    candidates = sweep(found, subject.measure) if thresholds is None else [tuple(thresholds)]
    for n, outcome in enumerate(subject.outcomes(found, candidates)):
        kept = row(outcome, subject.measure.needs_logits, subject.missing_kv)
        report["by_threshold"].append({"thresholds": list(candidates[n]), **kept})
        if n == len(candidates) // 2:
            report["shown"] = _shown(subject, found, outcome, candidates[n])
    return report


def _shown(subject: Subject, found: exits.Trace, outcome: exits.Outcome, thresholds) -> dict:
    """The beginning of the first window, token by token, for a picture."""
    count = int((found.window[:SHOWN] == found.window[0]).sum())
    tokens = subject.windows.tokens[found.window[0]][: 1 + count]
    detokenizer = text.Detokenizer(subject.model.tokenizer, tokens[:1].tolist())
    return {
        "thresholds": list(thresholds),
        "pieces": [detokenizer.add([int(token)]) for token in tokens[1:]],
        "exit_loops": outcome.exit_loops[:count].tolist(),
    }


def sweep(found: exits.Trace, measure: Measure) -> list[tuple[float, ...]]:
    """Thresholds, the same for all loops; `SWEEP` of the tokens leave after the first loop."""
    scores = found.score[~found.first, 0]
    values = np.quantile(scores.astype(np.float64), 1 - np.asarray(SWEEP))
    lowest, highest = measure.range
    return [(v,) for v in dict.fromkeys(np.clip(values, lowest, highest).tolist())]


def read_windows(
    model: Model, spec: str | os.PathLike, tokens: int, context_length: int, quiet: bool
) -> tuple[text.Windows, int]:
    """Windows from all over a text, in random order, as `risk` assumes; and how many documents.

    Raises:
      ValueError: the text has no token to score.
    """
    docs = documents(os.fspath(spec))
    size = model.cfg.vocab_size

    def encode(texts):
        return text.encode_batch(model.tokenizer, texts, size)

    fingerprint = f"{text.fingerprint(model.tokenizer)} {size}"
    found = tokenize(docs, encode, fingerprint, progress=not quiet)
    length = min(context_length, model.cfg.max_length)
    pieces = list(found.pieces(length - len(text.bos_prefix(model.tokenizer))))
    order = np.random.default_rng(0).permutation(len(pieces))
    shuffled = (pieces[i] for i in order)
    return text.eval_windows(model.tokenizer, shuffled, length, tokens, size), len(found)


def calibrate(
    subject: Subject, bound: float, confidence: float, kind: str, name: str, documents: int
) -> Thresholds:
    """Thresholds that keep a bound with a probability, by `risk.learn_then_test`.

    Args:
      subject: model, measure and windows from `read_windows`.
      bound: of the risk: a share of tokens, or a relative rise of the perplexity.
      confidence: that the bound holds on other text of the same kind.
      kind: of risk, one of `risk.RISKS`.
      name: of the text.
      documents: that it has.

    They name no step yet. Their `record` has the windows, the depth, and the candidates tried.

    Raises:
      ValueError: there is too little text, or no candidate keeps the bound.
    """
    check_number("bound", bound, False, 0, 1)
    check_number("confidence", confidence, False, 0.5, 0.999)
    if kind not in risk.RISKS:
        raise ValueError(f"risk={kind!r}; expected one of {', '.join(risk.RISKS)}")
    measure, count = subject.measure, len(subject.windows.tokens)
    if not measure.takes_threshold:
        raise ValueError(f"exit measure {measure.name!r} has no threshold; nothing to calibrate")
    if count < 10:
        raise ValueError(
            f"{name} has {count} windows, which prove nothing; expected at least 10: give more "
            "text, more tokens or a shorter context"
        )
    found = subject.trace()
    chosen = np.arange(count) < round(count * PATH_SHARE)  # the windows are in random order
    lowest, highest = measure.range
    clipped = (tuple(np.clip(c, lowest, highest).tolist()) for c in risk.path(found, chosen))
    candidates = list(dict.fromkeys(clipped))
    if subject.missing_kv != "complete":
        candidates = candidates[::WALKED]
    tested = found.take(~chosen)

    def try_out(thresholds):
        (outcome,) = subject.outcomes(found, [thresholds], ~chosen)
        return risk.window_losses(tested, outcome, kind), float(outcome.exit_loops.mean())

    accepted, tried = risk.learn_then_test(candidates, try_out, bound, confidence)
    if accepted is None:
        least = tried[0]
        raise ValueError(
            f"no thresholds keep {kind} below {bound:g} with confidence {confidence:g} on "
            f"{(~chosen).sum()} windows of {name}: the most careful ones measure "
            f"{least.risk:.4f}, p = {least.p_value:.3f}; give more text or a larger bound"
        )
    record = {
        "documents": documents,
        "context_length": subject.windows.tokens.shape[1],
        "dtype": sharding.compute_dtype(subject.dtype).name,
        "windows": count,
        "tested_windows": int((~chosen).sum()),
        "risk_on_text": accepted.risk,
        "p_value": accepted.p_value,
        "mean_loops": accepted.mean_loops,
        "tried": [dataclasses.asdict(candidate) for candidate in tried],
    }
    return Thresholds(
        measure.name, accepted.thresholds, bound, name, datetime.date.today().isoformat(), 0, 0,
        risk=kind, confidence=confidence, missing_kv=subject.missing_kv, record=record,
    )  # fmt: skip
