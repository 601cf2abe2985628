"""The generate job end to end, against a loop without a cache; pieces of text as they come."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from recursive_jax import generate as job
from recursive_jax import generation, sharding, text
from recursive_jax.analysis import timing
from recursive_jax.console import tables
from recursive_jax.decoding.prompts import Prompt, to_request
from recursive_jax.decoding.thresholds import Thresholds
from recursive_jax.model import load
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params
from recursive_jax.weights import checkpoint, hf
from recursive_jax.weights.source import ASSETS

CONTEXT = 64


@functools.cache
def params_of(cfg):
    """Random, nothing at its neutral value (LoRA starts at zero, norms at one)."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * 0.4).astype(np.float32), abstract_params(cfg)
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_at(cfg, params, tokens, index):
    """f32 [V] behind `tokens[:index + 1]`, by a forward pass without a cache."""
    positions = jnp.arange(CONTEXT, dtype=jnp.int32)[None]
    hidden = Decoder(cfg).apply({"params": params}, tokens[None], positions)
    return Decoder(cfg).apply({"params": params}, hidden[0, index], method="unembed")


@functools.cache
def slowly(cfg, prompt, count):
    """Greedy tokens: the whole text again for every one."""
    row = np.zeros(CONTEXT, np.int32)
    row[: len(prompt)] = prompt
    tokens = []
    for index in range(len(prompt), len(prompt) + count):
        tokens.append(int(logits_at(cfg, params_of(cfg), row, index - 1).argmax()))
        row[index] = tokens[-1]
    return tokens


# Text: streaming.


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


@pytest.fixture
def one_device(monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *sizes: mesh)


def read_jsonl(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def test_help_tells_every_flag_of_the_readme():
    told = commands.run("generate", "--help").stdout
    for name in ("prompts", "num_slots", "exit_measure", "missing_kv", "[no]lossless", "tensor"):
        assert f"  --{name}: " in told


def test_jsonl_through_the_command_line_and_on_a_mesh(tiny, tmp_path):
    """A real process on one device; then the same lines here, on eight."""
    source = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": "The quick brown fox jumps over the lazy dog and runs", "id": "long"},
        {"prompt": "Hi", "max_new_tokens": 3},
        {"prompt": "bad", "top_p": 0},
        {"messages": [{"role": "user", "content": "hi"}], "id": "chat"},
        {"prompt": "日本", "temperature": 1.5, "seed": 11, "logprobs": True},
        {"prompt": "much too long " * 99, "id": "no room"},
        {"prompt": "", "id": "only BOS"},
        {"prompt": "x", "max_loops": 3},
    ]
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "out.jsonl"
    arguments = dict(checkpoint=tiny, prompts=source, max_new_tokens=8, num_slots=2)
    given = [f"--{k}={v}" for k, v in arguments.items()]
    done = commands.run("generate", *given, f"--out={out}")
    assert done.returncode == 0, done.stderr
    answers = read_jsonl(out)
    assert [a["id"] for a in answers] == ["long", 2, 3, "chat", 5, "no room", "only BOS", 8]
    for line, message in (
        (3, "top_p=0"), (4, "no chat template"), (6, "context holds 64"), (8, "max_loops=3; the")
    ):  # fmt: skip
        answer = answers[line - 1]
        assert answer["finish_reason"] == "error" and answer["tokens"] == []
        assert f"{source}:{line}: " in answer["error"] and message in answer["error"]
    good = [a for a in answers if a["finish_reason"] != "error"]
    for answer in good:
        fields = {"id", "text", "tokens", "exit_loops", "finish_reason"}
        assert set(answer) == fields | ({"logprobs"} if answer["id"] == 5 else set())
        assert len(answer.get("logprobs", answer["tokens"])) == len(answer["tokens"])
        assert answer["exit_loops"] == [2] * len(answer["tokens"])
        prompt = next(r for i, r in enumerate(records, 1) if r.get("id", i) == answer["id"])
        ids = text.encode(tiny_tokenizer(), prompt["prompt"])
        decode = functools.partial(tiny_tokenizer().decode, skip_special_tokens=True)
        assert answer["text"] == decode([*ids, *answer["tokens"]])[len(decode(ids)) :]
        if "temperature" not in prompt:
            count = prompt.get("max_new_tokens", 8)
            expected = slowly(TINY, tuple(ids), count)
            expected = expected[: expected.index(1)] if 1 in expected else expected
            assert answer["tokens"] == expected
    tokens = sum(len(a["tokens"]) for a in answers)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    assert (lines["prompts"], lines["errors"], lines["tokens"]) == ("8", "4", str(tokens))
    assert float(lines["tokens/s"].replace(",", "")) > 0

    run_job(**arguments, out=tmp_path / "mesh.jsonl", tensor=2)
    meshed = read_jsonl(tmp_path / "mesh.jsonl")
    np.testing.assert_allclose(meshed[4].pop("logprobs"), answers[4].pop("logprobs"), atol=1e-4)
    assert meshed == answers


