"""What a person sees of a training run: the start-up table, a line per log, what came of it."""

from __future__ import annotations

import math
from typing import Any

import jax

from recursive_jax.console import output, tables
from recursive_jax.models.parameters import abstract_params, parameter_counts
from recursive_jax.training.callbacks import Callback
from recursive_jax.training.clock import RunClock
from recursive_jax.training.config import TrainConfig

SHOWN = ("loss", "ce", "kd", "ce_exit_1")


class Report(Callback):
    """Prints the progress of a run on process 0; with `quiet` nothing.

    Attributes:
      clock: rates of the steps.
      quiet: as given.
      peak: bfloat16 FLOP/s of all devices; None: not known.
      near_kl: of a near start; None: the start is another.
    """

    def __init__(
        self,
        config: TrainConfig,
        clock: RunClock,
        quiet: bool = False,
        near_kl: float | None = None,
        peak: float | None = None,
    ):
        self.config, self.clock, self.quiet, self.near_kl = config, clock, quiet, near_kl
        self.peak = peak

    def start(
        self,
        model: Any,
        origin: str,
        mesh: Any,
        dtype: Any,
        rows: Any,
        first_step: int,
        flops: float,
        weights: str,
        attention: str,
    ) -> None:
        """Print the table of what is about to happen.

        `model`: a `model.Model`; `origin`: where it comes from; `rows`: a `data.PackedRows`;
        `flops`: of a step; `weights`: how they are gathered;
        `attention`: of the student, in words.
        """
        cfg, config, devices = model.cfg, self.config, mesh.devices.flat
        counts = {k: n for k, n in parameter_counts(abstract_params(cfg)).items() if n}
        shape = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
        steps, tokens = config.num_steps, config.tokens_per_step
        micro = f" in {config.accumulate} micro-batches" if config.accumulate > 1 else ""
        average = f", weights averaged with decay {config.ema_decay}" if config.ema_decay else ""
        peak = f", peak {tables.flops(self.peak)}/s" if self.peak else ""
        if not self.peak and devices[0].platform != "cpu":
            peak = ", peak of this device unknown: no MFU without --config.peak_flops"
        cache = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
        order = "" if cfg.sharing == "cycle" else f" in order {cfg.sharing}"
        table = [
            ("model", origin),
            ("decoder", f"{cfg.family}, {cfg.num_loops} loops × {cfg.num_layers} layers{order}, "
                        f"width {cfg.embed_dim}, norms {cfg.norms}"),
            ("parameters", "  ".join(f"{k} {tables.count(n)}" for k, n in counts.items())),
            ("devices", f"{mesh.size} × {devices[0].device_kind}, "
                        f"{jax.process_count()} process(es), mesh {shape}"),
            ("compute", f"{dtype.name}, params and loss float32, remat {config.remat}, "
                        f"attention by {attention}{average}"),
            ("weights", weights),
            ("data", f"{config.data.train}: {tables.count(rows.num_tokens)} tokens, "
                     f"{len(rows):,} rows of {config.data.context_length}"),
            ("compiled", f"programs are kept in {cache}" if cache else "programs are not kept"),
            ("arithmetic", f"{tables.flops(flops)} a step{peak}"),
            ("to do", f"{steps - first_step:,} steps × {tokens:,} tokens{micro} = "
                      f"{tables.count((steps - first_step) * tokens)}, "
                      f"{steps * config.data.batch_size / len(rows):.2f} epochs in all"),
        ]  # fmt: skip
        if config.data.teacher:
            table.append(("teacher", f"not in memory: draws in {config.data.teacher}"))
        if self.near_kl is not None:
            labels = (
                f"cross-entropy × {config.objective.ce:g}" if config.objective.ce else "no labels"
            )
            table.append(
                ("near start", f"KL {self.near_kl:.2f} ≤ {config.near.kl:g} nats: {labels}, "
                               f"learning rate {config.optimizer.learning_rate:g}, warm-up "
                               f"{config.optimizer.warmup_steps} steps (near.kl=0: as set)")
            )  # fmt: skip
        self.say(tables.table(table) + "\n")
        for warning in (model.certificate or {}).get("warnings", ()):
            self.say(f"warning: {warning}")
        if first_step == steps:
            self.say("the run has trained to the end; nothing to do but to sum up")

    def on_skip(self, step, what):
        self.say(f"step {step}/{self.config.num_steps}  {what}: the step is skipped")

    def on_log(self, step, metrics):
        total, rate = self.config.num_steps, self.tokens_per_second
        shown = "  ".join(f"{k} {metrics[k]:.4f}" for k in SHOWN if k in metrics)
        shown += f"  loops {metrics['loops']:.0f}" if "loops" in metrics else ""
        shown += f"  skipped {metrics['skipped']:.0f}" if metrics.get("skipped") else ""
        eta = tables.clock(self.clock.remaining(total - step)) if rate > 0 else "?"
        work = f"{tables.flops(self.clock.flops_per_second)}/s" if rate > 0 else ""
        work = f"MFU {self.mfu:.1%}" if self.peak else work
        speed = f"{rate:,.0f} tok/s  ETA {eta}  data {self.clock.data_wait:.1%}  {work}"
        self.say(
            f"step {step}/{total}  {step / total:.0%}  {shown}  "
            + ("compiled" if math.isnan(rate) else speed)
        )

    def summary(self) -> dict[str, Any]:
        """The rates and times of the whole run, for summary.json."""
        clock, seconds = self.clock, self.clock.all_seconds()
        numbers = {
            "goodput": round(clock.goodput, 4),
            "seconds_by_kind": {kind: round(x, 1) for kind, x in seconds.items()},
        }
        if seconds["steps"]:
            stepping = seconds["steps"] + seconds["waiting"]
            numbers["tokens_per_second"] = clock.steps * self.config.tokens_per_step / stepping
            numbers["flops_per_second"] = clock.flops / stepping
            if self.peak:
                numbers["mfu"] = numbers["flops_per_second"] / self.peak
        return numbers

    def on_quality(self, step, name, quality):
        exits = quality.get("perplexity_exits", [])
        by_loop = f"  by exit {' · '.join(f'{x:.4g}' for x in exits)}" if exits else ""
        self.say(
            f"  {name} perplexity {quality['perplexity']:.4g} (nll {quality['nll']:.4f}, "
            f"{quality['tokens']:,} tokens){by_loop}"
        )

    def on_saved(self, step, seconds):
        if step:
            self.say(f"  step {step} goes to the checkpoint; the steps waited {seconds:.2f} s")

    def on_best(self, step, loss):
        self.say(f"  step {step} is the best by validation: nll {loss:.4f}; it is kept")

    @property
    def tokens_per_second(self) -> float:
        return self.config.tokens_per_step / self.clock.seconds_per_step

    @property
    def mfu(self) -> float:
        """Share of the peak arithmetic; nan where the peak is not known."""
        return self.clock.flops_per_second / (self.peak or math.nan)

    def performance(self) -> dict[str, float]:
        """The metrics of the latest steps by name: those that are known."""
        values = {
            "tokens_per_second": self.tokens_per_second,
            "flops_per_second": self.clock.flops_per_second,
            "mfu": self.mfu,
            "data_wait": self.clock.data_wait,
            "save_seconds": self.clock.saved_for,
            "goodput": self.clock.goodput,
        }
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def say(self, text: str) -> None:
        if not self.quiet:
            output.say(text)


