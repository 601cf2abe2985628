"""Sources as users have them: what opens, and what the jobs say of those that cannot be used."""

import json
import pathlib
import shutil

import commands
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_gguf import byte_vocabulary, tiny_gguf
from test_hf import write_directory

from recursive_jax.evaluation import certificate
from recursive_jax.model import load
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.text import Windows
from recursive_jax.weights import hf, low_rank, names
from recursive_jax.weights.source import ASSETS, open_source
from recursive_jax.weights.tie_config import TieConfig

CFG = DecoderConfig(
    family="llama", vocab_size=4096, embed_dim=16, mlp_dim=24, num_heads=2, num_kv_heads=1,
    head_dim=8, num_layers=2, max_length=64,
)  # fmt: skip
HOW = TieConfig(2, "average", "svd", 4)
BROKEN = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A random Llama with a tokenizer, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("source") / "llama"
    rng = np.random.default_rng(0)
    params = {
        path: np.ones(shape, np.float32) if "norm" in path else rng.normal(0, 0.1, shape)
        for path, shape in names.leaf_shapes(CFG).items()
    }
    hf.save_params(params, CFG, directory, dtype=np.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / name, directory)
    return directory


@pytest.fixture
def source(whole, tmp_path):
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "llama"))


def edit_tensor(directory, name, change):
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = np.asarray(change(tensors[name]), tensors[name].dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def put_nan(weight):
    weight[3, 2] = np.nan
    return weight


def test_convert_names_a_tensor_that_is_no_number(source):
    edit_tensor(source, BROKEN, put_nan)
    message = f"^{source}: tensor {BROKEN} holds NaN or infinity in float32;"
    with pytest.raises(ValueError, match=message):
        load(source).convert(HOW)


def test_train_names_a_tensor_that_is_no_number_before_its_first_step(source, tmp_path):
    edit_tensor(source, BROKEN, put_nan)
    (tmp_path / "text.txt").write_text("It was a bright day in April.\n" * 99)
    workdir = tmp_path / "run"
    flags = [
        f"--config={ASSETS.parents[1] / 'configs' / 'quickstart.py'}",
        f"--workdir={workdir}",
        f"--config.source={source}",
        f"--config.data.train={tmp_path / 'text.txt'}",
    ]
    done = commands.run("train", *flags)
    assert done.returncode == 2, done.stderr
    assert f"error: {source}: tensor {BROKEN} holds NaN or infinity" in done.stderr
    assert "step" not in done.stdout and not workdir.exists()


def test_a_certificate_has_no_value_that_json_lacks(source, tmp_path):
    """Where float32 overflows there is an error and no certificate with NaN or Infinity."""
    tokens = np.arange(8, dtype=np.int32)[None]
    windows = Windows(tokens, np.ones(tokens.shape, bool))
    model = open_source(str(source))
    reference = certificate.Reference(tmp_path / "rows", model, windows)
    params = names.nested(dict(model.params))
    found = reference.compare(Decoder(CFG), params)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    params["final_norm"] = {"scale": np.full(CFG.embed_dim, 3e38, np.float32)}
    with pytest.raises(ValueError, match="no finite numbers: activations exceed float32"):
        reference.compare(Decoder(CFG), params)
    edit_tensor(source, "model.norm.weight", lambda w: w * 3e38)
    with pytest.raises(ValueError, match=f"{source} gives .* no finite numbers"):
        certificate.full_rank_identity(open_source(str(source)), HOW, windows)


def test_the_squares_of_weights_may_not_exceed_float32(source):
    edit_tensor(source, BROKEN, lambda w: w * 1e30)
    with pytest.raises(ValueError, match="projection up .* exceed float32"):
        certificate.tie_with_certificate(open_source(str(source)), HOW)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_residual_that_is_no_number_has_no_svd(value):
    residual = np.ones((4, 6), np.float32)
    residual[1, 2] = value
    with (
        pytest.raises(ValueError, match="a weight holds NaN or infinity"),
        np.errstate(all="ignore"),
    ):
        low_rank.truncated_svd(residual, 2)


def test_a_gguf_file_needs_no_suffix(tmp_path):
    vocabulary = byte_vocabulary(59) | {"more": {"ggml.pre": "gpt-2"}}
    path = tiny_gguf(tmp_path / "model.gguf", "llama_mqa_tied_biases", vocabulary=vocabulary)
    expected = open_source(str(path))
    tokens = expected.load_tokenizer().get_vocab()
    with pytest.raises(ValueError, match=f"it holds a GGUF file; give that: {path}"):
        open_source(str(tmp_path))
    path.rename(tmp_path / "blob")
    with pytest.raises(ValueError, match=f"give that: {tmp_path / 'blob'}"):
        open_source(str(tmp_path))
    found = open_source(str(tmp_path / "blob"))
    assert found.cfg == expected.cfg
    assert found.load_tokenizer().get_vocab() == tokens
    with pytest.raises(FileNotFoundError, match="expected a GGUF model"):
        open_source(str(path))
    (tmp_path / "config.json").write_text("{}")  # repositories of GGUF files often have one
    with pytest.raises(ValueError, match="model_type None"):
        open_source(str(tmp_path))


def test_a_gguf_file_beside_a_config(tmp_path):
    source = write_directory(tmp_path, "llama_gqa_llama3_rope")
    (source / "model.safetensors").unlink()
    path = tiny_gguf(source / "model.Q8_0.gguf", "llama_gqa_llama3_rope")
    with pytest.raises(ValueError, match=f"give that: {path}"):
        open_source(str(source))


@pytest.mark.parametrize("with_config", [False, True])
def test_a_lora_adapter_is_no_model(with_config, source, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.x.lora_A.weight": np.zeros((2, 3))}, adapter / "adapter.st")
    if with_config:
        shutil.copy(source / "config.json", adapter)
    with pytest.raises(ValueError, match=r"LoRA adapter.*base \(someone/base\) first"):
        open_source(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="LoRA adapter.*merge it into its base first"):
        open_source(str(adapter))
