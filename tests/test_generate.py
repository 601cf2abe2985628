"""Lock-step decoding against a slow loop without a cache, and the generate job end to end."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from recursive_jax import generate as job
from recursive_jax import sharding, text
from recursive_jax.decoding import lockstep
from recursive_jax.decoding.lockstep import Lockstep
from recursive_jax.decoding.requests import (
    Answers,
    Completion,
    Request,
    Sampling,
    read_prompts,
)
from recursive_jax.models.config import DecoderConfig, Rope
from recursive_jax.models.decoder import Decoder, abstract_params, logical_axes
from recursive_jax.weights import checkpoint, hf
from recursive_jax.weights.source import ASSETS

CONTEXT = 64
LLAMA = DecoderConfig(
    family="llama", vocab_size=61, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
    head_dim=8, num_layers=3, max_length=CONTEXT,
)  # fmt: skip
# Windows far shorter than the texts, other ones in the other loop, and everything per loop.
GEMMA = DecoderConfig(
    family="gemma3", vocab_size=67, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=1,
    head_dim=8, num_layers=2, num_loops=2, norm_offset=1.0, post_norms=True, qk_norm=True,
    activation="gelu_tanh", windows=(3, 0, 0, 5), rope_of_depth=(1, 0, 0, 1),
    ropes=(Rope(theta=1e4), Rope(theta=100.0)), attn_softcap=3.0, final_softcap=9.0,
    embed_scale=4.0, norms="per_loop", lora_ranks=dict(q=2, k=3, v=2, o=3, gate=3, up=4, down=2),
    max_length=CONTEXT,
)  # fmt: skip
NEOX = DecoderConfig(
    family="gpt_neox", vocab_size=59, embed_dim=16, mlp_dim=24, num_heads=2, num_kv_heads=2,
    head_dim=8, num_layers=1, num_loops=3, norm="layer", parallel_residual=True,
    activation="gelu", gated_mlp=False, qkv_bias=True, o_bias=True, mlp_bias=True,
    rotary_fraction=0.5, tied_head=False, norms="per_loop", lora_ranks=dict(v=2, down=3),
    max_length=CONTEXT,
)  # fmt: skip
CONFIGS = {"llama": LLAMA, "gemma": GEMMA, "neox": NEOX}
LENGTHS = (1, 23, 6, 14)  # prompts of one batch, tokens


@functools.cache
def params_of(cfg):
    """Random, nothing at its neutral value (LoRA starts at zero, norms at one)."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * 0.4).astype(np.float32), abstract_params(cfg)
    )


def prompts_of(cfg, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, cfg.vocab_size, n).tolist()) for n in lengths]


@functools.partial(jax.jit, static_argnums=0)
def logits_at(cfg, params, tokens, index):
    """f32 [V] behind `tokens[:index + 1]`, by a forward pass without a cache."""
    positions = jnp.arange(CONTEXT, dtype=jnp.int32)[None]
    hidden, _ = Decoder(cfg).apply({"params": params}, tokens[None], positions)
    return Decoder(cfg).apply({"params": params}, hidden[0, index], method="unembed")


