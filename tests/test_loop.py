"""The training loop and its signals, with a trainer of plain Python."""

import gc
import os
import signal
import time

import pytest
from absl import flags

from recursive_jax import train as job
from recursive_jax.console import stop as console_stop
from recursive_jax.training import loop
from recursive_jax.training.callbacks import Callback


class Counting:
    """A trainer whose state is the number of steps, with a loss per step."""

    def __init__(self, losses=()):
        self.state, self.losses = 0, dict(losses)

    def step(self, batch):
        assert batch == self.state
        self.state += 1
        return {"loss": self.losses.get(self.state, 0.5)}


class Diary(Callback):
    def __init__(self):
        self.entries = []

    def on_log(self, step, metrics):
        self.entries.append(("log", step))

    def on_evaluate(self, step, state):
        self.entries.append(("evaluate", step, state))

    def on_save(self, step, state):
        self.entries.append(("save", step, state))


def run(num_steps, stop=None, trainer=None, first=0, log=2, evaluate=3, save=4, also=()):
    trainer, diary = trainer or Counting(), Diary()
    trainer.state = first
    schedule = loop.Schedule(num_steps, log, evaluate, save)
    batches = iter(range(first, 100))
    stop = stop or loop.Stop(signals=())
    last = loop.run(trainer, batches, first, schedule, [diary, *also], stop)
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
    def train(config, workdir, stop, strict):
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


def test_a_state_that_is_not_finite_is_never_saved():
    trainer = Counting({4: float("nan")})
    diary = Diary()
    with pytest.raises(FloatingPointError, match="loss nan .* at step 4 are not finite"):
        run(9, trainer=trainer, save=1, also=[diary])
    assert [entry[1] for entry in diary.entries if entry[0] == "save"] == [1, 2, 3]


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
