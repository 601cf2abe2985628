"""The training loop and its signals, with a trainer of plain Python."""

import gc
import json
import math
import os
import signal
import time

import pytest
from absl import flags

from recursive_jax import train as job
from recursive_jax.console import stop as console_stop
from recursive_jax.training import loop
from recursive_jax.training.callbacks import Callback
from recursive_jax.training.skips import Skips, not_finite


class Counting:
    """A trainer whose state is the number of steps, with a loss per step; nan is skipped."""

    def __init__(self, losses=()):
        self.state, self.losses = 0, dict(losses)

    def step(self, batch):
        assert batch == self.state
        self.state += 1
        loss = self.losses.get(self.state, 0.5)
        return {"loss": loss, "skipped": float(math.isnan(loss))}


class Diary(Callback):
    def __init__(self):
        self.entries = []

    def on_log(self, step, metrics):
        self.entries.append(("log", step))

    def on_skip(self, step, what):
        self.entries.append(("skip", step, what))

    def on_evaluate(self, step, state):
        self.entries.append(("evaluate", step, state))

    def on_save(self, step, state):
        self.entries.append(("save", step, state))


def run(
    num_steps, stop=None, trainer=None, first=0, log=2, evaluate=3, save=4, also=(), skips=None
):
    trainer, diary = trainer or Counting(), Diary()
    trainer.state = first
    schedule = loop.Schedule(num_steps, log, evaluate, save)
    batches = iter(range(first, 100))
    stop = stop or loop.Stop(signals=())
    last = loop.run(trainer, batches, first, schedule, [diary, *also], stop, skips=skips)
    return last, diary.entries


def test_everything_happens_on_schedule_and_at_the_end():
    last, entries = run(5)
    assert last == 5
    assert entries == [
        ("log", 1), ("log", 2), ("evaluate", 3, 3), ("log", 4), ("save", 4, 4),
        ("log", 5), ("evaluate", 5, 5), ("save", 5, 5),
    ]  # fmt: skip
    assert run(5, first=3)[1][0] == ("log", 4), "the first step of a resumed run is logged"
    assert run(5, first=5) == (5, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_steps_saves_and_stops(number):
    class Signals(Callback):
        def on_step(self, step):
            if step == 3:
                os.kill(os.getpid(), number)

    said = []
    before = signal.getsignal(number)
    with loop.Stop(said.append) as stop:
        stop.begin_steps()
        last, entries = run(9, stop, also=[Signals()])
    # the signal comes behind step 3, so step 4 is the one that is running
    assert (last, entries[-1]) == (4, ("save", 4, 4)) and len(said) == 1
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_the_job_with_its_own_code(number, monkeypatch, capsys):
    def train(config, workdir, stop, *options):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(job, "train", train)
    values = flags.FlagValues()
    job.define_flags(values)
    values(["train", "--config=configs/tiny_smoke.py", "--workdir=run"])
    monkeypatch.setattr(job.flags, "FLAGS", values)
    with pytest.raises(SystemExit) as end:
        job.main()
    assert end.value.code == 75
    assert f"{signal.Signals(number).name}: stopped before the first" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_is_not_lost_where_exceptions_are_ignored():
    """Python only prints an exception of a finalizer or of a callback of the garbage collector."""

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with loop.Stop(lambda line: None) as stop:
        Finalized()
        with pytest.raises(loop.NotStarted):
            stop.begin_steps()


def test_a_second_signal_stops_at_once():
    with loop.Stop(lambda line: None) as stop:
        stop.begin_steps()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_steps_that_are_not_finite_are_skipped_and_counted():
    skips = Skips(limit=3)
    trainer = Counting(dict.fromkeys((2, 4, 5, 7), math.nan))
    last, entries = run(8, trainer=trainer, skips=skips)
    assert (last, skips.total, skips.in_row) == (8, 4, 0)
    skipped = [entry for entry in entries if entry[0] == "skip"]
    assert skipped == [("skip", step, "the loss is nan") for step in (2, 4, 5, 7)]


@pytest.mark.parametrize("save", [1, 4, 100])
def test_too_many_skipped_steps_in_a_row_stop_the_run(save):
    diary = Diary()
    trainer = Counting(dict.fromkeys((2, 4, 5, 6), math.nan))
    with pytest.raises(FloatingPointError, match="^steps 4 to 6 were skipped .*at step 6 the loss"):
        run(9, trainer=trainer, save=save, also=[diary], skips=Skips(limit=3))
    saved = [entry[1] for entry in diary.entries if entry[0] == "save"]
    assert saved == [step for step in range(1, 6) if step % save == 0]


def test_the_count_of_skipped_steps_goes_on_after_a_resume():
    skips = Skips(limit=3)
    run(5, trainer=Counting(dict.fromkeys((2, 4, 5), math.nan)), skips=skips)
    resumed = Skips(3, json.loads(json.dumps(skips.to_json())))
    with pytest.raises(FloatingPointError, match="steps 4 to 6 were skipped"):
        run(9, trainer=Counting({6: math.nan}), first=5, skips=resumed)
    assert resumed.total == 4


def test_what_is_not_finite_is_named():
    norms = {"grad_norm": math.inf, "grad_norm_shared": math.inf, "grad_norm_lora_loop_2": math.nan}
    values = {"loss": 1.0, **norms, "grad_norm_norms": 1.0}
    assert not_finite(values) == "the gradient is inf in shared, lora_loop_2"
    assert not_finite(values | {"loss": math.inf}) == "the loss is inf"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(number):
    """Python ignores what such a callback raises, so the job would go on."""

    def callback(phase, info):
        gc.callbacks.remove(callback)
        signal.raise_signal(number)

    with pytest.raises(console_stop.Stopped) as stopped, console_stop.on_signals():
        gc.callbacks.append(callback)
        gc.collect()
        for _ in range(100):
            time.sleep(0.05)
        pytest.fail("the signal was lost")
    assert stopped.value.exit_code == 128 + number


def test_batches_that_end_too_early_are_an_error():
    """A run of fewer steps than asked for must not look like a finished one."""
    with pytest.raises(ValueError, match="the text ended after step 100 of 101"):
        run(101, save=50)
