"""Generate: checkpoint (or source model) + prompts -> text, through the depth-wise engine.

    python -m recursive_jax.generate --checkpoint=CKPT --prompt='Once upon a time'
    python -m recursive_jax.generate --checkpoint=CKPT --prompts=FILE --out=FILE.jsonl
    python -m recursive_jax.generate ... --exit_measure=top1 --exit_threshold=0.9
    python -m recursive_jax.generate ... --lossless

One --prompt streams to the terminal. --prompts is a text file with one prompt a line, or a .jsonl
file whose lines hold `prompt` or `messages` and, where it differs from the flags, `id`,
`max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `seed`, the penalties, `stop`,
`min_loops`, `max_loops`, `exit_threshold`, `logprobs`. A line that cannot be answered becomes one
with finish_reason 'error'; the others go on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from recursive_jax import metrics, sharding, text
from recursive_jax.analysis import timing
from recursive_jax.console import app, engine_flags, heatmap, report, tables
from recursive_jax.console.engine_flags import Exits
from recursive_jax.console.progress import PromptProgress
from recursive_jax.decoding import prompts as prompts_lib
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.prompts import Answers, Prompt
from recursive_jax.decoding.requests import Completion, Request
from recursive_jax.decoding.state import MAX_TICKS
from recursive_jax.decoding.text_session import News, TextSession
from recursive_jax.model import Opened, open_model
from recursive_jax.models.parameters import parameter_counts


def define_flags(values: flags.FlagValues) -> None:
    """A function, so that importing this job adds no flags to another's."""
    string, strings, integer, number, boolean = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_multi_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_bool,
        )
    )
    string("checkpoint", None, "ours, a Hugging Face directory, .gguf, hub id, or 'tiny'")
    string("prompt", None, "one prompt, answered on the terminal")
    string("prompts", None, "file: one prompt a line, or .jsonl")
    string("out", None, "answers as JSON lines: id, text, tokens, exit_loops, finish_reason")
    boolean("chat", False, "prompts are a user's words: apply the chat template")
    # Overridden by a line of a .jsonl file.
    integer("max_new_tokens", 128, "tokens of an answer, at most")
    number("temperature", 0.0, "0 takes the most likely token")
    integer("top_k", 0, "sample among the k most likely tokens; 0 = all")
    number("top_p", 1.0, "sample within this share of the probability; 1 = all")
    number("min_p", 0.0, "drop tokens below this fraction of the likeliest; 0 = none")
    number("repetition_penalty", 1.0, "divides logits of tokens in prompt and answer; 1 = none")
    number("presence_penalty", 0.0, "taken off logits of tokens in the answer")
    number("frequency_penalty", 0.0, "taken off as often as the token is in the answer")
    integer("seed", 0, "of sampling; --prompts makes one for every line from it")
    strings("stop", None, "text that ends an answer and is no part of it; may be repeated")
    boolean("logprobs", False, "answers tell the log-probability of every token, nats")
    integer("min_loops", 1, "loops that every token runs at least")
    integer(
        "max_loops",
        None,
        "loops after which the next token is chosen (lossless: drafted) at the latest; "
        "default: all. The first one needs all loops anyway",
    )
    string("stats", None, "file: the run in numbers, JSON")
    string("heatmap", None, "file: picture (.png, .svg, .pdf) of tokens coloured by exit loop")
    engine_flags.define_flags(values)
    flags.adopt_module_key_flags(engine_flags, values)  # --help tells them too
    flags.mark_flag_as_required("checkpoint", flag_values=values)


def to_request(opened: Opened, prompt: Prompt, chat: bool, context_length: int) -> Request:
    """Tokenised and checked; a ValueError says what is wrong with it."""
    if prompt.error:
        raise ValueError(prompt.error)
    tokenizer, vocab_size = opened.tokenizer, opened.cfg.vocab_size
    try:
        if chat or not isinstance(prompt.content, str):
            tokens = text.apply_chat(tokenizer, prompt.content)
            text.check_ids(tokenizer, tokens, vocab_size)
        else:
            tokens = text.encode(tokenizer, prompt.content, vocab_size)
        if not tokens:
            raise ValueError(
                "the prompt is empty and this tokenizer has no BOS to begin with; give it a text"
            )
        request = prompts_lib.make_request(prompt.id, tokens, opened.stop, prompt.options)
        request.check_fits(context_length)
    except ValueError as error:
        raise ValueError(f"{prompt.where}{error}") from error
    return request


