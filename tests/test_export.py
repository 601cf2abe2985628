"""Exports: whole or absent, equal in other programs, and read back bit by bit."""

import filecmp
import json
import pathlib
import re
import signal
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from golden import cases
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

import recursive_jax as rj
from recursive_jax import model_card
from recursive_jax.model import Model
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params
from recursive_jax.text import load_tokenizer
from recursive_jax.weights import checkpoint, hf_config
from recursive_jax.weights.source import ASSETS
from recursive_jax.weights.stored import ArrayWeights

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4  # of the logits' scale, max |logit|
LLAMA = dict(
    family="llama", embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8,
    num_layers=2, num_loops=2, norm_eps=1e-5, max_length=64,
)  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(ASSETS / "tiny")


def random_model(cfg, tokenizer, **facts):
    """A model whose every number is random, also LoRAs and norms."""
    rng = np.random.default_rng(cfg.vocab_size)

    def fill(path, x):
        name = path[-1].key
        noise = rng.standard_normal(x.shape).astype(np.float32)
        if name == "scale":
            return 1 - cfg.norm_offset + 0.3 * noise
        if name in ("b", "bias"):
            return 0.3 * noise
        return noise * (0.5 if name == "embedding" else x.shape[-2] ** -0.5)

    params = jax.tree_util.tree_map_with_path(fill, abstract_params(cfg))
    return Model(cfg, tokenizer, ArrayWeights(params), "random", facts)


def llama(tokenizer, **changes):
    return random_model(DecoderConfig(vocab_size=4096, **LLAMA | changes), tokenizer)


def logits_of(model, tokens):
    """`[T, V]` of `[T]`."""
    decoder = Decoder(model.cfg)
    tokens = jnp.asarray(tokens)[None]
    positions = jnp.arange(tokens.shape[1])[None]

    @jax.jit
    def run(params):
        hidden = decoder.apply({"params": params}, tokens, positions)
        return decoder.apply({"params": params}, hidden, method="unembed")[0]

    return np.array(run(model.params))


def tensors_of(path):
    out = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "np") as f:
            out |= {name: f.get_tensor(name) for name in f.keys()}
    return out


def same_files(a, b, but=("README.md",)):
    """Two directories have the same files with the same bytes."""
    there = [{p.relative_to(d) for p in d.rglob("*") if p.is_file()} for d in (a, b)]
    assert there[0] == there[1]
    differ = [str(p) for p in there[0] if not filecmp.cmp(a / p, b / p, shallow=False)]
    assert set(differ) <= set(but), differ


# Ordinary models for transformers


@pytest.mark.parametrize("kind", ["relaxed", "tied"])
@pytest.mark.parametrize("name", cases.CASES)
def test_transformers_computes_the_same_as_the_recursive_model(name, kind, tokenizer, tmp_path):
    """Logits, and greedy text, of a model unrolled from loops with LoRAs or without."""
    torch = pytest.importorskip("torch", reason="transformers runs models with torch only")
    transformers = pytest.importorskip("transformers")
    family, settings = cases.CASES[name]
    source = hf_config.config_from_hf({"model_type": family} | settings | {"vocab_size": 4096})
    order = dict(sharing="cycle_rev") if name == "gemma3_local_global" else {}
    how = dict(norms="tied")
    if kind == "relaxed":
        ranks = {p: 1 + i % 3 for i, p in enumerate(source.projections)}
        how = dict(norms="per_loop", lora_ranks=ranks)
    model = random_model(source.replace(num_layers=1, num_loops=3, **how, **order), tokenizer)
    model.export(tmp_path / "out")

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    prompt = cases.tokens(4096)[0]
    with torch.no_grad():
        continued = loaded.generate(
            torch.from_numpy(prompt[None]), max_new_tokens=12, min_new_tokens=12, do_sample=False
        )[0].numpy()
        theirs = loaded(torch.from_numpy(continued[None])).logits[0].numpy()
    ours = logits_of(model, continued)
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()
    ours[:, model.tokenizer.eos_token_id] = -np.inf  # as min_new_tokens does
    np.testing.assert_array_equal(continued[len(prompt) :], ours.argmax(-1)[len(prompt) - 1 : -1])
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.decode(continued) == tokenizer.decode(continued)


