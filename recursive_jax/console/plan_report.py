"""The tables of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recursive_jax.console import tables
from recursive_jax.models.parameters import abstract_params, parameter_counts
from recursive_jax.planning import token_flops
from recursive_jax.weights.tie_config import break_even_rank

if TYPE_CHECKING:
    from recursive_jax.plan_models import PlannedModels
    from recursive_jax.plan_sweep import Sweep
    from recursive_jax.planning import Prediction
    from recursive_jax.training.config import TrainConfig


def models(models: PlannedModels, config: TrainConfig) -> str:
    """Parameters, ranks and operations of a token."""
    cfg = models.student
    counts = parameter_counts(abstract_params(cfg))
    theirs = models.source and parameter_counts(abstract_params(models.source))
    rows = [
        (name, tables.count(n), tables.count(theirs[name]) if theirs else "")
        for name, n in counts.items()
        if n or (theirs and theirs[name])
    ]
    shape = f"{cfg.num_loops} × {cfg.num_layers} layers, width {cfg.embed_dim}"
    parts = [
        f"{models.origin}: {shape}, vocabulary {cfg.vocab_size:,}",
        tables.table(rows, ("parameters", "model", "source" if theirs else "")),
    ]
    ranks = dict(cfg.lora_ranks)
    if ranks and cfg.num_loops > 1:
        rows = [
            (name, rank, f"{break_even_rank(*cfg.projections[name], cfg.num_loops):.0f}")
            for name, rank in ranks.items()
        ]
        parts.append(tables.table(rows, ("LoRA", "rank", "break-even rank")))
    flops = token_flops(models, config)
    rows = [(name, tables.flops(n)) for name, n in (flops | {"total": sum(flops.values())}).items()]
    parts.append(tables.table(rows, ("a token", "operations")))
    return "\n\n".join(parts)


def plan(plan: Prediction, record: Mapping[str, Any]) -> str:
    """Memory, communication, time and cost of a step; `record`: as `plan.to_json` returns it."""
    mesh = " × ".join(f"{name} {n}" for name, n in plan.mesh.shape.items())
    sizes = f"{plan.config.data.batch_size} × {plan.config.data.context_length} tokens"
    micro = f", {plan.config.accumulate} micro-batches" if plan.config.accumulate > 1 else ""
    head = [
        ("devices", f"{record['devices']} × {record['device_kind']}: {mesh}"),
        ("step", f"{sizes}{micro}, remat {plan.config.remat}"),
        ("weights", plan.way),
        ("attention", plan.attention),
    ]
    compiled = record["compiled"]
    rows = [(name, size(n)) for name, n in plan.sizes.items() if n]
    rows.append(("total", size(plan.bytes)))
    parts = [tables.table(head), tables.table(rows, ("memory of a device", ""))]
    if compiled is not None:
        rows = [(name, size(n)) for name, n in compiled["bytes_by_kind"].items()]
        rows.append(("total", size(record["hbm_bytes_per_device"])))
        rows.append(("prediction", f"{record['prediction_error']:+.0%}"))
        parts.append(tables.table(rows, ("by the compiler", "")))
    parts.append(verdict(record))
    if plan.transfers:
        rows = [
            (t.what, t.kind, t.times, size(t.bytes), "yes" if t.overlaps else "no")
            for t in plan.transfers
        ]
        rows.append(("total", "", "", size(record["wire_bytes_per_device"]), ""))
        header = ("collectives of a step", "kind", "times", "bytes a device", "beside products")
        parts.append(tables.table(rows, header))
    if compiled is not None and compiled["wire_bytes"]:
        loops = ", ".join(f"{n} {kind}" for kind, n in compiled["student_in_loops"].items())
        parts.append(
            f"by the compiler: {size(compiled['wire_bytes'])}; large ones of the student in loops: "
            f"{loops or 'none'}"
        )
    if plan.seconds is not None:
        rows = [(name, seconds(s)) for name, s in plan.seconds.items() if s]
        rows.append(("a step, at best", seconds(plan.step_seconds)))
        parts.append(tables.table(rows, ("time", "")))
        rows = [("MFU, at most", f"{plan.mfu:.0%}")]
        rows += [("steps", f"{record['steps']:,}"), ("hours, at least", f"{record['hours']:.3g}")]
        rows.append(("chip-hours", f"{record['chip_hours']:,.4g}"))
        if record["cost"] is not None:
            rows.append(("cost, at least", f"{record['cost']:,.2f}"))
        parts.append(tables.table(rows))
    else:
        parts.append(
            f"no time: peak and bandwidths of a {record['device_kind']} are not known. "
            "--topology=v5e:4x4 plans for a TPU"
        )
    return "\n\n".join(parts)


def verdict(record: Mapping[str, Any]) -> str:
    """One line: whether the step fits."""
    n, how = record["hbm_bytes_per_device"], "by the compiler"
    if n is None:
        n, how = record["predicted_bytes_per_device"], "by arithmetic"
    if record["fits"] is None:
        return f"fits: unknown; {size(n)} {how}, the memory of the device is not known"
    return f"fits: {yes(record['fits'])}; {size(n)} of {size(record['device_bytes'])}, {how}"


def swept(sweep: Sweep) -> str:
    """What a search found."""
    lines = [f"{sweep.tried} settings tried by arithmetic, {sweep.fitting} fit"]
    if sweep.rows:
        rows = [
            (size(predicted), "" if n is None else size(n), f"{mfu:.0%}", flags or "as it is")
            for flags, predicted, n, mfu in sweep.rows
        ]
        lines.append(tables.table(rows, ("predicted", "compiled", "MFU at most", "settings")))
    if sweep.fits:
        lines.append(f"the first that fits: {sweep.flags or 'the config as it is'}")
    elif sweep.frees_most is not None:
        flag, freed = sweep.frees_most
        lines.append(f"nothing fits; the flag that frees most: {flag} ({size(freed)} a device)")
    else:
        lines.append("nothing fits; no single flag frees memory: take more or larger chips")
    return "\n".join(lines)


def decode(record: Mapping[str, Any]) -> str:
    """Memory and bounds of a decode engine."""
    rows = [("weights", size(record["weight_bytes"])),
            ("cache", size(record["cache_bytes"]))]  # fmt: skip
    if record["fits"] is not None:
        room = f"{size(record['bytes'])} of {size(record['device_bytes'])}"
        rows.append(
            ("fits", f"{yes(record['fits'])}; {room}, at most {record['most_slots']} slots")
        )
    if record["ticks_per_second"] is not None:
        rows.append(("ticks a second, at most", f"{record['ticks_per_second']:,.0f}"))
        rate = record["tokens_per_second_full_depth"]
        rows.append(("tokens a second at full depth", f"{rate:,.0f}"))
    title = f"decoding on one device: {record['slots']} slots × {record['context']} tokens"
    return f"{title}\n{tables.table(rows)}"


def size(n: float) -> str:
    """Bytes a person can read: 1.59 GB, 12.3 MB."""
    power = 3 if n >= 1e8 else 2 if n >= 1e5 else 1
    return f"{n / 1000**power:,.2f} {('', 'kB', 'MB', 'GB')[power]}"


def seconds(s: float) -> str:
    """1.234 s, or milliseconds."""
    return f"{s:,.3f} s" if s >= 0.1 else f"{s * 1e3:,.3f} ms"


def yes(fits: bool) -> str:
    return "yes" if fits else "no"
