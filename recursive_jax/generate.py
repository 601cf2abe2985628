"""Generate: checkpoint (or source model) + prompts -> text.

    python -m recursive_jax.generate --checkpoint=CKPT --prompt='Once upon a time'
    python -m recursive_jax.generate --checkpoint=CKPT --prompts=FILE --out=FILE.jsonl

One --prompt streams to the terminal. --prompts is a text file with one prompt a line, or a .jsonl
file whose lines hold `prompt` or `messages` and, where it differs from the flags, `id`,
`max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `seed`. A line that cannot be answered
becomes one with finish_reason 'error'; the others go on.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from recursive_jax import cli, metrics, sharding, text
from recursive_jax.decoding import requests as requests_lib
from recursive_jax.decoding.lockstep import MAX_STEPS, Lockstep
from recursive_jax.decoding.requests import Answers, Completion, Prompt, Request, Sampling
from recursive_jax.models.decoder import Decoder, logical_axes, parameter_counts
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import open_source


def define_flags(values: flags.FlagValues) -> None:
    """A function, so that importing this job adds no flags to another's."""
    string, integer, number, boolean = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_bool,
        )
    )
    string("checkpoint", None, "ours, a Hugging Face directory, .gguf, hub id, or 'tiny'")
    string("prompt", None, "one prompt, answered on the terminal")
    string("prompts", None, "file: one prompt a line, or .jsonl")
    string("out", None, "answers as JSON lines: id, text, tokens, exit_loops, finish_reason")
    integer("max_new_tokens", 128, "tokens of an answer, at most")
    number("temperature", 0.0, "0 takes the most likely token")
    integer("top_k", 0, "sample among the k most likely tokens; 0 = all")
    number("top_p", 1.0, "sample within this share of the probability; 1 = all")
    number("min_p", 0.0, "drop tokens below this fraction of the likeliest; 0 = none")
    integer("seed", 0, "of sampling; --prompts makes one for every line from it")
    boolean("chat", False, "prompts are a user's words: apply the chat template")
    integer("context_length", None, "tokens, prompt and answer together; default: the model's own")
    integer("batch_size", 16, "prompts answered at once")
    string("dtype", "auto", "float32, bfloat16; auto: float32 on CPU")
    integer("data", -1, "mesh: devices the prompts are spread over; -1 = the rest")
    integer("tensor", 1, "mesh: devices every weight is split over")
    flags.mark_flag_as_required("checkpoint", flag_values=values)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on its devices, and what it takes to read and write text."""

    decoder: Decoder
    params: Any
    tokenizer: Any
    stop: tuple[int, ...]
    mesh: jax.sharding.Mesh
    rules: tuple[tuple[str, Any], ...]


def load_model(spec: str, mesh: jax.sharding.Mesh, dtype: Any) -> Model:
    """A checkpoint of ours or whatever `open_source` opens, in `dtype`, sharded over `mesh`."""
    source = None if checkpoint.is_checkpoint(spec) else open_source(spec)
    if source is None:
        cfg, facts = checkpoint.load_config(spec)
        tokenizer = text.load_tokenizer(pathlib.Path(spec) / "tokenizer")
        generation_config = facts.get("generation_config")
    else:
        cfg, tokenizer = source.cfg, source.load_tokenizer()
        generation_config = source.generation_config
    text.check_vocabulary(tokenizer, cfg.vocab_size)
    rules = sharding.rules_for(mesh, cfg)
    where = sharding.shardings(logical_axes(cfg), mesh, rules)
    if source is None:
        params, _ = checkpoint.load_params(spec, where, dtype)
    else:
        params = sharding.put_stacks(source.params, where, dtype)
    decoder = Decoder(cfg, dtype=dtype, data_shards=sharding.data_shards(mesh))
    stop = text.stop_ids(tokenizer, generation_config)
    return Model(decoder, params, tokenizer, stop, mesh, rules)


def to_request(model: Model, prompt: Prompt, chat: bool, context_length: int) -> Request:
    """Tokenised and checked; a ValueError says what is wrong with it."""
    if prompt.error:
        raise ValueError(prompt.error)
    try:
        if chat or not isinstance(prompt.content, str):
            tokens = text.apply_chat(model.tokenizer, prompt.content)
            text.check_ids(model.tokenizer, tokens, model.decoder.cfg.vocab_size)
        else:
            tokens = text.encode(model.tokenizer, prompt.content, model.decoder.cfg.vocab_size)
        if not tokens:
            raise ValueError(
                "the prompt is empty and this tokenizer has no BOS to begin with; give it a text"
            )
        options = dict(prompt.options)
        length = options.pop("max_new_tokens")
        request = Request(prompt.id, tokens, length, model.stop, Sampling(**options))
        request.check_fits(context_length)
    except ValueError as error:
        raise ValueError(f"{prompt.where}{error}") from error
    return request


def make_engine(model: Model, requests: Sequence[Request], batch_size: int) -> Lockstep:
    """A decode loop with room for the longest of `requests`, compiled for all of them."""
    shards = sharding.data_shards(model.mesh)
    longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
    engine = Lockstep(
        model.decoder,
        model.params,
        num_rows=-(-min(batch_size, len(requests)) // shards) * shards,
        context_length=-(-longest // 128) * 128,  # whole tiles on a TPU
        num_stop=max(len(model.stop), 1),
        mesh=model.mesh,
        rules=model.rules,
    )
    engine.compile([max(len(r.tokens) for r in batch) for batch in _batches(engine, requests)])
    return engine


def generate(
    model: Model, engine: Lockstep, requests: Sequence[Request], max_steps: int = MAX_STEPS
) -> Iterator[tuple[Completion, str]]:
    """Answers as they grow: (completion so far, its new piece of text).

    A completion is whole once it has a `finish_reason`; they do not finish in the order of
    `requests`.
    """
    for batch in _batches(engine, requests):
        completions = [Completion(r.id) for r in batch]
        detokenizers = [text.Detokenizer(model.tokenizer, r.tokens) for r in batch]
        for event in engine.run(batch, max_steps):
            completion, detokenizer = completions[event.index], detokenizers[event.index]
            completion.add(event)
            piece = detokenizer.add(event.tokens)
            if event.finish_reason:
                piece += detokenizer.finish()
            completion.text += piece
            yield completion, piece


def _batches(engine: Lockstep, requests: Sequence[Request]) -> list[list[Request]]:
    """Prompts of like length together: the longest of a batch sets the cost of its prefill."""
    ordered = sorted(requests, key=lambda r: len(r.tokens))
    return [ordered[i : i + engine.num_rows] for i in range(0, len(ordered), engine.num_rows)]


def answer_one(model: Model, request: Request) -> Completion:
    """The answer goes to standard output as it comes, everything else to standard error."""
    began = time.perf_counter()
    engine = make_engine(model, [request], 1)
    start, first = time.perf_counter(), None
    for completion, piece in generate(model, engine, [request], max_steps=1):
        first = first or time.perf_counter()
        if jax.process_index() == 0:
            print(piece, end="\n" if completion.finish_reason else "", flush=True)
    if completion.error:
        raise ValueError(completion.error)
    count = len(completion.tokens)
    rate = (count - 1) / (time.perf_counter() - first) if count > 1 else 0.0
    note(
        f"{count} tokens ({completion.finish_reason}), {rate:.1f} tok/s, first token after "
        f"{first - start:.2f} s; compiled in {start - began:.1f} s"
    )
    return completion


def answer_all(
    model: Model, requests: dict[int, Request], batch_size: int, answers: Answers
) -> tuple[int, int, float]:
    """Every answer into `answers` at its index. Returns tokens, failures, seconds."""
    from tqdm import tqdm

    note("compiling …")
    engine = make_engine(model, list(requests.values()), batch_size)
    note(
        f"{engine.num_rows} rows of {engine.context_length} tokens, "
        f"cache {engine.cache_bytes / 2**20:,.0f} MiB"
    )
    start, tokens, failures = time.perf_counter(), 0, 0
    index = {request.id: i for i, request in requests.items()}
    bar = tqdm(total=len(requests), unit="prompt", disable=jax.process_index() != 0)
    with bar:
        for completion, _ in generate(model, engine, list(requests.values())):
            if completion.finish_reason:
                answers.add(index[completion.id], completion)
                failures += completion.finish_reason == "error"
                tokens += len(completion.tokens)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.1f} tok/s")
                bar.update()
    return tokens, failures, time.perf_counter() - start


def note(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def run(options: flags.FlagValues) -> None:
    """The job; raises ValueError and OSError for what the user can mend."""
    if (options.prompt is None) == (options.prompts is None):
        raise ValueError("nothing to answer: give either --prompt=TEXT or --prompts=FILE")
    if options.prompts is not None and not options.out:
        raise ValueError("--prompts needs --out=FILE for the answers")
    # Wrong values are told before a model is read.
    requests_lib.check_number("batch_size", options.batch_size, True, 1, 2**20)
    if options.context_length is not None:
        requests_lib.check_number("context_length", options.context_length, True, 2, 2**31 - 1)
    defaults = {name: options[name].value for name in requests_lib.OPTIONS}
    Request(0, (0,), defaults["max_new_tokens"])
    Sampling(**{k: v for k, v in defaults.items() if k != "max_new_tokens"})
    if options.prompts is None:
        prompts = [Prompt(1, options.prompt, defaults)]
    else:
        prompts = requests_lib.read_prompts(options.prompts, defaults)
    answers = None
    if options.out:
        answers = Answers(options.out, write=jax.process_index() == 0)
    dtype = sharding.compute_dtype(options.dtype)
    mesh = sharding.make_mesh(options.data, 1, options.tensor)

    model = load_model(options.checkpoint, mesh, dtype)
    cfg = model.decoder.cfg
    context_length = options.context_length or cfg.max_length
    shape = "".join(f", {name}={size}" for name, size in mesh.shape.items() if size > 1)
    note(
        f"{options.checkpoint}: {cfg.family}, {cfg.num_loops} × {cfg.num_layers} layers, "
        f"{metrics.count(parameter_counts(model.params)['total'])} parameters, {dtype.name}{shape}"
    )
    if context_length > cfg.max_length:
        note(f"warning: the model was trained on at most {cfg.max_length} positions")

    requests, errors = {}, []
    for i, prompt in enumerate(prompts):
        try:
            requests[i] = to_request(model, prompt, options.chat, context_length)
        except ValueError as error:
            if options.prompts is None:
                raise
            errors.append(str(error))
            answers.add(i, Completion(prompt.id, finish_reason="error", error=str(error)))
    if options.prompts is None:
        completion = answer_one(model, requests[0])
        if answers is not None:
            answers.add(0, completion)
            answers.close()
        return
    if not requests:
        answers.close()
        raise ValueError(f"none of {len(prompts)} prompts can be answered. The first: {errors[0]}")
    tokens, failures, seconds = answer_all(model, requests, options.batch_size, answers)
    answers.close()
    rows = [("prompts", f"{len(prompts):,}")]
    if errors or failures:
        rows.append(("errors", f"{len(errors) + failures:,}"))
    rows += [
        ("tokens", f"{tokens:,}"),
        ("seconds", f"{seconds:,.1f}"),
        ("tokens/s", f"{tokens / seconds:,.1f}"),
    ]
    metrics.say(metrics.table(rows) + f"\nanswers: {options.out}")


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 does not end the run
    try:
        run(flags.FLAGS)
    except KeyboardInterrupt:
        out = flags.FLAGS.out
        note(f"\nstopped; finished answers: {out}.part" if out else "\nstopped")
        sys.exit(130)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run(main)
