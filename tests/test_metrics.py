"""What a person sees: numbers, tables, rates, metric files."""

import json
import math
import time

import pytest

from recursive_jax import metrics
from recursive_jax.console import output, tables
from recursive_jax.console.train_report import Report
from recursive_jax.training.callbacks import Record
from recursive_jax.training.chips import peak_flops
from recursive_jax.training.clock import RunClock
from recursive_jax.training.config import DataConfig, TrainConfig


def test_numbers_a_person_can_read():
    shown = [0, 999, 1234, 999_999, 1_000_000, 12_345_678, 999_950_000, 4.56e9, 2.5e12]
    assert [tables.count(n) for n in shown] == [
        "0", "999", "1,234", "999,999", "1M", "12.3M", "1B", "4.56B", "2,500B",
    ]  # fmt: skip
    assert [tables.clock(s) for s in (0, 59.4, 59.6, 3599, 3600, 36_061)] == [
        "0:00", "0:59", "1:00", "59:59", "1:00:00", "10:01:01",
    ]  # fmt: skip


def test_table_aligns_words_left_and_numbers_right():
    text = tables.table([("a", "1,234.5", 7), ("long name", "-2.0", 12)], ("who", "nll", "n"))
    assert text.split("\n") == [
        "who            nll   n",
        "─────────  ───────  ──",
        "a          1,234.5   7",
        "long name     -2.0  12",
    ]
    assert tables.table([("model", "x"), ("to do", "5 steps")]) == "model  x\nto do  5 steps"


def test_progress_leaves_compilation_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = RunClock()
    with progress.pause("saving"):  # before the first step: not repeated
        now[0] += 50.0
    now[0] += 100.0
    progress.tick(11, flops=7.0, compiled=True)
    assert math.isnan(progress.seconds_per_step) and math.isnan(progress.remaining(9))
    for step in (12, 13, 14):
        now[0] += 2.0
        progress.tick(step, flops=7.0)
    assert progress.seconds_per_step == 2.0 and progress.flops_per_second == 3.5
    assert progress.remaining(6) == 12.0
    with progress.pause("evaluating"):  # no part of a step, but of the time that remains
        now[0] += 8.0
    now[0] += 2.0
    progress.tick(15, flops=7.0)
    assert progress.seconds_per_step == 2.0
    assert progress.remaining(5) == 18.0  # 5 steps of 2 s, and 8 s of pauses by 5 steps so far
    now[0] += 60.0
    progress.tick(16, compiled=True)  # another number of loops
    assert math.isnan(progress.seconds_per_step)


def test_goodput_counts_steps_once_over_all_starts(monkeypatch):
    now = [1000.0]
    for name in ("perf_counter", "time"):
        monkeypatch.setattr(time, name, lambda: now[0])

    def train(clock, first, last):
        for step in range(first, last + 1):
            now[0] += 20.0 if step == first else 2.0  # the first step of a start compiles
            clock.tick(step, 5.0, compiled=step == first)

    clock = RunClock(began=900.0)  # a conversion took 100 s
    train(clock, 1, 10)
    with clock.pause("saving"):
        saved = json.loads(json.dumps(clock.to_json()))
        now[0] += 12.0
    assert clock.saved_for == 12.0 and clock.goodput == 10 * 2.0 / (100 + 20 + 9 * 2 + 12)
    train(clock, 11, 14)  # killed: these steps are repeated
    now[0] += 500.0
    clock = RunClock(saved)
    train(clock, 11, 20)
    clock.skip()  # the update of a step was skipped
    assert clock.steps == 19 and clock.flops == 19 * 5.0
    assert clock.goodput == 19 * 2.0 / (now[0] - 900.0)
    ended, goodput = clock.to_json(), clock.goodput
    now[0] += 1e6  # the same command once more, with nothing to do
    assert RunClock(ended).goodput == goodput
    assert RunClock(ended).all_seconds() == {
        "waiting": 0.0, "evaluating": 0.0, "saving": 0.0, "steps": 38.0,
    }  # fmt: skip