class Run:
    """Requests answered by an engine, and what is told about them afterwards."""

    def __init__(
        self, engine: Engine, tokenizer: Any, prompts: Sequence[Prompt], answers: Answers | None
    ):
        self._engine, self._tokenizer = engine, tokenizer
        self._prompts, self._answers = prompts, answers
        self._session = TextSession(engine, tokenizer)
        self._requests: dict[int, Request] = {}  # by place among the answers
        self._completions: dict[int, Completion] = {}
        self.seconds = 0.0

    def stream(self, request: Request) -> None:
        """The answer goes to standard output as it comes."""
        self._submit(0, request)
        start, first, at_first = time.perf_counter(), None, 0
        for news in self._news(max_ticks=self._engine.num_loops):  # about a token at once
            if first is None and news.tokens:
                first, at_first = time.perf_counter(), news.tokens
            if jax.process_index() == 0:
                print(news.piece, end="\n" if news.completion else "", flush=True)
            if news.completion:
                self._finish(0, news.completion)
        self.seconds = time.perf_counter() - start
        completion = self._completions[0]
        if completion.error:
            raise ValueError(completion.error)
        count = len(completion.tokens)
        told = [f"{count} tokens ({completion.finish_reason})"]
        if count > at_first > 0:
            told.append(f"{(count - at_first) / (start + self.seconds - first):.1f} tok/s")
        if first is not None:
            told.append(f"first token after {first - start:.2f} s")
        note(", ".join(told))

    def answer(self, requests: Mapping[int, Request]) -> None:
        """All of them, in any order, with a progress bar."""
        places, errors = {}, []
        for place, request in requests.items():
            try:
                places[self._submit(place, request)] = place
            except ValueError as error:
                errors.append(f"{self._prompts[place].where}{error}")
                self._finish(place, failed(request.id, errors[-1]))
        if not places:
            raise nothing_left(self._prompts, errors)
        limits = {index: requests[place].max_new_tokens for index, place in places.items()}
        with PromptProgress(limits) as progress:
            for news in self._news():
                progress.add(news.index, news.tokens, news.completion is not None)
                if news.completion:
                    self._finish(places[news.index], news.completion)
            self.seconds = progress.seconds

    def summary(self, lossless: bool, measured: bool) -> dict[str, Any]:
        """In numbers; `measured`: with the bound."""
        answered = sum(c.finish_reason != "error" for c in self._completions.values())
        stats = self._session.stats
        measured = measured and stats.tokens
        return report.summary(
            self._engine,
            stats,
            prompts=len(self._prompts),
            errors=len(self._prompts) - answered,
            tokens=sum(len(c.tokens) for c in self._completions.values()),
            seconds=self.seconds,
            lossless=lossless,
            times=timing.measure(self._engine, stats.exit_loops) if measured else None,
        )

    def draw(self, path: str, title: str) -> None:
        """The heat map of all answers there are."""
        rows = []
        for place in sorted(self._requests):
            prompt, completion = self._prompts[place], self._completions[place]
            detokenizer = text.Detokenizer(self._tokenizer, self._requests[place].tokens)
            pieces = [detokenizer.add([token]) for token in completion.tokens]
            asked = (
                prompt.content if isinstance(prompt.content, str) else prompt.content[-1]["content"]
            )
            rows.append(heatmap.Row(f"{prompt.id}: {asked}", pieces, completion.exit_loops))
        if jax.process_index() == 0:
            heatmap.save(path, rows, self._engine.num_loops, title)

    def _news(self, max_ticks: int = MAX_TICKS) -> Iterator[News]:
        while not self._session.idle:
            yield from self._session.round(max_ticks)

    def _submit(self, place: int, request: Request) -> int:
        index = self._session.submit(request)
        self._requests[place] = request
        return index

    def _finish(self, place: int, completion: Completion) -> None:
        self._completions[place] = completion
        if self._answers is not None:
            request = self._requests.get(place)
            self._answers.add(place, completion, request is not None and request.logprobs)


def failed(name: str | int, error: Any) -> Completion:
    return Completion(name, finish_reason="error", error=str(error))


def nothing_left(prompts: Sequence[Prompt], errors: Sequence[str]) -> ValueError:
    return ValueError(f"none of {len(prompts)} prompts can be answered. The first: {errors[0]}")