@functools.cache
def slowly(cfg, prompt, count):
    """Greedy tokens and their log-probabilities: the whole text again for every token."""
    row = np.zeros(CONTEXT, np.int32)
    row[: len(prompt)] = prompt
    tokens, logprobs = [], []
    for index in range(len(prompt), len(prompt) + count):
        logits = np.asarray(logits_at(cfg, params_of(cfg), row, index - 1), np.float64)
        tokens.append(int(logits.argmax()))
        logprobs.append(logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        row[index] = tokens[-1]
    return tokens, logprobs


@functools.cache
def engine_of(cfg, num_rows=4):
    return Lockstep(Decoder(cfg), jax.device_put(params_of(cfg)), num_rows, CONTEXT)


def answer(engine, requests, max_steps=16):
    completions = [Completion(r.id) for r in requests]
    for event in engine.run(requests, max_steps):
        assert completions[event.index].finish_reason is None, "an event after the last"
        completions[event.index].add(event)
    assert all(c.finish_reason for c in completions)
    return completions


@pytest.mark.parametrize("chunk", [16, 64], ids=["chunks of 16", "one chunk"])
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_batches_equal_the_slow_loop(name, chunk, monkeypatch):
    """Token for token, prompts of several lengths side by side, a second batch in used slots."""
    cfg = CONFIGS[name]
    monkeypatch.setattr(lockstep, "PREFILL_TOKENS", chunk * 4)
    engine = engine_of(cfg)
    for seed, count in ((0, 20), (1, 9)):
        requests = [Request(i, p, count) for i, p in enumerate(prompts_of(cfg, seed=seed))]
        for request, completion in zip(requests, answer(engine, requests), strict=True):
            tokens, logprobs = slowly(cfg, request.tokens, count)
            assert completion.tokens == tokens
            np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
            assert completion.exit_loops == [cfg.num_loops] * count
            assert completion.finish_reason == "length"
    assert set(engine.memory()) <= {"decode", 16, 32, 64}


def test_windows_and_loops_matter_to_these_models():
    """The parity above would say little if they changed nothing."""
    tokens, params = np.asarray(prompts_of(GEMMA, (CONTEXT,))[0], np.int32), params_of(GEMMA)
    whole = logits_at(GEMMA, params, tokens, 30)
    wide = logits_at(GEMMA.replace(windows=()), params, tokens, 30)
    swapped = jax.tree_util.tree_map_with_path(
        lambda path, x: x[:, ::-1] if path[-1].key.startswith("lora") else x, params
    )
    for other in (wide, logits_at(GEMMA, swapped, tokens, 30)):
        assert np.abs(np.asarray(whole - other)).max() > 0.01


@pytest.mark.parametrize("max_steps", [1, 3])
def test_steps_per_round_trip_change_nothing(max_steps):
    requests = [
        Request(i, p, 7 + i, sampling=Sampling(temperature=0.5 * i, seed=i))
        for i, p in enumerate(prompts_of(LLAMA))
    ]
    engine = engine_of(LLAMA)
    few = answer(engine, requests, max_steps)
    assert [c.to_json() for c in few] == [c.to_json() for c in answer(engine, requests)]
    assert [len(c.tokens) for c in few] == [7, 8, 9, 10]
    for event in engine.run(requests, max_steps):
        assert len(event.tokens) <= max_steps


def test_a_sampled_request_does_not_depend_on_its_batch():
    prompts = prompts_of(LLAMA)
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=42)
    ours = Request("ours", prompts[1], 12, sampling=sampling)
    others = [
        Request(i, p, 5 + 4 * i, sampling=Sampling(temperature=0.3 * i, seed=i))
        for i, p in enumerate(prompts)
    ]
    engine = engine_of(LLAMA)
    alone = answer(engine, [ours])[0].tokens
    assert answer(engine, [others[3], others[0], ours])[2].tokens == alone
    assert answer(engine, [ours, *others[1:]])[0].tokens == alone
    again = Request("again", prompts[1], 12, sampling=Sampling(1.0, top_p=0.95, seed=43))
    assert answer(engine, [again])[0].tokens != alone
    assert alone != slowly(LLAMA, prompts[1], 12)[0]


def test_stop_tokens_end_a_text_and_are_not_part_of_it():
    prompts = prompts_of(LLAMA)
    greedy = [slowly(LLAMA, p, 12)[0] for p in prompts]
    stop = (greedy[0][3], 10**6)  # as greedy decoding meets it, and one that never comes
    requests = [Request(i, p, 12, stop=stop) for i, p in enumerate(prompts)]
    for tokens, completion in zip(greedy, answer(engine_of(LLAMA), requests), strict=True):
        end = tokens.index(stop[0]) if stop[0] in tokens else None
        assert completion.tokens == tokens[:end]
        assert len(completion.logprobs) == len(completion.exit_loops) == len(completion.tokens)
        assert completion.finish_reason == ("length" if end is None else "stop")


