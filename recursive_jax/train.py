"""Train: source, checkpoint or nothing -> (conversion) -> uptraining, distillation, exit training.

    python -m recursive_jax.train --config=configs/quickstart.py --workdir=DIR
    python -m recursive_jax.train --config=configs/gemma_rrt.py:gemma3_270m --workdir=DIR \
        --config.source=MODEL_DIR --config.data.train=TEXT_DIR

Run the same command again to resume. Any value of the config can be set with --config.NAME=VALUE.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import linen as nn
from ml_collections import config_flags

from recursive_jax import metrics, sharding, text
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import (
    REMAT_CHOICES,
    Decoder,
    abstract_params,
    init_params,
    logical_axes,
    parameter_counts,
)
from recursive_jax.training import data as data_lib
from recursive_jax.training.documents import documents
from recursive_jax.training.evaluation import perplexity
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
)
from recursive_jax.training.step import init_state, make_train_step
from recursive_jax.weights import checkpoint, tying
from recursive_jax.weights.source import ASSETS, Source, open_source

CONFIG = config_flags.DEFINE_config_file("config", None, "what to train, e.g. configs/gemma_rrt.py")
WORKDIR = flags.DEFINE_string("workdir", None, "checkpoints, metrics; resumed when it exists")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "several hosts: call jax.distributed.initialize() (TPU pod, Slurm, GKE)"
)


@dataclasses.dataclass
class Start:
    """The model a run begins with."""

    params: Any  # nested host arrays; None when they are restored from the workdir
    cfg: DecoderConfig
    tokenizer: Any
    facts: dict[str, Any]  # for the checkpoint's config.json
    origin: str  # for the start-up table


def compute_dtype(name: str) -> jnp.dtype:
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={name!r}; expected auto, float32 or bfloat16")
    return jnp.dtype(name)


def starting_model(config, workdir: pathlib.Path) -> tuple[Start, Source | None]:
    """Restore order: workdir > init_from > source > scratch."""
    source = open_source(config.source) if config.source else None
    recipe = {
        "source": config.source,
        "init_from": config.init_from,
        "scratch": config.scratch.to_dict(),
        "model": config.model.to_dict(),
    }
    if (workdir / checkpoint.CONFIG).exists():
        cfg, facts = checkpoint.load_config(workdir)
        if facts.get("recipe") != recipe:
            changed = [k for k in recipe if (facts.get("recipe") or {}).get(k) != recipe[k]]
            raise ValueError(
                f"{workdir} holds a run of another model: {', '.join(changed)} differ from this "
                "config. Give another --workdir, or the config it was started with"
            )
        if checkpoint.latest_step(workdir) is not None:
            tokenizer = text.load_tokenizer(workdir / "tokenizer")
            return Start(None, cfg, tokenizer, facts, f"resumed from {workdir}"), source
    if config.init_from:
        cfg, facts = checkpoint.load_config(config.init_from)
        params = checkpoint.as_numpy(checkpoint.load_params(config.init_from)[0])
        tokenizer = text.load_tokenizer(pathlib.Path(config.init_from) / "tokenizer")
        start = Start(params, cfg, tokenizer, facts, f"checkpoint {config.init_from}")
    elif source is not None:
        start = from_source(source, config)
    elif config.scratch:
        cfg = DecoderConfig.from_json(config.scratch.to_dict())
        params = checkpoint.as_numpy(init_params(cfg, jax.random.key(config.seed)))
        where = ASSETS / "tiny" if config.tokenizer == "tiny" else config.tokenizer
        start = Start(params, cfg, text.load_tokenizer(where), {}, "random weights")
    else:
        raise ValueError(
            "nothing to train: set --config.source=MODEL (Hugging Face directory, .gguf, hub id "
            "or 'tiny'), --config.init_from=CHECKPOINT, or config.scratch"
        )
    start.facts = {k: v for k, v in start.facts.items() if k not in ("format", "versions")}
    start.facts["recipe"] = recipe
    return start, source


def from_source(source: Source, config) -> Start:
    """Convert a pretrained model by `config.model` (or make the paper's reduced-size baseline)."""
    options, tokenizer = config.model, source.load_tokenizer()
    facts = {"source": str(source.path), "generation_config": source.generation_config}
    if options.reduced_baseline:  # paper §3.2: fewer layers, no loop, no pretrained weights
        tying.selected_depths("lower", source.cfg.depth, options.num_loops)
        cfg = source.cfg.replace(
            num_layers=source.cfg.depth // options.num_loops,
            windows=source.cfg.windows[: source.cfg.depth // options.num_loops],
            rope_of_depth=source.cfg.rope_of_depth[: source.cfg.depth // options.num_loops],
        )
        params = checkpoint.as_numpy(init_params(cfg, jax.random.key(config.seed)))
        return Start(params, cfg, tokenizer, facts, "random weights, reduced size")
    if options.num_loops == 1 and not options.lora_rank:
        return Start(source.load_params(), source.cfg, tokenizer, facts, f"{source.path}, as is")
    params, cfg = tying.tie(source.params, source.cfg, **tying.recipe_from(options, config.seed))
    return Start(params, cfg, tokenizer, facts | {"tying": options.to_dict()}, f"{source.path}")


def open_text(config, tokenizer) -> tuple[data_lib.PackedRows, text.Windows, str]:
    """Packed training rows, the windows perplexity is measured on, and the training text's hash."""
    d = config.data
    prefix = text.bos_prefix(tokenizer)

    def tokens(spec):
        return data_lib.tokenize(
            documents(spec),
            lambda texts: text.encode_batch(tokenizer, texts),
            text.fingerprint(tokenizer),
            d.cache_dir or None,
            progress=jax.process_index() == 0,
        )

    train = tokens(d.train)
    if d.valid:
        valid = tokens(d.valid)
    else:
        valid = train.split("valid", d.valid_fraction)
        train = train.split("train", d.valid_fraction)
    rows = data_lib.PackedRows(train, prefix, d.context_length, config.seed)
    windows = text.eval_windows(
        tokenizer, (valid[i] for i in range(len(valid))), d.context_length, d.eval_tokens
    )
    return rows, windows, hashlib.blake2b(train.hashes.tobytes(), digest_size=8).hexdigest()


class Stop:
    """Remembers that the machine is being taken away (SIGTERM) or Ctrl-C was pressed."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._ask)

    def _ask(self, number, frame):
        if self.asked:  # pressed twice: now
            raise KeyboardInterrupt
        self.asked = True

    def reached(self, step: int) -> bool:
        """True on every process at the same step."""
        if jax.process_count() == 1:
            return self.asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


def train(config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """One run, resumed when `workdir` holds one. Returns its `summary.json`."""
    workdir = pathlib.Path(workdir)
    objective = Objective(**config.objective)
    optimizer_cfg = OptimizerConfig(**config.optimizer)
    if config.remat not in REMAT_CHOICES:
        raise ValueError(f"remat={config.remat!r}; expected one of {', '.join(REMAT_CHOICES)}")
    dtype = compute_dtype(config.dtype)
    mesh = sharding.make_mesh(**config.mesh)
    shards = sharding.data_shards(mesh)
    if config.data.batch_size % shards:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} does not divide over the {shards} devices "
            "of the mesh axes data × fsdp; choose a multiple"
        )
    start, source = starting_model(config, workdir)
    cfg = start.cfg
    text.check_vocabulary(start.tokenizer, cfg.vocab_size)
    if objective.kd and source is None:
        raise ValueError("objective.kd > 0 needs the model to distil from: set --config.source")
    rows, windows, text_hash = open_text(config, start.tokenizer)

    tokens_per_step = config.data.batch_size * config.data.context_length
    num_steps = max(1, round(config.tokens / tokens_per_step))
    tx = make_optimizer(optimizer_cfg, num_steps)
    schedule = learning_rate_schedule(optimizer_cfg, num_steps)
    options = dict(dtype=dtype, remat_policy=config.remat, data_shards=shards)
    model = Decoder(cfg, unroll_layers=config.unroll_layers, **options)
    teacher = Decoder(source.cfg, **options) if objective.kd else None

    rules = sharding.rules_for(mesh, cfg)
    param_shardings = sharding.shardings(logical_axes(cfg), mesh, rules)
    abstract = jax.eval_shape(lambda p: init_state(p, tx), abstract_params(cfg))
    state_shardings = sharding.state_shardings(abstract, param_shardings, mesh)

    batches = data_lib.batches(
        rows, config.data.batch_size, config.seed, jax.process_index(), jax.process_count()
    )
    history: list[dict[str, Any]] = []
    if start.params is None:
        arrays = {"params": abstract.params, "opt_state": abstract.opt_state}
        where = {"params": state_shardings.params, "opt_state": state_shardings.opt_state}
        arrays = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays, where
        )
        arrays, progress, first_step = checkpoint.restore(workdir, arrays)
        if progress["num_steps"] != num_steps:
            raise ValueError(
                f"{workdir} was planned for {progress['num_steps']} steps, this config gives "
                f"{num_steps}: the learning-rate schedule would jump. Use the same tokens, "
                "batch_size and context_length, or start a new --workdir with --config.init_from"
            )
        if progress["text_hash"] != text_hash:
            raise ValueError(
                f"the text of {config.data.train} has changed since {workdir} was started, so the "
                "run cannot go on where it stopped. Restore the text, or start a new --workdir "
                f"with --config.init_from={workdir}"
            )
        batches.set_state(progress["data"])
        history = progress["history"]
        step_array = sharding.put_global(np.int32(first_step), state_shardings.step)
        state = dataclasses.replace(abstract, step=step_array, **arrays)
    else:
        first_step = 0
        params = sharding.put_global(start.params, param_shardings)
        start.params = None  # the host copy
        state = jax.jit(lambda p: init_state(p, tx), out_shardings=state_shardings)(params)
        del params
    teacher_params = None
    if teacher is not None:
        axes = sharding.shardings(logical_axes(source.cfg), mesh, rules)
        teacher_params = sharding.put_global(source.load_params(), axes)

    loss_step = make_train_step(model, tx, objective, teacher)

    def sharded_step(state, batch, teacher_params):
        with nn.logical_axis_rules(rules):
            return loss_step(state, batch, teacher_params)

    step_fn = jax.jit(sharded_step, donate_argnums=0, out_shardings=(state_shardings, None))
    put_windows = lambda b: sharding.put_global(b, sharding.batch_sharding(mesh))  # noqa: E731

    def evaluate(model, params):
        batch_size = max(shards, config.data.batch_size)
        with jax.set_mesh(mesh):
            return perplexity(
                model, params, windows.tokens, windows.scored, batch_size,
                all_loops=model.cfg.num_loops > 1, put=put_windows,
            )  # fmt: skip

    if first_step == 0:
        checkpoint.create(workdir, cfg, start.tokenizer, **start.facts)
    print_start(config, start, mesh, dtype, rows, num_steps, first_step)
    writer = metrics.MetricWriter(workdir)
    saver = checkpoint.Writer(workdir, keep=config.keep_checkpoints)
    stop = Stop()

    def record_eval(step, model, params, name="valid"):
        result = evaluate(model, params)
        history.append({"step": step, "name": name, **result})
        values = {f"{name}/nll": result["nll"], f"{name}/perplexity": result["perplexity"]}
        for i, value in enumerate(result.get("perplexity_exits", [])[:-1], 1):
            values[f"{name}/perplexity_exit_{i}"] = value
        writer.write(step, values)
        exits = result.get("perplexity_exits", [])
        by_loop = "  by exit " + " · ".join(f"{x:.4g}" for x in exits) if len(exits) > 1 else ""
        metrics.say(
            f"  {name} perplexity {result['perplexity']:.4g} (nll {result['nll']:.4f}, "
            f"{result['tokens']:,} tokens){by_loop}"
        )
        return result

    def save(step, wait=False):
        progress = {
            "data": batches.get_state(),
            "text_hash": text_hash,
            "num_steps": num_steps,
            "history": history,
            "tokens": step * tokens_per_step,
        }
        saver.save(step, state.params, state.opt_state, progress, wait=wait)

    began = time.time()
    if first_step == 0:
        if teacher is not None:
            record_eval(0, teacher, teacher_params, "source")
        record_eval(0, model, state.params)
    progress = metrics.Progress(num_steps, first_step)
    pending = None  # metrics of the step before: read after the next step is under way
    stopped = False
    for step in range(first_step + 1, num_steps + 1):
        batch = sharding.put_local_batch(next(batches), mesh)
        state, values = step_fn(state, batch, teacher_params)
        check(pending, step - 1)
        pending = values
        log = step % config.log_every == 0 or step in (first_step + 1, num_steps)
        eval_now = step % config.eval_every == 0 or step == num_steps
        stopped = stop.reached(step)
        save_now = step % config.checkpoint_every == 0 or step == num_steps or stopped
        if log or eval_now or save_now:
            values = check(pending, step)
        progress.tick(step)
        if log:
            rate = tokens_per_step / progress.seconds_per_step
            written = {f"train/{k}": v for k, v in values.items()}
            written["train/learning_rate"] = float(schedule(step))
            if np.isfinite(rate):  # the first step only compiles
                written["perf/tokens_per_second"] = rate
            writer.write(step, written)
            shown = "  ".join(
                f"{k} {values[k]:.4f}" for k in ("loss", "ce", "kd", "ce_exit_1") if k in values
            )
            metrics.say(
                f"step {step}/{num_steps}  {100 * step / num_steps:.0f}%  {shown}  "
                f"{rate:,.0f} tok/s  ETA {progress.eta(step)}"
            )
        if eval_now:
            record_eval(step, model, state.params)
        if save_now:
            save(step)
        if stopped:
            break
    saver.close()
    source_counts = parameter_counts(abstract_params(source.cfg)) if source else None
    summary = summarise(config, state, source_counts, history, int(state.step), tokens_per_step)
    summary["seconds"] = round(time.time() - began, 1)
    writer.close()
    if stopped:
        metrics.say(f"stopped at step {step} and saved; run the same command to go on")
    else:
        if jax.process_index() == 0:
            checkpoint.write_json(workdir / "summary.json", summary)
        print_end(summary, workdir)
    return summary


def check(values, step: int):
    """Metrics as floats; stops the run when the loss is not finite, before anything is saved."""
    if values is None:
        return None
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    if not np.isfinite(values["loss"]) or not np.isfinite(values.get("grad_norm", 0.0)):
        raise FloatingPointError(
            f"loss {values['loss']} and gradient norm {values.get('grad_norm')} at step {step} are "
            "not finite. The last checkpoint is from before. Lower optimizer.learning_rate, "
            "raise warmup_steps, or use --config.dtype=float32; then run again"
        )
    return values


def print_start(config, start, mesh, dtype, rows, num_steps, first_step) -> None:
    cfg = start.cfg
    counts = {k: n for k, n in parameter_counts(abstract_params(cfg)).items() if n}
    devices = jax.devices()
    tokens = config.data.batch_size * config.data.context_length
    shape = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    metrics.say(
        metrics.table(
            [
                ("model", start.origin),
                ("decoder", f"{cfg.family}, {cfg.num_loops} loops × {cfg.num_layers} layers, "
                            f"width {cfg.embed_dim}, norms {cfg.norms}"),
                ("parameters", "  ".join(f"{k} {metrics.count(n)}" for k, n in counts.items())),
                ("devices", f"{len(devices)} × {devices[0].device_kind}, "
                            f"{jax.process_count()} process(es), mesh {shape}"),
                ("compute", f"{dtype.name}, params and loss float32, remat {config.remat}"),
                ("data", f"{config.data.train}: {metrics.count(rows.num_tokens)} tokens, "
                         f"{len(rows):,} rows of {config.data.context_length}"),
                ("to do", f"{num_steps - first_step:,} steps × {tokens:,} tokens = "
                          f"{metrics.count((num_steps - first_step) * tokens)}, "
                          f"{num_steps * config.data.batch_size / len(rows):.2f} epochs in all"),
            ]
        )
    )  # fmt: skip
    metrics.say()


def summarise(config, state, source_parameters, history, step, tokens_per_step) -> dict[str, Any]:
    before = next((h for h in history if h["name"] == "valid"), None)
    after = next((h for h in reversed(history) if h["name"] == "valid"), None)
    source = next((h for h in history if h["name"] == "source"), None)
    summary = {
        "steps": step,
        "tokens": step * tokens_per_step,
        "parameters": parameter_counts(state.params),
        "source_parameters": source_parameters,
        "before": before,
        "after": after,
        "source": source,
        "config": json.loads(config.to_json_best_effort()),
    }
    if source and before and after and before["nll"] > source["nll"]:
        gap = before["nll"] - source["nll"]
        summary["recovered"] = (before["nll"] - after["nll"]) / gap
    return summary


def print_end(summary, workdir) -> None:
    sizes, rows = summary["parameters"], []
    for name, key in (("source", "source"), ("recursive, before", "before"), ("after", "after")):
        if not summary[key]:
            continue
        n = summary["source_parameters"] if key == "source" else sizes
        if n is None:
            continue
        layers = n["shared"] + n["lora"] + n["vectors"]
        ppl, nll = summary[key]["perplexity"], summary[key]["nll"]
        rows.append((name, f"{layers:,}", f"{n['total']:,}", f"{ppl:,.2f}", f"{nll:.4f}"))
    header = ("model", "layers' parameters", "all parameters", "perplexity", "nll")
    metrics.say("\n" + metrics.table(rows, header))
    if "recovered" in summary:
        metrics.say(f"{summary['recovered']:.0%} of the gap in nll to the source recovered")
    metrics.say(
        f"trained on {metrics.count(summary['tokens'])} tokens in "
        f"{metrics.clock(summary['seconds'])}; checkpoint: {workdir}\n"
        f"next: python -m recursive_jax.generate --checkpoint={workdir} --prompt='…'"
    )


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags start with --")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    try:
        train(CONFIG.value, WORKDIR.value)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        metrics.fail(error)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
