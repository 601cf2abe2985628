"""What a person sees of a training run: the start-up table, a line per log, what came of it."""

from __future__ import annotations

import math
from typing import Any

import jax

from recursive_jax.console import output, tables
from recursive_jax.console.progress import StepProgress
from recursive_jax.models.parameters import abstract_params, parameter_counts
from recursive_jax.training.callbacks import Callback
from recursive_jax.training.config import TrainConfig

SHOWN = ("loss", "ce", "kd", "ce_exit_1")


class Report(Callback):
    """Prints the progress of a run on process 0; with `quiet` nothing.

    Attributes:
      clock: rate and remaining time of the steps.
      near_kl: of a near start; None: the start is another.
    """

    def __init__(
        self,
        config: TrainConfig,
        clock: StepProgress,
        quiet: bool = False,
        near_kl: float | None = None,
    ):
        self.config, self.clock, self._quiet, self.near_kl = config, clock, quiet, near_kl

    def start(
        self, model: Any, origin: str, mesh: Any, dtype: Any, rows: Any, first_step: int
    ) -> None:
        """Print the table of what is about to happen.

        `model`: a `model.Model`; `origin`: where it comes from; `rows`: a `data.PackedRows`.
        """
        cfg, config, devices = model.cfg, self.config, mesh.devices.flat
        counts = {k: n for k, n in parameter_counts(abstract_params(cfg)).items() if n}
        shape = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
        steps, tokens = config.num_steps, config.tokens_per_step
        micro = f" in {config.accumulate} micro-batches" if config.accumulate > 1 else ""
        average = f", weights averaged with decay {config.ema_decay}" if config.ema_decay else ""
        order = "" if cfg.sharing == "cycle" else f" in order {cfg.sharing}"
        table = [
            ("model", origin),
            ("decoder", f"{cfg.family}, {cfg.num_loops} loops × {cfg.num_layers} layers{order}, "
                        f"width {cfg.embed_dim}, norms {cfg.norms}"),
            ("parameters", "  ".join(f"{k} {tables.count(n)}" for k, n in counts.items())),
            ("devices", f"{mesh.size} × {devices[0].device_kind}, "
                        f"{jax.process_count()} process(es), mesh {shape}"),
            ("compute", f"{dtype.name}, params and loss float32, remat {config.remat}{average}"),
            ("data", f"{config.data.train}: {tables.count(rows.num_tokens)} tokens, "
                     f"{len(rows):,} rows of {config.data.context_length}"),
            ("to do", f"{steps - first_step:,} steps × {tokens:,} tokens{micro} = "
                      f"{tables.count((steps - first_step) * tokens)}, "
                      f"{steps * config.data.batch_size / len(rows):.2f} epochs in all"),
        ]  # fmt: skip
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

    def on_step(self, step):
        self.clock.tick(step)

    def on_log(self, step, metrics):
        total, rate = self.config.num_steps, self.tokens_per_second
        shown = "  ".join(f"{k} {metrics[k]:.4f}" for k in SHOWN if k in metrics)
        shown += f"  loops {metrics['loops']:.0f}" if "loops" in metrics else ""
        speed = f"{rate:,.0f} tok/s  ETA {self.clock.eta(step)}  data {self.clock.data_wait:.1%}"
        self.say(
            f"step {step}/{total}  {step / total:.0%}  {shown}  "
            + ("compiled" if math.isnan(rate) else speed)
        )

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

    @property
    def tokens_per_second(self) -> float:
        return self.config.tokens_per_step / self.clock.seconds_per_step

    def say(self, text: str) -> None:
        if not self._quiet:
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
    )
    return "\n".join(lines)
