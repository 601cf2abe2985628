"""Hugging Face directories: frozen logits, bitwise round trips, and refusals by name."""

import base64
import json
import os
import pathlib
import subprocess
import sys

import hub_server
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import cases
from safetensors import safe_open
from safetensors.numpy import save_file

from recursive_jax.models.decoder import Decoder
from recursive_jax.weights import hf

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load_golden(name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    tokens = np.asarray(golden["tokens"])
    logits = np.frombuffer(base64.b64decode(golden["logits"]), "<f4")
    return golden, tokens, logits.reshape(*tokens.shape, -1)


def tensors_of(golden, dtype=np.float32):
    kind = golden["config"]["model_type"]
    # The head of gpt_neox is embed_out in files, and lm_head inside transformers 5.
    head = "embed_out" if kind == "gpt_neox" else "lm_head"
    return {
        name.replace("lm_head", head): cases.weight(name, tuple(shape), kind).astype(dtype)
        for name, shape in golden["tensors"].items()
    }


def write_directory(path, name, dtype=np.float32, shards=1, edit=None):
    """The golden model `name` as a Hugging Face directory; `edit` changes its tensors first."""
    golden, _, _ = load_golden(name)
    tensors = tensors_of(golden, dtype)
    if edit:
        edit(tensors)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(golden["config"]))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(path, weight_map)
    return path


def write_index(path, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def read_all(path):
    out = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "np") as f:
            out |= {name: f.get_tensor(name) for name in f.keys()}
    return out


def forward(params, cfg, tokens):
    model = Decoder(cfg)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden = model.apply({"params": params}, jnp.asarray(tokens), positions)
    return np.asarray(model.apply({"params": params}, hidden, method="unembed"))


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_equal_the_frozen_ones_of_transformers(name, tmp_path):
    _, tokens, expected = load_golden(name)
    path = write_directory(tmp_path, name)
    cfg = hf.load_config(path)
    actual = forward(hf.load_params(path, cfg), cfg, tokens)
    # f32 noise is 1e-6 of the scale, and gelu differs from its tanh form by 5e-5
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "dtype, shards", [(np.float32, 1), (np.float16, 1), (ml_dtypes.bfloat16, 1), (np.float32, 3)]
)
@pytest.mark.parametrize("name", cases.CASES)
def test_hf_to_ours_to_hf_is_bitwise(name, dtype, shards, tmp_path):
    source = write_directory(tmp_path / "source", name, dtype, shards)
    cfg = hf.load_config(source)
    total = sum(x.nbytes for x in read_all(source).values())
    limit = total if shards == 1 else total // 2
    hf.save_params(hf.open_params(source, cfg), cfg, tmp_path / "out", max_shard_bytes=limit)
    before, after = read_all(source), read_all(tmp_path / "out")
    assert set(before) == set(after)
    for tensor, value in before.items():
        assert after[tensor].dtype == dtype == value.dtype
        assert after[tensor].tobytes() == value.tobytes(), tensor
    assert hf.load_config(tmp_path / "out") == cfg
    files = [f.name for f in (tmp_path / "out").iterdir()]
    assert ("model.safetensors.index.json" in files) == (shards > 1)
    assert all(f.stat().st_size < limit + 10_000 for f in (tmp_path / "out").iterdir())
    hf.open_params(tmp_path / "out", cfg)  # our own audit accepts what we write


def test_fused_qkv_is_interleaved_by_head(tmp_path):
    """GPT-NeoX rows are [heads, 3, head_dim]: checked element by element, not by round trip."""
    source = write_directory(tmp_path, "gpt_neox_parallel")
    cfg = hf.load_config(source)
    fused = read_all(source)["gpt_neox.layers.1.attention.query_key_value.weight"]
    params = hf.open_params(source, cfg)
    size = cfg.head_dim
    for part, name in enumerate("qkv"):
        for head in range(cfg.num_heads):
            theirs = fused[(head * 3 + part) * size : (head * 3 + part + 1) * size]
            ours = params[f"block/attention/{name}/w"][1][:, head * size : (head + 1) * size]
            np.testing.assert_array_equal(ours, theirs.T)


