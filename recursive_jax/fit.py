"""Train a model: everything between a model, its text and the trained weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from recursive_jax import device_memory, hosts, metrics, paths, sharding, wandb_log
from recursive_jax.console import output
from recursive_jax.console.train_report import Report
from recursive_jax.device_memory import Plan
from recursive_jax.evaluation.certificate import certified_kl
from recursive_jax.evaluation.perplexity import perplexity
from recursive_jax.models.batch_attention import choose
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.flops import training_flops
from recursive_jax.models.parameters import abstract_params, parameter_counts
from recursive_jax.text import Windows
from recursive_jax.trainer import Trainer, teacher_shardings
from recursive_jax.training import data, loop
from recursive_jax.training.callbacks import Callback, Evaluate, Record, Save, Tick
from recursive_jax.training.chips import peak_flops
from recursive_jax.training.clock import RunClock
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.contract import PROGRESS_KEY, RunContract
from recursive_jax.training.corpus import Corpus
from recursive_jax.training.draw_files import find_manifest
from recursive_jax.training.optimizer import learning_rate_schedule, make_optimizer
from recursive_jax.training.profile import Profile
from recursive_jax.training.setup import TrainSetup
from recursive_jax.training.skips import Skips
from recursive_jax.weights import checkpoint
from recursive_jax.weights.integrity import together

if TYPE_CHECKING:
    from recursive_jax.model import Model

SUMMARY = "summary.json"
LEAST_CHUNK = 1024  # positions of a chunk of the loss on accelerators: arithmetic, not memory


@dataclasses.dataclass
class Fit:
    """The end of a run.

    Attributes:
      trainer: its `state` is the last one.
      summary: as in summary.json.
      stopped: a signal ended the run before its last step.
    """

    trainer: Trainer
    summary: dict[str, Any]
    stopped: bool


def fit(
    model: Model,
    config: TrainConfig,
    corpus: Corpus,
    teacher: Model | None = None,
    workdir: str | os.PathLike | None = None,
    stop: loop.Stop | None = None,
    quiet: bool = False,
    origin: str | None = None,
    record: dict[str, Any] | None = None,
    began: float | None = None,
    profile: tuple[int, int] | None = None,
    strict: bool = False,
) -> Fit:
    """Train `model` on `corpus`; go on with the run that `workdir` has.

    Args:
      model: what to start from. A run in `workdir` replaces its weights.
      config: of the run.
      corpus: its text, as `corpus.open_corpus` returns it.
      teacher: vanilla model to distil from; needed if `config.objective.kd` > 0 and the corpus has
        no draws from it. Otherwise only its size is in the summary.
      workdir: for checkpoints, metrics and the summary; None writes nothing.
      stop: tells when to stop; None runs to the end.
      quiet: print nothing.
      origin: of the model, for the start-up table; None: its name.
      record: the config as the summary shows it; None: `config` itself.
      began: `time.time()` when the caller began; None: now.
      profile: first and last step of a trace in WORKDIR/profile, or None.
      strict: a damaged newest step is an error. Otherwise the one before it is used.

    Raises:
      ValueError: an impossible setting, or a run in `workdir` with another contract.
      FloatingPointError: losses or gradients of too many steps in a row are not finite.
    """
    began = time.time() if began is None else began
    wandb_log.check(config.wandb)
    saved = None
    if workdir is not None and checkpoint.latest_step(workdir) is not None:
        newest = checkpoint.latest_step(workdir) if strict else None
        saved = checkpoint.load_progress(workdir, newest, output.say)
        if PROGRESS_KEY not in saved:
            raise ValueError(
                f"{workdir} holds a model that was saved, not a run that can go on; give another "
                "workdir"
            )
    corpus.check_enough(config.num_steps * config.data.batch_size, config.data.epochs)
    config, near_kl = for_start(config, model.certificate, saved and saved[PROGRESS_KEY])
    mesh = make_mesh(config)
    plan = plan_step(model, config, teacher, mesh)
    setup = plan.setup
    if jax.process_count() > 1:  # the memory of each host's devices decides
        hosts.agree({"gather": plan.words}, "how weights are gathered (--config.gather)")
    contract = RunContract.of(
        config, corpus.rows.content, corpus.windows.tokens, near_kl, corpus.draws_fingerprint
    )
    if saved is not None:
        # On all processes, before any of them opens arrays.
        together(lambda: contract.check(saved[PROGRESS_KEY], workdir))
    teacher_params = None
    if teacher is not None and setup.teacher is not None:
        places = teacher_shardings(teacher.cfg, mesh)
        teacher_params = teacher.weights.load(places, setup.teacher.dtype)
    trainer = Trainer(setup, mesh, teacher_params, config.curriculum(model.cfg.num_loops))
    batches = data.batches(
        corpus.rows, config.data.batch_size, config.seed, jax.process_index(), jax.process_count(),
        corpus.draws and corpus.draws.join,
    )  # fmt: skip
    first_step, history, spent = 0, [], 0.0
    if saved is not None:
        # Not always the step of `saved`: one whose arrays are damaged is set aside.
        arrays, saved, first_step = checkpoint.restore(
            workdir, trainer.to_restore(), newest, output.say
        )
        trainer.resume(arrays, first_step)
        batches.set_state(saved["data"])
        history, spent = saved["history"], saved["seconds"]
    else:
        trainer.start(model.weights.load(trainer.param_shardings, jax.numpy.float32))
    # A caller that keeps no reference to the model frees the arrays it started from.
    model = dataclasses.replace(model, weights=None)

    clock = RunClock(saved and saved.get("clock"), began)
    skips = Skips(config.max_skipped_steps, saved and saved.get("skips"))
    peak = config.peak_flops or peak_flops(mesh.devices.flat[0].device_kind)
    report = Report(config, clock, quiet, near_kl, peak and peak * mesh.size)
    flops = flops_of(config, setup)
    report.start(model, origin or model.name, mesh, setup.model.dtype, corpus.rows, first_step,
                 flops(model.cfg.num_loops), plan.words,
                 attention_of(model.cfg, config, mesh)[1])  # fmt: skip

    def seconds() -> float:
        return spent + time.time() - began

    def progress() -> dict[str, Any]:
        return {
            "data": batches.get_state(),
            PROGRESS_KEY: contract.to_json(),
            "history": history,
            "seconds": seconds(),
            "clock": clock.to_json(),
            "skips": skips.to_json(),
        }

    record = config.to_json() if record is None else record
    rows = config.data.batch_size // config.accumulate
    with contextlib.ExitStack() as files:
        callbacks: list[Callback] = [Tick(clock, trainer, flops), report]
        if workdir is not None:
            if saved is None:
                create(model, workdir)
            callbacks += open_files(files, workdir, report, first_step, progress, record)
            if profile is not None and profile[1] <= first_step:
                report.say(f"steps {profile[0]} to {profile[1]} are done already: no trace")
            elif profile is not None:
                directory, ready = f"{os.fspath(workdir)}/profile", jax.block_until_ready
                callbacks.append(
                    Profile(profile, directory, lambda: ready(trainer.state.step), report.say)
                )
                files.callback(callbacks[-1].close)
        quality_of = functools.partial(measure, trainer, corpus.windows, rows)
        evaluate = Evaluate(quality_of, callbacks, history)
        callbacks = [evaluate, *callbacks]
        if workdir is not None and saved is None:
            with clock.pause("saving"):  # from here on, a run that stops need not convert again
                for callback in callbacks:
                    callback.on_save(0, trainer.state)
        if not history:
            with clock.pause("evaluating"):
                if teacher_params is not None:
                    evaluate.record(0, "source", quality_of(teacher_params, setup.teacher))
                evaluate.on_evaluate(0, trainer.state)
        stop = stop or loop.Stop(signals=())
        stop.begin_steps()
        step = loop.run(
            trainer,
            clock.timed(batches),
            first_step,
            schedule_of(config),
            callbacks,
            stop,
            clock.pause,
            skips,
        )
    summary = summarise(config, model, teacher, history, step, record)
    summary |= {"seconds": round(seconds(), 1), "skipped_steps": skips.total}
    summary |= report.summary()
    if workdir is not None and step == config.num_steps and jax.process_index() == 0:
        file = paths.path_of(workdir) / SUMMARY
        if not (first_step == step and file.exists()):
            checkpoint.write_json(file, summary)
    return Fit(trainer, summary, step < config.num_steps)


def for_start(
    config: TrainConfig,
    certificate: Mapping[str, Any] | None,
    saved: Mapping[str, Any] | None = None,
) -> tuple[TrainConfig, float | None]:
    """The settings for a start, and its KL if it is near its source; see `NearStart`.

    Args:
      config: as it was set.
      certificate: of the model to start from.
      saved: contract of the run that goes on; one that knows no near starts goes on as it was.
    """
    kl = certified_kl(certificate)
    if not config.is_near(kl) or (saved is not None and not RunContract.records_start(saved)):
        return config, None
    return config.from_near(), kl


def make_mesh(config: TrainConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of a run; ValueError where the batch does not divide over it.

    Args:
      config: of the run.
      devices: that are only described; None: all devices of this run.
    """
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    if devices is None:
        sharding.check_batch_is_local(mesh)
    shards = sharding.data_shards(mesh)
    rows = config.data.batch_size // config.accumulate
    if rows % shards:
        micro = f" / accumulate={config.accumulate}" if config.accumulate > 1 else ""
        raise ValueError(
            f"data.batch_size={config.data.batch_size}{micro} does not divide over the {shards} "
            f"devices of the mesh axes data × fsdp{sharding.by_host(mesh.devices.flat)}; choose a "
            "multiple"
        )
    return mesh


