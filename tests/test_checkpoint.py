"""Checkpoints: what is saved comes back, on any mesh, or one error says what is wrong."""

import functools
import gc
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recursive_jax import sharding
from recursive_jax.models.config import DecoderConfig, Rope
from recursive_jax.models.parameters import abstract_params, logical_axes
from recursive_jax.text import load_tokenizer
from recursive_jax.training.optimizer import OptimizerConfig, make_optimizer
from recursive_jax.weights import checkpoint, integrity, workdir_lock
from recursive_jax.weights.source import ASSETS

ROOT = pathlib.Path(__file__).resolve().parents[1]
CFG = DecoderConfig(
    "llama", 48, 16, 32, num_heads=4, num_kv_heads=2, head_dim=4, num_layers=2, num_loops=2,
    norms="per_loop", lora_ranks={"q": 2, "up": 3}, tied_head=False,
)  # fmt: skip
PROGRESS = {"data": {"next_index": 7}, "history": [{"step": 0, "nll": 3.25}]}


@functools.cache
def make_arrays():
    """Params and Adam's state, no two numbers alike."""
    params = abstract_params(CFG)
    opt_state = jax.eval_shape(make_optimizer(OptimizerConfig(), 9).init, params)
    arrays = {"params": params, "opt_state": opt_state}
    rng = np.random.default_rng(0)

    def fill(x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        return noise if x.dtype == np.float32 else np.asarray(5, x.dtype)

    return jax.tree.map(fill, arrays)


def on(arrays, mesh):
    """Shardings as training has them."""
    rules = sharding.rules_for(mesh, CFG)
    params = sharding.shardings(logical_axes(CFG), mesh, rules)
    return sharding.state_shardings(arrays, {"params": params}["params"], mesh)


def abstract(arrays, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays, shardings
    )


def one_device(arrays):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return abstract(arrays, jax.tree.map(lambda _: device, arrays))


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with steps 1 (numbers doubled) and 2; tests that damage it take a copy."""
    directory = tmp_path_factory.mktemp("checkpoint") / "run"
    checkpoint.create(directory, CFG, load_tokenizer(ASSETS / "tiny"), source="somewhere", n=[1])
    writer = checkpoint.Writer(directory, keep=2)
    for step, factor in ((0, 3), (1, 2), (2, 1)):
        arrays = jax.tree.map(lambda x, f=factor: jnp.asarray(x * f), make_arrays())
        writer.save(step, arrays["params"], arrays["opt_state"], PROGRESS)
    writer.close()
    return directory


def test_everything_comes_back(saved):
    assert checkpoint.is_checkpoint(saved)
    cfg, facts = checkpoint.load_config(saved)
    assert cfg == CFG
    assert facts["source"] == "somewhere" and facts["n"] == [1] and "jax" in facts["versions"]
    assert load_tokenizer(saved / "tokenizer").encode("a b") == load_tokenizer(
        ASSETS / "tiny"
    ).encode("a b")
    arrays, progress, step = checkpoint.restore(saved, one_device(make_arrays()))
    assert step == checkpoint.latest_step(saved) == 2 and progress == PROGRESS
    assert_equal(arrays, make_arrays())
    older, _, step = checkpoint.restore(saved, one_device(make_arrays()), step=1)
    assert step == 1
    assert_equal(older, jax.tree.map(lambda x: x * 2, make_arrays()))


def test_only_the_latest_are_kept(saved):
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["1", "2"]


def test_params_alone_and_in_another_dtype(saved):
    params, cfg = checkpoint.load_params(saved, dtype=jnp.bfloat16)
    assert cfg == CFG
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_arrays()["params"])
    assert_equal(params, want)


def test_every_config_survives_json(tmp_path):
    cfg = CFG.replace(
        ropes=(Rope(), Rope(theta=1e6, scaling="llama3", factor=8.0)),
        rope_of_depth=(0, 1, 0, 1), windows=(4, 0, 4, 0), attn_softcap=20.0, query_scale=0.3,
    )  # fmt: skip
    checkpoint.create(tmp_path, cfg)
    assert checkpoint.load_config(tmp_path)[0] == cfg


@pytest.mark.parametrize("there", [(8, 1, 1), (1, 2, 4)])
def test_restores_onto_another_mesh(there, tmp_path):
    """Saved from (2, 2, 2), by the rules training uses: kv heads of tensor=4 are replicated."""
    arrays, mesh = make_arrays(), sharding.make_mesh(2, 2, 2)
    placed = jax.tree.map(sharding.put_global, arrays, on(arrays, mesh))
    writer = checkpoint.Writer(tmp_path)
    writer.save(3, placed["params"], placed["opt_state"])
    writer.close()
    wanted = on(arrays, sharding.make_mesh(*there))
    got, _, _ = checkpoint.restore(tmp_path, abstract(arrays, wanted))
    assert_equal(got, arrays)
    for x, s in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    # the checksums are of the numbers, however they are spread
    assert checkpoint.checksums(placed) == checkpoint.checksums(got)


def test_a_save_under_way_keeps_the_values_it_was_given(tmp_path):
    """The arrays are donated to the next step at once, and its progress goes on."""
    arrays = jax.tree.map(jnp.asarray, make_arrays()["params"])
    progress = {"history": [1]}
    scramble = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    writer = checkpoint.Writer(tmp_path)
    writer.save(1, arrays, progress=progress)
    progress["history"].append(2)
    for _ in range(20):
        arrays = scramble(arrays)
    jax.block_until_ready(arrays)
    writer.close()
    wanted = one_device({"params": make_arrays()["params"]})
    got, progress, _ = checkpoint.restore(tmp_path, wanted)
    assert_equal(got["params"], make_arrays()["params"])
    assert progress == {"history": [1]}


# Checksums


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint8])
def test_checksum_sees_every_bit_and_every_exchange(dtype):
    x = np.asarray(np.random.default_rng(0).integers(0, 99, (3, 5)), dtype)
    before = checkpoint.checksums({"x": x})
    raw = x.view(np.uint8).reshape(-1)
    for byte in range(0, raw.size, 7):
        for bit in range(8):
            flipped = raw.copy()
            flipped[byte] ^= 1 << bit
            assert checkpoint.checksums({"x": flipped.view(x.dtype).reshape(x.shape)}) != before
    exchanged = x.copy()
    exchanged[[0, 1]] = x[[1, 0]]
    assert checkpoint.checksums({"x": exchanged}) != before
    # by the formula in the docstring
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    bits = x.view(width).reshape(-1).astype(np.uint64)
    expected = int((bits * (2 * np.arange(x.size, dtype=np.uint64) + 1)).sum() % 2**32)
    assert before == {"['x']": expected}


@pytest.mark.parametrize("shape", [(7, 5), (40,), ()])
def test_checksum_is_the_same_in_pieces_and_on_a_device(shape, monkeypatch):
    x = np.asarray(np.random.default_rng(0).normal(size=shape), np.float32)
    whole = checkpoint.checksums({"x": x})
    monkeypatch.setattr(integrity, "PIECE_BYTES", 45)
    assert checkpoint.checksums({"x": x}) == whole
    assert checkpoint.checksums({"x": jnp.asarray(x)}) == whole


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_arrays_stored_in_bfloat16(dtype, tmp_path):
    """Their checksum is of the stored bits."""
    stored = {"x": jnp.arange(9.0).astype(jnp.bfloat16) / 7, "y": jnp.arange(3.0)}
    writer = checkpoint.Writer(tmp_path)
    writer.save(1, stored, wait=True)
    writer.close()
    wanted = one_device({"params": jax.tree.map(lambda x: x.astype(dtype), stored)})
    got, _, _ = checkpoint.restore(tmp_path, wanted)
    assert_equal(got["params"], jax.tree.map(lambda x: x.astype(dtype), stored))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}


# Damage


def step_files(directory):
    step = directory / "checkpoints" / "2"
    return sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file())


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


DAMAGE = {"flip": flip, "truncate": lambda data: data[: len(data) // 2], "delete": None}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # orbax leaves coroutines behind
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
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


def test_a_missing_step(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved step 5 in .*checkpoints"):
        checkpoint.restore(saved, one_device(make_arrays()), step=5)
    checkpoint.create(tmp_path, CFG)
    assert checkpoint.latest_step(tmp_path) is None and not checkpoint.is_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no saved step .*in .*start again"):
        checkpoint.load_params(tmp_path)


def test_another_models_arrays(saved):
    for changes in ({"embed_dim": 24}, {"num_loops": 4}, {"lora_ranks": {}}, {"tied_head": True}):
        cfg = CFG.replace(**changes)
        params = abstract_params(cfg)
        with pytest.raises(ValueError, match=r"of another model: \['params'\]") as error:
            checkpoint.restore(saved, one_device({"params": params}))
        assert "\n" not in str(error.value) and "Remove" not in str(error.value)
    assert checkpoint.saved_steps(saved) == [1, 2], "whole steps stay"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "config.json is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "format 99, this version reads"),
        (lambda text: '{"model_type": "llama"}', "format None.* Hugging Face model.*--source"),
        (lambda text: "[1]", "config.json is damaged"),
        (lambda text: text.replace('"embed_dim"', '"embed_dam"'), "embed_dam"),
        (lambda text: text.replace('"embed_dim": 16,', ""), "missing.*embed_dim"),
        (lambda text: text.replace('"num_loops": 2', '"num_loops": 0'), "num_loops"),
        (lambda text: text.replace('"max_length": ', '"max_length": 1'), "config.json is damaged"),
        (lambda text: text.replace("somewhere", "somewhexe"), "config.json is damaged"),
    ],
)
def test_damaged_or_foreign_config(saved, tmp_path, change, message):
    text = (saved / "config.json").read_text()
    (tmp_path / "config.json").write_text(change(text))
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_config(tmp_path)
    assert "config.json" in str(error.value), "says where"
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*recursive_jax.convert"):
        checkpoint.load_config(tmp_path / "nowhere")


def test_damaged_tokenizer(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    file = run / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("th", "ht", 1))  # still a tokenizer
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged.*Restore it"):
        checkpoint.load_config(run)
    file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        checkpoint.load_config(run)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "facts.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["facts.json"]


KILLED = """
import os, pathlib, signal, sys, time
import jax.numpy as jnp
import numpy as np
from recursive_jax.weights import checkpoint
big = jnp.asarray(np.random.default_rng(0).standard_normal(1 << 24).astype(np.float32))
writer = checkpoint.Writer(sys.argv[1])
writer.save(1, {"x": jnp.arange(1000.0)}, wait=True)
writer.save(2, {"x": big})
while len(os.listdir(sys.argv[1] + "/checkpoints")) < 2:
    time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    """SIGKILL as soon as 64 MB begin to be written: the step before is still the latest."""
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert "1" in left and "2" not in left and len(left) > 1, "a partial step lies there"
    assert checkpoint.latest_step(tmp_path) == 1
    wanted = one_device({"params": {"x": np.arange(1000.0, dtype=np.float32)}})
    got, _, step = checkpoint.restore(tmp_path, wanted)
    assert step == 1
    np.testing.assert_array_equal(got["params"]["x"], np.arange(1000.0))
    writer = checkpoint.Writer(tmp_path)  # the next run clears it away and saves the step
    writer.save(2, {"x": jnp.arange(1000.0) + 2}, wait=True)
    writer.close()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}
    assert checkpoint.restore(tmp_path, wanted)[0]["params"]["x"][0] == 2.0


def test_sharded_arrays_need_no_gathering(tmp_path):
    """One array spread over eight devices, restored onto four: each reads its own part."""
    mesh = sharding.make_mesh(1, 8, 1)
    x = sharding.put_global(
        {"x": np.arange(64.0, dtype=np.float32)}, NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    writer = checkpoint.Writer(tmp_path)
    writer.save(1, x, wait=True)
    writer.close()
    four = sharding.make_mesh(1, 4, 1, devices=jax.devices()[4:])
    there = NamedSharding(four, PartitionSpec("fsdp"))
    wanted = {"params": {"x": jax.ShapeDtypeStruct((64,), np.float32, sharding=there)}}
    got = checkpoint.restore(tmp_path, wanted)[0]["params"]["x"]
    assert [s.data.shape for s in got.addressable_shards] == [(16,)] * 4
    np.testing.assert_array_equal(got, np.arange(64.0))


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
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
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