def test_opening_reads_nothing_and_items_are_read_one_at_a_time(tmp_path, monkeypatch):
    source = write_directory(tmp_path, "llama_gqa_llama3_rope", ml_dtypes.bfloat16)
    cfg = hf.load_config(source)
    reads = []

    class Recorded:
        """An open safetensors file that records which tensors are read."""

        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            reads.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr("safetensors.safe_open", Recorded)
    lazy = hf.open_params(source, cfg)
    assert len(lazy) == len(list(lazy)) and not reads
    up = lazy["block/mlp/up/w"]
    assert up.shape == (3, 32, 48) and up.dtype == ml_dtypes.bfloat16
    assert reads == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    as_f32 = hf.open_params(source, cfg, np.float32)["block/mlp/up/w"]
    assert as_f32.dtype == np.float32
    np.testing.assert_array_equal(as_f32, up.astype(np.float32))
    # our leaf is the transpose of theirs
    stored = read_all(source)["model.layers.2.mlp.up_proj.weight"]
    np.testing.assert_array_equal(up[2].T, stored)
    with pytest.raises(KeyError):
        lazy["block/mlp/up/b"]


def test_layers_of_different_types_widen(tmp_path):
    def edit(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.float32) * 1.001

    source = write_directory(tmp_path, "llama_gqa_llama3_rope", ml_dtypes.bfloat16, edit=edit)
    up = hf.open_params(source, hf.load_config(source))["block/mlp/up/w"]
    assert up.dtype == np.float32
    np.testing.assert_array_equal(up[1].T, read_all(source)["model.layers.1.mlp.up_proj.weight"])


def test_save_takes_nested_jax_arrays_and_casts(tmp_path):
    source = write_directory(tmp_path / "in", "qwen3_qk_norm")
    cfg = hf.load_config(source)
    params = jax.tree.map(jnp.asarray, hf.load_params(source, cfg))
    hf.save_params(
        params, cfg, tmp_path / "out", dtype=ml_dtypes.bfloat16, config_extra={"eos_token_id": 7}
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["eos_token_id"] == 7
    for name, value in read_all(tmp_path / "out").items():
        expected = read_all(source)[name].astype(ml_dtypes.bfloat16)
        assert value.tobytes() == expected.tobytes()


# What is refused, and what the message must name.


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    "edit, words",
    [
        (
            drop("model.layers.2.mlp.up_proj.weight"),
            ["missing", "model.layers.2.mlp.up_proj.weight"],
        ),
        (drop("lm_head.weight"), ["missing", "lm_head.weight"]),
        (
            put("model.layers.3.mlp.up_proj.weight", np.zeros((48, 32), np.float32)),
            ["left over", "model.layers.3.mlp.up_proj.weight"],
        ),
        (
            put("model.layers.0.self_attn.q_proj.bias", np.zeros(32, np.float32)),
            ["left over", "model.layers.0.self_attn.q_proj.bias"],
        ),
        (
            put("model.norm.weight", np.zeros(31, np.float32)),
            ["misshapen", "model.norm.weight", "[31]", "[32]"],
        ),
        (
            put("model.layers.1.mlp.down_proj.weight", np.zeros((48, 32), np.float32)),
            ["misshapen", "model.layers.1.mlp.down_proj.weight", "[48, 32]", "[32, 48]"],
        ),
        (
            put("model.layers.1.mlp.down_proj.weight", np.zeros((32, 48), np.int8)),
            ["model.layers.1.mlp.down_proj.weight", "I8", "BF16"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(edit, words, tmp_path):
    source = write_directory(tmp_path, "llama_gqa_llama3_rope", edit=edit)
    with pytest.raises(ValueError) as error:
        hf.open_params(source, hf.load_config(source))
    for word in [str(source), *words]:
        assert word in str(error.value), error.value


def test_buffers_are_allowed_and_only_where_they_belong(tmp_path):
    def buffers(tensors):
        for i in range(3):
            block = f"gpt_neox.layers.{i}.attention."
            tensors[block + "bias"] = np.ones((1, 1, 4, 4), bool)
            tensors[block + "masked_bias"] = np.array(-1e9, np.float32)
            tensors[block + "rotary_emb.inv_freq"] = np.ones(2, np.float32)

    source = write_directory(tmp_path / "a", "gpt_neox_parallel", edit=buffers)
    hf.open_params(source, hf.load_config(source))
    source = write_directory(tmp_path / "b", "llama_gqa_llama3_rope", edit=buffers)
    with pytest.raises(ValueError, match="gpt_neox.layers.0.attention.bias"):
        hf.open_params(source, hf.load_config(source))


def test_new_spelling_of_the_pythia_head(tmp_path):
    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")

    plain = write_directory(tmp_path / "a", "gpt_neox_parallel")
    renamed = write_directory(tmp_path / "b", "gpt_neox_parallel", edit=rename)
    cfg = hf.load_config(plain)
    np.testing.assert_array_equal(
        hf.open_params(plain, cfg)["head"], hf.open_params(renamed, cfg)["head"]
    )


def test_head_of_a_tied_model_must_be_its_embedding(tmp_path):
    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def other(tensors):
        same(tensors)
        tensors["lm_head.weight"][-1, -1] += 1e-3

    source = write_directory(tmp_path / "a", "gemma_mqa", edit=same)
    hf.open_params(source, hf.load_config(source))
    source = write_directory(tmp_path / "b", "gemma_mqa", edit=other)
    with pytest.raises(ValueError, match="lm_head.weight differs.*tie_word_embeddings"):
        hf.open_params(source, hf.load_config(source))


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.999])
def test_truncated_safetensors(keep, tmp_path):
    source = write_directory(tmp_path, "gemma_mqa")
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if keep > 1 else int(keep * len(data))])
    with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
        hf.open_params(source, hf.load_config(source))


