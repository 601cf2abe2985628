"""Generate: checkpoint (or source model) + prompts -> text, through the depth-wise engine.

    python -m recursive_jax.generate --checkpoint=CKPT --prompt='Once upon a time'
    python -m recursive_jax.generate --checkpoint=CKPT --prompts=FILE --out=FILE.jsonl
    python -m recursive_jax.generate ... --exit_measure=top1 --exit_threshold=0.9
    python -m recursive_jax.generate ... --lossless

One --prompt streams to the terminal. --prompts is a text file with one prompt a line, or a .jsonl
file. A line of a .jsonl file has `prompt` or `messages`. It may have `id`, and values in place of
the flags: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `seed`, the penalties,
`stop`, `min_loops`, `max_loops`, `exit_threshold`, `logprobs`. A line that cannot be answered has
an answer with finish_reason 'error'; the other lines are answered.

The answers of --prompts grow in OUT.part. After Ctrl-C, SIGTERM, a full disk or a crash the same
command goes on from there. Answers that another model, other settings or other prompts made are not
used: their OUT.part is renamed. More slots, other mesh sizes and --nodepthwise are no other
settings.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import shlex
import sys
import time

import jax
from absl import flags
from jax.sharding import Mesh

from recursive_jax import sharding
from recursive_jax.analysis import timing
from recursive_jax.console import app, engine_flags, heatmap, prompt_flags, report, stop, tables
from recursive_jax.console.output import note, say
from recursive_jax.console.progress import PrintedAnswer, PromptProgress
from recursive_jax.decoding import answers as answers_lib
from recursive_jax.decoding.answers import Answers, check_writable
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.prompts import Prompt, to_request
from recursive_jax.decoding.requests import Completion, Request
from recursive_jax.decoding.session import Session
from recursive_jax.model import Model, Opened, open_model
from recursive_jax.models.parameters import abstract_params, parameter_counts
from recursive_jax.weights import checkpoint


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
    string("checkpoint", None, "ours, a Hugging Face directory, .gguf, hub id, or 'tiny'")
    string("stats", None, "file: the numbers of the run as JSON, including those of --profile")
    boolean("profile", False, "print the bound: measure the parts of a tick alone, some seconds")
    string("heatmap", None, "file: picture (.png, .svg, .pdf) of tokens coloured by exit loop")
    for module in (prompt_flags, engine_flags):
        module.define_flags(values)
        flags.adopt_module_key_flags(module, values)  # --help lists them too
    flags.mark_flag_as_required("checkpoint", flag_values=values)


@dataclasses.dataclass
class Item:
    """One prompt of the run with its request and answer.

    Attributes:
      place: of the answer in the file.
      request: None while the prompt is not tokenized, and when it cannot be answered.
      completion: None while the answer is not complete.
      kept: whether an interrupted run made the completion.
    """

    place: int
    prompt: Prompt
    request: Request | None = None
    completion: Completion | None = None
    kept: bool = False

    def fail(self, error: object, answers: Answers) -> None:
        """Write that the prompt cannot be answered."""
        self.request = None
        self.finish(Completion.failed(self.prompt.id, error), answers)

    def finish(self, completion: Completion, answers: Answers) -> None:
        """Write the answer."""
        self.completion = completion
        answers.add(self.place, completion, self.request is not None and self.request.logprobs)


def read_items(options: flags.FlagValues) -> tuple[EngineConfig, list[Item]]:
    """The engine and the prompts of the command line. Raises ValueError before a model is read."""
    prompt_flags.check_values(options)
    config = engine_flags.read_config(options)
    prompts = prompt_flags.read_prompts(options)
    check_files(options)
    return config, [Item(place, prompt) for place, prompt in enumerate(prompts)]


def check_files(options: flags.FlagValues) -> None:
    """Raise ValueError unless all output files are writable and different from each other."""
    names = [name for name in ("prompts", "out", "stats", "heatmap") if options[name].value]
    places = {}
    for name in names:
        place = pathlib.Path(options[name].value).resolve()
        if place in places:
            raise ValueError(f"--{places[place]} and --{name} are one file, {place}; give two")
        places[place] = name
    if options.stats:
        check_writable(options.stats)
    if options.heatmap:
        heatmap.check(options.heatmap)


def make_requests(
    options: flags.FlagValues,
    opened: Opened,
    config: EngineConfig,
    items: list[Item],
    answers: Answers,
) -> None:
    """Tokenize the prompts; take the answers of an interrupted run.

    A prompt that cannot be answered gets its completion here.
    """
    longest = opened.cfg.max_length
    context_length = config.context_length or longest
    if context_length > longest:
        note(f"warning: the model was trained on at most {longest} positions")
    sizes = opened.cfg.vocab_size, opened.stop, context_length, options.chat
    failed: list[tuple[Item, ValueError]] = []
    for item in items:
        try:
            item.request = to_request(item.prompt, opened.tokenizer, *sizes)
        except ValueError as error:
            if options.prompts is None:
                raise
            failed.append((item, error))
    if options.prompts is not None:
        take_finished(options, opened, config, items, answers)
    for item, error in failed:
        item.fail(error, answers)
    check_any_left(items, answers)


def take_finished(
    options: flags.FlagValues,
    opened: Opened,
    config: EngineConfig,
    items: list[Item],
    answers: Answers,
) -> None:
    """Take the answers that an interrupted run of the same command left in OUT.part."""
    settings = config.measure, config.thresholds, config.missing_kv, config.lossless
    weights = answers_lib.digest_of_files(weight_files(opened))
    run = repr((opened.cfg, weights, sharding.compute_dtype(options.dtype).name, settings))
    requests = [(item.place, item.request) for item in items if item.request]
    digests = {r.id: (place, answers_lib.digest(r, run)) for place, r in requests}
    kept = answers.resume(digests, note)
    sharding.check_agreement("the number of answers in OUT.part", len(kept))
    for place, completion in kept.items():
        items[place].completion, items[place].kept = completion, True


def weight_files(opened: Opened) -> list[pathlib.Path]:
    """The files that the weights of a model are read from."""
    if opened.source is None:
        step = checkpoint.latest_step(opened.spec)
        path, pattern = pathlib.Path(opened.spec) / checkpoint.STEPS / str(step), "**/*"
    else:
        path, pattern = opened.source.path, "*.safetensors"
    return sorted(f for f in path.glob(pattern) if f.is_file()) if path.is_dir() else [path]


def check_any_left(items: list[Item], answers: Answers) -> None:
    """Raise ValueError if no request can be answered."""
    if not any(item.request for item in items):
        answers.close()
        first = items[0].completion.error
        raise ValueError(f"none of {len(items)} prompts can be answered. The first: {first}")


def start_engine(
    options: flags.FlagValues,
    config: EngineConfig,
    origin: str,
    model: Model,
    requests: list[Request],
    total: int,
) -> tuple[Engine, dict[str, str]]:
    """Compile the engine; returns it and the start-up table.

    Args:
      config, origin: as `engine_flags.complete` returns them.
      requests: those to answer.
      total: number of prompts.
    """
    cfg, mesh = model.decoder.cfg, model.mesh
    shape = "".join(f", {name}={size}" for name, size in mesh.shape.items() if size > 1)
    count = tables.count(parameter_counts(abstract_params(cfg))["total"])
    layers = f"{cfg.num_loops} × {cfg.num_layers} layers"
    start = time.perf_counter()
    engine = engine_flags.make_engine(model, config, requests)
    rows = {"model": f"{options.checkpoint}: {cfg.family}, {layers}, {count} parameters"}
    rows["computed in"] = f"{model.decoder.dtype.name} on {mesh.devices.flat[0].device_kind}{shape}"
    rows["prompts"] = f"{len(requests):,} of {total:,}"
    rows |= engine_flags.describe(engine, config, origin)
    rows["compiled in"] = f"{time.perf_counter() - start:.1f} s"
    return engine, rows


def answer_one(session: Session, engine: Engine, item: Item, answers: Answers) -> float:
    """Print the answer while it is decoded; returns seconds."""
    session.submit(item.request)
    printed = PrintedAnswer()
    for event in session.events(max_ticks=engine.num_loops):  # about one token per round trip
        printed.add(event)
        if event.completion:
            item.finish(event.completion, answers)
    if item.completion.error:
        raise ValueError(item.completion.error)
    note(printed.summary(item.completion))
    return printed.seconds


def answer_all(session: Session, items: list[Item], answers: Answers) -> float:
    """Answer the requests that have no answer yet, behind a progress bar; returns seconds."""
    running: dict[int, Item] = {}
    for item in items:
        if item.completion is None:
            try:
                running[session.submit(item.request)] = item
            except ValueError as error:
                item.fail(f"{item.prompt.where}{error}", answers)
    check_any_left(items, answers)
    limits = {index: item.request.max_new_tokens for index, item in running.items()}
    with PromptProgress(limits) as progress:
        for event in session.events():
            progress.add(event)
            if event.completion:
                running[event.index].finish(event.completion, answers)
        return progress.seconds


def measure_bound(
    options: flags.FlagValues, engine: Engine, session: Session, mesh: Mesh
) -> timing.Times | None:
    """Times of the parts of a tick, if --stats or --profile needs them and they can be measured."""
    if not (options.stats or options.profile) or not session.stats.tokens:
        return None
    if mesh.size > 1:
        note("the bound is measured on one device only, so the numbers lack it")
        return None
    note("measuring the parts of a tick alone …")
    return timing.measure(engine, session.stats.exit_loops)


def run(options: flags.FlagValues) -> None:
    """Run the job. A ValueError or OSError is a mistake of the user."""
    config, items = read_items(options)
    dtype = sharding.compute_dtype(options.dtype)
    mesh = sharding.make_mesh(options.data, 1, options.tensor)
    writes = bool(options.out) and jax.process_index() == 0
    with Answers(options.out or os.devnull, writes) as answers:
        opened = open_model(options.checkpoint)
        config, origin = engine_flags.complete(options, config, opened)
        make_requests(options, opened, config, items, answers)
        requests = [item.request for item in items if item.completion is None]
        if not requests:
            answers.close()
            return say(f"nothing was left to decode\nanswers: {options.out}")
        tokens = sum(request.max_new_tokens for request in requests)
        passes = opened.cfg.num_loops * tokens / min(config.num_slots, len(requests))
        model = opened.load(mesh, dtype, engine_flags.needed_context(requests), passes, note)
        engine, rows = start_engine(options, config, origin, model, requests, len(items))
        note(tables.table(list(rows.items())))
        session = Session(engine, opened.tokenizer)
        if options.prompts is None:
            seconds = answer_one(session, engine, items[0], answers)
        else:
            seconds = answer_all(session, items, answers)
    answered = [item.completion for item in items if not item.kept]
    times = measure_bound(options, engine, session, mesh)
    record = report.summary(engine, session.stats, answered, seconds, config.lossless, times)
    if options.stats:
        report.write(options.stats, {"run": rows} | record)
    if options.heatmap and jax.process_index() == 0:
        make_row = functools.partial(heatmap.make_row, opened.tokenizer)
        drawn = [make_row(i.prompt, i.request, i.completion) for i in items if i.request]
        title = f"{options.checkpoint}, exits: {rows['exits']}"
        with answers_lib.naming(options.heatmap):
            heatmap.save(options.heatmap, drawn, engine.num_loops, title)
    files = {"answers": options.out, "stats": options.stats, "heat map": options.heatmap}
    lines = [report.table(record), *(f"{name}: {file}" for name, file in files.items() if file)]
    (note if options.prompts is None else say)("\n".join(lines))


def stopped(options: flags.FlagValues) -> str:
    """What a signal left, and how to go on."""
    if not options.out:
        return "stopped"
    part = Answers(options.out, write=False).part
    if not part.exists():
        return f"stopped; answers: {options.out}" if os.path.exists(options.out) else "stopped"
    command = shlex.join(["python", "-m", "recursive_jax.generate", *sys.argv[1:]])
    count = answers_lib.count_answers(part)
    return f"stopped; finished answers: {count:,} in {part}. To go on:\n{command}"


def main(options: flags.FlagValues = flags.FLAGS) -> None:
    with stop.on_signals():
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 does not end the run
        try:
            run(options)
        except stop.Stopped as signal:
            note(f"\n{stopped(options)}")
            sys.exit(signal.exit_code)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
