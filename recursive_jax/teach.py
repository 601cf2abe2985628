"""Write draws from the teacher of a run, once; training then distils without it in memory.

    python -m recursive_jax.teach --config=configs/quickstart.py --out=DIR
    python -m recursive_jax.train --config=configs/quickstart.py --config.data.teacher=DIR …

It takes the config of the run, with the same --config.NAME=VALUE, and reads the very rows that
`train` will. The same command goes on with a job that was stopped, on any number of hosts.
docs/pods.md describes the directory.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from recursive_jax import host_endings, host_facts, hosts, teaching
from recursive_jax.console import app, host_flags, output, stop, tables
from recursive_jax.console.progress import row_progress
from recursive_jax.model import load
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.corpus import open_corpus
from recursive_jax.training.draws import MAX_DRAWS


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    config_flags.DEFINE_config_file(
        "config", None, "of the run: a file, or the name of one of configs/", values
    )
    flags.DEFINE_string(
        "out", None, "directory to write; one that was stopped is gone on with", flag_values=values
    )
    flags.DEFINE_integer(
        "draws", 50, "ids of each token, drawn with replacement", 1, MAX_DRAWS, flag_values=values
    )
    flags.DEFINE_integer(
        "shard_rows", 1024, "rows of a file; a stopped job loses at most one file of each host", 1,
        flag_values=values,
    )  # fmt: skip
    host_flags.define(values)
    flags.mark_flags_as_required(["config", "out"], values)


def main() -> None:
    options = flags.FLAGS
    try:
        host_flags.connect(options)
    except hosts.MissingHosts as error:
        output.tell_error(str(error))
        sys.exit(hosts.AGAIN)
    advice = "; run the same command on all hosts to go on"
    with (
        host_endings.ending_together(output.tell_error, lambda: advice),
        stop.on_signals(),
    ):
        try:
            teach(options.config, options.out, options.draws, options.shard_rows)
        except stop.Stopped as signal:
            output.note(f"\n{signal}: stopped; run the same command to go on")
            sys.exit(signal.exit_code)


def teach(config: Any, out: str, draws: int = 50, shard_rows: int = 1024) -> None:
    """Write the draws for the run of `config`, a ConfigDict as `configs/common.py` makes it."""
    began = time.time()
    settings = TrainConfig.from_mapping(config)
    settings.objective.check_draws()
    if not settings.objective.kd:
        raise ValueError("objective.kd=0: nothing is distilled; set objective.kd > 0")
    if not config.source:
        raise ValueError("draws need the model to take them from: set --config.source")
    source = load(config.source)
    host_facts.agree_on_start(config.to_dict(), source)
    model = load(config.init_from) if config.init_from else source
    speaks = jax.process_index() == 0
    corpus = open_corpus(
        settings.data, model.tokenizer, model.cfg.vocab_size, settings.seed, progress=speaks
    )
    corpus.check_enough(settings.num_steps * settings.data.batch_size, settings.data.epochs)
    job = teaching.make_job(settings, corpus, model, source, draws, shard_rows)
    hosts.agree({"draws": job.fingerprint, "rows": job.rows}, "the draws")
    with row_progress(f"drawing from {source.name}", job.rows // jax.process_count()) as done:
        manifest = teaching.write_draws(out, job, settings, corpus, source, done)
    size = sum(file.bytes for file in manifest.shards)
    tokens = job.rows * job.context_length
    output.say(
        f"{job.draws} draws of {source.name} for each of {tables.count(tokens)} tokens: "
        f"{job.rows:,} rows, {size / 1e6:.1f} MB, {size / tokens:.1f} bytes a token\n"
        f"{out} is whole ({time.time() - began:.0f} s); next: python -m recursive_jax.train "
        f"--config.data.teacher={out} with this --config"
    )


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