def test_the_job_says_what_it_writes_and_how_to_load_it(tokenizer, tmp_path):
    model = llama(tokenizer, lora_ranks={"q": 2, "down": 3}, norms="per_loop")
    model.save(tmp_path / "run")
    left = tmp_path / ".hf-0123abc_"
    left.mkdir()
    end = commands.run("export", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}")
    assert end.returncode == 0, end.stderr
    assert f"{left} is left of an export that was killed, or that runs; remove it" in end.stderr
    words = "2 loops × 2 layers, LoRA rank 2 to 3", "hf, unrolled: 4 layers, float32", " free"
    assert all(part in end.stdout for part in words)
    assert f"from_pretrained('{tmp_path / 'hf'}')" in end.stdout
    exported = rj.load(tmp_path / "hf")
    assert exported.cfg.num_layers == 4 and exported.stop == model.stop
    ours, theirs = (logits_of(m, [5, 6, 7, 8]) for m in (model, exported))
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(ours).max()


def test_shards_and_types(tokenizer, tmp_path):
    model = llama(tokenizer)
    total = sum(x.size for x in jax.tree.leaves(model.untie().params))
    for dtype in (jnp.bfloat16, np.float16):
        name = np.dtype(dtype).name
        model.export(tmp_path / name, dtype=name, max_shard_gb=total * 2 / 3 / 1e9)
        stored = tensors_of(tmp_path / name)
        assert len(list((tmp_path / name).glob("model-*-of-*.safetensors"))) > 1
        assert sum(x.size for x in stored.values()) == total
        expected = np.asarray(model.params["embedding"]).astype(dtype)
        assert stored["model.embed_tokens.weight"].tobytes() == expected.tobytes()
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == name
    again = rj.load(tmp_path / "bfloat16")
    assert again.params["embedding"].dtype == jnp.float32


def test_a_step_and_the_averaged_weights(tokenizer, tmp_path):
    cfg = DecoderConfig(vocab_size=4096, **LLAMA)

    def params(value):
        return jax.tree.map(lambda x: jnp.full(x.shape, value), abstract_params(cfg))

    checkpoint.create(tmp_path / "run", cfg, tokenizer)
    writer = checkpoint.Writer(tmp_path / "run")
    for step in (1, 2):
        writer.save(step, params(step + 0.25), ema=params(step + 0.5))
    writer.close()
    for number, (step, ema, value, words) in enumerate(
        (
            (None, None, 2.5, "2 steps (averaged weights)"),
            (None, True, 2.5, "2 steps (averaged weights)"),
            (1, None, 1.5, "1 steps (averaged weights)"),
            (None, False, 2.25, "2 steps |"),
        )
    ):
        out = tmp_path / str(number)
        rj.load(tmp_path / "run", step, ema).export(out)
        assert set(tensors_of(out)["model.norm.weight"]) == {np.float32(value)}
        assert words in (out / "README.md").read_text()
    flags = [f"--checkpoint={tmp_path / 'run'}", "--step=1", "--noema"]
    end = commands.run("export", *flags, f"--out={tmp_path / 'out'}")
    assert end.returncode == 0, end.stderr
    assert set(tensors_of(tmp_path / "out")["model.norm.weight"]) == {np.float32(1.25)}


# Round trips


@pytest.fixture(scope="module")
def relaxed(tokenizer):
    cfg = DecoderConfig(
        vocab_size=4096, **LLAMA, norms="per_loop", lora_ranks={"q": 2, "up": 3, "down": 1},
        tied_head=False,
    )  # fmt: skip
    return random_model(cfg, tokenizer, source="/models/one", tying={"num_loops": 2})


