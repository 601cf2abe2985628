"""The job plan: its numbers are those of the model, the mesh and the compiler."""

import dataclasses
import importlib.util
import json

import jax
import pytest
from commands import run, run_together

from recursive_jax import plan_sweep, topology
from recursive_jax.ahead_of_time import compiled_step
from recursive_jax.decode_plan import decode_plan
from recursive_jax.models.config import DecoderConfig
from recursive_jax.plan_models import PlannedModels
from recursive_jax.planning import predict
from recursive_jax.training.config import TrainConfig
from recursive_jax.weights.hf_config import preset

PAPER = ("--config=configs/gemma_rrt.py:paper", "--config.remat=full", "--config.accumulate=64")
SLICE = (*PAPER, "--topology=v6e:4x4", "--nocompile")
SOURCE = DecoderConfig(
    "llama", 512, 64, 128, num_heads=4, num_kv_heads=2, head_dim=16, num_layers=4, tied_head=False
)
STUDENT = SOURCE.replace(num_layers=2, num_loops=2, lora_ranks={"q": 4, "down": 4})
MODELS = PlannedModels(STUDENT, SOURCE, "a toy")


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    done = run("plan", *SLICE, f"--json={file}", "--price_per_chip_hour=2")
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_the_papers_run_on_a_slice_that_is_not_here(paper):
    """Sizes of Gemma 2B, worked out by hand; no weights, no network, no TPU wheel are needed."""
    record, shown = paper
    assert record["fits"] is True and "fits: yes" in shown
    assert (record["devices"], record["device_kind"]) == (16, "TPU v6 lite")
    assert record["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
    assert record["block_gathers_per_step"] == 1
    assert record["hbm_bytes_per_device"] is None and record["device_bytes"] == 32 << 30
    sizes = record["predicted_bytes_by_kind"]
    assert sum(sizes.values()) == record["predicted_bytes_per_device"]
    # 9 layers: q o 2048 × 2048, k v 2048 × 256, gate up down 2048 × 16384; rank 64; two loops
    shared = 9 * 2048 * (2 * 2048 + 2 * 256 + 3 * 16384)
    lora = 2 * 9 * 64 * (2 * 4096 + 2 * 2304 + 3 * 18432)
    head = 256_000 * 2048
    assert sizes["params"] == pytest.approx(4 * (shared + lora + head) / 16, rel=1e-3)
    assert sizes["optimizer"] == pytest.approx(8 * (shared + lora + head) / 16, rel=1e-3)
    assert sizes["gathered block"] == pytest.approx(2 * (shared + lora), rel=1e-3)
    assert sizes["teacher"] == pytest.approx(2 * (2 * shared + head) / 16, rel=1e-3)
    moved = {(t["what"], t["kind"]): t for t in record["collectives"]}
    gathered = moved["block", "all-gather"]
    assert gathered["times"] == 1
    assert gathered["bytes"] == pytest.approx(2 * (shared + lora) * 15 / 16, rel=1e-3)
    # forward and backward of two loops and the head, and the teacher; 1024.5 tokens are seen
    seen = 4 * 8 * 256 * 1024.5 * 18
    flops = 6 * (2 * shared + lora + head) + 3 * seen + 2 * (2 * shared + head) + seen
    assert record["flops_per_token"] == pytest.approx(flops, rel=1e-3)
    assert 0.4 < record["predicted_mfu"] < 0.9
    hours = record["flops_per_token"] * record["tokens"] / record["predicted_mfu"]
    hours /= 16 * 918e12 * 3600
    assert record["hours"] == pytest.approx(hours)
    assert record["cost"] == pytest.approx(2 * 16 * hours)
    for words in ("break-even rank", "114", "splash", "chip-hours", "ticks a second"):
        assert words in shown


def test_mistakes_end_in_one_line(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    cases = {
        "v5e has the slices": [*PAPER, "--topology=v5e:3x7", "--nocompile"],
        "does not divide over the 16 devices": [*SLICE, "--config.accumulate=128"],
        "the config of someone/unknown could not": [*SLICE, "--config.source=someone/unknown"],
        "set --config.source": [*SLICE, "--config.source="],
        "--sweep needs --topology": [*PAPER, "--sweep"],
        "num_loops=5 does not divide": [*SLICE, "--config.model.num_loops=5"],
    }
    for words, done in zip(cases, run_together("plan", cases.values(), **offline), strict=True):
        assert done.returncode == 2, done.stdout
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert words in line
        assert "Traceback" not in done.stderr


def test_a_compile_without_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    with pytest.raises(ValueError, match=r"recursive_jax\[tpu\].*--nocompile"):
        topology.for_compiler("v5e:2x2")


@pytest.mark.parametrize("name", ["v5e:4x4", "v5e:2x4", "v5p:2x2x1", "v5p:4x4x8", "v6e:16x16"])
def test_a_described_slice_is_what_libtpu_describes(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    ours, theirs = topology.chips(name), topology.for_compiler(name)
    facts = [{(d.device_kind, d.platform, tuple(d.coords)) for d in ds} for ds in (ours, theirs)]
    assert facts[0] == facts[1] and len(facts[0]) == len(ours) == len(theirs)


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v5e:4", "v5p:4x4", "v5p:2x1x2", "v5p:0x4x4", "4"])
def test_slices_that_do_not_exist_are_refused(name):
    with pytest.raises(ValueError, match="topology"):
        topology.chips(name)


def settings(**changes):
    config = TrainConfig().with_changes(
        kd=1.0, batch_size=16, context_length=64, remat="none", dtype="float32"
    )
    return config.with_changes(**changes)


def test_the_collectives_are_those_of_the_compiled_step():
    config = settings(**{"mesh.fsdp": 4, "mesh.data": 2, "gather": "step"})
    plan = predict(MODELS, config, jax.devices()[:8])
    step = compiled_step(MODELS, config, jax.devices()[:8])
    assert step.student_in_loops == {}
    leaves = [c for c in step.collectives if c.kind == "all-gather" and "/gather/" in c.label]
    assert plan.gathers == 1 and all(c.times == 1 for c in leaves)
    teachers_head = 4 * 512 * 64 * 3 / 4
    ours = sum(t.bytes for t in plan.transfers if t.what in ("block", "embedding and head"))
    theirs = sum(c.wire_bytes for c in leaves) - teachers_head
    assert ours == pytest.approx(theirs, rel=0.01)
    reduced = sum(t.bytes for t in plan.transfers if t.what.startswith("gradients"))
    theirs = sum(c.wire_bytes for c in step.collectives if "/reduce/" in c.label)
    assert reduced == pytest.approx(theirs, rel=0.1)


def test_loops_gather_again_where_weights_are_gathered_by_layer():
    config = settings(**{"mesh.fsdp": 8, "gather": "layer"})
    by_loops = [
        predict(
            dataclasses.replace(MODELS, student=SOURCE.replace(num_layers=4 // n, num_loops=n)),
            config, jax.devices()[:8],
        ).gathers
        for n in (1, 2, 4)
    ]  # fmt: skip
    assert by_loops == [2, 4, 8]


def test_a_sweep_finds_settings_that_fit():
    gemma = preset("gemma_2b")
    student = gemma.replace(num_layers=9, num_loops=2, norms="tied")
    config = TrainConfig().with_changes(
        kd=1.0, batch_size=64, context_length=2048, remat="dots", dtype="bfloat16"
    )
    models, chips = PlannedModels(student, gemma, "gemma"), topology.chips("v5e:2x4")
    assert not predict(models, config.with_changes(gather="step"), chips).fits
    found = plan_sweep.sweep(models, config, chips, None, print)
    assert found.fits and found.plan.fits and 0 < found.fitting < found.tried
    seconds = [row[3] for row in found.rows]
    assert seconds == sorted(seconds, reverse=True) and found.plan.mfu == seconds[0]
    changes = dict(part.removeprefix("--config.").split("=") for part in found.flags.split())
    values = {k: v if k == "remat" else int(v) for k, v in changes.items()}
    again = predict(models, config.with_changes(**values), chips)
    assert again.bytes == found.plan.bytes


def test_a_sweep_names_the_flag_that_frees_most():
    source = preset("mistral_7b")
    models = PlannedModels(source.replace(num_layers=16, num_loops=2), source, "a 7B")
    config = TrainConfig().with_changes(
        kd=1.0, batch_size=16, context_length=2048, remat="dots", dtype="bfloat16"
    )
    chips = topology.chips("v5e:2x2")
    found = plan_sweep.sweep(models, config, chips, None, print)
    assert not found.fits and found.fitting == 0
    flag, freed = found.frees_most
    name, value = flag.removeprefix("--config.").split("=")
    value = value if name in ("remat", "gather") else int(value)
    less = predict(models, config.with_changes(**{name: value}), chips)
    assert predict(models, config, chips).bytes - less.bytes == freed > 0


def test_a_decode_plan_counts_cache_and_weights():
    """Gemma 2B's student, 32 slots × 2048 tokens: a v5e's compiler has 4.56 GB with temporaries."""
    student = preset("gemma_2b").replace(
        num_layers=9, num_loops=2, norms="tied",
        lora_ranks={n: min(64, *s) for n, s in preset("gemma_2b").projections.items()},
    )  # fmt: skip
    chip = topology.chips("v5e:1x1")[0]
    plan = decode_plan(student, chip, "bfloat16", 32, 2048)
    assert plan["cache_bytes"] == 2 * 2 * 9 * 256 * 2 * 32 * 2048  # loops, layers, K and V, bf16
    assert plan["bytes"] == pytest.approx(4.56e9, rel=0.05)
    assert plan["fits"] and not decode_plan(student, chip, "bfloat16", 512, 2048)["fits"]
    most = plan["most_slots"]
    assert decode_plan(student, chip, "bfloat16", most, 2048)["fits"]
    assert not decode_plan(student, chip, "bfloat16", most + 2, 2048)["fits"]
    assert plan["ticks_per_second"] == pytest.approx(819e9 / plan["bytes_per_tick"])
    assert plan["tokens_per_second_full_depth"] == pytest.approx(16 * plan["ticks_per_second"])


@pytest.mark.slow
def test_the_compiler_agrees_on_a_small_slice(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    file = tmp_path / "plan.json"
    done = run(
        "plan", "--config=configs/tiny_smoke.py", "--topology=v5e:2x2", f"--json={file}",
        "--config.data.context_length=128",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert record["fits"] is True and 0 < record["hbm_bytes_per_device"] < 1e9
    assert record["compiled"]["student_in_loops"] == {}
