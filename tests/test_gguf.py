"""GGUF files: written here as llama.cpp's converter would, read back, and refused when damaged."""

import random
import re

import gguf as gguf_format
import ml_dtypes
import numpy as np
import pytest
from test_hf import load_golden, tensors_of, write_directory

from recursive_jax.models.config import Rope
from recursive_jax.weights import gguf, hf, names

# Their names for Hugging Face's, from the GGUF specification.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
ARCHITECTURES = {
    "gemma_mqa": "gemma",
    "gemma2_softcap_local": "gemma2",
    "gemma3_local_global": "gemma3",
    "llama_gqa_llama3_rope": "llama",
    "llama_mqa_tied_biases": "llama",
    "qwen2_last_layers_local": "qwen2",
    "qwen3_qk_norm": "qwen3",
}


def gguf_name(name, arch):
    norms = ("post_attention_norm", "ffn_norm", "post_ffw_norm")
    if not arch.startswith("gemma") or arch == "gemma":
        norms = ("ffn_norm", None, None)
    later = dict(
        zip(
            ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            norms,
            strict=True,
        )
    )
    if name in NAMES:
        return NAMES[name]
    layer, part, suffix = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(\w+)", name).groups()
    return f"blk.{layer}.{(NAMES | later)[part]}.{suffix}"


def permute(w, heads):
    """llama.cpp's conversion of query and key rows."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def byte_vocabulary(size):
    """A byte-level vocabulary of `size` tokens, its merges, and one control token at the end."""
    tokens = [f"<{i}>" for i in range(size)]
    tokens[:4] = ["a", "b", "ab", "Ġ"]
    return dict(model="gpt2", tokens=tokens, merges=["a b"], types=[1] * 4 + [3] * (size - 4))


def write_gguf(path, arch, settings, tensors, vocabulary, quantise=None, extra=None):
    writer = gguf_format.GGUFWriter(path, arch)
    for key, value in settings.items():
        key = key if "." in key and key.split(".")[0] == "split" else f"{arch}.{key}"
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    if vocabulary:
        writer.add_tokenizer_model(vocabulary["model"])
        writer.add_token_list(vocabulary["tokens"])
        writer.add_token_types(vocabulary["types"])
        if "merges" in vocabulary:
            writer.add_token_merges(vocabulary["merges"])
        if "scores" in vocabulary:
            writer.add_token_scores(vocabulary["scores"])
        for key, value in vocabulary.get("more", {}).items():
            if isinstance(value, bool):
                writer.add_bool(f"tokenizer.{key}", value)
            elif isinstance(value, int):
                writer.add_uint32(f"tokenizer.{key}", value)
            else:
                writer.add_string(f"tokenizer.{key}", value)
    for name, value in tensors.items():
        if quantise and value.ndim == 2 and value.shape[1] % 32 == 0:
            data = gguf_format.quants.quantize(value, quantise)
            writer.add_tensor(name, data, raw_dtype=quantise)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_gguf(path, name, edit=None, **kwargs):
    """The golden model `name` as a GGUF file; `edit` changes its settings and tensors first."""
    golden, _, _ = load_golden(name)
    config, arch = golden["config"], ARCHITECTURES[name]
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    tensors = {}
    for key, value in tensors_of(golden).items():
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):
            value = permute(value, heads if "q_proj" in key else kv_heads)
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            value = value + 1
        tensors[gguf_name(key, arch)] = value
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    settings = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    rope = config["rope_parameters"]
    if "full_attention" in rope:
        settings["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    settings["rope.freq_base"] = rope["rope_theta"]
    if rope["rope_type"] == "linear":
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if arch in ("gemma2", "gemma3"):
        settings["attention.sliding_window"] = config["sliding_window"]
        local = [t == "sliding_attention" for t in config["layer_types"]]
        settings["attention.sliding_window_pattern"] = local
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            settings[key] = config[key]
    if edit:
        edit(settings, tensors)
    vocabulary = kwargs.pop("vocabulary", byte_vocabulary(config["vocab_size"]))
    return write_gguf(path, arch, settings, tensors, vocabulary, **kwargs)


def expected(tmp_path, name):
    """What the same model's Hugging Face directory says, as far as a GGUF file can say it."""
    source = write_directory(tmp_path / "hf", name)
    cfg = hf.load_config(source)
    params = dict(hf.open_params(source, cfg))
    changes = {"norm_eps": float(np.float32(cfg.norm_eps))}
    if cfg.family in ("gemma2", "gemma3"):
        changes["query_scale"] = None  # not in a GGUF file; these sizes are not llama.cpp's
    if name == "qwen2_last_layers_local":
        changes["windows"] = ()
    if name == "llama_gqa_llama3_rope":
        changes["ropes"] = (Rope(500.0),)
    return cfg.replace(**changes), params


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_and_parameters_equal_the_hugging_face_ones(name, tmp_path):
    cfg, params = expected(tmp_path, name)
    lazy, actual = gguf.open_params(tiny_gguf(tmp_path / "m.gguf", name))
    assert actual == cfg
    assert set(lazy) == set(params)
    for path, value in params.items():
        # adding and taking away the 1 of a norm rounds
        atol = 2e-7 if "norm" in path else 0
        np.testing.assert_allclose(lazy[path], value, rtol=0, atol=atol, err_msg=path)