def test_hugging_face_round_trip_is_bitwise(relaxed, tmp_path):
    relaxed.export(tmp_path / "one", max_shard_gb=0.0005)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    rj.load(tmp_path / "one").export(tmp_path / "two", max_shard_gb=0.0005)
    same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("changes", [{}, dict(prefix_length=3), dict(sharing="sequence")])
def test_our_own_round_trip_is_bitwise(changes, relaxed, tmp_path):
    model = random_model(relaxed.cfg.replace(**changes), relaxed.tokenizer, **relaxed.facts)
    for form in ("recursive", "orbax"):
        model.export(tmp_path / form, form, max_shard_gb=0.0005)
        again = rj.load(tmp_path / form)
        assert again.cfg == model.cfg
        assert again.facts["source"] == "/models/one" and again.facts["tying"] == {"num_loops": 2}
        jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert len(list((tmp_path / "recursive").glob("*.safetensors"))) > 1
    rj.load(tmp_path / "recursive").export(tmp_path / "two", "recursive", max_shard_gb=0.0005)
    same_files(tmp_path / "recursive", tmp_path / "two")
    tokens = [5, 6, 7, 8]
    np.testing.assert_array_equal(logits_of(again, tokens), logits_of(model, tokens))


def test_the_certificate_comes_along(relaxed, tmp_path):
    certified = Model(
        relaxed.cfg, relaxed.tokenizer, relaxed.weights, "x", relaxed.facts, {"kl": 0.5}
    )
    certified.export(tmp_path / "out", "recursive")
    assert rj.load(tmp_path / "out").certificate == {"kl": 0.5}


def test_every_export_of_a_vanilla_model_is_a_source(tokenizer, tmp_path):
    model = llama(tokenizer, num_loops=1, num_layers=4, norms="tied")
    expected = model.convert(num_loops=2, lora_rank=2, lora_init="svd", quiet=True)
    for form in ("hf", "recursive", "orbax"):
        model.export(tmp_path / form, form)
        assert rj.load(tmp_path / form).facts["source"] == str(tmp_path / form)
        tied = rj.load(tmp_path / form).convert(
            num_loops=2, lora_rank=2, lora_init="svd", quiet=True
        )
        assert tied.cfg == expected.cfg
        jax.tree.map(np.testing.assert_array_equal, tied.params, expected.params)
    with pytest.raises(ValueError, match="num_loops"):
        expected.export(tmp_path / "looped", "recursive")
        rj.load(tmp_path / "looped").convert(num_loops=2)