def note(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def check_files(options: flags.FlagValues) -> None:
    """Raises ValueError unless all that is to be written can be, each to a file of its own."""
    names = [name for name in ("prompts", "out", "stats", "heatmap") if options[name].value]
    places = {}
    for name in names:
        place = pathlib.Path(options[name].value).resolve()
        if place in places:
            raise ValueError(f"--{places[place]} and --{name} are one file, {place}; give two")
        places[place] = name
    if options.stats:
        prompts_lib.check_writable(options.stats)
    if options.heatmap:
        heatmap.check(options.heatmap)


def run(options: flags.FlagValues) -> None:
    """The job; raises ValueError and OSError for what the user can mend."""
    if (options.prompt is None) == (options.prompts is None):
        raise ValueError("nothing to answer: give either --prompt=TEXT or --prompts=FILE")
    if options.prompts is not None and not options.out:
        raise ValueError("--prompts needs --out=FILE for the answers")
    # Wrong values are told before a model is read.
    engine_flags.check_sizes(options)
    exits = engine_flags.read_exits(options)
    defaults = {name: options[name].value for name in prompts_lib.OPTIONS if name in options}
    defaults |= {"stop": options.stop or (), "exit_threshold": None}  # None: the engine's own
    prompts_lib.make_request(0, (0,), (), defaults)
    if options.prompts is None:
        prompts = [Prompt(1, options.prompt, defaults)]
    else:
        prompts = prompts_lib.read_prompts(options.prompts, defaults)
    check_files(options)
    answers = contextlib.nullcontext()
    if options.out:
        answers = Answers(options.out, write=jax.process_index() == 0)
    with answers as answers:
        answer(options, exits, prompts, answers)


def answer(
    options: flags.FlagValues, exits: Exits, prompts: Sequence[Prompt], answers: Answers | None
) -> None:
    """`run`, after what can be told without a model."""
    dtype = sharding.compute_dtype(options.dtype)
    mesh = sharding.make_mesh(options.data, 1, options.tensor)

    opened = open_model(options.checkpoint)
    cfg = opened.cfg
    exits = engine_flags.resolve_exits(options, exits, opened)
    context_length = options.context_length or cfg.max_length
    if context_length > cfg.max_length:
        note(f"warning: the model was trained on at most {cfg.max_length} positions")
    requests, errors = {}, []
    for place, prompt in enumerate(prompts):
        try:
            requests[place] = to_request(opened, prompt, options.chat, context_length)
        except ValueError as error:
            if options.prompts is None:
                raise
            errors.append(str(error))
            answers.add(place, failed(prompt.id, error))
    if not requests:
        raise nothing_left(prompts, errors)

    tokens = sum(request.max_new_tokens for request in requests.values())
    passes = cfg.num_loops * tokens / min(options.num_slots, len(requests))
    model = opened.load(mesh, dtype, passes)
    shape = "".join(f", {name}={size}" for name, size in mesh.shape.items() if size > 1)
    counted = tables.count(parameter_counts(model.params)["total"])
    layers = f"{cfg.num_loops} × {cfg.num_layers} layers"
    start = time.perf_counter()
    engine = engine_flags.make_engine(model, options, exits, list(requests.values()))
    rows = {"model": f"{options.checkpoint}: {cfg.family}, {layers}, {counted} parameters"}
    rows["computed in"] = f"{dtype.name} on {mesh.devices.flat[0].device_kind}{shape}"
    rows["prompts"] = f"{len(requests):,} of {len(prompts):,}"
    rows |= engine_flags.describe(engine, options, exits)
    rows["compiled in"] = f"{time.perf_counter() - start:.1f} s"
    note(tables.table(list(rows.items())))

    job = Run(engine, opened.tokenizer, prompts, answers)
    if options.prompts is None:
        job.stream(requests[0])
    else:
        job.answer(requests)
    if answers is not None:
        answers.close()
    # a conversation need not wait for numbers nobody asked for
    measured = options.prompts is not None or bool(options.stats)
    if measured and mesh.size > 1:
        note("the bound is measured on one device only, so the numbers lack it")
        measured = False
    if measured:
        note("measuring the parts of a tick alone …")
    record = job.summary(options.lossless, measured)
    if options.stats:
        report.write(options.stats, {"run": rows} | record)
    if options.heatmap:
        job.draw(options.heatmap, f"{options.checkpoint}, exits: {rows['exits']}")
    closing = [report.table(record)]
    files = {"answers": options.out, "stats": options.stats, "heat map": options.heatmap}
    closing += [f"{name}: {file}" for name, file in files.items() if file]
    (note if options.prompts is None else metrics.say)("\n".join(closing))


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 does not end the run
    try:
        run(flags.FLAGS)
    except KeyboardInterrupt:
        out = flags.FLAGS.out and os.path.realpath(flags.FLAGS.out)
        files = [f for f in (f"{out}.part", out) if out and pathlib.Path(f).exists()]
        note(f"\nstopped; finished answers: {files[0]}" if files else "\nstopped")
        sys.exit(130)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