def test_damaged_header_and_git_lfs_pointer(tmp_path):
    source = write_directory(tmp_path, "gemma_mqa")
    file = source / "model.safetensors"
    file.write_bytes(b"\xff" * 200)
    with pytest.raises(ValueError, match="truncated or damaged"):
        hf.open_params(source, hf.load_config(source))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        hf.open_params(source, hf.load_config(source))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b", "..", "C:\\x", 3])
def test_index_may_not_leave_the_directory(file, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    source = write_directory(tmp_path / "model", "gemma_mqa", shards=2)
    write_index(source, {"model.norm.weight": file})
    with pytest.raises(ValueError, match="expected a file name") as error:
        hf.open_params(source, hf.load_config(source))
    assert repr(file) in str(error.value)


def test_index_must_describe_its_files(tmp_path):
    source = write_directory(tmp_path, "gemma_mqa", shards=2)
    cfg = hf.load_config(source)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    some = "model.layers.1.mlp.up_proj.weight"
    file, other = weight_map[some], next(f for f in weight_map.values() if f != weight_map[some])

    write_index(source, weight_map | {some: other})
    with pytest.raises(ValueError, match=f"does not describe its files.*{some}"):
        hf.open_params(source, cfg)
    write_index(source, {k: v for k, v in weight_map.items() if k != some})
    with pytest.raises(ValueError, match=f"{file} holds {some}"):
        hf.open_params(source, cfg)
    write_index(source, weight_map | {some: "model-00009-of-00009.safetensors"})
    with pytest.raises(FileNotFoundError, match="model-00009-of-00009.safetensors"):
        hf.open_params(source, cfg)
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match="not a safetensors index"):
            hf.open_params(source, cfg)

    # the same tensor in two files
    write_index(source, weight_map)
    extra = {some: read_all(source)[some]}
    with safe_open(source / other, "np") as f:
        extra |= {name: f.get_tensor(name) for name in f.keys()}
    save_file(extra, source / other)
    with pytest.raises(ValueError, match=some):
        hf.open_params(source, cfg)


def test_two_spellings_of_one_tensor_are_a_duplicate(tmp_path):
    def both(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors["language_model." + name] = tensors[name]

    source = write_directory(tmp_path, "gemma3_local_global", edit=both)
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.weight is there twice"):
        hf.open_params(source, hf.load_config(source))


def test_pickles_are_never_read(tmp_path):
    golden, _, _ = load_golden("gemma_mqa")
    (tmp_path / "config.json").write_text(json.dumps(golden["config"]))
    cfg = hf.load_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        hf.open_params(tmp_path, cfg)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin.*save_pretrained"):
        hf.open_params(tmp_path, cfg)


def rename(change):
    """An `edit` that renames all tensors."""

    def edit(tensors):
        renamed = {change(name): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return edit


@pytest.mark.parametrize("name", ["llama_gqa_llama3_rope", "gpt_neox_parallel"])
@pytest.mark.parametrize(
    "change",
    [
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "_orig_mod.module." + name,
        lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    ],
)
def test_wrappers_of_torch_are_left_out_of_names(name, change, tmp_path, caplog):
    plain = write_directory(tmp_path / "plain", name)
    wrapped = write_directory(tmp_path / "wrapped", name, edit=rename(change))
    cfg = hf.load_config(plain)
    expected, found = hf.open_params(plain, cfg), hf.open_params(wrapped, cfg)
    assert not [r for r in caplog.records if str(plain) in r.message]
    assert f"{wrapped}: left out the wrapper prefix of" in caplog.text
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])


def test_a_headless_model_that_is_not_tied_lacks_its_head(tmp_path):
    def edit(tensors):
        del tensors["lm_head.weight"]
        rename(lambda name: name.removeprefix("model."))(tensors)

    source = write_directory(tmp_path, "llama_gqa_llama3_rope", edit=edit)
    with pytest.raises(ValueError, match=r"config. missing: lm_head.weight. Check"):
        hf.open_params(source, hf.load_config(source))