@pytest.mark.slow
def test_a_model_trained_further_is_source_and_teacher(tokenizer, tmp_path):
    """The recipe of configs/gemma_rrt.py, by its commands."""
    small = ["--config.data.context_length=16", "--config.data.batch_size=2"]
    small += ["--config.data.train=docstrings:1", "--config.data.eval_tokens=32"]
    small += [f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.optimizer.warmup_steps=1"]
    start = llama(tokenizer, num_loops=1, num_layers=4)
    start.export(tmp_path / "source")
    for job, *flags in (
        ["train", "--config=configs/gemma_rrt.py:paper,loops=1,rank=0",
         f"--config.source={tmp_path / 'source'}", f"--workdir={tmp_path / 'teacher'}",
         "--config.objective.kd=0", "--config.tokens=32", *small],
        ["export", f"--checkpoint={tmp_path / 'teacher'}", f"--out={tmp_path / 'teacher_hf'}"],
        ["train", "--config=configs/gemma_rrt.py:paper,rank=2",
         f"--config.source={tmp_path / 'teacher_hf'}", f"--workdir={tmp_path / 'run'}",
         "--config.tokens=32", *small],
    ):  # fmt: skip
        end = commands.run(job, *flags)
        assert end.returncode == 0, end.stderr
    before, after = (tensors_of(tmp_path / name) for name in ("source", "teacher_hf"))
    changed = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert changed and set(before) == set(after)
    assert rj.load(tmp_path / "run").cfg.num_loops == 2


# Stored once, for other engines


def test_the_looped_layout_stores_the_block_once(tokenizer, tmp_path):
    model = llama(tokenizer, num_loops=3)
    model.export(tmp_path / "one", layout="looped", max_shard_gb=0.0003)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    expected = dict(
        model_type="nanbeige", architectures=["NanbeigeForCausalLM"], num_loops=3,
        skip_loop_final_norm=True, num_hidden_layers=2, rope_theta=10000.0, attention_bias=False,
    )  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    stored = tensors_of(tmp_path / "one")
    q = stored["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(q.T, model.params["block"]["attention"]["q"]["w"][1])
    assert not any(name.startswith("model.layers.2.") for name in stored)
    again = rj.load(tmp_path / "one")
    assert again.cfg == model.cfg and "source" not in again.facts
    tokens = [5, 6, 7, 8]
    np.testing.assert_array_equal(logits_of(again, tokens), logits_of(model, tokens))
    again.export(tmp_path / "two", layout="looped", max_shard_gb=0.0003)
    same_files(tmp_path / "one", tmp_path / "two")
    # Unrolled, the same model has the same logits.
    again.export(tmp_path / "unrolled")
    unrolled = logits_of(rj.load(tmp_path / "unrolled"), tokens)
    np.testing.assert_allclose(unrolled, logits_of(model, tokens), rtol=0, atol=1e-5)


def test_a_llama_of_transformers_that_runs_the_stored_layers_again_computes_the_same(
    tokenizer, tmp_path
):
    torch = pytest.importorskip("torch", reason="transformers runs models with torch only")
    transformers = pytest.importorskip("transformers")
    model = llama(tokenizer, num_loops=3)
    model.export(tmp_path / "out", layout="looped")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    loops = config.pop("num_loops")
    file.write_text(json.dumps(config | {"model_type": "llama"}))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    loaded.model.layers = torch.nn.ModuleList(list(loaded.model.layers) * loops)
    loaded.config.num_hidden_layers *= loops
    tokens = cases.tokens(4096)
    with torch.no_grad():
        theirs = loaded(torch.from_numpy(tokens), use_cache=False).logits[0].numpy()
    ours = logits_of(model, tokens[0])
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(lora_ranks={"q": 2}), "its LoRAs differ from loop to loop .ranks: q 2."),
        (dict(norms="per_loop"), "norm/scale and 1 other vectors differ from loop to loop"),
        (dict(sharing="sequence"), "in the order sharing='sequence'"),
        (dict(qkv_bias=True), "not those of a Llama .qkv_bias=True."),
        (dict(qk_norm=True), "not those of a Llama .qk_norm=True."),
        (dict(windows=(4,) * 4), "sliding window"),
        (dict(num_loops=1), "this model has one loop; use layout=unrolled"),
    ],
)
def test_what_the_looped_layout_cannot_express_is_refused(changes, reason, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=reason) as error:
        llama(tokenizer, **changes).export(tmp_path / "out", layout="looped")
    assert "layout=unrolled" in str(error.value) and not list(tmp_path.iterdir())


def test_a_norm_between_loops_is_refused(tokenizer, tmp_path):
    llama(tokenizer).export(tmp_path / "out", layout="looped")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    for name, value, words in (
        ("skip_loop_final_norm", False, "the final norm runs between the loops"),
        ("num_loops", 0, "num_loops must be a positive integer, got 0"),
        ("loop_share_kv", True, "loop_share_kv=True"),
    ):
        file.write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=words):
            rj.load(tmp_path / "out")