def plan_step(
    model: Model, config: TrainConfig, teacher: Model | None, mesh: jax.sharding.Mesh
) -> Plan:
    """The step of a run, and how it gathers weights.

    Raises:
      ValueError: teacher and model do not fit together.
    """
    num_ids, draws = None, 0
    config.check_fits(model.cfg)
    if config.data.teacher:
        job = find_manifest(config.data.teacher).job
        num_ids, draws = job.num_ids, job.draws
    elif config.objective.kd:
        if teacher is None:
            raise ValueError(
                "objective.kd > 0 needs the model to distil from: set --config.source, or "
                "teacher=MODEL in Python"
            )
        num_ids = shared_ids(model, teacher)
    return plan_of(model.cfg, config, teacher and teacher.cfg, mesh, num_ids, draws)


def plan_of(
    cfg: DecoderConfig,
    config: TrainConfig,
    teacher: DecoderConfig | None,
    mesh: jax.sharding.Mesh,
    num_ids: int | None = None,
    draws: int = 0,
) -> Plan:
    """As `plan_step`, from sizes alone.

    Args:
      cfg, teacher: of the models; the teacher is used if `config.objective.kd` > 0.
      config, mesh: of the run.
      num_ids, draws: as in `TrainSetup`.
    """
    dtype = sharding.compute_dtype(config.dtype)
    options = dict(dtype=dtype, remat_policy=config.remat, data_shards=sharding.data_shards(mesh))

    def decoder(cfg, **more):
        kernel, _ = attention_of(cfg, config, mesh)
        return Decoder(cfg, attention=kernel, **options, **more)

    setup = TrainSetup(
        decoder(cfg, unroll_layers=config.unroll_layers),
        make_optimizer(config.optimizer, config.num_steps),
        config.objective,
        decoder(teacher) if config.objective.kd and not draws else None,
        num_ids,
        config.accumulate,
        config.ema_decay,
        least_chunk=1 if mesh.devices.flat[0].platform == "cpu" else LEAST_CHUNK,
        draws=draws,
    )
    sizes = config.data.batch_size, config.data.context_length
    return device_memory.plan(setup, mesh, *sizes, config.gather)


