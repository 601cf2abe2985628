"""Train a model: uptraining with distillation and exit losses, or training from scratch.

    python -m recursive_jax.train --config=configs/quickstart.py --workdir=DIR
    python -m recursive_jax.train --config=gemma_rrt:gemma3_270m --workdir=DIR \
        --config.source=MODEL_DIR --config.data.train=TEXT_DIR

A source is converted first. The same command again resumes the run. Any value of the config can
be set with --config.NAME=VALUE. A run that a signal stops saves its state and exits with code 75.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from recursive_jax import host_endings, host_facts, hosts, paths, start, wandb_log
from recursive_jax.console import app, compile_cache, host_flags, output, train_report
from recursive_jax.fit import Fit, fit, make_mesh
from recursive_jax.model import load
from recursive_jax.teaching import open_draws
from recursive_jax.training import loop
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.contract import RunContract
from recursive_jax.training.corpus import open_corpus
from recursive_jax.training.profile import profile_steps
from recursive_jax.weights import checkpoint, workdir_lock

STOPPED = hosts.AGAIN  # exit code of a run that can go on


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    config_flags.DEFINE_config_file(
        "config", None, "what to train: a file, or the name of one of configs/", values
    )
    flags.DEFINE_string(
        "workdir", None, "checkpoints, metrics; resumed when it exists", flag_values=values
    )
    flags.DEFINE_string(
        "profile", None, "START:STOP: write a trace of these steps to WORKDIR/profile",
        flag_values=values,
    )  # fmt: skip
    compile_cache.define(values)
    flags.DEFINE_bool(
        "strict", False, "stop where a saved step is damaged, instead of using the one before it",
        flag_values=values,
    )  # fmt: skip
    host_flags.define(values)
    flags.mark_flags_as_required(["config", "workdir"], values)


def train(
    config: Any,
    workdir: str | pathlib.Path,
    stop: loop.Stop | None = None,
    profile: str | None = None,
    cache: str = compile_cache.AUTO,
    strict: bool = False,
) -> Fit:
    """Run `config`, a ConfigDict as `configs/common.py` makes it; a run in `workdir` goes on.

    Args:
      config, workdir: as said.
      stop: tells when to stop.
      profile: START:STOP, the first and the last step of a trace; None: no trace.
      cache: of compiled programs, as `compile_cache.use` takes it.
      strict: a damaged step is an error; otherwise the one before it is used.
    """
    began = time.time()
    workdir = paths.path_of(workdir)
    settings = TrainConfig.from_mapping(config)
    make_mesh(settings)  # refused before anything is read
    wandb_log.check(settings.wandb)
    traced = profile_steps(profile, settings.num_steps) if profile is not None else None
    if settings.objective.kd and not config.source and not settings.data.teacher:
        raise ValueError("objective.kd > 0 needs the model to distil from: set --config.source")
    source = load(config.source) if config.source else None
    host_facts.agree_on_start(config.to_dict(), source)
    with workdir_lock.hold(workdir, output.say):
        hosts.see_one_directory(workdir)
        if jax.process_count() > 1:
            compile_cache.use(cache, f"{workdir}/compiled")
        options = {"began": began, "profile": traced}
        return _train_alone(config, settings, source, workdir, stop, strict, **options)


def _train_alone(config, settings, source, workdir, stop, strict, **options) -> Fit:
    """`train` once nobody else writes to the workdir."""
    latest = checkpoint.latest_step(workdir)
    hosts.agree({"last step": latest}, f"the last step in {workdir}")
    begin = start.choose(config, source, workdir, strict)
    settings.check_fits(begin.cfg)
    corpus = open_corpus(
        settings.data,
        begin.tokenizer,
        begin.cfg.vocab_size,
        settings.seed,
        progress=jax.process_index() == 0,
    )
    corpus.check_enough(settings.num_steps * settings.data.batch_size, settings.data.epochs)
    corpus = open_draws(settings, corpus, begin, source, jax.process_index() == 0)
    contract = RunContract.of(
        settings,
        corpus.rows.content,
        corpus.windows.tokens,
        teacher_draws=corpus.draws_fingerprint,
    )
    host_facts.agree_on_text(contract, begin.tokenizer, len(corpus.rows))
    return fit(
        begin.make(),
        settings,
        corpus,
        teacher=source,
        workdir=workdir,
        stop=stop,
        origin=begin.origin,
        record=json.loads(config.to_json_best_effort()),
        strict=strict,
        **options,
    )


def advice(workdir: str) -> str:
    """What to do when a host is gone."""
    latest = None
    with contextlib.suppress(Exception):  # the workdir may be gone, too
        latest = checkpoint.latest_step(workdir)
    where = "from the start" if latest is None else f"from step {latest}"
    return f"; run the same command on all hosts to go on {where}"


def main() -> None:
    options = flags.FLAGS
    try:
        host_flags.connect(options)
    except hosts.MissingHosts as error:
        output.tell_error(str(error))
        sys.exit(hosts.AGAIN)
    try:
        with (
            host_endings.ending_together(output.tell_error, lambda: advice(options.workdir)),
            loop.Stop(output.say) as stop,
        ):
            end = train(
                options.config, options.workdir, stop, options.profile, options.compilation_cache,
                options.strict,
            )  # fmt: skip
    except loop.NotStarted as signal:
        output.say(f"\n{signal}: stopped before the first step; run the same command to start")
        sys.exit(STOPPED)
    if end.stopped:
        step = end.summary["steps"]
        output.say(f"stopped at step {step} and saved; run the same command to go on")
        sys.exit(STOPPED)
    output.say(
        f"{train_report.end(end.summary)}; checkpoint: {options.workdir}\n"
        "next: python -m recursive_jax.generate "
        f"--checkpoint={shlex.quote(options.workdir)} --prompt='…'"
    )


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
