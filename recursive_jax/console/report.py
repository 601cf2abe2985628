"""The closing numbers of a decoding run: as a record for --stats, and as a table."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from recursive_jax import files
from recursive_jax.analysis.timing import Times
from recursive_jax.console import tables
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.requests import Completion
from recursive_jax.decoding.session import Stats
from recursive_jax.models.parameters import abstract_params, parameter_counts


def summary(
    engine: Engine,
    stats: Stats,
    completions: Sequence[Completion],
    seconds: float,
    lossless: bool = False,
    times: Times | None = None,
) -> dict[str, Any]:
    """The record of a run, for --stats.

    Args:
      engine: the engine that ran.
      stats: of its session. They also count stop tokens and tokens after a stop string.
      completions: one for every prompt, including errors.
      seconds: wall-clock time of decoding.
      lossless: adds the drafts.
      times: adds the bound. With `lossless` also the gain over full depth that the times predict.
    """
    tokens = sum(len(completion.tokens) for completion in completions)
    record = {
        "prompts": len(completions),
        "errors": sum(completion.finish_reason == "error" for completion in completions),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    record |= {f"engine_{k}" if k == "tokens" else k: v for k, v in stats.to_json().items()}
    if lossless:
        # a token that exited before the last loop had a correct draft
        accepted = sum(n for loops, n in stats.exit_loops.items() if loops < engine.num_loops)
        record |= {
            "drafted": stats.drafted,
            "accepted": accepted,
            "agreement": accepted / max(stats.drafted, 1),
            "ticks_per_token": stats.ticks_per_token,
        }
    if times is not None and stats.tokens:
        # the oracle's exit loops are hypothetical: its tokens run all loops
        mean_loops = stats.mean_loops if engine.can_exit else engine.num_loops
        bound = times.bound(engine.num_slots, mean_loops)
        record |= {
            "times": times.to_json(),
            "bound_tokens_per_second": bound,
            "share_of_bound": stats.tokens / seconds / bound,
        }
        if lossless:
            record["gain_over_full_depth"] = times.lossless_gain(
                engine.num_slots,
                engine.num_loops,
                stats.ticks_per_token,
                stats.head_rows / stats.ticks,
            )
    return record


def table(record: Mapping[str, Any]) -> str:
    """The record of `summary` as a table."""
    rows = [("prompts", f"{record['prompts']:,}")]
    if record["errors"]:
        rows.append(("errors", f"{record['errors']:,}"))
    rows += [
        ("tokens", f"{record['tokens']:,}"),
        ("seconds", f"{record['seconds']:,.1f}"),
        ("tokens/s", f"{record['tokens_per_second']:,.1f}"),
        ("ticks", f"{record['ticks']:,}"),
        ("mean loops per token", f"{record['mean_loops']:.2f}"),
    ]
    total = max(record["engine_tokens"], 1)
    for loops, count in record["exit_loops"].items():
        share = count / total
        bar = ("█" * round(20 * share)).ljust(20, "░")
        rows.append((f"  {loops} loop{'s' * (loops != '1')}", f"{share:.0%} {bar}"))
    rows.append(("lane occupancy", f"{record['occupancy']:.0%}"))
    if "drafted" in record:
        rows += [
            ("drafts accepted", f"{record['accepted']:,} of {record['drafted']:,}"),
            ("agreement", f"{record['agreement']:.0%}"),
            ("ticks per token", f"{record['ticks_per_token']:.2f}"),
            ("lanes dropped", f"{record['dropped']:,}"),
        ]
    if "gain_over_full_depth" in record:
        rows.append(("gain over full depth", f"{record['gain_over_full_depth']:.2f}× (predicted)"))
    if "times" in record:
        rows += [
            ("tick alone", f"{1e3 * record['times']['tick']:.3g} ms"),
            ("bound", f"{record['bound_tokens_per_second']:,.1f} tok/s"),
            ("share of the bound", f"{record['share_of_bound']:.0%}"),
        ]
    return tables.table(rows)


def describe_model(name: str, placed: Any) -> dict[str, str]:
    """Rows of the start-up table. `placed`: a `decode_model.OnDevices` of the model `name`."""
    cfg, mesh = placed.decoder.cfg, placed.mesh
    shape = "".join(f", {axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    count = tables.count(parameter_counts(abstract_params(cfg))["total"])
    layers = f"{cfg.num_loops} × {cfg.num_layers} layers"
    kind = mesh.devices.flat[0].device_kind
    return {
        "model": f"{name}: {cfg.family}, {layers}, {count} parameters",
        "computed in": f"{placed.decoder.dtype.name} on {kind}{shape}",
    }


def write(path: str | pathlib.Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, on process 0 only. An OSError names the file."""
    if jax.process_index() == 0:
        with files.naming(path):
            pathlib.Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
