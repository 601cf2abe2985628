"""GGUF files that we write: read back bit for bit, run by llama.cpp, and refused by name."""

import json
import math
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases
from llama_cpp import LlamaCpp
from test_gguf_tokenizer import train_byte_level, varied_strings
from test_hf import load_golden
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import recursive_jax as rj
from recursive_jax.models.config import Rope
from recursive_jax.models.decoder import Decoder
from recursive_jax.weights import gguf, gguf_config, gguf_writer, hf_config, names, tying
from recursive_jax.weights.gguf_tokenizer import PRE_TOKENIZERS, spelled_merges

VOCABULARY = 608  # a few rows more than the tokenizer has tokens
LLAMA = "llama_gqa_llama3_rope"
YARN = Rope(1e4, "yarn", 4.0, original_length=16, attention_factor=0.1 * math.log(4) + 1)
# Golden models with what llama.cpp can run: the goldens try rare settings on purpose.
NO_BIAS = dict(qkv_bias=False, o_bias=False)
CHANGES = {
    "gemma_mqa": NO_BIAS,
    "gemma2_softcap_local": dict(query_scale=None),
    "gemma3_local_global": dict(query_scale=None),
    LLAMA: {},
    "llama_mqa_tied_biases": {},
    "mistral_window": dict(windows=()),
    "qwen2_last_layers_local": dict(windows=()),
    "qwen3_qk_norm": NO_BIAS,
    "gpt_neox_parallel": {},
    "gpt_neox_sequential": dict(activation="gelu", tied_head=False, qkv_bias=True, o_bias=True),
    "looped": dict(num_loops=3),
    "looped_llama3": dict(num_loops=2, ropes=(Rope(1e4, "llama3", 8.0, 1.0, 4.0, 32),)),
    "yarn": dict(
        ropes=(Rope(1e4, "yarn", 4.0, original_length=16, attention_factor=0.1 * math.log(4) + 1),)
    ),
    "linear": dict(ropes=(Rope(1e4, "linear", 2.0),)),
}


def config(name, **changes):
    golden, _, _ = load_golden(name if name in cases.CASES else LLAMA)
    cfg = hf_config.config_from_hf(golden["config"] | {"vocab_size": VOCABULARY})
    eps = {} if name == LLAMA else {"norm_eps": 2**-17}  # 1e-5 is no float32
    return cfg.replace(**CHANGES[name] | eps | changes)


def random_params(cfg, seed=1):
    """Flat float32 params whose greedy text does not repeat one token."""
    rng, out = np.random.default_rng(seed), {}
    for path, shape in names.shapes(cfg).items():
        x = rng.standard_normal(shape)
        if path == "embedding":
            x = x / cfg.embed_scale / 2  # the blocks decide, not the last token
        elif path.endswith("scale"):
            x = 1 - cfg.norm_offset + x / 8
        else:
            x = x * (2 / np.sqrt(shape[-2]) if path.endswith(("w", "head")) else 0.2)
        out[path] = x.astype(np.float32)
    logits = out["embedding"] if cfg.tied_head else out["head"].T
    logits[:2] = 0  # the tokens that would end the text
    return out


def starting_with(*tokens):
    """A post-processor that puts tokens, given as text and id, before a text."""
    pairs = list(zip(tokens[::2], tokens[1::2], strict=True))
    template = " ".join([text for text, _ in pairs] + ["$A"])
    return processors.TemplateProcessing(template, special_tokens=pairs)


def split(regex):
    return dict(type="Split", pattern={"Regex": regex}, behavior="Isolated", invert=False)


def fast(backend, **special):
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return fast(train_byte_level("smollm"), eos_token="<|x|>")


@pytest.fixture
def save(tokenizer, tmp_path):
    """Saves params of a config to a file; returns its path and the lines that were said."""

    def save(cfg, params=None, name="m.gguf", tokenizer=tokenizer, **options):
        lines = []
        params = random_params(cfg) if params is None else params
        path = tmp_path / name
        gguf_writer.save(params, cfg, tokenizer, path, say=lines.append, **options)
        return path, lines

    return save


