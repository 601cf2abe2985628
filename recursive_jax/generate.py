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

import functools
import os
import pathlib
import sys
import time

import jax
from absl import flags

from recursive_jax import answering, files, generation, sharding
from recursive_jax.analysis import timing
from recursive_jax.console import app, engine_flags, heatmap, prompt_flags, report, stop, tables
from recursive_jax.console.output import note, say
from recursive_jax.decoding.answers import Answers, check_writable
from recursive_jax.decoding.session import Session
from recursive_jax.model import load


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    string("checkpoint", None, "ours, a Hugging Face directory, .gguf, hub id, or 'tiny'")
    integer("step", None, "of a checkpoint with several saved steps; default the newest")
    flags.DEFINE_bool(
        "strict", False, "stop where the newest step is damaged, instead of using the one before",
        flag_values=values,
    )  # fmt: skip
    string("stats", None, "file: the numbers of the run as JSON, including those of --profile")
    boolean("profile", False, "print the bound: measure the parts of a tick alone, some seconds")
    string("heatmap", None, "file: picture (.png, .svg, .pdf) of tokens coloured by exit loop")
    for module in (prompt_flags, engine_flags):
        module.define_flags(values)
        flags.adopt_module_key_flags(module, values)  # --help lists them too
    flags.mark_flag_as_required("checkpoint", flag_values=values)


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


def run(options: flags.FlagValues) -> None:
    """Run the job. A ValueError or OSError is a mistake of the user."""
    prompt_flags.check_values(options)
    config = engine_flags.read_config(options)
    prompts = prompt_flags.read_prompts(options)
    check_files(options)
    items = [answering.Item(place, prompt) for place, prompt in enumerate(prompts)]
    dtype = sharding.compute_dtype(options.dtype)
    mesh = sharding.make_mesh(options.data, 1, options.tensor)
    one = options.prompts is None
    with Answers(options.out or os.devnull, bool(options.out) and is_first()) as answers:
        model = load(options.checkpoint, options.step, strict=options.strict)
        config, origin = engine_flags.complete(options, config, model)
        requests = answering.make_requests(
            model, config, items, answers, options.chat, dtype.name, one
        )
        if not requests:
            answers.close()
            return say(f"nothing was left to decode\nanswers: {options.out}")
        passes = generation.expected_passes(model, requests, config.num_slots)
        length = generation.needed_context(requests)
        placed = generation.put_on_devices(model, mesh, dtype, length, passes)
        began = time.perf_counter()
        engine = generation.make_engine(placed, generation.fit_to(config, requests, placed))
        rows = {
            **report.describe_model(options.checkpoint, placed),
            "prompts": f"{len(requests):,} of {len(items):,}",
            **engine_flags.describe(engine, config, origin),
            "compiled in": f"{time.perf_counter() - began:.1f} s",
        }
        note(tables.table(list(rows.items())))
        session = Session(engine, model.tokenizer)
        if one:
            seconds = answering.answer_one(session, engine, items[0], answers)
        else:
            seconds = answering.answer_all(session, items, answers)
    times = None
    if (options.stats or options.profile) and session.stats.tokens:
        if mesh.size > 1:
            note("the bound is measured on one device only, so the numbers lack it")
        else:
            note("measuring the parts of a tick alone …")
            times = timing.measure(engine, session.stats.exit_loops)
    answered = [item.completion for item in items if not item.kept]
    record = report.summary(engine, session.stats, answered, seconds, config.lossless, times)
    if options.stats:
        report.write(options.stats, {"run": rows} | record)
    if options.heatmap and is_first():
        make_row = functools.partial(heatmap.make_row, model.tokenizer)
        drawn = [make_row(i.prompt, i.request, i.completion) for i in items if i.request]
        with files.naming(options.heatmap):
            title = f"{options.checkpoint}, exits: {rows['exits']}"
            heatmap.save(options.heatmap, drawn, engine.num_loops, title)
    written = {"answers": options.out, "stats": options.stats, "heat map": options.heatmap}
    lines = [report.table(record), *(f"{name}: {file}" for name, file in written.items() if file)]
    (note if one else say)("\n".join(lines))


def is_first() -> bool:
    return jax.process_index() == 0


def main(options: flags.FlagValues = flags.FLAGS) -> None:
    with stop.on_signals():
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 does not end the run
        try:
            run(options)
        except stop.Stopped as signal:
            note(f"\n{answering.stopped(options.out, sys.argv[1:])}")
            sys.exit(signal.exit_code)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
