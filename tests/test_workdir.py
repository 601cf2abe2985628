"""A workdir: its config and tokenizer, its lock, and a disk that is full."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import pytest

from configs import tiny_smoke
from recursive_jax import file_lock, files, metrics, paths, start
from recursive_jax.console import report
from recursive_jax.model import load
from recursive_jax.models.config import DecoderConfig
from recursive_jax.text import load_tokenizer
from recursive_jax.training.callbacks import Callback, Save
from recursive_jax.weights import checkpoint, workdir_lock
from recursive_jax.weights.source import ASSETS

ROOT = pathlib.Path(__file__).resolve().parents[1]
CFG = DecoderConfig(
    "llama", 48, 16, 32, num_heads=4, num_kv_heads=2, head_dim=4, num_layers=2, num_loops=2
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with step 2."""
    directory = tmp_path_factory.mktemp("checkpoint") / "run"
    checkpoint.create(directory, CFG, load_tokenizer(ASSETS / "tiny"), source="somewhere", n=[1])
    writer = checkpoint.Writer(directory)
    writer.save(2, {"x": jnp.arange(4.0)}, wait=True)
    writer.close()
    return directory


def begin(workdir):
    """What a run of the embedded model starts from in a workdir."""
    return start.choose(tiny_smoke.get_config(), load("tiny"), workdir)


# config.json and the tokenizer


def test_a_lost_config_is_made_again_from_a_step(saved, tmp_path):
    run, lines = tmp_path / "run", []
    shutil.copytree(saved, run)
    (run / "config.json").unlink()
    assert checkpoint.is_checkpoint(run)
    assert checkpoint.load_config(run, lines.append) == checkpoint.load_config(saved)
    assert len(lines) == 1 and "config.json was missing" in lines[0] and "step 2" in lines[0]
    assert json.loads((run / "config.json").read_text()) == json.loads(
        (saved / "config.json").read_text()
    )
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged .*; remove the file: .* the copy in step 2"):
        checkpoint.load_config(run)


def test_steps_without_a_config_are_not_trained_over(tmp_path):
    """Steps of an older version hold no copy: resume says so, and does not begin at step 0."""
    writer = checkpoint.Writer(tmp_path)
    writer.save(5, {"x": jnp.arange(4.0)}, wait=True)
    writer.close()
    for function in (checkpoint.load_config, begin):
        with pytest.raises(ValueError, match="config.json is missing.* steps 5 without a copy"):
            function(tmp_path)


def test_a_workdir_without_a_step_is_begun_anew_whatever_is_there(tmp_path):
    """Killed before the first save, then while the tokenizer was written."""
    tokenizer = load_tokenizer(ASSETS / "tiny")
    checkpoint.create(tmp_path, CFG, tokenizer)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("")
    (tmp_path / ".tokenizer-left").mkdir()
    recipe = {"source": "another"}
    assert not begin(tmp_path).resumes
    checkpoint.create(tmp_path, CFG, tokenizer, recipe=recipe)
    assert checkpoint.load_config(tmp_path)[1]["recipe"] == recipe
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "tokenizer"]
    (tmp_path / "config.json").write_text("")
    assert not begin(tmp_path).resumes
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # a model of the user's
    with pytest.raises(ValueError, match="Hugging Face model"):
        begin(tmp_path)


def test_a_tokenizer_that_cannot_be_written_leaves_the_old_one(tmp_path):
    tokenizer = load_tokenizer(ASSETS / "tiny")
    checkpoint.create(tmp_path, CFG, tokenizer)

    class Full:
        def save_pretrained(self, directory):
            pathlib.Path(directory).mkdir()
            (pathlib.Path(directory) / "tokenizer.json").write_text("{")
            raise Exception("No space left on device (os error 28)")  # as tokenizers raises it

    with pytest.raises(OSError, match="No space left on device: '.*tokenizer'"):
        checkpoint.create(tmp_path, CFG, Full())
    checkpoint.load_config(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "tokenizer"]


# The lock

HOLDING = """
import sys, time
from recursive_jax.weights import workdir_lock
with workdir_lock.hold(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(100)
"""


def test_one_run_at_a_time(tmp_path):
    """The second is told of the first; SIGKILL of the first frees the workdir."""
    run, command = tmp_path / "run", [sys.executable, "-c", HOLDING]
    with subprocess.Popen([*command, run], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        words = rf"run is in use by process {process.pid} on \S+ since 20\d\d-\d\d-\d\d \d\d:"
        for _ in range(2):
            with pytest.raises(file_lock.InUse, match=words):
                with workdir_lock.hold(run):
                    pass
        assert not workdir_lock.is_held(run)
        process.kill()
    with workdir_lock.hold(run):
        assert workdir_lock.is_held(run)
        with pytest.raises(file_lock.InUse, match=f"process {os.getpid()} on"):
            with workdir_lock.hold(run):
                pass
    assert not workdir_lock.is_held(run) and list(run.iterdir()) == []


def test_a_lock_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="a mistake"):
        with workdir_lock.hold(tmp_path / "a" / "b"):
            raise ValueError("a mistake")
    assert list(tmp_path.iterdir()) == []
    with workdir_lock.hold(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]