def test_a_batch_that_is_done_stops_early():
    """One prefill and one decode call, and that one leaves its loop after three tokens."""
    engine, calls = engine_of(LLAMA), []
    prompt = prompts_of(LLAMA)[1]
    greedy = slowly(LLAMA, prompt, 12)[0]
    stop = next(t for t in greedy[2:] if greedy.index(t) >= 2)
    wrapped = engine._call

    def call(name, *arguments):
        rows, found = wrapped(name, *arguments)
        calls.append((name, int((found.tokens != lockstep.NO_TOKEN).sum())))
        return rows, found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_call", call)
        answer(engine, [Request(0, prompt, 40, stop=(stop,))])
    assert calls == [(32, 1), ("decode", greedy.index(stop))]


def test_nothing_compiles_after_warm_up():
    engine = Lockstep(Decoder(LLAMA), params_of(LLAMA), 2, CONTEXT)
    engine.compile([3, 20])
    count = []
    listener = lambda event, *_, **__: count.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for lengths in ((1,), (3, 16), (20, 1), (17, 5), (30, 2)):
            prompts = prompts_of(LLAMA, lengths)
            sampling = Sampling(temperature=float(len(prompts) - 1), top_k=3, seed=len(count))
            answer(engine, [Request(i, p, 3 + i, (1,), sampling) for i, p in enumerate(prompts)])
        compiled = [event for event in count if "compile" in event]
        assert not compiled
        jax.jit(lambda x: x * 3 + len(count))(np.float32(1))
        assert any("compile" in event for event in count), "the listener hears compilations"
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_the_cache_is_updated_in_place():
    """Bytes, by the compiler's account: the donated cache is the output, and not copied."""
    cfg = LLAMA.replace(num_layers=16, num_loops=2)
    engine = Lockstep(Decoder(cfg), params_of(cfg), 8, 512)
    engine.compile([16])
    cache = engine._cache.rows.nbytes
    assert cache >= 16 << 20
    for name, memory in engine.memory().items():
        assert memory.alias_size_in_bytes >= cache, name
        assert memory.temp_size_in_bytes < cache / 4, name


def test_padding_and_idle_rows_write_nothing():
    engine = Lockstep(Decoder(LLAMA), params_of(LLAMA), 4, CONTEXT)
    prompts = prompts_of(LLAMA)
    answer(engine, [Request(i, prompts[i], 5) for i in range(3)])
    rows = np.asarray(engine._cache.rows)  # [loop, layer, slot, length, ...]
    written = np.abs(rows).max(axis=(0, 1, 4, 5, 6)) > 0  # [slot, length]
    # the last token of an answer is never run
    ends = [len(prompts[i]) + 4 for i in range(3)] + [0]
    np.testing.assert_array_equal(written, np.arange(CONTEXT) < np.array(ends)[:, None])


@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (2, 4), (4, 2)])
def test_a_mesh_gives_the_same_tokens(data, tensor):
    cfg = NEOX if tensor == 4 else GEMMA
    mesh = sharding.make_mesh(data, 1, tensor)
    rules = sharding.rules_for(mesh, cfg)
    where = sharding.shardings(logical_axes(cfg), mesh, rules)
    params = sharding.put_global(params_of(cfg), where)
    model = Decoder(cfg, data_shards=data)
    engine = Lockstep(model, params, 8, CONTEXT, mesh=mesh, rules=rules)
    requests = [
        Request(i, p, 10, sampling=Sampling(temperature=i % 2, seed=i))
        for i, p in enumerate(prompts_of(cfg))
    ]
    alone = answer(engine_of(cfg), requests)
    assert [c.tokens for c in answer(engine, requests)] == [c.tokens for c in alone]
    spec = engine._cache.rows.sharding.spec
    assert spec[2] == ("data", "fsdp")
    assert spec[4] == ("tensor" if cfg.num_kv_heads % tensor == 0 else None)
    if tensor > 1:  # the weights are split, not copied
        w = params["block"]["mlp"]["up"]["w"]
        assert w.addressable_shards[0].data.size == w.size // tensor


