"""A report of a model: perplexity and tasks after every loop, with its source beside it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from recursive_jax import file_lock, files, generation, sharding
from recursive_jax.console.output import note
from recursive_jax.console.progress import WorkProgress
from recursive_jax.decoding.requests import Request, Sampling
from recursive_jax.evaluation import rolling
from recursive_jax.evaluation.encoding import Encoder
from recursive_jax.evaluation.records import Records, key, recorded_scores
from recursive_jax.evaluation_settings import Settings
from recursive_jax.placed import Placed
from recursive_jax.text.documents import documents

if TYPE_CHECKING:
    from recursive_jax.model import Model

WINDOW = 512  # tokens of a window by this project's convention, if not given
LONGEST_WINDOW = 2048  # of rolling perplexity, if not given: attention is quadratic in it
WINDOWS = (
    "recursive_jax: disjoint windows of context_length tokens, each behind the tokenizer's own "
    "prefix (BOS or nothing); per token. Every loop is an exit through the same final norm and head"
)


def measure(
    model: Model, settings: Settings, part: str | os.PathLike | None = None, quiet: bool = False
) -> dict[str, Any]:
    """The numbers of one model: `model`, and what was asked of `perplexity` and `tasks`.

    Args:
      model: any.
      settings: what is measured.
      part: file that keeps results of requests, from which an interrupted call goes on.
      quiet: show no progress.
    """
    loaded = None
    if settings.tasks is not None:
        check_lm_eval()
        from recursive_jax.evaluation.tasks import load_tasks

        loaded = load_tasks(settings.tasks, settings.task_dir)  # before any work
    texts = None
    if settings.text is not None:
        windows = model.windows(
            settings.text, settings.text_tokens, settings.context_length or WINDOW
        )
        encoder = Encoder(model.tokenizer, model.cfg.vocab_size)
        stream = (text for _, text in documents(settings.text))
        texts = encoder.first_documents(stream, settings.text_tokens)
    out: dict[str, Any] = {"model": describe(model)}
    placed = Placed(model, settings.dtype)
    longest = settings.max_length(model.cfg.max_length)
    say = str if quiet else note
    with _records(model, settings, longest, part, say) as records:
        if texts is not None:
            length = windows.tokens.shape[1]
            name = key("windows", length, zlib.crc32(windows.tokens.tobytes()))
            if name not in records:
                with WorkProgress("perplexity by windows", quiet) as progress:
                    found = placed.perplexity(windows, settings.batch_size, progress)
                records.add([(name, found)])
            found = records[name]
            facts = {"definition": WINDOWS, "context_length": length}
            out["perplexity"] = {"windows": facts | found}
            length = longest if settings.context_length else min(longest, LONGEST_WINDOW)
            with WorkProgress("rolling perplexity", quiet) as progress:
                found = _rolling(encoder, texts, length, placed, settings, records, progress)
            out["perplexity"]["rolling"] = {"max_length": length} | found
            if settings.exits:
                config = generation.with_thresholds(settings.exit_config(), model)
                name = key("early exits", str(config), zlib.crc32(windows.tokens.tobytes()))
                if name not in records:
                    records.add([(name, _exits(model, windows, config, settings, placed, quiet))])
                out["exits"] = records[name]
        if loaded is not None:
            from recursive_jax.evaluation import harness

            with WorkProgress("tasks", quiet) as progress:
                args = placed, longest, settings.batch_size, records, progress
                out["tasks"] = harness.run(language_model(model, *args), loaded, settings.limit)
    return out


def _exits(model, windows, config, settings, placed, quiet) -> dict[str, Any]:
    from recursive_jax.early_exits import Subject, measure_exits

    how = config.measure, config.missing_kv, settings.dtype, settings.batch_size, quiet
    return measure_exits(Subject(model, windows, *how), config.thresholds, placed)


def language_model(
    model: Model,
    placed: Placed,
    max_length: int,
    batch_size: int,
    records: Records | None = None,
    progress: Callable[[float], None] = float,
) -> Any:
    """The model as lm-eval calls it: a `harness.RecursiveLM`."""
    from recursive_jax.evaluation import harness

    generate = generator(model, max_length, placed.decoder.dtype.name)
    return harness.RecursiveLM(
        model.tokenizer, model.cfg.vocab_size, max_length,
        placed.likelihoods(max_length, batch_size), generate, records, progress,
    )  # fmt: skip


def evaluate(
    model: Model,
    settings: Settings,
    source: Model | str | None = "auto",
    out: str | os.PathLike | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """The report of a model, and of the source of a recursive one by the same settings.

    Args:
      model: any.
      settings: what is measured.
      source: vanilla model; 'auto': the one the model was converted from, if it is still there;
        None leaves it out.
      out: file of the report. OUT.part keeps results while they are made, OUT.source.json the
        source's report.
      quiet: show no progress.

    Returns:
      JSON: `settings`, `model`, `perplexity` and `tasks` as `measure` returns them. `source` of a
      recursive model: `source_report.measured`, or what its certificate stores: `from` is then
      'certificate' or 'nowhere', and `reason` says why the source was not measured.
    """
    from recursive_jax import source_report

    out = None if out is None else pathlib.Path(out)
    part = None if out is None else pathlib.Path(f"{out}.part")
    if settings.exits:  # refused before any work
        from recursive_jax.early_exits import check

        check(model, generation.with_thresholds(settings.exit_config(), model).measure)
    beside, reason = None, ""
    if model.cfg.num_loops > 1 and source is not None:
        beside, reason = source_report.find(model, source)  # before any work
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if out is not None and first:
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock.hold(pathlib.Path(f"{part}.lock"), part, "--out"))
        report = {"settings": settings.to_json(), "versions": versions()}
        report |= measure(model, settings, part, quiet)
        if beside is not None:
            report["source"] = source_report.measured(
                model, settings.of_source(), beside, out, quiet
            )
        elif reason:
            report["source"] = source_report.certified(model, settings) | {"reason": reason}
        if out is not None and first:
            files.write_whole(out, json.dumps(report, indent=1) + "\n")
            part.unlink(missing_ok=True)
    return report


def versions() -> dict[str, str]:
    from recursive_jax import __version__

    found = {"recursive_jax": __version__, "jax": jax.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["lm_eval"] = importlib.metadata.version("lm_eval")
    return found


def describe(model: Model) -> dict[str, Any]:
    """What was measured, as JSON."""
    cfg = model.cfg
    return {
        "name": model.name,
        "family": cfg.family,
        "num_loops": cfg.num_loops,
        "layers": cfg.num_layers,
        "content": model.weights.content(),
        "step": getattr(model.weights, "step", None),
    }


def check_lm_eval() -> None:
    """Raise ValueError if lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tasks need lm-eval, which cannot be imported ({error}); "
            "pip install 'recursive_jax[eval]'"
        ) from error