@pytest.mark.parametrize("layout", ["unrolled", "looped"])
def test_a_gguf_file_is_read_back(layout, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # gpt-2
    names = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token")}
    model = llama(PreTrainedTokenizerFast(tokenizer_object=backend, **names))
    run, out = tmp_path / "run", tmp_path / "model.gguf"
    model.save(run)
    flags = ["--format=gguf", f"--layout={layout}", f"--out={out}"]
    end = commands.run("export", f"--checkpoint={run}", *flags)
    assert end.returncode == 0, end.stderr
    assert f"llama-cli -m {out}" in end.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "run"]
    again = rj.load(out)
    assert again.cfg.num_loops == (2 if layout == "looped" else 1)
    assert again.params["block"]["mlp"]["up"]["w"].shape[0] == (2 if layout == "looped" else 4)
    ours, theirs = (logits_of(m, [5, 6, 7, 8]) for m in (model, again))
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(ours).max()
    end = commands.run("export", "--checkpoint=nowhere", *flags)
    assert end.returncode == 2 and f"{out} exists; choose another name" in end.stderr


def test_what_gguf_cannot_express_is_refused_before_weights_are_read(tokenizer, tmp_path):
    pytest.importorskip("gguf")
    missing = ArrayWeights({})
    for changes, layout, words in (
        (dict(norms="per_loop"), "looped", "pre_attention_norm.* differ from loop to loop"),
        (dict(num_loops=1), "looped", "this model has one loop"),
        (dict(family="qwen3", qk_norm=True, qkv_bias=True), "unrolled", "qkv_bias=True"),
    ):
        cfg = DecoderConfig(vocab_size=4096, **LLAMA | changes)
        with pytest.raises(ValueError, match=words):
            Model(cfg, tokenizer, missing, "x").export(tmp_path / "a.gguf", "gguf", layout=layout)
    assert not list(tmp_path.iterdir())


# Other programs read our forms


SPLIT = """
import numpy as np

def split(x):
    axis = next((i for i, n in enumerate(x.shape) if n % 8 == 0), len(x.shape))
    spec = jax.sharding.PartitionSpec(*[None] * axis, *["x"] * (axis < len(x.shape)))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

parts = ocp.load(path, jax.tree.map(split, ocp.metadata(path).metadata))
for tree in (params, parts):
    print(len(tree["embedding"].sharding.device_set), tree["embedding"].addressable_data(0).shape)
    rows = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    np.savez(sys.argv.pop(), **{name: np.asarray(x, np.float32) for name, x in rows.items()})
"""


def test_orbax_and_jax_alone_restore_the_params_on_any_mesh(relaxed, tmp_path):
    printed = relaxed.export(tmp_path / "out", "orbax", dtype="bfloat16")
    readme = (tmp_path / "out" / "README.md").read_text()
    beside = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert len(printed.splitlines()) == len(beside.splitlines()) == 6
    assert printed.replace(str(tmp_path / "out"), ".") == beside.strip()
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    end = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['recursive_jax'] = None\n{beside}{SPLIT}",
         *map(str, files)],
        capture_output=True, text=True, cwd=tmp_path / "out",
        env=commands.environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert end.returncode == 0, end.stderr
    assert end.stdout.splitlines() == ["8 (4096, 32)", "8 (512, 32)"]
    for file in files:
        restored = np.load(file)
        for path, x in jax.tree_util.tree_leaves_with_path(relaxed.params):
            stored = np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(restored[jax.tree_util.keystr(path)], stored)