def likeliest(params, cfg, tokens):
    """The likeliest next id after every one of `tokens`, from one pass over all of them."""
    model, nested = Decoder(cfg), names.nested(params)
    hidden = model.apply({"params": nested}, tokens, jnp.arange(tokens.shape[1])[None])
    return model.apply({"params": nested}, hidden, method="unembed").argmax(-1)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_written_is_read_back_bit_for_bit(name, save):
    cfg = config(name)
    params = random_params(cfg)
    path, _ = save(cfg, params)
    read, found, tokenizer = gguf.load_params(path)
    read = names.flat(read)
    assert set(read) == set(params)
    for leaf, value in params.items():
        if cfg.norm_offset and leaf.endswith("scale"):  # files store 1 + scale
            np.testing.assert_array_equal(1 + read[leaf], 1 + value)
        else:
            np.testing.assert_array_equal(read[leaf], value)
    gguf_config.check_round_trip(cfg, found)
    for field in ("num_loops", "num_layers", "windows", "activation", "tied_head", "sharing"):
        assert getattr(found, field) == getattr(cfg, field)
    assert found.norm_eps == np.float32(cfg.norm_eps)
    np.testing.assert_array_equal(found.rope_frequencies(), cfg.rope_frequencies())
    again, _ = save(found, read, "again.gguf", tokenizer)
    assert again.read_bytes() == path.read_bytes()


def test_fused_rows_are_all_queries_then_keys_then_values(save):
    cfg = config("gpt_neox_parallel")
    params = random_params(cfg)
    file = gguf.GGUFFile(save(cfg, params)[0])
    fused = np.asarray(file.tensors["blk.1.attn_qkv.weight"].data)
    for part, rows in zip("qkv", np.split(fused, 3), strict=True):
        np.testing.assert_array_equal(rows, params[f"block/attention/{part}/w"][1].T)


@pytest.mark.parametrize("name", CHANGES)
def test_llama_cpp_generates_the_same_text(name, save, tokenizer):
    cfg = config(name)
    params = random_params(cfg)
    prompt = tokenizer("def f(x): return x")["input_ids"]
    found = LlamaCpp(save(cfg, params)[0]).greedy(prompt, 40)
    assert len(found) == 40 and len(set(found)) > 2
    tokens = jnp.asarray([prompt + found])
    expected = jax.jit(likeliest, static_argnums=1)(params, cfg, tokens)
    assert found == expected[0, len(prompt) - 1 : -1].tolist()


@pytest.fixture(scope="module")
def lines():
    """Lines of text, without those whose characters llama.cpp does not compose."""
    return [s for s in varied_strings(3200) if unicodedata.is_normalized("NFC", s)]


def assert_llama_cpp_has_the_ids(path, tokenizer, strings):
    model = LlamaCpp(path)
    for string in strings:
        expected = tokenizer(string, add_special_tokens=False)["input_ids"]
        assert model.ids(string) == expected, repr(string)
    assert model.ids("text", special=True) == tokenizer("text")["input_ids"]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama_cpp_has_the_same_ids(pre, save, lines):
    backend = train_byte_level(
        {"olmo": "gpt-2", "dbrx": "llama-bpe", "stablelm2": "qwen2"}.get(pre, pre)
    )
    rules = json.loads(backend.to_str())
    rules["model"]["ignore_merges"] = PRE_TOKENIZERS[pre].whole_tokens
    rules["normalizer"] = {"type": "NFC"} if PRE_TOKENIZERS[pre].nfc else None
    backend = Tokenizer.from_str(json.dumps(rules))
    backend.add_tokens([AddedToken("   ", normalized=False), AddedToken("[own]", normalized=False)])
    bos = pre in ("gpt-2", "llama-bpe")  # against llama.cpp's rule, and with it
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            "<|x|> $A", special_tokens=[("<|x|>", 0)]
        )
    tokenizer = fast(backend, bos_token="<|x|>", eos_token="<|im_end|>", pad_token="<|x|>")
    path, said = save(config(LLAMA), tokenizer=tokenizer)
    assert gguf.GGUFFile(path).get("tokenizer.ggml.pre") == pre
    assert ("not in NFC" in " ".join(said)) == PRE_TOKENIZERS[pre].nfc
    assert len(lines) > 3000 or pre != "smollm"
    some = lines if pre == "smollm" else lines[:400]
    assert_llama_cpp_has_the_ids(path, tokenizer, [*some, "a   [own]b<|im_end|> c <|x|>d"])