def test_parameters_are_read_one_at_a_time(tmp_path):
    reads = []

    class Tensors(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    file = gguf.GGUFFile(tiny_gguf(tmp_path / "m.gguf", "gemma_mqa"))
    lazy = file.params(ml_dtypes.bfloat16)
    file.tensors = Tensors(file.tensors)
    assert len(lazy) == len(list(lazy)) and not reads
    assert lazy["block/mlp/up/w"].dtype == ml_dtypes.bfloat16
    assert reads == [f"blk.{i}.ffn_up.weight" for i in range(3)]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "F16", "BF16"])
def test_quantised_parameters_are_close(kind, tmp_path):
    kind = gguf_format.GGMLQuantizationType[kind]
    step = {"Q8_0": 0.01, "Q4_1": 0.2, "Q5_0": 0.15, "F16": 1e-3, "BF16": 1e-2}[kind.name]
    _, params = expected(tmp_path, "llama_gqa_llama3_rope")
    lazy, _ = gguf.open_params(
        tiny_gguf(tmp_path / "m.gguf", "llama_gqa_llama3_rope", quantise=kind)
    )
    q = lazy["block/attention/q/w"]
    assert q.dtype == np.float32
    difference = np.abs(q - params["block/attention/q/w"]).max()
    assert 0 < difference < step * np.abs(q).max()


def test_llama3_rope_is_recognised_from_its_factors(tmp_path):
    rope = Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    factors = Rope(500000.0).frequencies(64) / rope.frequencies(64)
    assert factors[0] == 1 and factors[-1] == 32  # both ends of the interpolation are there

    def edit(settings, tensors, factors=factors):
        settings["rope.freq_base"] = 500000.0
        settings["attention.key_length"] = settings["attention.value_length"] = 64
        for i in range(3):
            for part, heads in (("q", 4), ("k", 2), ("v", 2)):
                tensors[f"blk.{i}.attn_{part}.weight"] = np.zeros((64 * heads, 32), np.float32)
            tensors[f"blk.{i}.attn_output.weight"] = np.zeros((32, 256), np.float32)
        tensors["rope_freqs.weight"] = factors.astype(np.float32)

    path = tiny_gguf(tmp_path / "m.gguf", "llama_gqa_llama3_rope", edit)
    assert gguf.load_config(path).ropes == (rope,)
    gguf.open_params(path)

    def odd(settings, tensors):
        edit(settings, tensors, factors * np.linspace(1, 2, 32))

    path = tiny_gguf(tmp_path / "odd.gguf", "llama_gqa_llama3_rope", odd)
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        gguf.load_config(path)


@pytest.mark.parametrize("arch, layers", [("gemma2", 46), ("gemma3", 62)])
def test_query_scale_of_the_largest_gemmas(arch, layers, tmp_path):
    """27B scales queries by hidden_size / heads; the file does not say so, llama.cpp knows it."""
    sizes = {
        "block_count": layers, "embedding_length": 48, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 16, "context_length": 64,
        "feed_forward_length": 8, "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    embedding = {"token_embd.weight": np.zeros((20, 48), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", arch, sizes, embedding, None)
    assert gguf.load_config(path).query_scale == 12**-0.5
    path = write_gguf(tmp_path / "s.gguf", arch, sizes | {"block_count": 26}, embedding, None)
    cfg = gguf.load_config(path)
    assert cfg.query_scale is None and cfg.windows[:6] == (
        (4096, 0) * 3 if arch == "gemma2" else (4096,) * 5 + (0,)
    )