def test_float64_is_read_as_float32(tmp_path, caplog):
    source = write_directory(tmp_path / "double", "llama_gqa_llama3_rope", np.float64)
    cfg = hf.load_config(source)
    params = hf.open_params(source, cfg)
    single = write_directory(tmp_path / "single", "llama_gqa_llama3_rope")
    assert f"{source}: 30 tensors are float64" in caplog.text
    for path, value in hf.open_params(single, cfg).items():
        assert params[path].dtype == np.float32
        np.testing.assert_array_equal(params[path], value)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_when_read(dtype, value, tmp_path):
    def edit(tensors):
        tensors[NAME][3, 2] = value

    source = write_directory(tmp_path, "llama_gqa_llama3_rope", dtype, edit=edit)
    params = hf.open_params(source, hf.load_config(source))
    params.layers("block/mlp/up/w", [0, 2])  # the others are whole
    for read in (lambda: params["block/mlp/up/w"], lambda: params.layers("block/mlp/up/w", [1])):
        with pytest.raises(ValueError, match=f"{source}: tensor {NAME} holds NaN or infinity"):
            read()


def test_float64_beyond_float32_is_infinity(tmp_path):
    def edit(tensors):
        tensors[NAME] = tensors[NAME].astype(np.float64)
        tensors[NAME][0, 0] = 1e300

    source = write_directory(tmp_path, "llama_gqa_llama3_rope", edit=edit)
    with pytest.raises(ValueError, match=f"{NAME} holds NaN or infinity in float32"):
        hf.open_params(source, hf.load_config(source))["block/mlp/up/w"]


def test_config_that_is_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        hf.load_config(tmp_path)
    for text in ("{", "[]", '{"a":' * 10**5):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            hf.load_config(tmp_path)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    source = write_directory(tmp_path / "in", "gemma_mqa")
    cfg = hf.load_config(source)
    params = dict(hf.open_params(source, cfg))
    out = tmp_path / "out"

    broken = params | {"final_norm/scale": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="final_norm/scale"):
        hf.save_params(broken, cfg, out)
    with pytest.raises(ValueError, match="final_norm/scale"):
        hf.save_params({k: v for k, v in params.items() if "final" not in k}, cfg, out)
    with pytest.raises(ValueError, match="Untie it first"):
        hf.save_params(params, cfg.replace(num_layers=1, num_loops=3), out)

    class DiskFull(Exception):
        pass

    def fail(*_):
        raise DiskFull

    monkeypatch.setattr(hf.os, "replace", fail)
    with pytest.raises(DiskFull):
        hf.save_params(params, cfg, out)
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == ["in"]  # nothing was left behind

    out.mkdir()
    hf.save_params(params, cfg, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not empty"):
        hf.save_params(params, cfg, out)
    assert (out / "model.safetensors").read_bytes() == before


def test_resolve_finds_local_paths_and_says_what_it_expected(tmp_path, monkeypatch):
    assert hf.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="hub id such as"):
        hf.resolve(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="hub id such as"):
        hf.resolve("./nothing/here")


def test_hub_ids_download_safetensors_only(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def download(repo, allow_patterns):
        calls.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hf.resolve("someone/a-model") == tmp_path
    (repo, patterns), *_ = calls
    assert repo == "someone/a-model" and "*.safetensors" in patterns
    assert not any("bin" in p or p == "*" or ".pt" in p for p in patterns)

    def offline(*_, **__):
        raise OSError("no route to host\nlong trace")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="someone/a-model.*no route to host.*network"):
        hf.resolve("someone/a-model")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"recursive_jax\[hub\]"):
        hf.resolve("someone/a-model")


def test_a_hub_model_is_downloaded_once_by_the_real_client(tmp_path):
    """From a hub on loopback: whole, without its pickle, and offline from then on."""
    pytest.importorskip("huggingface_hub")
    model = write_directory(tmp_path / "model", "llama_gqa_llama3_rope", shards=2)
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    server = hub_server.serve({"someone/a-model": model})
    here = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }

    def resolve(name, **more):
        code = f"from recursive_jax.weights import hf; print(hf.resolve({name!r}))"
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | here | more, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    done = resolve("someone/a-model")
    assert done.returncode == 0, done.stderr
    got = pathlib.Path(done.stdout.strip().splitlines()[-1])
    wanted = {file.name for file in model.iterdir()} - {"pytorch_model.bin"}
    assert {file.name for file in got.iterdir()} == wanted
    assert all((got / name).read_bytes() == (model / name).read_bytes() for name in wanted)
    assert not any(".bin" in path for path in server.asked)
    assert "someone/another does not exist here" in resolve("someone/another").stderr
    server.shutdown(), server.server_close()
    again = resolve("someone/a-model", HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout, again.stderr