def test_progress_tells_the_share_of_time_that_waits_for_data(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = RunClock()

    def slow():
        for batch in range(4):
            now[0] += 0.5
            yield batch

    for step, batch in enumerate(progress.timed(slow()), 1):
        assert batch == step - 1
        now[0] += 30.0 if step == 1 else 1.5  # the first step compiles, and leaves no share
        progress.tick(step, compiled=step == 1)
        assert math.isnan(progress.data_wait) == (step == 1)
    assert progress.data_wait == 0.25
    with progress.pause("evaluating"):  # neither a step nor waiting
        now[0] += 8.0
    now[0] += 2.0
    progress.tick(5)
    assert progress.data_wait == 1.5 / 8.0


def test_metric_files_can_be_read_back(tmp_path):
    for step in (1, 2):  # the second writer goes on where the first ended
        writer = metrics.MetricWriter(tmp_path, step - 1)
        writer.write(step, {"train/loss": 0.5 * step, "perf/rate": math.nan})
        writer.close()
        assert scalars(tmp_path / "tensorboard")["train/loss"][-1] == (step, 0.5 * step)

    def strict(constant):
        pytest.fail(f"{constant} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=strict) for line in lines]
    assert [(r["step"], r["train/loss"]) for r in records] == [(1, 0.5), (2, 1.0)]
    assert all("perf/rate" not in r for r in records), "a number that is none is left out"


def test_a_resumed_run_takes_out_what_a_killed_one_wrote_ahead(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"train/loss": step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "tra')  # cut off
    writer = metrics.MetricWriter(tmp_path, last_step=2)
    writer.write(3, {"train/loss": 30})
    writer.close()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [(r["step"], r["train/loss"]) for r in lines] == [(1, 1), (2, 2), (3, 30)]
    for value in (7, 8):  # nothing was saved: it begins again, with the evaluation before step 1
        writer = metrics.MetricWriter(tmp_path)
        writer.write(0, {"valid/nll": value})
        writer.close()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [(r["step"], r["valid/nll"]) for r in lines] == [(0, 8)]


def test_lines_that_are_no_records_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    good = ['{"step": 1, "train/loss": 1.0, "name": "\u2028"}', '{"step": 2, "train/loss": 2.0}']
    strange = ["5", "{}", "[]", "null", '{"step": null}', '{"step": "1"}', '{"step": true}', ""]
    lines = [good[0].encode(), b"\xff\xfe", b'{"step": 2, "\xff": 0}', b"\0" * 9]
    lines += [line.encode() for line in (*strange, "[" * 100_000, good[1], '{"step": 3}')]
    file.write_bytes(b"\n".join(lines) + b"\n")
    metrics.MetricWriter(tmp_path, last_step=2).close()
    assert file.read_text(encoding="utf-8").split("\n") == [*good, ""]


def test_a_write_that_fails_names_the_metrics_file(tmp_path):
    resource = pytest.importorskip("resource")
    writer = metrics.MetricWriter(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large: '.*metrics.jsonl'"):
            writer.write(1, {"train/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def scalars(directory):
    """tag -> [(step, value)] of TensorBoard event files, read without TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, event, its checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return {tag: sorted(values) for tag, values in found.items()}


def test_fail_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        output.fail(ValueError("no such thing; make one"))
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: no such thing; make one\n"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5", 459e12), ("TPU v5 lite", 197e12), ("TPU v6e", 918e12), ("TPU v4", 275e12),
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12),
        ("cpu", None), ("TPU v9", None), ("NVIDIA L400", None),
    ],
)  # fmt: skip
def test_peak_arithmetic_by_kind_of_device(kind, peak):
    assert peak_flops(kind) == peak


def test_rates_and_mfu_are_those_of_the_latest_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = RunClock()
    config = TrainConfig(data=DataConfig(context_length=10, batch_size=3))
    known, unknown = (Report(config, clock, quiet=True, peak=peak) for peak in (1e3, None))
    assert set(known.performance()) == {"goodput"}, "nothing is known before there are two steps"
    for step in (1, 2, 3):
        clock.tick(step, flops=800.0, compiled=step == 1)
        now[0] += 2.0
    values = known.performance()
    assert (values["tokens_per_second"], values["flops_per_second"]) == (15.0, 400.0)
    assert values["mfu"] == 0.4 and "mfu" not in unknown.performance()


def test_skipped_steps_do_not_advance_the_learning_rate():
    class Writer:
        def write(self, step, values):
            self.values = values

    writer = Writer()
    Record(writer, float, dict).on_log(7, {"loss": 1.0, "skipped": 2})
    assert writer.values["train/learning_rate"] == 4, "the optimizer has done 4 steps before"


def test_operations_a_person_can_read():
    shown = [tables.flops(x) for x in (0, 1234, 8.91e9, 989e12, 2.5e18)]
    assert shown == ["0 FLOP", "1.23 kFLOP", "8.91 GFLOP", "989 TFLOP", "2.5 EFLOP"]
