"""Train a model: uptraining with distillation and exit losses, or training from scratch.

    python -m recursive_jax.train --config=configs/quickstart.py --workdir=DIR
    python -m recursive_jax.train --config=configs/gemma_rrt.py:gemma3_270m --workdir=DIR \
        --config.source=MODEL_DIR --config.data.train=TEXT_DIR

A source is converted first. The same command again resumes the run. Any value of the config can
be set with --config.NAME=VALUE.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from recursive_jax import metrics, sharding, start, text
from recursive_jax.console import app, output, tables
from recursive_jax.console.progress import StepProgress
from recursive_jax.evaluation import certificate
from recursive_jax.evaluation.perplexity import perplexity
from recursive_jax.models.decoder import REMAT_CHOICES, Decoder
from recursive_jax.models.parameters import abstract_params, logical_axes, parameter_counts
from recursive_jax.text.documents import documents
from recursive_jax.training import data as data_lib
from recursive_jax.training import loop
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from recursive_jax.training.step import TrainState, init_state, make_train_step
from recursive_jax.weights import checkpoint, tying
from recursive_jax.weights.source import Source, open_source

CONFIG = config_flags.DEFINE_config_file("config", None, "what to train, e.g. configs/gemma_rrt.py")
WORKDIR = flags.DEFINE_string("workdir", None, "checkpoints, metrics; resumed when it exists")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "several hosts: call jax.distributed.initialize() (TPU pod, Slurm, GKE)"
)


def starting_model(config, source: Source | None, workdir: pathlib.Path) -> start.Start:
    """The model to start from, by the first that exists: workdir, init_from, source, scratch."""
    recipe = {
        "source": config.source,
        "init_from": config.init_from,
        # A checkpoint determines its model: these sections do not apply to it.
        "scratch": None if config.init_from else config.scratch.to_dict(),
        "model": None if config.init_from else config.model.to_dict(),
    }
    recipe = json.loads(json.dumps(recipe))  # as it is read from config.json: lists, no tuples
    begin = start.from_workdir(workdir, recipe)
    if begin is not None:
        return begin
    if config.init_from:
        begin = start.from_checkpoint(config.init_from)
    elif source is not None and config.model.reduced_baseline:
        begin = start.reduced_baseline(source, config.model.num_loops, config.seed)
    elif source is not None:
        how = tying.recipe_from(config.model, config.seed)
        begin = start.from_source(source, how, certificate.tie_with_certificate)
    elif config.scratch:
        begin = start.from_scratch(config.scratch.to_dict(), config.tokenizer, config.seed)
    else:
        raise ValueError(
            "nothing to train: set --config.source=MODEL (Hugging Face directory, .gguf, hub id "
            "or 'tiny'), --config.init_from=CHECKPOINT, or config.scratch"
        )
    begin.facts["recipe"] = recipe
    return begin


def open_text(config, tokenizer, vocab_size: int) -> tuple[data_lib.PackedRows, text.Windows]:
    """Packed training rows, and the held-out windows for perplexity."""
    d = config.data

    def tokens(spec):
        return data_lib.tokenize(
            documents(spec),
            lambda texts: text.encode_batch(tokenizer, texts, vocab_size),
            f"{text.fingerprint(tokenizer)} {vocab_size}",
            d.cache_dir or None,
            progress=jax.process_index() == 0,
        )

    train = tokens(d.train)
    if d.valid:
        valid = tokens(d.valid)
    else:
        valid = train.split("valid", d.valid_fraction)
        train = train.split("train", d.valid_fraction)
    prefix = text.bos_prefix(tokenizer)
    rows = data_lib.PackedRows(train, prefix, d.context_length, config.seed)
    pieces = valid.pieces(d.context_length - len(prefix))  # each becomes one window
    windows = text.eval_windows(tokenizer, pieces, d.context_length, d.eval_tokens)
    return rows, windows


CONTRACT_KEY = "plan"  # in the saved progress; renaming it would break resuming older runs


def _hash(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def restore(workdir, abstract: TrainState, shardings: TrainState, contract: dict[str, Any]):
    """The saved state, `progress` and step of a run with the same contract.

    Raises:
      ValueError: the run has another contract.
    """
    there = checkpoint.load_progress(workdir)[CONTRACT_KEY]
    changed = [name for name in contract if there.get(name) != contract[name]]
    if changed:
        then = ", ".join(f"{name} was {there.get(name, 'not recorded')}" for name in changed)
        now = ", ".join(f"{name} is {contract[name]}" for name in changed)
        raise ValueError(
            f"{workdir} cannot go on where it stopped: {then}; now {now}. "
            f"Put it back, or start a new --workdir with --config.init_from={workdir}"
        )
    arrays = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        {"params": abstract.params, "opt_state": abstract.opt_state},
        {"params": shardings.params, "opt_state": shardings.opt_state},
    )
    arrays, progress, step = checkpoint.restore(workdir, arrays)
    array = sharding.put_global(np.int32(step), shardings.step)
    return TrainState(step=array, **arrays), progress, step


def train(config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """The summary of one run, as in `summary.json`; a run that `workdir` has is resumed."""
    workdir, began = checkpoint.local(workdir), time.time()
    objective, optimizer = Objective(**config.objective), OptimizerConfig(**config.optimizer)
    for name in ("batch_size", "context_length", "eval_tokens"):
        if config.data[name] < 1:
            raise ValueError(f"data.{name} must be at least 1, got {config.data[name]}")
    if config.keep_checkpoints < 1:
        raise ValueError(f"keep_checkpoints must be at least 1, got {config.keep_checkpoints}")
    if config.tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {config.tokens}")
    if config.remat not in REMAT_CHOICES:
        raise ValueError(f"remat={config.remat!r}; expected one of {', '.join(REMAT_CHOICES)}")
    if objective.kd and not config.source:
        raise ValueError("objective.kd > 0 needs the model to distil from: set --config.source")
    dtype = sharding.compute_dtype(config.dtype)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_is_local(mesh)
    shards, batch_size = sharding.data_shards(mesh), config.data.batch_size
    if batch_size % shards:
        raise ValueError(
            f"data.batch_size={batch_size} does not divide over the {shards} devices of the mesh "
            "axes data × fsdp; choose a multiple"
        )
    source = open_source(config.source) if config.source else None
    latest = checkpoint.latest_step(workdir)
    sharding.check_agreement(
        f"the last step in {workdir} (-1: none; all of them must see one directory)",
        -1 if latest is None else latest,
    )
    begin = starting_model(config, source, workdir)
    cfg = begin.cfg
    text.check_vocabulary(begin.tokenizer, cfg.vocab_size)
    if objective.kd and begin.tokenizer.get_vocab() != source.load_tokenizer().get_vocab():
        raise ValueError(
            f"the teacher {config.source} and the model ({begin.origin}) have different "
            "vocabularies; distillation compares them token by token. Give the model it came from"
        )
    rows, windows = open_text(config, begin.tokenizer, cfg.vocab_size)
    tokens_per_step = batch_size * config.data.context_length
    num_steps = -(-config.tokens // tokens_per_step)
    schedule = loop.Schedule(
        num_steps, config.log_every, config.eval_every, config.checkpoint_every
    )
    contract = {  # values that a resumed run must share with the saved one
        "num_steps": num_steps,
        "batch_size": batch_size,
        "context_length": config.data.context_length,
        "seed": config.seed,
        "training text": _hash(rows.docs.hashes),
        "held-out text": _hash(windows.tokens),
        "gradient clipping": optimizer.clip_norm > 0,  # these two change the optimizer state's tree
        "own LoRA rate": optimizer.lora_lr_scale != 1.0,
        "objective": dataclasses.asdict(objective),
    }

    tx = make_optimizer(optimizer, num_steps)
    options = dict(dtype=dtype, remat_policy=config.remat, data_shards=shards)
    model = Decoder(cfg, unroll_layers=config.unroll_layers, **options)
    rules = sharding.rules_for(mesh, cfg)
    param_shardings = sharding.shardings(logical_axes(cfg), mesh, rules)
    abstract = jax.eval_shape(lambda p: init_state(p, tx), abstract_params(cfg))
    shardings = sharding.state_shardings(abstract, param_shardings, mesh)
    batches = data_lib.batches(
        rows, batch_size, config.seed, jax.process_index(), jax.process_count()
    )
    history: list[dict[str, Any]] = []
    spent = 0.0  # seconds of earlier invocations
    if begin.params is None and begin.checkpoint is None:
        state, progress, first_step = restore(workdir, abstract, shardings, contract)
        batches.set_state(progress["data"])
        history, spent = progress["history"], progress["seconds"]
        if first_step == num_steps:
            output.say(f"{workdir} has trained to the end; nothing to do but to sum up")
            began = time.time()
    else:
        first_step = 0
        if begin.checkpoint is not None:
            params, _ = checkpoint.load_params(begin.checkpoint, param_shardings)
        else:
            params = sharding.put_global(begin.params, param_shardings)
        begin.params = None  # the host copy
        state = jax.jit(lambda p: init_state(p, tx), out_shardings=shardings)(params)
        del params
    teacher = teacher_params = None
    if objective.kd:
        teacher = Decoder(source.cfg, **options)
        axes = sharding.shardings(
            logical_axes(source.cfg), mesh, sharding.rules_for(mesh, source.cfg)
        )
        teacher_params = sharding.put_stacks(source.params, axes, dtype)

    jitted = jax.jit(
        make_train_step(model, tx, objective, teacher),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )

    def train_step(state, batch):
        with sharding.use(mesh, rules):
            return jitted(state, sharding.put_local_batch(batch, mesh), teacher_params)

    if first_step == 0:
        if jax.process_index() == 0:
            checkpoint.create(workdir, cfg, begin.tokenizer, **begin.facts)
            if begin.certificate is not None:
                checkpoint.write_json(workdir / checkpoint.CERTIFICATE, begin.certificate)
        sharding.wait_for_all("checkpoint directory")
    print_start(config, begin, mesh, dtype, rows, num_steps, first_step)
    for warning in (begin.certificate or {}).get("warnings", ()):
        output.say(f"warning: {warning}")
    writer = metrics.MetricWriter(workdir, first_step)
    saver = checkpoint.Writer(workdir, keep=config.keep_checkpoints)
    progress_bar = StepProgress(num_steps, first_step)
    rate = learning_rate_schedule(optimizer, num_steps)

    # Smaller than a training batch where there are few windows: less padding.
    eval_rows = min(batch_size, -(-len(windows.tokens) // shards) * shards)

    def seconds():
        return spent + time.time() - began

    def put(batch):
        return sharding.put_global(batch, sharding.batch_sharding(mesh))

    def evaluate(step, model, params, name="valid"):
        with sharding.use(mesh, rules):
            result = perplexity(
                model, params, *windows, eval_rows, all_loops=model.cfg.num_loops > 1, put=put
            )
        history.append({"step": step, "name": name, **result})
        exits = result.get("perplexity_exits", [])
        values = {f"{name}/nll": result["nll"], f"{name}/perplexity": result["perplexity"]}
        values |= {f"{name}/perplexity_exit_{i}": x for i, x in enumerate(exits, 1)}
        writer.write(step, values)
        by_loop = f"  by exit {' · '.join(f'{x:.4g}' for x in exits)}" if exits else ""
        output.say(
            f"  {name} perplexity {result['perplexity']:.4g} (nll {result['nll']:.4f}, "
            f"{result['tokens']:,} tokens){by_loop}"
        )

    def log(step, values):
        tokens_per_second = tokens_per_step / progress_bar.seconds_per_step
        written = {f"train/{name}": value for name, value in values.items()}
        written["train/learning_rate"] = float(rate(step - 1))  # the optimizer counts from 0
        writer.write(step, written | {"perf/tokens_per_second": tokens_per_second})
        shown = [f"{k} {values[k]:.4f}" for k in ("loss", "ce", "kd", "ce_exit_1") if k in values]
        output.say(
            f"step {step}/{num_steps}  {step / num_steps:.0%}  {'  '.join(shown)}  "
            + (
                "compiled"
                if np.isnan(tokens_per_second)
                else f"{tokens_per_second:,.0f} tok/s  ETA {progress_bar.eta(step)}"
            )
        )

    def save(step, state):
        data = batches.get_state()
        progress = {"data": data, CONTRACT_KEY: contract, "history": history}
        progress["seconds"] = seconds()
        saver.save(step, state.params, state.opt_state, progress)

    hooks = loop.Hooks(
        progress_bar.tick,
        log,
        progress_bar.pause()(lambda step, state: evaluate(step, model, state.params)),
        progress_bar.pause()(save),
    )
    try:
        if first_step == 0:
            if teacher is not None:
                evaluate(0, teacher, teacher_params, "source")
            evaluate(0, model, state.params)
        with loop.Stop(output.say) as stop:
            state, step = loop.run(train_step, state, batches, first_step, schedule, hooks, stop)
    finally:  # a pending save is completed even after an error
        saver.close()
        writer.close()
    summary = summarise(config, state, source, history, step, tokens_per_step)
    summary["seconds"] = round(seconds(), 1)
    if step < num_steps:
        output.say(f"stopped at step {step} and saved; run the same command to go on")
        return summary
    file = workdir / "summary.json"
    if jax.process_index() == 0 and not (first_step == num_steps and file.exists()):
        checkpoint.write_json(file, summary)
    print_end(summary, workdir)
    return summary


def print_start(config, begin, mesh, dtype, rows, num_steps, first_step) -> None:
    cfg, devices = begin.cfg, jax.devices()
    counts = {k: n for k, n in parameter_counts(abstract_params(cfg)).items() if n}
    tokens = config.data.batch_size * config.data.context_length
    shape = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    output.say(
        tables.table(
            [
                ("model", begin.origin),
                ("decoder", f"{cfg.family}, {cfg.num_loops} loops × {cfg.num_layers} layers, "
                            f"width {cfg.embed_dim}, norms {cfg.norms}"),
                ("parameters", "  ".join(f"{k} {tables.count(n)}" for k, n in counts.items())),
                ("devices", f"{len(devices)} × {devices[0].device_kind}, "
                            f"{jax.process_count()} process(es), mesh {shape}"),
                ("compute", f"{dtype.name}, params and loss float32, remat {config.remat}"),
                ("data", f"{config.data.train}: {tables.count(rows.num_tokens)} tokens, "
                         f"{len(rows):,} rows of {config.data.context_length}"),
                ("to do", f"{num_steps - first_step:,} steps × {tokens:,} tokens = "
                          f"{tables.count((num_steps - first_step) * tokens)}, "
                          f"{num_steps * config.data.batch_size / len(rows):.2f} epochs in all"),
            ]
        )
        + "\n"
    )  # fmt: skip


def summarise(config, state, source, history, step, tokens_per_step) -> dict[str, Any]:
    last = {entry["name"]: entry for entry in history}
    first = {entry["name"]: entry for entry in reversed(history)}
    before, after, vanilla = first.get("valid"), last.get("valid"), last.get("source")
    summary = {
        "steps": step,
        "tokens": step * tokens_per_step,
        "parameters": parameter_counts(state.params),
        "source_parameters": source and parameter_counts(abstract_params(source.cfg)),
        "before": before,
        "after": after,
        "source": vanilla,
        "config": json.loads(config.to_json_best_effort()),
    }
    if vanilla and before and before["nll"] > vanilla["nll"]:
        gap = before["nll"] - vanilla["nll"]
        summary["recovered"] = (before["nll"] - after["nll"]) / gap
    return summary


def print_end(summary, workdir) -> None:
    rows = []
    for name, key in (("source", "source"), ("before", "before"), ("after", "after")):
        if summary[key]:
            sizes = summary["source_parameters" if key == "source" else "parameters"]
            layers = sizes["shared"] + sizes["lora"] + sizes["vectors"]
            quality = summary[key]
            rows.append(
                (name, f"{layers:,}", f"{sizes['total']:,}", f"{quality['perplexity']:,.2f}",
                 f"{quality['nll']:.4f}")
            )  # fmt: skip
    header = ("model", "layers' parameters", "all parameters", "perplexity", "nll")
    output.say("\n" + tables.table(rows, header))
    if "recovered" in summary:
        output.say(f"{summary['recovered']:.0%} of the gap in nll to the source recovered")
    output.say(
        f"trained on {tables.count(summary['tokens'])} tokens in "
        f"{tables.clock(summary['seconds'])}; checkpoint: {workdir}\n"
        f"next: python -m recursive_jax.generate --checkpoint={workdir} --prompt='…'"
    )


def main() -> None:
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main, required=("config", "workdir"))