def attention_of(
    cfg: DecoderConfig, config: TrainConfig, mesh: jax.sharding.Mesh
) -> tuple[str, str]:
    """The attention of a model in a run, by name and in words."""
    dtype, length = sharding.compute_dtype(config.dtype), config.data.context_length
    return choose(cfg, mesh.devices.flat[0], dtype, length, mesh.shape["tensor"])


def shared_ids(model: Model, teacher: Model) -> int | None:
    """The number of ids over which teacher and model are compared; None: all.

    Embeddings of one tokenizer may be padded to different sizes. The padding rows mean nothing.

    Raises:
      ValueError: different tokenizers.
    """
    vocabulary = model.tokenizer.get_vocab()
    if vocabulary != teacher.tokenizer.get_vocab():
        raise ValueError(
            f"the teacher {teacher.name} and the model ({model.name}) have different "
            "vocabularies; distillation compares them token by token. Give the model it came from"
        )
    if model.cfg.vocab_size == teacher.cfg.vocab_size:
        return None
    return max(vocabulary.values()) + 1


def flops_of(config: TrainConfig, setup: TrainSetup) -> Callable[[int], float]:
    """Loops of a step -> its model operations, over all devices."""
    teacher = None if setup.teacher is None else setup.teacher.cfg
    length = config.data.context_length

    @functools.cache
    def flops(loops: int) -> float:
        each = training_flops(setup.model.cfg, length, loops, setup.exits, teacher)
        return each * config.tokens_per_step

    return flops


