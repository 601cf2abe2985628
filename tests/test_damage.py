"""A damaged step is told and set aside; one that cannot be read now stays."""

import gc
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import PROGRESS, ROOT, assert_equal, flip, make_arrays, one_device, save_run

from recursive_jax.weights import checkpoint, integrity, workdir_lock

pytestmark = [  # Orbax leaves coroutines behind when it fails
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with two steps; tests that damage it take a copy."""
    directory = tmp_path_factory.mktemp("checkpoint") / "run"
    save_run(directory)
    return directory


def step_files(directory):
    step = directory / "checkpoints" / "2"
    return sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file())


DAMAGE = {"flip": flip, "truncate": lambda data: data[: len(data) // 2], "delete": None}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_told_or_harmless(saved, damage, tmp_path):
    """Every file of a step in turn: the right numbers come back, or one error says what to do.

    Without a step, the one before is used where there is an error, and the damaged one set aside.
    """
    told, lines = 0, []
    for n, name in enumerate(step_files(saved)):
        copy = tmp_path / str(n)
        shutil.copytree(saved, copy)
        file = copy / "checkpoints" / "2" / name
        data = file.read_bytes()
        if damage == "delete":
            file.unlink()
        else:
            file.write_bytes(DAMAGE[damage](data))
        wanted = one_device(make_arrays())
        try:
            arrays, progress, _ = checkpoint.restore(copy, wanted, step=2)
        except ValueError as error:
            told += 1
            message = str(error)
            assert str(copy / "checkpoints" / "2") in message and "\n" not in message, message
            assert "damaged" in message or "corrupt" in message
            assert "convert again" in message
            lines.clear()
            arrays, progress, step = checkpoint.restore(copy, wanted, say=lines.append)
            assert step == 1 and progress == PROGRESS
            assert_equal(arrays, jax.tree.map(lambda x: x * 2, make_arrays()))
            assert len(lines) == 1 and "now 2.damaged. Step 1 is used" in lines[0], lines
            assert sorted(p.name for p in (copy / "checkpoints").iterdir())[:2] == [
                "1",
                "2.damaged",
            ]
            continue
        assert_equal(arrays, make_arrays())
        assert progress == PROGRESS, name
    assert told >= 3, "array data, their index and the metadata at the least"
    gc.collect()  # while their warnings are ignored


def test_no_flipped_bit_in_the_progress_goes_unseen(tmp_path):
    """The data position is as precious as the weights: every third byte of the metadata."""
    wanted = one_device({"params": {"x": np.arange(4.0, dtype=np.float32)}})
    writer = checkpoint.Writer(tmp_path)
    writer.save(1, {"x": jnp.arange(4.0)}, progress=PROGRESS, wait=True)
    writer.close()
    file = tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    data = file.read_bytes()
    assert b"next_index" in data
    told = 0
    for n in range(0, len(data), 3):
        file.write_bytes(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :])
        try:
            arrays, progress, _ = checkpoint.restore(tmp_path, wanted)
        except ValueError as error:
            told += 1
            assert "damaged" in str(error) or "corrupt" in str(error)
            continue
        assert_equal(arrays["params"], {"x": np.arange(4.0, dtype=np.float32)})
        assert progress == PROGRESS, data[n - 10 : n + 10]
    assert told > 20


def test_a_flipped_number_is_told_by_name(tmp_path):
    """Orbax itself notices nothing here: the file is whole, one number in it is another."""
    params = make_arrays()["params"]
    other = jax.tree.map(np.copy, params)
    other["block"]["mlp"]["up"]["w"][1, 2, 3] += 1.0
    for name, tree in (("a", params), ("b", other)):
        writer = checkpoint.Writer(tmp_path / name)
        writer.save(1, jax.tree.map(jnp.asarray, tree))
        writer.close()
    a, b = (tmp_path / n / "checkpoints" / "1" for n in "ab")
    shutil.rmtree(b / "params")
    shutil.copytree(a / "params", b / "params")
    with pytest.raises(ValueError, match=r"corrupt: checksums differ for .*'up'.*'w'"):
        checkpoint.restore(tmp_path / "b", one_device({"params": params}))


# Steps that are set aside


def damage_step(run, step=2):
    """Other arrays than the checksums are of, in a copy of a checkpoint."""
    data = sorted((run / "checkpoints" / str(step) / "params" / "d").iterdir())
    file = max(data, key=lambda p: p.stat().st_size)
    file.write_bytes(flip(file.read_bytes()))


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the checkpoint; the newest step has a flipped bit."""
    shutil.copytree(saved, tmp_path / "run")
    damage_step(tmp_path / "run")
    return tmp_path / "run"


def test_params_of_the_step_before_a_damaged_one(damaged):
    with pytest.raises(ValueError, match="2 is corrupt|2 is damaged"):
        checkpoint.load_params(damaged, step=2)
    assert checkpoint.saved_steps(damaged) == [1, 2], "a step that was asked for stays"
    lines = []
    params, _ = checkpoint.load_params(damaged, say=lines.append)
    assert_equal(params, jax.tree.map(lambda x: x * 2, make_arrays()["params"]))
    assert len(lines) == 1 and checkpoint.latest_step(damaged) == 1
    checkpoint.load_params(damaged, say=lines.append)
    assert len(lines) == 1, "told once"


def test_a_damaged_step_is_saved_again_and_set_aside_again(damaged):
    """The run goes on from step 1, saves step 2, and that one is damaged as well."""
    wanted = one_device({"params": make_arrays()["params"]})
    for name in ("2.damaged", "2.damaged-2"):
        assert checkpoint.restore(damaged, wanted, say=str)[2] == 1
        assert (damaged / "checkpoints" / name / "params").is_dir()
        writer = checkpoint.Writer(damaged)
        writer.save(2, jax.tree.map(jnp.asarray, make_arrays()["params"]), wait=True)
        writer.close()
        assert checkpoint.restore(damaged, wanted, say=str)[2] == 2
        damage_step(damaged)


def test_no_step_is_set_aside_when_all_are_damaged(damaged):
    damage_step(damaged, 1)
    with pytest.raises(ValueError, match="checkpoints/2 is .*Remove its directory"):
        checkpoint.load_params(damaged)
    assert checkpoint.saved_steps(damaged) == [1, 2]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows")
def test_a_damaged_step_on_a_read_only_disk_is_skipped(damaged, as_nobody):
    lines = []
    for directory in (damaged, damaged / "checkpoints"):
        directory.chmod(0o555)
    as_nobody()
    params, _ = checkpoint.load_params(damaged, say=lines.append)
    assert_equal(params, jax.tree.map(lambda x: x * 2, make_arrays()["params"]))
    assert len(lines) == 1 and "cannot be renamed and is skipped" in lines[0], lines
    assert "Permission denied" in lines[0] and checkpoint.saved_steps(damaged) == [1, 2]


def test_a_damaged_step_of_a_running_training_is_skipped(damaged):
    """The training counts on its directories."""
    lines = []
    with workdir_lock.hold_alone(damaged):
        with other_process(LOADING, damaged) as process:
            lines = process.communicate()[0].splitlines()
    words = f"skipped ({damaged} is in use by process {os.getpid()} on "
    assert len(lines) == 1 and words in lines[0] and lines[0].endswith("Step 1 is used"), lines
    assert checkpoint.saved_steps(damaged) == [1, 2]
    with workdir_lock.hold_alone(damaged):  # the training itself, when it resumes
        checkpoint.load_params(damaged, say=str)
    assert checkpoint.saved_steps(damaged) == [1]


LOADING = """
import sys
from recursive_jax.weights import checkpoint
checkpoint.load_params(sys.argv[1], say=print)
"""


def other_process(code, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_step_that_a_running_training_deletes_is_not_damaged(saved, tmp_path, monkeypatch):
    """The step is deleted while it is read; newer ones are there by then."""
    from orbax.checkpoint import v1 as ocp

    run, load = tmp_path / "run", ocp.load_checkpointables
    shutil.copytree(saved, run)
    steps, lines = run / "checkpoints", []

    def load_while_training(path, wanted):
        if path.endswith("/2"):
            shutil.copytree(steps / "1", steps / "3")
            shutil.rmtree(steps / "2")
        return load(path, wanted)

    monkeypatch.setattr(ocp, "load_checkpointables", load_while_training)
    _, _, step = checkpoint.restore(run, one_device(make_arrays()), say=lines.append)
    assert step == 3 and not lines and checkpoint.saved_steps(run) == [1, 3]


def test_files_and_strange_names_are_no_steps(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    (run / "checkpoints" / "99").write_text("a file")
    for name in ("98", "007", "2.damaged", "97.orbax-checkpoint-tmp", "x"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "007" / "file").touch()
    assert checkpoint.saved_steps(run) == [1, 2]
    (run / "checkpoints" / "98").rmdir()
    writer = checkpoint.Writer(run)
    writer.save(3, jax.tree.map(jnp.asarray, make_arrays()["params"]), wait=True)
    writer.close()
    assert checkpoint.saved_steps(run) == [2, 3]


def test_an_older_step_with_damaged_metadata_does_not_stop_a_run(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    (run / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_text("[")
    writer = checkpoint.Writer(run)
    writer.save(3, jax.tree.map(jnp.asarray, make_arrays()["params"]), wait=True)
    writer.close()
    assert checkpoint.saved_steps(run) == [2, 3]


# What is no damage


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("UNAVAILABLE: Task 1 heartbeat timeout"), "could not be read now (UNAVAILABLE"),
        (RuntimeError("DEADLINE_EXCEEDED: barrier"), "could not be read now (DEADLINE"),
        (ValueError("PERMISSION_DENIED: x [os_error_code='13']"), "could not be read now"),
        (ValueError("UNKNOWN: Input/output error [os_error_code='5']"), "could not be read now"),
        (OSError(116, "Stale file handle"), "could not be read now"),
        (ValueError("RESOURCE_EXHAUSTED: 9 GB"), "does not fit into memory"),
        (RuntimeError("something new"), "nothing proves that it is damaged"),
    ],
)
def test_an_error_that_does_not_prove_damage_is_no_reason_to_remove_a_step(error, words, tmp_path):
    outer = RuntimeError("Failed to load")
    outer.__cause__ = error
    for raised in (error, outer):
        told = integrity.explain(tmp_path, raised)
        assert words in str(told) and str(tmp_path) in str(told)
        assert "Remove" not in str(told) and not isinstance(told, integrity.Damaged)
    assert isinstance(integrity.explain(tmp_path, ValueError("DATA_LOSS: x")), integrity.Damaged)


@pytest.fixture
def as_nobody(tmp_path):
    """A function that gives up the superuser's rights, which no file mode limits."""
    places = [tmp_path, *tmp_path.parents]
    closed = [p for p in places if p.stat().st_uid == os.geteuid() and p != p.parent]
    modes = {p: p.stat().st_mode for p in closed}

    def change():
        if os.geteuid() == 0:
            for path in closed:
                path.chmod(modes[path] | 0o011)
            os.seteuid(65534)

    yield change
    if os.getuid() == 0 and os.geteuid() != 0:
        os.seteuid(0)
    for path, mode in modes.items():
        path.chmod(mode)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows")
@pytest.mark.parametrize(
    "name", ["_CHECKPOINT_METADATA", "params/_METADATA", "params/manifest.ocdbt", "params/d", ""]
)
def test_a_step_that_this_user_may_not_read_is_not_damaged(saved, tmp_path, as_nobody, name):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    blocked = run / "checkpoints" / "2" / name
    blocked.chmod(0)
    as_nobody()
    with pytest.raises((ValueError, OSError)) as error:
        checkpoint.restore(run, one_device(make_arrays()))
    assert "Permission denied" in str(error.value) and str(blocked) in str(error.value)
    assert "Remove" not in str(error.value) and "\n" not in str(error.value)


# Several processes

TOGETHER = """
import contextlib, pathlib, sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from recursive_jax.weights import checkpoint, workdir_lock
run, index, x = pathlib.Path(sys.argv[3]), jax.process_index(), np.arange(1000.0, dtype=np.float32)
sharding = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
wanted = {"params": {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}}
with workdir_lock.hold(run):
    writer = checkpoint.Writer(run)
    for step in (10, 20):
        array = jax.make_array_from_callback(x.shape, sharding, lambda i: step * x[i])
        writer.save(step, {"x": array}, wait=True)
    writer.close()
    if index == 0:
        data = (run / "checkpoints" / "20" / "params").rglob("d/*")
        file = max(data, key=lambda p: p.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    multihost_utils.sync_global_devices("damaged")
    arrays, _, step = checkpoint.restore(run, wanted, say=print)
    (shard,) = arrays["params"]["x"].addressable_shards
    np.testing.assert_array_equal(shard.data, 10 * x[shard.index])
    print(step, *checkpoint.saved_steps(run))
with workdir_lock.hold_alone(run) if index == 0 else contextlib.nullcontext():
    multihost_utils.sync_global_devices("locked")
    try:
        with workdir_lock.hold(run):
            print("locked twice")
    except ValueError as error:
        print(error)
"""


def test_two_processes_agree_on_the_step_and_on_the_lock(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [other_process(TOGETHER, port, index, tmp_path / "run") for index in (0, 1)]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    first, second = ([x for x in lines if not x.startswith("[Gloo]")] for lines in outputs)
    assert "its directory is now 20.damaged. Step 10 is used" in first[0]
    assert first[1] == second[0] == "10 10"
    assert f"is in use by process {processes[0].pid} on" in first[2]
    assert second[1] == f"process 0: {first[2]}"