def test_one_prompt_streams_to_the_terminal(tiny, tmp_path, capsys, monkeypatch, one_device):
    """Lossless, so the answer is that of full depth; the table says what ran."""
    pieces, wrapped = [], print

    def spy(*words, **options):
        if options.get("file") is None:
            pieces.append(words[0])
        wrapped(*words, **options)

    monkeypatch.setattr("builtins.print", spy)
    ids = tuple(text.encode(tiny_tokenizer(), "Once upon"))
    run_job(
        checkpoint=tiny, prompt="Once upon", max_new_tokens=9, lossless=True,
        out=tmp_path / "one.jsonl",
    )  # fmt: skip
    printed = capsys.readouterr()
    (answer,) = read_jsonl(tmp_path / "one.jsonl")
    assert answer["tokens"] == slowly(TINY, ids, 9)
    assert printed.out == answer["text"] + "\n" == "".join(pieces) + "\n"
    assert len([piece for piece in pieces if piece]) > 4, "they come while the text is made"
    assert "9 tokens (length)" in printed.err
    assert "tok/s" in printed.err and "first token after" in printed.err
    for words in ("static:1 of 2 loops", "exits only draft", "drafts accepted", "ticks per token"):
        assert words in printed.err
    count = tables.count(sum(leaf.size for leaf in jax.tree.leaves(params_of(TINY))))
    assert f"2 × 2 layers, {count} parameters" in printed.err


def test_exits_with_calibrated_thresholds_statistics_and_a_picture(
    tiny, tmp_path, capsys, one_device
):
    """The checkpoint's thresholds.json is for the measure that is asked for, or names it."""
    pytest.importorskip("matplotlib")
    source = tmp_path / "prompts.txt"
    source.write_text("Once upon a time\nThe list\nx = 1\n")
    path = pathlib.Path(tiny) / Thresholds.FILE
    weights = checkpoint.params_checksum(tiny)
    kept = Thresholds("cosine", (0.0,), 0.01, "a text", "2026-01-02", *weights)
    dataclasses.replace(kept, missing_kv="propagate").save(tiny)
    try:
        named = tmp_path / "a $name$ that is $no formula$"
        named.symlink_to(tiny)
        run_job(
            checkpoint=named, prompts=source, out=tmp_path / "out.jsonl", max_new_tokens=12,
            exit_measure="calibrated", missing_kv="propagate", num_slots=2,
            stats=tmp_path / "stats.json", heatmap=tmp_path / "map.png", stop="\0",
        )  # fmt: skip
    finally:
        path.unlink()
    printed = capsys.readouterr()
    assert "cosine of 2 loops" in printed.err
    assert "0 (thresholds.json: at most 1.00% of tokens differ on text like" in printed.err
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    answers, stats = read_jsonl(tmp_path / "out.jsonl"), json.load(open(tmp_path / "stats.json"))
    loops = sum((a["exit_loops"] for a in answers), [])
    assert set(loops) == {1, 2}
    assert all(a["exit_loops"][0] == 2 for a in answers), "prompt tokens run all loops"
    assert stats["tokens"] == len(loops) and stats["errors"] == 0
    assert stats["engine_tokens"] - stats["tokens"] in range(4)  # stop tokens
    assert stats["mean_loops"] == pytest.approx(np.mean(loops), abs=0.2)
    assert stats["run"]["missing KV"] == "propagate"
    assert 0 < stats["occupancy"] <= 1 and stats["ticks"] > 12
    e, times = stats["mean_loops"], stats["times"]
    heads = [(int(n), t) for n, t in times["head"].items()]
    head = np.interp(2 / e, *zip(*heads, strict=True))
    bound = 2 / (e * (times["tick"] + head) + times["embed"])
    assert stats["bound_tokens_per_second"] == pytest.approx(bound)
    rate = stats["engine_tokens"] / stats["seconds"]
    assert stats["share_of_bound"] == pytest.approx(rate / bound)
    assert f"{stats['bound_tokens_per_second']:,.1f} tok/s" in printed.out
    assert re.search(r"lane occupancy +\d+%", printed.out)