def test_without_locks_it_warns_and_goes_on(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lines = []
    with workdir_lock.hold(tmp_path, lines.append):
        pass
    assert len(lines) == 1 and "file system without locks" in lines[0]


# A full disk

FILLING = """
import os, resource, sys
import jax.numpy as jnp
from recursive_jax.weights import checkpoint
run, large = sys.argv[1], jnp.ones(4 << 20)
writer = checkpoint.Writer(run)
writer.save(10, {"x": large[:1000]}, wait=True)
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
for step, size in ((20, 4 << 20), (30, 9), (40, 9)):
    try:
        writer.save(step, {"x": large[:size]})  # step 30 tells what became of step 20
    except OSError as error:
        print(error, flush=True)
writer.close()
"""


def fill(*command):
    done = subprocess.run(
        [*command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_step_that_cannot_be_stored_is_told_in_one_line(tmp_path):
    pytest.importorskip("resource")
    done = fill(sys.executable, "-c", FILLING, tmp_path, "limit")
    words = f"step 20 is not saved, step 10 is ({tmp_path / 'checkpoints'})"
    assert done.stdout.count("\n") == 1 and words in done.stdout
    assert "Traceback" not in done.stderr and "rror" not in done.stderr, done.stderr
    assert checkpoint.saved_steps(tmp_path) == [10, 40], "it can go on"


def test_a_full_disk_is_told_in_one_line(tmp_path):
    """On a file system of 8 MB, where the kernel lets a user mount one."""
    mount = f"mount -t tmpfs -o size=8m none {tmp_path}"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    script = f'{mount} && exec {sys.executable} -c "$0" {tmp_path}'
    done = fill(*inside, script, FILLING)
    words = f"disk full: step 20 is not saved, step 10 is ({tmp_path / 'checkpoints'})"
    assert words in done.stdout.splitlines()[0]
    assert "Traceback" not in done.stderr and "rror" not in done.stderr, done.stderr


def test_a_full_disk_names_the_file(tmp_path):
    full = pathlib.Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        report.write(full, {"answers": "x" * 100_000})
    with pytest.raises(OSError, match="No space left on device: '.*facts.json'"):
        with files.naming(tmp_path / "facts.json"), open(full, "w") as f:
            f.write("x" * 100_000)


# which steps are kept, and a save that fails in the background


def test_latest_best_and_every_nth_step_are_kept(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 2.5}
    writer = checkpoint.Writer(tmp_path, keep=1, best=1, every=4)
    for step in losses:
        known = {s: loss for s, loss in losses.items() if s <= step}
        writer.save(step, {"x": jnp.arange(4.0)}, losses=known, wait=True)
    writer.close()
    assert checkpoint.saved_steps(tmp_path) == [2, 4, 6]
    writer = checkpoint.Writer(tmp_path, keep=1, best=1, every=4)  # a run that goes on
    writer.save(7, {"x": jnp.arange(4.0)}, losses=losses | {7: 9.0}, wait=True)
    writer.close()
    assert checkpoint.saved_steps(tmp_path) == [2, 4, 7]


def test_the_best_of_the_saved_steps_is_told_when_it_changes(tmp_path):
    history, told = [], []

    class Listener(Callback):
        def on_best(self, step, loss):
            told.append((step, loss))

    state = types.SimpleNamespace(saved=lambda: {"params": {"x": jnp.arange(4.0)}})
    for losses in ({1: 5.0, 2: 1.0, 3: 4.0}, {4: 3.0, 5: 0.5}):  # a run, and one that goes on
        writer = checkpoint.Writer(tmp_path, keep=1, best=1)
        save = Save(writer, lambda: {"history": history}, [Listener()])
        for step, loss in losses.items():
            history.append({"step": step, "name": "valid", "nll": loss})
            save.on_save(step, state)
        save.close()
    assert told == [(1, 5.0), (2, 1.0), (2, 1.0), (5, 0.5)]


def test_a_workdir_that_is_gone_is_told_before_a_save(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    writer, records = checkpoint.Writer(run), metrics.MetricWriter(run)
    records.write(2, {"train/loss": 1.0})
    run.rename(tmp_path / "elsewhere")
    with pytest.raises(paths.StorageFault, match="run/config.json is gone: step 3 is not saved"):
        writer.save(3, {"x": jnp.arange(4.0)})
    with pytest.raises(paths.StorageFault, match="run/metrics.jsonl is gone"):
        records.write(3, {"train/loss": 1.0})
    records.close()
    writer.close()
    assert not run.exists() and checkpoint.saved_steps(tmp_path / "elsewhere") == [2]


def test_a_save_that_fails_in_the_background_stops_the_next_step(tmp_path):
    resource = pytest.importorskip("resource")
    writer = checkpoint.Writer(tmp_path)
    writer.save(1, {"x": jnp.arange(4.0)}, wait=True)
    writer.check()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))  # bytes of the largest file
    try:
        with pytest.raises(OSError, match="file too large .*step 2 is not saved, step 1 is"):
            writer.save(2, {"x": jnp.ones(4 << 20)})
            for _ in range(600):  # as many steps as it takes
                writer.check()
                time.sleep(0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.check()
    writer.close()