@pytest.fixture(scope="module")
def pieces():
    """Tokens of a SentencePiece vocabulary in the order of their scores, and all its merges."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False)
    backend.train_from_iterator(varied_strings(400), trainer)
    vocabulary = backend.get_vocab()
    tokens = special + ["▁" * n for n in range(2, 9)]
    tokens += [t for t in sorted(vocabulary, key=vocabulary.get) if t not in tokens]
    merges = spelled_merges(tokens, [-i for i in range(len(tokens))])
    return tokens, [merge for merge in merges if "".join(merge) not in special]


def sentencepiece(pieces, kind):
    """A tokenizer as transformers holds those of Llama 2, of newer conversions, and of Gemma."""
    tokens, merges = pieces
    backend = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )  # fmt: skip
    )
    replace = normalizers.Replace(" ", "▁")
    if kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = replace
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    backend.post_processor = starting_with("<bos>", 2)
    special = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    return fast(backend, **special)


@pytest.mark.parametrize("kind", ["llama", "metaspace", "gemma"])
def test_llama_cpp_has_the_ids_of_sentencepiece(kind, pieces, save, lines):
    tokenizer = sentencepiece(pieces, kind)
    name = "gemma_mqa" if kind == "gemma" else LLAMA
    cfg = config(name, vocab_size=len(pieces[0]) + 5)
    path, said = save(cfg, tokenizer=tokenizer)
    strings = [s for s in lines[:600] if " " * 9 not in s and "<" not in s and s.strip()]
    if kind == "gemma":  # llama.cpp matches runs of spaces, not of the character for them
        strings = [s for s in strings if "▁" not in s]
    if kind == "metaspace":  # it puts no second space; llama.cpp does, which is said
        strings = [s for s in strings if s[0] not in " ▁"]
    assert ("begins with a space" in " ".join(said)) == (kind == "metaspace")
    if kind != "metaspace":
        strings += ["a<eos> b<unk>c"]
    assert_llama_cpp_has_the_ids(path, tokenizer, strings)
    params, found, read = gguf.load_params(path)
    again, _ = save(found, params, "again.gguf", read)
    assert again.read_bytes() == path.read_bytes()


def test_merges_that_scores_cannot_give_are_refused(pieces, save):
    tokens, merges = pieces
    tokenizer = sentencepiece((tokens, merges[:-1]), "llama")
    with pytest.raises(ValueError, match="not those of a SentencePiece vocabulary"):
        save(config(LLAMA, vocab_size=len(tokens)), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", gguf_writer.KINDS)
def test_kinds_lose_no_more_than_their_steps(kind, save):
    cfg = config(LLAMA, embed_dim=64, mlp_dim=96, tied_head=False)
    params = random_params(cfg)
    path, said = save(cfg, params, kind=kind)
    read, file = gguf.open_params(path)[0], gguf.GGUFFile(path)
    types = {name: tensor.tensor_type.name for name, tensor in file.tensors.items()}
    assert not said and types["blk.2.ffn_down.weight"] == kind.upper()
    steps = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8": 1 / 240, "q5": 1 / 15, "q4": 1 / 7}
    step = steps[kind[:2] if kind[0] == "q" else kind]
    for leaf, value in params.items():
        error = np.abs(read[leaf] - value)
        if value.ndim < 3 and leaf not in ("embedding", "head"):  # vectors
            assert error.max() == 0
        elif leaf == "head":  # of at least q8_0
            assert error.max() <= min(step, 1 / 240) * np.abs(value).max()
        else:
            assert (error.max() > 0) == (step > 0)
            assert error.max() <= step * np.abs(value).max()
    again, _ = save(cfg, params, "again.gguf", kind=kind)
    assert again.read_bytes() == path.read_bytes()


def test_rows_that_no_block_divides_are_f16_and_named(save):
    cfg = config("llama_mqa_tied_biases", embed_dim=36, mlp_dim=64)
    path, said = save(cfg, kind="q4_0")
    types = {n: t.tensor_type.name for n, t in gguf.GGUFFile(path).tensors.items()}
    assert types["blk.0.ffn_down.weight"] == "Q4_0" and types["blk.0.ffn_up.weight"] == "F16"
    (line,) = said
    assert "f16" in line and "token_embd.weight [608, 36]" in line and "multiple of 32" in line


def test_a_looped_file_stores_the_weights_once(save):
    cfg = config("looped", embed_dim=64, num_loops=3)
    params = random_params(cfg)
    looped, _ = save(cfg, params)
    flat, plain = tying.untie(names.nested(params), cfg)
    unrolled, _ = save(plain, flat, "unrolled.gguf")
    layers = [n for n in gguf.GGUFFile(looped).tensors if n.startswith("blk.")]
    assert len(layers) * 3 == sum(n.startswith("blk.") for n in gguf.GGUFFile(unrolled).tensors)
    assert looped.stat().st_size < unrolled.stat().st_size
    model = rj.load(looped)
    assert (model.cfg.num_loops, model.cfg.num_layers) == (3, cfg.num_layers)
    np.testing.assert_array_equal(model.params["block"]["mlp"]["up"]["w"], params["block/mlp/up/w"])
    with pytest.raises(ValueError, match="num_loops"):
        model.convert(num_loops=3, lora_rank=0, lora_init="zero")
    texts = [LlamaCpp(path).greedy("def f(x)", 40) for path in (looped, unrolled)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 2


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("looped", dict(norms="per_loop"), ["differ from loop to loop", "layout=unrolled"]),
        ("looped", dict(sharing="sequence"), ["sharing='sequence'", "layout=unrolled"]),
        ("looped", dict(lora_ranks={"q": 2}), ["ranks: q 2", "layout=unrolled"]),
        ("looped", dict(prefix_length=1), ["prefix_length=1", "layout=unrolled"]),
        ("looped", dict(qkv_bias=True, o_bias=True), ["qkv_bias=True", "layout=unrolled"]),
        ("gemma_mqa", dict(num_loops=2), ["not those of a Llama", "layout=unrolled"]),
        (LLAMA, dict(prefix_length=1), ["prefix_length=1", "checkpoint"]),
        (LLAMA, dict(lora_ranks={"q": 2}), ["lora_ranks", "Untie it first"]),
        ("gemma_mqa", dict(tied_head=False), ["gemma", "tied_head=False", "hf or recursive"]),
        ("mistral_window", dict(windows=(5, 5, 5)), ["llama", "windows=(5, 5, 5)"]),
        ("qwen3_qk_norm", dict(qkv_bias=True, o_bias=True), ["qwen3", "qkv_bias=True"]),
        ("gpt_neox_parallel", dict(activation="gelu_tanh"), ["activation='gelu_tanh'"]),
        ("gemma3_local_global", dict(query_scale=0.5), ["gemma3", "query_scale=0.5"]),
    ],
)
def test_models_that_llama_cpp_cannot_run_are_refused(name, changes, words, save, tmp_path):
    cfg = config(name, **changes)
    with pytest.raises(ValueError) as error:
        save(cfg, {})
    for word in words:
        assert word in str(error.value), error.value
    assert not list(tmp_path.iterdir())


def test_a_mistral_whose_window_is_its_context_is_a_llama(save):
    cfg = config("mistral_window", windows=(64,) * 3, max_length=64)
    assert gguf.load_config(save(cfg)[0]).windows == ()


@pytest.mark.parametrize(
    "edit, words",
    [
        (
            lambda r: r["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            ["ByteLevel", "Known: gpt-2, smollm"],
        ),
        (
            lambda r: r["pre_tokenizer"]["pretokenizers"].insert(0, split("_+")),
            ["'_+'", "Known: gpt-2, smollm", "Export the model as hf"],
        ),
        (lambda r: r.update(normalizer={"type": "Lowercase"}), ["Lowercase", "Known"]),
        (lambda r: r["model"].update(end_of_word_suffix="</w>"), ["Known"]),
        (lambda r: r["added_tokens"][0].update(lstrip=True), ["<|x|>", "other ids"]),
        (
            lambda r: r.update(pre_tokenizer={"type": "Whitespace"}),
            ["neither byte-level nor SentencePiece", "Whitespace"],
        ),
        (
            lambda r: r.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            ["WordLevel", "BPE"],
        ),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(edit, words, save, tmp_path):
    rules = json.loads(train_byte_level("smollm").to_str())
    edit(rules)
    tokenizer = fast(Tokenizer.from_str(json.dumps(rules)), eos_token="<|im_end|>")
    with pytest.raises(ValueError) as error:
        save(config(LLAMA), tokenizer=tokenizer)
    for word in words:
        assert word in str(error.value), error.value
    assert not list(tmp_path.iterdir())


def test_two_tokens_before_a_text_are_refused(save):
    backend = train_byte_level("smollm")
    backend.post_processor = starting_with("<|x|>", 0, "<|im_end|>", 1)
    with pytest.raises(ValueError, match=r"puts 2 tokens before a text \(\[0, 1\]\)"):
        save(config(LLAMA), tokenizer=fast(backend, eos_token="<|x|>"))


def test_stop_ids_and_chat_template_are_kept(save):
    tokenizer = fast(train_byte_level("smollm"), eos_token="<|x|>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    facts = {"name": "some", "generation_config": {"eos_token_id": [0, 7]}}
    path, _ = save(config(LLAMA), tokenizer=tokenizer, facts=facts)
    read = gguf.load_tokenizer(path)
    assert read.init_kwargs["stop_token_ids"] == [0, 1, 7]  # 1 is <|im_end|>, known by its text
    assert read.chat_template == tokenizer.chat_template
    assert gguf.GGUFFile(path).get("general.name") == "some"


def test_a_file_is_whole_or_not_there(save, tmp_path):
    cfg = config(LLAMA)
    params = random_params(cfg)
    with pytest.raises(ValueError, match="'q6_k'.*q8_0.*llama-quantize"):
        save(cfg, params, kind="q6_k")
    with pytest.raises(ValueError, match="missing or left over.*head"):
        save(cfg, {k: v for k, v in params.items() if k != "head"})
    for value, kind in ((np.nan, "q4_0"), (np.inf, "f32"), (1e6, "f16")):
        bad = params["block/mlp/up/w"].copy()
        bad[1, 0, 0] = value
        with pytest.raises(ValueError, match="tensor blk.1.ffn_up.weight holds NaN or infinity"):
            save(cfg, params | {"block/mlp/up/w": bad}, kind=kind)

    class Broken(dict):
        def __getitem__(self, leaf):
            if leaf == "block/mlp/up/w":
                raise KeyboardInterrupt
            return super().__getitem__(leaf)

    with pytest.raises(KeyboardInterrupt):
        save(cfg, Broken(params))
    assert not list(tmp_path.iterdir())
    path, _ = save(cfg, params)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="already exists"):
        save(cfg, params)
    assert path.read_bytes() == before and [path] == list(tmp_path.iterdir())


def test_a_full_disk_is_seen_before_anything_is_written(save, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="m.gguf needs .* GB .* free; make room"):
        save(config(LLAMA))
    assert not list(tmp_path.iterdir())