def end(summary: dict[str, Any]) -> str:
    """Sizes and quality before and after a run, as text."""
    rows = []
    for key in ("source", "before", "after"):
        if summary[key]:
            sizes = summary["source_parameters" if key == "source" else "parameters"]
            layers = sum(sizes.get(k, 0) for k in ("shared", "lora", "prefix", "vectors"))
            quality = summary[key]
            rows.append(
                (key, f"{layers:,}", f"{sizes['total']:,}", f"{quality['perplexity']:,.2f}",
                 f"{quality['nll']:.4f}")
            )  # fmt: skip
    header = ("model", "layers' parameters", "all parameters", "perplexity", "nll")
    lines = ["", tables.table(rows, header)]
    if "recovered" in summary:
        lines.append(f"{summary['recovered']:.0%} of the gap in nll to the source recovered")
    lines.append(
        f"trained on {tables.count(summary['tokens'])} tokens in {tables.clock(summary['seconds'])}"
        f"{_speed(summary)}"
    )
    return "\n".join(lines)


def _speed(summary: dict[str, Any]) -> str:
    """The rates of a whole run, and what else its time was spent on, as text."""
    facts = []
    if "tokens_per_second" in summary:
        facts.append(f"{summary['tokens_per_second']:,.0f} tok/s")
    if "flops_per_second" in summary:
        facts.append(f"{tables.flops(summary['flops_per_second'])}/s")
    if "mfu" in summary:
        facts.append(f"MFU {summary['mfu']:.1%}")
    facts.append(f"goodput {summary['goodput']:.0%}")
    facts += [
        f"{kind} {tables.clock(seconds)}"
        for kind, seconds in summary["seconds_by_kind"].items()
        if kind != "steps" and seconds >= 1
    ]
    if summary["skipped_steps"]:
        facts.append(f"{summary['skipped_steps']} steps skipped")
    return ": " + ", ".join(facts)