def test_the_numpy_reader_of_the_docs_reads_a_relaxed_model(relaxed, tmp_path):
    text = (ROOT / "docs" / "format.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.splitlines()) <= 60
    names = {n for line in code.splitlines() for n in re.findall(r"^(?:import|from) (\w+)", line)}
    assert names == {"json", "pathlib", "numpy"}
    space = {}
    exec(code, space)
    for dtype in ("float32", "bfloat16", "float16"):
        model = random_model(relaxed.cfg.replace(sharing="cycle_rev"), relaxed.tokenizer)
        model.export(tmp_path / dtype, "recursive", dtype=dtype, max_shard_gb=0.0005)
        config, tensors = space["read"](tmp_path / dtype)
        assert config["decoder"] == json.loads(json.dumps(model.cfg.to_json()))
        stored = rj.load(tmp_path / dtype)
        flat = jax.tree_util.tree_leaves_with_path(stored.params)
        assert len(flat) == len(tensors)
        for path, x in flat:
            np.testing.assert_array_equal(tensors[".".join(k.key for k in path)], x)
        untied = stored.untie().params["block"]["mlp"]["up"]["w"]
        for layer in range(2):
            for loop in range(2):
                depth = space["depth_of"](config, layer, loop)
                assert depth == model.cfg.depths()[layer, loop]
                merged = space["weight"](tensors, "mlp.up", layer, loop)
                np.testing.assert_array_equal(merged, untied[depth])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema", 2, "has schema 2 .*reads schema 1"),
        ("decoder", {"family": "llama"}, "config.json is damaged .*missing"),
        ("form", "other", "form 'other'"),
    ],
)
def test_an_export_of_another_schema_is_refused(key, value, words, relaxed, tmp_path):
    relaxed.export(tmp_path / "out", "recursive")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=words):
        rj.load(tmp_path / "out")


def test_tensors_that_do_not_belong_to_the_config_are_named(relaxed, tmp_path):
    relaxed.export(tmp_path / "out", "recursive")
    file = tmp_path / "out" / "config.json"
    record = json.loads(file.read_text())
    record["decoder"]["lora_ranks"] = {"q": 2, "up": 3}
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="left over: block/mlp/down/lora_a"):
        rj.load(tmp_path / "out")


# Whole or not there