def schedule_of(config: TrainConfig) -> loop.Schedule:
    return loop.Schedule(
        config.num_steps, config.log_every, config.eval_every, config.checkpoint_every
    )


def measure(
    trainer: Trainer, windows: Windows, batch_size: int, params: Any, decoder: Decoder | None = None
) -> dict[str, Any]:
    """The quality of params on held-out windows; `decoder`: theirs, by default the student."""
    decoder = decoder or trainer.setup.model
    shards = decoder.data_shards
    fewer = -(-len(windows.tokens) // shards) * shards  # less padding
    place = sharding.batch_sharding(trainer.mesh)
    with trainer.use():
        return perplexity(
            decoder,
            params,
            *windows,
            batch_size=min(batch_size, fewer),
            all_loops=decoder.cfg.has_exits,
            put=lambda batch: sharding.put_global(batch, place),
        )


def create(model: Model, workdir: str | os.PathLike) -> None:
    """Write config, tokenizer and certificate of a new run."""
    # If process 0 cannot write, the others must not wait for it.
    together(lambda: model.write_description(workdir) if jax.process_index() == 0 else None)


def open_files(
    files: contextlib.ExitStack,
    workdir: str | os.PathLike,
    report: Report,
    first_step: int,
    progress: Callable[[], dict[str, Any]],
    record: dict[str, Any],
) -> list[Callback]:
    """The callbacks that write metrics and checkpoints; `files` closes them."""
    config = report.config
    rate = learning_rate_schedule(config.optimizer, config.num_steps)
    writers: list[Any] = [metrics.MetricWriter(workdir, first_step)]
    if config.wandb:
        writers.append(wandb_log.WandbWriter(workdir, config.wandb, record, report.quiet))
    records = [Record(writer, rate, report.performance) for writer in writers]
    saver = checkpoint.Writer(workdir, config.keep_checkpoints, config.keep_best, config.keep_every)
    save = Save(saver, progress, [report, *records])
    for callback in (*records, save):
        files.callback(callback.close)
    return [*records, save]


def summarise(config, model, teacher, history, step, record) -> dict[str, Any]:
    """The numbers of a run, as JSON."""
    last = {entry["name"]: entry for entry in history}
    first = {entry["name"]: entry for entry in reversed(history)}
    before, after, source = first.get("valid"), last.get("valid"), last.get("source")
    summary = {
        "steps": step,
        "tokens": step * config.tokens_per_step,
        "parameters": parameter_counts(abstract_params(model.cfg)),
        "source_parameters": teacher and parameter_counts(abstract_params(teacher.cfg)),
        "before": before,
        "after": after,
        "source": source,
        "config": record,
    }
    if source and before and before["nll"] > source["nll"]:
        gap = before["nll"] - source["nll"]
        summary["recovered"] = (before["nll"] - after["nll"]) / gap
    return summary