def test_the_oracle_runs_all_loops_and_so_does_its_bound(tiny, tmp_path, one_device):
    """Lines without characters in their ids included, in numbers and in the picture."""
    pytest.importorskip("matplotlib")
    source, stats = tmp_path / "prompts.jsonl", tmp_path / "stats.json"
    source.write_text(json.dumps({"prompt": "Once upon a time", "id": "\ud800"}))
    run_job(
        checkpoint=tiny, prompts=source, out=tmp_path / "out.jsonl", max_new_tokens=12,
        exit_measure="oracle", stats=stats, heatmap=tmp_path / "map.png",
    )  # fmt: skip
    stats = json.loads(stats.read_text())
    assert stats["mean_loops"] < 2, "what might have been"
    times = stats["times"]
    bound = 1 / (2 * (times["tick"] + times["head"]["1"]) + times["embed"])
    assert stats["bound_tokens_per_second"] == pytest.approx(bound)


def test_a_request_may_bound_its_loops_without_a_measure(tiny, tmp_path, capsys, one_device):
    source = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Once upon", "max_loops": 1}, {"prompt": "Once upon"}]
    source.write_text("\n".join(map(json.dumps, lines)))
    run_job(checkpoint=tiny, prompts=source, out=tmp_path / "o.jsonl", max_new_tokens=8)
    assert "share of the bound" not in capsys.readouterr().out
    early, late = read_jsonl(tmp_path / "o.jsonl")
    assert set(early["exit_loops"][1:]) <= {1} and set(late["exit_loops"]) == {2}
    ids = tuple(text.encode(tiny_tokenizer(), "Once upon"))
    assert late["tokens"] == slowly(TINY, ids, 8)


@pytest.mark.parametrize("profile", [False, True])
def test_nothing_compiles_after_warm_up_unless_asked(
    tiny, tmp_path, capsys, monkeypatch, one_device, profile
):
    """The bound needs programs of its own. Only --stats and --profile measure it."""
    source = tmp_path / "prompts.txt"
    source.write_text("Once upon a time\nThe list\n")
    events, make_engine = [], generation.make_engine

    def listener(event, *_, **__):
        events.append(event)

    def warmed_up(*arguments):
        engine = make_engine(*arguments)
        assert any("compile" in event for event in events), "the listener hears compilations"
        events.clear()
        return engine

    monkeypatch.setattr(generation, "make_engine", warmed_up)
    monkeypatch.setattr(timing, "SECONDS", 0.002)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run_job(
            checkpoint=tiny, prompts=source, out=tmp_path / "o.jsonl", max_new_tokens=6,
            exit_measure="top1", missing_kv="propagate", profile=profile,
        )  # fmt: skip
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert bool([event for event in events if "compile" in event]) == profile
    printed = capsys.readouterr()
    assert ("measuring the parts of a tick alone" in printed.err) == profile
    found = [re.search(rf"\n *{row} +[\d,.]+", printed.out) for row in BOUND_ROWS]
    assert found == [None] * 3 if not profile else all(found)
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 2