def test_an_existing_target_is_refused_before_anything_is_read(tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        end = commands.run("export", "--checkpoint=nowhere", f"--out={tmp_path / name}")
        assert end.returncode == 2 and "choose another name" in end.stderr, end.stderr
    (tmp_path / "empty").mkdir()
    llama(tokenizer).export(tmp_path / "empty")  # an empty directory will do
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format=hf", "--type=q8_0"], "--type=q8_0 beside --format=hf; use --dtype"),
        (["--format=gguf", "--dtype=float32"], "beside --format=gguf; use --type"),
        (["--format=gguf"], "format=gguf writes one file"),
        (["--format=orbax", "--layout=unrolled"], "format=orbax, which stores the model as it is"),
        (["--max_shard_gb=-1"], "max_shard_gb=-1.0; expected a positive number"),
        (["--step=3"], "step=3 of tiny, which is no checkpoint"),
        (["--ema"], "ema=True of tiny, which is no checkpoint"),
    ],
)
def test_impossible_flags_are_named(flags, words, tmp_path):
    end = commands.run("export", "--checkpoint=tiny", f"--out={tmp_path / 'out'}", *flags)
    assert end.returncode == 2 and words in end.stderr, end.stderr
    assert len(end.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_disk_without_room_is_told_before_any_weight_is_read(tokenizer, tmp_path):
    """Weights of a petabyte that do not exist."""
    cfg = DecoderConfig(vocab_size=4096, **LLAMA | dict(mlp_dim=2**30, embed_dim=2**20))
    with pytest.raises(OSError, match=r"needs [\d,]+\.\d GB, and .* has [\d,.]+ [GM]B free"):
        Model(cfg, tokenizer, ArrayWeights({}), "huge").export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_number_that_float16_cannot_hold_is_named(tokenizer, tmp_path):
    model = llama(tokenizer)
    model.weights.params["block"]["mlp"]["up"]["w"][1, 2, 3] = 1e5
    names = {"hf": "tensor model.layers.1.mlp.up_proj.weight", "recursive": "block/mlp/up/w"}
    for form, name in names.items():
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinity in float16"):
            model.export(tmp_path / "out", form, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_prefixes_have_no_form_elsewhere(tokenizer, tmp_path):
    for layout in ("unrolled", "looped"):
        with pytest.raises(ValueError, match="prefix_length=2.*use format=recursive"):
            llama(tokenizer, prefix_length=2).export(tmp_path / "out", layout=layout)


class Interrupted:
    """A tokenizer that ends the process when it is written, after the weights."""

    def __init__(self, inner, end):
        self.inner, self.end = inner, end

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def save_pretrained(self, directory):
        files = [file.name for file in pathlib.Path(directory).iterdir()]
        assert "model.safetensors" in files
        self.end()


def test_ctrl_c_leaves_nothing(tokenizer, tmp_path):
    def end():
        raise KeyboardInterrupt

    model = llama(Interrupted(tokenizer, end))
    with pytest.raises(KeyboardInterrupt):
        model.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_no_export_under_its_name(tmp_path):
    code = """if True:
        import os, sys
        sys.path.insert(0, "tests")
        from test_export import ASSETS, Interrupted, llama, load_tokenizer
        end = Interrupted(load_tokenizer(ASSETS / "tiny"), lambda: os.kill(os.getpid(), 9))
        llama(end).export(sys.argv[1])
    """
    out = tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-c", code, out], cwd=ROOT, env=commands.environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1 and re.fullmatch(r"\.out-\w{8}", left[0])


def test_a_full_disk_is_one_error(tokenizer, tmp_path):
    """A limit on the size of files stands for the disk; it is of this process."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = llama(tokenizer)
    _ = model.params
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OSError, match="file too large.*out is not written"):
            model.export(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


# The model card


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlanguage: en\nlicense: apache-2.0\n---\n# X"}, "apache-2.0"),
        ({"README.md": "---\nlicense: 'gemma'\n---\n", "config.json": "{}"}, "gemma"),
        ({"config.json": '{"license": "mit"}'}, "mit"),
        ({"README.md": "license: in words", "config.json": "{}"}, None),
        ({}, None),
    ],
)
def test_the_licence_of_a_source(files, licence, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert model_card.licence_of(tmp_path) == licence


def test_the_model_card(relaxed, tokenizer, tmp_path):
    source = tmp_path / "models--some--model" / "snapshots" / "0a"
    source.mkdir(parents=True)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    certificate = {
        "source_perplexity": 31.25, "perplexity": 40.5, "kl": 0.25, "top1_agreement": 0.75,
        "text": "/home/me/valid.txt", "text_tokens": 2048,
    }  # fmt: skip
    facts = {"source": str(source), "tying": {"num_loops": 2, "method": "stepwise"}}
    model = Model(relaxed.cfg, tokenizer, relaxed.weights, "m", facts, certificate)
    model.save(tmp_path / "run")
    saved = rj.load(tmp_path / "run")
    task = {"items": 9, "metric": "acc", "value": 0.5, "stderr": 0.25}
    report = {
        "model": {"content": saved.weights.content()}, "tasks": {"arc_easy": task},
        "perplexity": {"windows": {"context_length": 64, "perplexity": 12.5}},
        "source": {"tasks": {"arc_easy": task | {"value": 0.75}}},
    }  # fmt: skip
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(report))
    saved.export(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "license: apache-2.0\nbase_model: some/model\n", "library_name: transformers",
        "# out\n", "a llama block of 2 layers that runs 2 times", "LoRAs of rank 1 to 3",
        "method=stepwise", "| training | none |", "| perplexity | 40.5 |",
        "| text | valid.txt, 2,048 tokens |", "|  | this model | source |",
        "| arc_easy, acc, 9 items | 0.5 ± 0.25 | 0.75 ± 0.25 |",
        "| perplexity per token, windows of 64 tokens | 12.5 |  |",
        "licence `apache-2.0`",
    ):  # fmt: skip
        assert words in card, (words, card)
    report["model"]["content"] = "of other weights"
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(report))
    saved.export(tmp_path / "other")
    assert "Evaluated" not in (tmp_path / "other" / "README.md").read_text()
    assert "/home/me" not in card and str(tmp_path) not in card