# Damaged and unsupported files.


def test_truncated_anywhere(tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", "gemma_mqa")
    data = path.read_bytes()
    for end in [5, 12, 30, 100, 400, 900, 2000, len(data) // 2, len(data) - 40]:
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="m.gguf is truncated or damaged.*download it again"):
            gguf.open_params(path)


def test_damaged_anywhere_never_hangs_or_crashes(tmp_path):
    """A flipped byte may go unnoticed in a weight, but the header either reads or is refused."""
    path = tiny_gguf(tmp_path / "m.gguf", "gemma_mqa")
    data = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(30):
        at = rng.randrange(4, 3000)
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        try:
            gguf.GGUFFile(path).params()
        except ValueError as error:
            assert str(path) in str(error) or "config.json" in str(error)
            refused += 1
    assert refused > 5


def test_not_a_gguf_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.gguf does not exist"):
        gguf.load_config(tmp_path / "no.gguf")
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="not a GGUF file"):
        gguf.load_config(tmp_path / "x.gguf")


def set_(key, value):
    return lambda settings, tensors: settings.__setitem__(key, value)


def drop(name):
    return lambda settings, tensors: tensors.pop(name)


def put(name, value):
    return lambda settings, tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    "edit, words",
    [
        (set_("expert_count", 8), ["gguf", "llama.expert_count=8"]),
        (set_("rope.dimension_count", 4), ["rope.dimension_count=4", "head_dim=8"]),
        (set_("attention.value_length", 4), ["attention.value_length=4"]),
        (set_("attention.head_count_kv", [2, 1, 2]), ["attention.head_count_kv", "[2, 1, 2]"]),
        (set_("rope.scaling.type", "yarn"), ["yarn"]),
        (set_("attention.sliding_window", 512), ["sliding_window=512"]),
        (set_("split.count", 3), ["3 parts", "llama-gguf-split --merge"]),
        (drop("blk.1.ffn_up.weight"), ["missing", "blk.1.ffn_up.weight"]),
        (drop("token_embd.weight"), ["token_embd.weight"]),
        (put("blk.1.ffn_up_exps.weight", np.zeros((2, 2), "f4")), ["left over", "ffn_up_exps"]),
        (put("blk.1.ffn_up.weight", np.zeros((2, 2), "f4")), ["misshapen", "[48, 32]"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(edit, words, tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", "llama_gqa_llama3_rope", edit)
    with pytest.raises(ValueError) as error:
        gguf.open_params(path)
    for word in words:
        assert word in str(error.value), error.value


def test_weights_that_are_no_numbers_are_refused_when_read(tmp_path):
    def edit(settings, tensors):
        tensors["blk.1.ffn_up.weight"][3, 2] = np.nan

    path = tiny_gguf(tmp_path / "m.gguf", "llama_gqa_llama3_rope", edit)
    params, _ = gguf.open_params(path)
    with pytest.raises(ValueError, match=f"{path}: tensor blk.1.ffn_up.weight holds NaN"):
        params["block/mlp/up/w"]


def test_numbers_that_agree_between_layers_are_one_number(tmp_path):
    edit = set_("attention.head_count_kv", [2, 2, 2])
    path = tiny_gguf(tmp_path / "m.gguf", "llama_gqa_llama3_rope", edit)
    assert gguf.load_config(path).num_kv_heads == 2


def test_unsupported_architecture(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "mamba", {}, {"x": np.zeros(3, "f4")}, None)
    with pytest.raises(ValueError, match="'mamba' is not supported.*gemma3.*qwen3"):
        gguf.load_config(path)


# Real files, where their packages are installed; `smollm2` and `gemma3` are fixtures of conftest.


def assert_same_parameters(path):
    """Ours against what transformers makes of the same file, bit for bit."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    )
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    file = gguf.GGUFFile(path)
    params = file.params()
    shapes = names.leaf_shapes(file.config)
    for ours, row in names.used_rows(names.HF_TABLES[file.config.family], shapes).items():
        leaf = params[ours]
        tensors = names.layer_names(row, shapes[ours])
        pieces = leaf if "{}" in row.theirs else [leaf]
        for name, piece in zip(tensors, pieces, strict=True):
            np.testing.assert_array_equal(row.transform.join([piece], file.config), state[name])


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_real_parameters_equal_those_transformers_reads(model, request):
    assert_same_parameters(request.getfixturevalue(model))