@contextlib.contextmanager
def _records(model, settings, longest, part, say) -> Iterator[Records]:
    """Results so far; their file stays until the report is written."""
    run = json.dumps([model.cfg.to_json(), model.weights.content(), settings.dtype, longest])
    records = Records(part, run, say, jax.process_index() == 0)
    sharding.check_agreement("the number of results that are kept", len(records))
    with contextlib.closing(records):
        yield records


def _rolling(encoder, texts, length, placed, settings, records, progress) -> dict[str, Any]:
    encoded = [encoder.encode(text) for text in texts]
    pairs = [pair for ids in encoded for pair in rolling.windows(ids, encoder.prefix, length)]
    scorer = placed.likelihoods(length, settings.batch_size)
    scores = recorded_scores(scorer, pairs, records, progress)
    return rolling.summarise(texts, [len(after) for _, after in pairs], scores)


def generator(model: Model, max_length: int, dtype: str):
    """Answers lm-eval's prompts by the depth-wise engine; see `harness.Generate`."""

    def generate(prompts: Sequence[tuple[list[int], Mapping[str, Any]]]) -> Iterable:
        requests = [
            make_request(n, ids, options, max_length, model.stop)
            for n, (ids, options) in enumerate(prompts)
        ]
        for event in model.stream(requests, dtype=dtype, max_ticks=None):
            if event.completion is not None:
                if event.completion.error:
                    raise ValueError(event.completion.error)
                yield event.index, event.completion.text

    return generate


def make_request(
    number: int, ids: Sequence[int], options: Mapping[str, Any], max_length: int, stop: Any
) -> Request:
    """The request of a prompt of lm-eval; a long prompt is cut from the left, as by `hf`.

    Raises:
      ValueError: an option that the engine does not have.
    """
    options = dict(options)
    limits = [options.pop(n, None) for n in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    most = int(next((n for n in limits if n is not None), 256))
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    temperature = float(options.pop("temperature", 0.0) or 0.0)
    if not options.pop("do_sample", temperature > 0):
        temperature = 0.0
    names = [n for n in ("top_k", "top_p", "min_p", "seed", "repetition_penalty") if n in options]
    sampling = Sampling(temperature=temperature, **{name: options.pop(name) for name in names})
    if options:
        raise ValueError(f"the task generates with {sorted(options)}, which the engine lacks")
    if most >= max_length:
        raise ValueError(
            f"the task generates up to {most} tokens, and the context holds {max_length} with the "
            "prompt; raise context_length"
        )
    kept = tuple(ids)[-(max_length - most) :]
    strings = tuple(text for text in until if text)
    return Request(number, kept, most, stop, sampling, stop_strings=strings)