def test_nan_ends_one_request_and_leaves_the_others():
    cfg = LLAMA.replace(tied_head=False)
    params = dict(params_of(cfg), embedding=params_of(cfg)["embedding"].copy())
    params["embedding"][5] = np.nan
    engine = Lockstep(Decoder(cfg), params, 4, CONTEXT)
    good = [tuple(t for t in p if t != 5) for p in prompts_of(LLAMA, (9, 12, 20))]
    alone = answer(engine, [Request(0, good[0], 6)])[0]
    poisoned, fine = answer(engine, [Request(1, (*good[1], 5), 6), Request(2, good[0], 6)])
    assert poisoned.finish_reason == "error" and "not numbers" in poisoned.error
    assert poisoned.tokens == []
    assert fine.tokens == alone.tokens
    # the next request in that slot does not meet what the poisoned one left there
    assert answer(engine, [Request(3, good[0], 6)])[0].tokens == alone.tokens


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([Request(0, (1,) * CONTEXT, 1)], "the prompt has 64 tokens, the context holds 64"),
        ([Request(0, (1,) * 60, 5)], "60 prompt tokens . max_new_tokens=5 do not fit"),
        ([Request(i, (1,), 1) for i in range(5)], "5 requests; expected 1..4"),
        ([], "0 requests; expected 1..4"),
        ([Request("a", (1,), 1, stop=(1, 2, 3, 4, 5))], "'a' has 5 stop ids"),
    ],
)
def test_batches_that_cannot_run_are_refused(requests, message):
    with pytest.raises(ValueError, match=message):
        next(engine_of(LLAMA).run(requests))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(((), 1), "no tokens"), (((1,), 0), "max_new_tokens=0"), (((1,), "9"), "max_new_tokens='9'")],
)
def test_requests_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Request(0, *arguments)


# Text: streaming, files of prompts and answers.


@functools.cache
def tiny_tokenizer():
    return text.load_tokenizer(ASSETS / "tiny")


