"""Checkpoints: what is saved comes back, on any mesh, or one error says what is wrong."""

import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    CFG,
    PROGRESS,
    ROOT,
    abstract,
    assert_equal,
    make_arrays,
    one_device,
    save_run,
)
from jax.sharding import NamedSharding, PartitionSpec

from recursive_jax import sharding
from recursive_jax.models.config import Rope
from recursive_jax.models.parameters import abstract_params, logical_axes
from recursive_jax.text import load_tokenizer
from recursive_jax.weights import checkpoint, integrity
from recursive_jax.weights.source import ASSETS


def on(arrays, mesh):
    """Shardings as training has them."""
    rules = sharding.rules_for(mesh, CFG)
    params = sharding.shardings(logical_axes(CFG), mesh, rules)
    return sharding.state_shardings(arrays, {"params": params}["params"], mesh)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with two steps; tests that damage it take a copy."""
    directory = tmp_path_factory.mktemp("checkpoint") / "run"
    save_run(directory)
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