BOUND_ROWS = ("tick alone", "bound", "share of the bound")


def test_a_vanilla_directory_and_its_generation_config(tmp_path):
    """The stop ids of generation_config.json count beside the tokenizer's."""
    directory = tmp_path / "llama"
    cfg = TINY.replace(num_layers=2, num_loops=1, norms="tied", lora_ranks={})
    hf.save_params(jax.tree.map(np.asarray, params_of(cfg)), cfg, directory, dtype=np.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((ASSETS / "tiny" / name).read_bytes())
    ids = tuple(text.encode(tiny_tokenizer(), "Once upon a time"))
    expected = slowly(cfg, ids, 8)
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
        ({"prompt": "a", "num_slots": 0}, "num_slots=0; expected"),
        ({"prompt": "a", "chunk_length": 0}, "chunk_length=0; expected"),
        ({"prompt": "a", "stop": ""}, "expected a text"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty=0.0; expected"),
        ({"prompt": "a", "min_loops": 3}, "min_loops=3; the model has 2 loops"),
        ({"prompt": "a", "max_loops": 0}, "max_loops=0; expected"),
        ({"prompt": "a", "exit_measure": "best"}, "'best' is unknown; expected static:N, "),
        ({"prompt": "a", "exit_measure": "static:3"}, "static:3: the model has 2 loops"),
        ({"prompt": "a", "exit_measure": "stable"}, "needs a model of at least 3 loops"),
        ({"prompt": "a", "exit_measure": "calibrated"}, "has no thresholds.json; name"),
        ({"prompt": "a", "exit_threshold": "0.5"}, "without an exit measure"),
        ({"prompt": "a", "exit_measure": "top1", "exit_threshold": "x"}, "threshold=x; expected"),
        ({"prompt": "a", "exit_measure": "top1", "exit_threshold": "2"}, "of top1=2.0; expected"),
        ({"prompt": "a", "exit_measure": "top1", "exit_threshold": ".1,.2"}, "2 exit thresholds"),
        ({"prompt": "a", "lossless": True, "missing_kv": "copy"}, "it needs 'complete'"),
        ({"prompt": "a", "lossless": True, "draft_loop": 2}, "after loop 2 of 2 is no draft"),
        ({"prompt": "a", "lossless": True, "exit_measure": "oracle"}, "which never drafts"),
        ({"prompt": "a", "draft_loop": 1}, "--draft_loop is for --lossless"),
        ({"prompt": "a", "exit_measure": "static:1", "exit_threshold": "1"}, "takes no threshold"),
        ({"prompt": "a", "lossless": True, "checkpoint": "tiny"}, "has one loop only"),
        ({"prompt": "a", "out": "OUT", "stats": "OUT"}, "--out and --stats are one file"),
        ({"prompt": "a", "stats": "/"}, "cannot write /"),
        ({"prompt": "a", "heatmap": "map.txt"}, "map.txt is no picture; expected"),
        ({"prompt": "a", "exit_measure": "top1", "checkpoint": "tiny"}, "this one has 1"),
        ({"prompt": "a", "context_length": 1}, "context_length=1; expected"),
        (
            {"prompt": "a", "context_length": 2**31 - 1, "max_new_tokens": 2**31 - 200},
            "do not fit into memory beside the model .*; lower num_slots or max_new_tokens",
        ),
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
        file = tmp_path / "out.jsonl"
        options = options | {n: file for n, value in options.items() if value == "OUT"}
    with pytest.raises((ValueError, OSError), match=message):
        run_job(**{"checkpoint": tiny, "max_new_tokens": 4} | options)
    assert not any(tmp_path.iterdir())


def test_an_empty_prompt_needs_a_bos_token(tiny):
    prompt = Prompt(0, "", {"max_new_tokens": 9})
    sizes = dict(vocab_size=TINY.vocab_size, stop_ids=(1,), context_length=CONTEXT)
    assert to_request(prompt, tiny_tokenizer(), **sizes).tokens == (0,)
    with pytest.raises(ValueError, match="prompt is empty and this tokenizer has no BOS"):
        to_request(prompt, space_tokenizer(), **sizes)


def test_a_job_that_is_stopped_goes_on_where_it_was(tiny, tmp_path, capsys, one_device):
    """By real signals; the answers are those of a run that was not stopped."""
    source, out = tmp_path / "prompts.txt", tmp_path / "out file.jsonl"
    source.write_text("".join(f"word {i}\n" for i in range(120)))
    part, count = pathlib.Path(f"{out}.part"), 0

    def answer_until(number, lines, num_slots):
        """Send a signal when so many answers are there; returns what the job told."""

        def watch():
            while not part.exists() or part.read_bytes().count(b"\n") < lines:
                time.sleep(0.001)
            os.kill(os.getpid(), number)

        values = flags.FlagValues()
        job.define_flags(values)
        arguments = [f"--prompts={source}", f"--out={out}", f"--num_slots={num_slots}"]
        values(["generate", f"--checkpoint={tiny}", "--max_new_tokens=12", *arguments])
        before, watcher = signal.getsignal(number), threading.Thread(target=watch, daemon=True)
        watcher.start()
        with pytest.raises(SystemExit) as ended:
            job.main(values)
        watcher.join()
        assert ended.value.code == 128 + number and signal.getsignal(number) is before
        return capsys.readouterr().err

    for number, num_slots in ((signal.SIGTERM, 2), (signal.SIGINT, 4)):
        told = answer_until(number, count + 5, num_slots)
        assert not count or f"{count} answers are in {part} already" in told
        assert count + 5 <= len(part.read_text().splitlines()) < 120 and not out.exists()
        count = len(part.read_text().splitlines())
        assert f"stopped; finished answers: {count} in {part}. To go on:\npython -m " in told

    run_job(checkpoint=tiny, prompts=source, out=out, max_new_tokens=12)
    assert re.search(rf"\nprompts +{120 - count} of 120\n", capsys.readouterr().err)
    answers = read_jsonl(out)
    assert [answer["id"] for answer in answers] == list(range(1, 121)) and not part.exists()
    for i in (0, 7, 119):
        expected = slowly(TINY, tuple(text.encode(tiny_tokenizer(), f"word {i}")), 12)
        assert answers[i]["tokens"] == expected[: (*expected, 1).index(1)]


def test_answers_of_other_settings_are_not_taken(tiny, tmp_path, capsys, one_device):
    """All answers are there, so the same command has nothing to decode."""
    source, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    source.write_text("Once upon\nThe list\n")
    part = pathlib.Path(f"{out}.part")
    job_of = functools.partial(run_job, checkpoint=tiny, prompts=source, out=out, max_new_tokens=6)
    (tmp_path / "out.jsonl.sorted").mkdir()  # so the file cannot be written in the end
    with pytest.raises(OSError, match=f"cannot write {out}.sorted: .* 2 answers are in {part}; "):
        job_of()
    (tmp_path / "out.jsonl.sorted").rmdir()
    data = part.read_bytes()
    job_of()
    assert "nothing was left to decode" in capsys.readouterr().out
    assert len(read_jsonl(out)) == 2 and not part.exists()
    part.write_bytes(data)
    job_of(exit_measure="top1", exit_threshold=0.3)
    assert "held 2 answers of another run" in capsys.readouterr().err
    assert pathlib.Path(f"{part}.1").read_bytes() == data


def test_weights_are_told_apart_by_their_content(tiny, tmp_path):
    def found(directory):
        return load(directory).weights.content()

    copy = shutil.copytree(tiny, tmp_path / "copy")
    assert found(copy) == found(tiny)
    writer = checkpoint.Writer(copy)
    writer.save(4, jax.tree.map(lambda x: x * 1.5, params_of(TINY)), wait=True)
    writer.close()
    assert found(copy) != found(tiny)
    assert found("tiny") == found(ASSETS / "tiny") != found(tiny)


def test_the_command_tells_mistakes_without_a_traceback(tiny, tmp_path):
    done = commands.run("generate", f"--checkpoint={tmp_path}", "--prompt=a")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