@functools.cache
def space_tokenizer(byte_fallback=True):
    """As Llama 2's: words begin with ▁, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", *[f"<0x{b:02X}>" for b in range(256)], "▁", "▁the", "▁cat", "s", "."]
    vocab = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


TEXTS = (
    "plain words",
    " a leading space",
    "naïve café — “quotes”",
    "日本語のテキスト",
    "🧑‍🚀🎉 e\u0301",
    "a\n\n  b\t",
)


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("prompt", ["", "the cats", "日"])
def test_streamed_pieces_join_to_the_text(content, prompt):
    tokenizer = tiny_tokenizer()
    detokenizer = text.Detokenizer(tokenizer, text.encode(tokenizer, prompt))
    ids = text.encode_batch(tokenizer, [content])[0]
    pieces = [detokenizer.add([i]) for i in ids]
    assert "".join(pieces) == content and detokenizer.finish() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([p for p in pieces if p]) >= min(2, len(content.split()))
    assert text.Detokenizer(tokenizer, ()).add(ids) == content


@pytest.mark.parametrize("prompt", ["", "the cat"])
def test_streaming_where_spaces_belong_to_the_next_word(prompt):
    tokenizer = space_tokenizer()
    ids = tokenizer.encode(prompt, add_special_tokens=False) if prompt else [1]
    answer_ids = tokenizer.convert_tokens_to_ids(
        ["▁the", "▁cat", "s", "<0xE6>", "<0x97>", "<0xA5>", "<s>", "▁the", "."]
    )
    detokenizer = text.Detokenizer(tokenizer, ids)
    pieces = [detokenizer.add([i]) for i in answer_ids]
    first = " the" if prompt else "the"
    assert pieces == [first, " cat", "s", "", "", "日", "", " the", "."]


def test_a_text_cut_within_a_character_keeps_the_rest():
    tokenizer = space_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁cat", "<0xE6>", "<0x97>"])
    detokenizer = text.Detokenizer(tokenizer, [1])
    assert [detokenizer.add([i]) for i in ids] == ["cat", "", ""]
    assert detokenizer.finish() == "\ufffd\ufffd"
    assert detokenizer.finish() == ""


DEFAULTS = dict(max_new_tokens=9, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes('one\r\n\n  two \nzwölf\u2028 {"prompt": 1}'.encode())
    prompts = read_prompts(path, DEFAULTS)
    assert [(p.id, p.content) for p in prompts] == [
        (1, "one"), (3, "  two "), (4, 'zwölf\u2028 {"prompt": 1}')
    ]  # fmt: skip
    assert all(p.options | {"seed": 3} == DEFAULTS for p in prompts)
    assert len({p.options["seed"] for p in prompts}) == 3
    other = read_prompts(path, DEFAULTS | {"seed": 4})
    assert not {p.options["seed"] for p in prompts} & {p.options["seed"] for p in other}


def test_prompts_of_a_jsonl_file_and_what_is_wrong_with_them(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    lines = [
        ({"prompt": "x", "id": "a", "top_k": 5, "seed": 8}, None),
        ({"messages": chat, "max_new_tokens": 2}, None),
        ('{"prompt": ', ":3: not JSON"),
        ([1], ":4: expected an object"),
        ({"prompt": "x", "temprature": 1}, r":5: unknown fields \['temprature'\]; expected"),
        ({"prompt": "x", "messages": chat}, ":6: expected either prompt or messages"),
        ({"id": 7}, ":7: expected either prompt or messages"),
        ({"prompt": 5}, ":8: prompt=5; expected a string"),
        ({"messages": [{"role": "user"}]}, ":9: messages: expected a list"),
        ({"messages": []}, ":10: messages: expected a list"),
        ({"prompt": "x", "id": True}, ":11: id=True; expected"),
        ({"prompt": "x", "id": "a"}, ":12: id 'a' is taken by line 1"),
    ]
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x, _ in lines))
    prompts = read_prompts(path, DEFAULTS)
    for prompt, (_, message) in zip(prompts, lines, strict=True):
        if message is None:
            assert prompt.error is None
        else:
            with pytest.raises(ValueError, match=message):
                raise ValueError(prompt.error)
    assert prompts[0].id == "a" and prompts[0].options == DEFAULTS | {"top_k": 5, "seed": 8}
    assert prompts[1].content == chat and prompts[1].options["max_new_tokens"] == 2


def test_prompt_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompts(tmp_path / "missing.txt", DEFAULTS)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt", DEFAULTS)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "binary.txt", DEFAULTS)


def test_answers_are_on_disk_at_once_and_in_order_at_the_end(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    answers = Answers(path)
    for index, name in ((2, "c"), (0, "\ud800"), (1, "b")):
        answers.add(index, Completion(name, text="é" + str(name)[:0], finish_reason="stop"))
        part = pathlib.Path(f"{path}.part").read_text().splitlines()
        assert json.loads(part[-1])["id"] == name and not path.exists()
    answers.close()
    assert [json.loads(x)["id"] for x in path.read_text().splitlines()] == ["\ud800", "b", "c"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.jsonl"]
    with pytest.raises(ValueError, match="cannot write"):
        Answers(tmp_path)


# The job.

TINY = DecoderConfig(
    family="llama", vocab_size=4096, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
    head_dim=8, num_layers=2, num_loops=2, norms="per_loop", lora_ranks=dict(q=2, down=3),
    max_length=CONTEXT,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A recursive checkpoint with random weights and our own tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint")
    checkpoint.create(directory, TINY, tiny_tokenizer(), generation_config={"eos_token_id": [1]})
    writer = checkpoint.Writer(directory)
    writer.save(3, params_of(TINY), wait=True)
    writer.close()
    return directory


def run_job(**options):
    values = flags.FlagValues()
    job.define_flags(values)
    values(["generate", *[f"--{name}={value}" for name, value in options.items()]])
    job.run(values)


def read_jsonl(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def command(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    return subprocess.run(
        [sys.executable, "-m", "recursive_jax.generate", *arguments],
        cwd=ASSETS.parents[1], env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def test_jsonl_through_the_command_line_and_on_a_mesh(tiny, tmp_path):
    """A real process on one device; then the same lines here, on eight."""
    source = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": "The quick brown fox jumps over the lazy dog and runs", "id": "long"},
        {"prompt": "Hi", "max_new_tokens": 3},
        {"prompt": "bad", "top_p": 0},
        {"messages": [{"role": "user", "content": "hi"}], "id": "chat"},
        {"prompt": "日本", "temperature": 1.5, "seed": 11},
        {"prompt": "much too long " * 99, "id": "no room"},
        {"prompt": "", "id": "only BOS"},
    ]
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "out.jsonl"
    arguments = dict(checkpoint=tiny, prompts=source, max_new_tokens=8, batch_size=2)
    done = command(*[f"--{k}={v}" for k, v in arguments.items()], f"--out={out}")
    assert done.returncode == 0, done.stderr
    answers = read_jsonl(out)
    assert [a["id"] for a in answers] == ["long", 2, 3, "chat", 5, "no room", "only BOS"]
    for line, message in ((3, "top_p=0"), (4, "no chat template"), (6, "context holds 64")):
        answer = answers[line - 1]
        assert answer["finish_reason"] == "error" and answer["tokens"] == []
        assert f"{source}:{line}: " in answer["error"] and message in answer["error"]
    good = [a for a in answers if a["finish_reason"] != "error"]
    for answer in good:
        assert set(answer) == {"id", "text", "tokens", "exit_loops", "finish_reason"}
        assert answer["exit_loops"] == [2] * len(answer["tokens"])
        prompt = next(r for i, r in enumerate(records, 1) if r.get("id", i) == answer["id"])
        ids = text.encode(tiny_tokenizer(), prompt["prompt"])
        decode = functools.partial(tiny_tokenizer().decode, skip_special_tokens=True)
        assert answer["text"] == decode([*ids, *answer["tokens"]])[len(decode(ids)) :]
        if "temperature" not in prompt:
            count = prompt.get("max_new_tokens", 8)
            expected = slowly(TINY, tuple(ids), count)[0]
            expected = expected[: expected.index(1)] if 1 in expected else expected
            assert answer["tokens"] == expected
    tokens = sum(len(a["tokens"]) for a in answers)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    assert (lines["prompts"], lines["errors"], lines["tokens"]) == ("7", "3", str(tokens))
    assert float(lines["tokens/s"].replace(",", "")) > 0

    run_job(**arguments, out=tmp_path / "mesh.jsonl", tensor=2)
    assert read_jsonl(tmp_path / "mesh.jsonl") == answers


def test_one_prompt_streams_to_the_terminal(tiny, tmp_path, capsys):
    run_job(
        checkpoint=tiny, prompt="Once upon", max_new_tokens=9, temperature=1, seed=5, top_k=50,
        out=tmp_path / "one.jsonl",
    )  # fmt: skip
    printed = capsys.readouterr()
    (answer,) = read_jsonl(tmp_path / "one.jsonl")
    assert printed.out == answer["text"] + "\n" and len(answer["tokens"]) > 3
    count = len(answer["tokens"])
    assert f"{count} tokens ({answer['finish_reason']})" in printed.err
    assert "tok/s" in printed.err and "first token after" in printed.err


def test_pieces_come_while_the_text_is_made(tiny):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = job.load_model(str(tiny), mesh, np.dtype("float32"))
    request = Request(0, text.encode(model.tokenizer, "Once upon"), 9, model.stop)
    engine = job.make_engine(model, [request], 1)
    states = [(len(c.tokens), p) for c, p in job.generate(model, engine, [request], 1)]
    assert [n for n, _ in states][:5] == [1, 2, 3, 4, 5]
    assert len([p for _, p in states if p]) > 3


def test_a_vanilla_directory_and_its_generation_config(tmp_path):
    """The stop ids of generation_config.json win over the tokenizer's."""
    directory = tmp_path / "llama"
    cfg = TINY.replace(num_layers=2, num_loops=1, norms="tied", lora_ranks={})
    hf.save_params(jax.tree.map(np.asarray, params_of(cfg)), cfg, directory, dtype=np.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((ASSETS / "tiny" / name).read_bytes())
    ids = tuple(text.encode(tiny_tokenizer(), "Once upon a time"))
    expected = slowly(cfg, ids, 8)[0]
    stop = expected[4]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 2]}))
    source, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    source.write_text("Once upon a time\n")
    run_job(checkpoint=directory, prompts=source, out=out, max_new_tokens=8)
    (answer,) = read_jsonl(out)
    assert answer["tokens"] == expected[: expected.index(stop)]
    assert answer["finish_reason"] == "stop" and answer["exit_loops"] == [1] * len(answer["tokens"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --prompt=TEXT or --prompts=FILE"),
        ({"prompt": "a", "prompts": "b"}, "give either"),
        ({"prompts": "b"}, "needs --out"),
        ({"prompts": "/no/such/file", "out": "OUT"}, "no such file: /no/such/file"),
        ({"prompt": "a", "temperature": -1}, "temperature=-1.0; expected"),
        ({"prompt": "a", "top_p": 1.5}, "top_p=1.5; expected"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0; expected"),
        ({"prompt": "a", "max_new_tokens": 64}, "max_new_tokens=64 do not fit into"),
        ({"prompt": "a", "batch_size": 0}, "batch_size=0; expected"),
        ({"prompt": "a", "context_length": 1}, "context_length=1; expected"),
        ({"prompt": "word " * 99}, "the context holds 64"),
        ({"prompt": "a", "chat": True}, "no chat template"),
        ({"prompt": "a", "dtype": "float16"}, "dtype='float16'; expected"),
        ({"prompt": "a", "tensor": 3}, "does not divide the 8 devices"),
        ({"prompt": "a", "checkpoint": "/no/such/model"}, "/no/such/model"),
    ],
    ids=lambda x: None if isinstance(x, str) else " ".join(x),
)
def test_mistakes_are_told_in_one_sentence(tiny, tmp_path, options, message):
    if "out" in options:
        options = options | {"out": tmp_path / "out.jsonl"}
    with pytest.raises((ValueError, OSError), match=message):
        run_job(**{"checkpoint": tiny, "max_new_tokens": 4} | options)
    assert not any(tmp_path.iterdir())


def test_an_empty_prompt_needs_a_bos_token(tiny):
    model = job.load_model(str(tiny), sharding.make_mesh(), np.dtype("float32"))
    prompt = job.Prompt(0, "", DEFAULTS)
    assert job.to_request(model, prompt, False, CONTEXT).tokens == (0,)
    without = dataclasses.replace(model, tokenizer=space_tokenizer())
    with pytest.raises(ValueError, match="prompt is empty and this tokenizer has no BOS"):
        job.to_request(without, prompt, False, CONTEXT)


def test_the_command_tells_mistakes_without_a_traceback(tiny, tmp_path):
    done = command(f"--checkpoint={tmp_path}", "--prompt=a")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
