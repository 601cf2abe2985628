"""Plan a run before it is paid for: memory, time and cost on chips that need not be here.

    python -m recursive_jax.plan --config=configs/gemma_rrt.py:paper --topology=v5e:4x4
    python -m recursive_jax.plan --config=gemma_rrt:paper --topology=v6e:4x4 --sweep

The arithmetic takes seconds and reads no weights. With --topology the step is also compiled ahead
of time, which takes minutes and needs the extra [tpu], but no TPU; --nocompile leaves that out.
--sweep searches mesh, micro-batches and recomputation. Without --topology the plan is for the
devices of this machine. Exit code 3: the step does not fit.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from recursive_jax import ahead_of_time, files, plan_sweep, topology
from recursive_jax.console import app, output, plan_report
from recursive_jax.decode_plan import decode_plan
from recursive_jax.plan_models import PlannedModels, planned_models
from recursive_jax.planning import Prediction, predict
from recursive_jax.training.config import TrainConfig

DOES_NOT_FIT = 3  # exit code


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    config_flags.DEFINE_config_file(
        "config", None, "what to train: a file, or the name of one of configs/", values
    )
    flags.DEFINE_string("topology", None, "a TPU slice, such as v5e:4x4", flag_values=values)
    flags.DEFINE_bool(
        "compile", True, "with --topology: compile the step, too", flag_values=values
    )  # fmt: skip
    flags.DEFINE_bool("sweep", False, "search settings that fit", flag_values=values)
    flags.DEFINE_float(
        "price_per_chip_hour", None, "in any currency, for the cost of the run", lower_bound=0.0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("slots", 16, "of the decode plan", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "context", None, "tokens of a slot; default: those of a row", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("json", None, "file for all numbers", flag_values=values)
    flags.mark_flags_as_required(["config"], values)


def main() -> None:
    options = flags.FLAGS
    config = options.config
    if options.topology is not None:
        devices = topology.chips(options.topology)
        jax.config.update("jax_platforms", "cpu")  # chips that are here stay free
        if config.dtype == "auto":
            config.dtype = "bfloat16"  # as on TPUs
    else:
        devices = jax.devices()
        if options.sweep:
            raise ValueError("--sweep needs --topology, such as --topology=v5e:4x4")
    compiles = options.topology is not None and options.compile
    real = topology.for_compiler(options.topology) if compiles else None
    settings = TrainConfig.from_mapping(config)
    models = planned_models(config)
    output.say(plan_report.models(models, settings))
    compiled = swept = None
    if options.sweep:
        swept = plan_sweep.sweep(models, settings, devices, real, output.say)
        plan, compiled = swept.plan, swept.compiled
        output.say("\n" + plan_report.swept(swept))
    else:
        plan = predict(models, settings, devices)
        if compiles:
            output.say(f"\ncompiling for {len(real)} chips of {options.topology} …")
            compiled = ahead_of_time.compiled_step(models, settings, real)
    decode = decode_plan(
        models.student, devices[0], settings.dtype, options.slots,
        options.context or settings.data.context_length,
    )  # fmt: skip
    record = to_json(models, plan, compiled, options.price_per_chip_hour) | {"decode": decode}
    if swept is not None:
        record["sweep"] = swept.to_json()
    output.say("\n" + plan_report.plan(plan, record))
    output.say("\n" + plan_report.decode(decode))
    if options.json is not None:
        files.write_whole(options.json, json.dumps(record, indent=1) + "\n")
    if record["fits"] is False:
        sys.exit(DOES_NOT_FIT)


def to_json(
    models: PlannedModels,
    plan: Prediction,
    compiled: ahead_of_time.CompiledStep | None,
    price: float | None,
) -> dict[str, Any]:
    """All numbers of a plan. Bytes are those of one device, `null` is unknown.

    `hbm_bytes_per_device` is the compiler's, `predicted_bytes_per_device` the arithmetic's.
    """
    hours = plan.run_seconds and plan.run_seconds / 3600
    fits, error = plan.fits, None
    if compiled is not None:
        error = plan.bytes / compiled.bytes - 1
        fits = None if plan.limit is None else compiled.bytes <= plan.limit
    return {
        "model": models.origin,
        "devices": plan.mesh.size,
        "device_kind": plan.mesh.devices.flat[0].device_kind,
        "mesh": dict(plan.mesh.shape),
        "accumulate": plan.config.accumulate,
        "remat": plan.config.remat,
        "gather": plan.way,
        "attention": plan.attention,
        "fits": fits,
        "device_bytes": plan.limit,
        "hbm_bytes_per_device": compiled and compiled.bytes,
        "predicted_bytes_per_device": plan.bytes,
        "prediction_error": error,
        "predicted_bytes_by_kind": plan.sizes,
        "compiled": compiled and compiled.to_json(),
        "block_gathers_per_step": plan.gathers,
        "collectives": [t._asdict() for t in plan.transfers],
        "wire_bytes_per_device": sum(t.bytes for t in plan.transfers),
        "flops_per_token": plan.flops / plan.config.tokens_per_step,
        "flops_per_step": plan.flops,
        "seconds_by_cause": plan.seconds,
        "step_seconds": plan.step_seconds,
        "predicted_mfu": plan.mfu,
        "steps": plan.config.num_steps,
        "tokens": plan.config.num_steps * plan.config.tokens_per_step,
        "hours": hours,
        "chip_hours": hours and hours * plan.mesh.size,
        "cost": None if price is None or hours is None else price * hours * plan.mesh.size,
    }


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
