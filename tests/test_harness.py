"""Scores as lm-eval's `hf` model gives them: its rules one by one, and the harness as a whole."""

import json
import math
import socket

import evaluated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated import make_model, reference, write_tasks

pytest.importorskip("lm_eval", reason="pip install 'lm-eval>=0.4.13'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from recursive_jax import evaluating  # noqa: E402
from recursive_jax.evaluation import harness, rolling, tasks  # noqa: E402
from recursive_jax.evaluation.likelihood import Likelihoods, make_rows, padded_length  # noqa: E402
from recursive_jax.evaluation.loops import loop_report
from recursive_jax.evaluation.records import Records  # noqa: E402
from recursive_jax.models.decoder import Decoder  # noqa: E402


@pytest.fixture(scope="module")
def placed():
    return evaluating.Placed(make_model(), "float32")


@pytest.fixture
def lm(placed):
    return language_model(placed)


def language_model(placed, max_length=64, tokenizer=None, records=None, generate=None):
    model = make_model()
    return harness.RecursiveLM(
        tokenizer or model.tokenizer, model.cfg.vocab_size, max_length,
        placed.likelihoods(max_length, 8), generate, records,
    )  # fmt: skip


def requests(kind, *arguments):
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def ask(lm, *pairs):
    return lm.loglikelihood(requests("loglikelihood", *pairs))


def encode(text):
    return make_model().tokenizer.encode(text)


def expected(context, continuation, loop=-1):
    values, greedy = reference(make_model(), context, continuation)
    return values[loop], greedy[loop]


# The seven rules


def test_spaces_between_context_and_continuation_belong_to_the_continuation(lm):
    """Rule 1: one text, tokenised whole, then split."""
    ((value, greedy),) = ask(lm, ("The list  ", "is sorted"))
    context = encode("The list")
    continuation = encode("The list  is sorted")[len(context) :]
    assert lm.tokenizer.decode(continuation) == "  is sorted"
    np.testing.assert_allclose(value, expected(context, continuation)[0], atol=1e-4)
    apart = expected(
        encode("The list  "), lm.tokenizer.encode("is sorted", add_special_tokens=False)
    )
    assert abs(value - apart[0]) > 0.1
    assert greedy is False


def test_the_prefix_of_an_empty_context_is_bos_or_else_eos(lm, placed):
    """Rule 2."""
    tokenizer = lm.tokenizer
    assert lm.prefix_token_id == tokenizer.bos_token_id != tokenizer.eos_token_id
    ((value, _),) = ask(lm, ("", "list"))
    ids = tokenizer.encode("list", add_special_tokens=False)
    np.testing.assert_allclose(value, expected([tokenizer.bos_token_id], ids)[0], atol=1e-4)
    without = evaluated.tokenizer_without("bos_token")
    assert language_model(placed, tokenizer=without).prefix_token_id == tokenizer.eos_token_id


def test_a_tokenizer_with_neither_bos_nor_eos_is_refused_by_name(placed):
    lm = language_model(placed, tokenizer=evaluated.tokenizer_without("bos_token", "eos_token"))
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token.*tokenizer_config.json"):
        ask(lm, ("", "list"))
    assert len(ask(lm, ("The", " list"))) == 1  # a context needs none


def test_a_text_that_begins_with_bos_gets_no_second_one(lm):
    """Rule 3."""
    bos = lm.tokenizer.bos_token
    assert lm.tok_encode("list") == lm.tok_encode(f"{bos}list")
    assert lm.tok_encode("list").count(lm.tokenizer.bos_token_id) == 1


def test_rolling_windows_are_disjoint_behind_one_token_of_context():
    """Rule 4."""
    assert rolling.windows([5, 6, 7, 8, 9], 0, 2) == [
        ([0], [5, 6]), ([6], [7, 8]), ([7, 8], [9]),
    ]  # fmt: skip
    assert rolling.windows([5, 6], 0, 3) == [([0], [5, 6])]


def test_rolling_likelihood_of_a_text_longer_than_the_context(lm):
    text = "Return the list of names that are in the file. " * 12
    ids = lm.tok_encode(text)
    assert 2 * 64 < len(ids) < 3 * 64
    (value,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    total = expected([lm.prefix_token_id], ids[:64])[0]
    total += expected([ids[63]], ids[64:128])[0]
    total += expected(ids[-65:128], ids[128:])[0]  # the last window has all context that fits
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_the_longest_context_is_that_of_the_config():
    """Rule 5."""
    assert evaluating.Settings(tasks="all").max_length(make_model().cfg.max_length) == 64
    assert evaluating.Settings(tasks="all", context_length=32).max_length(64) == 32
    assert evaluating.Settings(tasks="all", context_length=99).max_length(64) == 64


def test_a_context_that_is_too_long_is_cut_from_the_left(lm):
    """Rule 6: with its continuation it keeps `max_length + 1` tokens."""
    long = "The value of the list is " * 20
    ((value, _),) = ask(lm, (long, "sorted"))
    whole = encode(long.rstrip() + " sorted")
    context = encode(long.rstrip())
    continuation = whole[len(context) :]
    kept = whole[-65 : -len(continuation)]
    np.testing.assert_allclose(value, expected(kept, continuation)[0], atol=1e-4)
    assert abs(value - expected(kept[1:], continuation)[0]) > 1e-3


def test_log_probabilities_are_computed_in_float32():
    """Rule 7: in bfloat16 the probabilities of all tokens would miss 1 by some percent."""
    model = make_model()
    decoder = Decoder(model.cfg, dtype=jnp.bfloat16)
    pairs = [([1, 2, 3], [token]) for token in range(4096)]
    ((_, scores),) = Likelihoods(decoder, model.params, 64, 1, all_loops=True)(pairs)
    assert len(scores) == 4096
    for loop in range(2):
        total = math.fsum(math.exp(scores[n].loglikelihood[loop]) for n in scores)
        assert abs(total - 1) < 1e-4
        assert sum(score.greedy[loop] for score in scores.values()) == 1


# Batches


def test_continuations_that_share_a_row_score_as_if_alone(placed):
    pairs = [([1, 2, 3, 4], [5, 6]), ([1, 2, 3, 4], [7]), ([1, 2, 3, 4], [5, 9, 8]), ([4], [5])]
    assert [len(row.tokens) for row in make_rows(pairs, 64)] == [4 + 1 + 0 + 2, 1]
    ((share, scores),) = placed.likelihoods(64, 8)(pairs)
    assert share == 1.0
    for n, pair in enumerate(pairs):
        values, greedy = reference(make_model(), *pair)
        np.testing.assert_allclose(scores[n].loglikelihood, values, atol=1e-4)
        assert list(scores[n].greedy) == greedy


def test_one_device_gives_what_a_mesh_gives(placed):
    model = make_model()
    assert placed.mesh.size == jax.device_count() > 1
    pairs = [([1, 2, 3], [token, 5]) for token in range(9)]
    alone = Likelihoods(Decoder(model.cfg), model.params, 64, 3, all_loops=True)
    found = [{}, {}]
    for kind, scorer in enumerate((placed.likelihoods(64, 8), alone)):
        for _, batch in scorer(pairs):
            found[kind] |= batch
    for n in range(9):
        np.testing.assert_allclose(found[0][n].loglikelihood, found[1][n].loglikelihood, atol=1e-4)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([1], [])], "continuation of pair 0 has no tokens"),
        ([([1], [2]), ([], [2])], "context of pair 1 has no tokens"),
        ([([1], [2] * 65)], "65 tokens.*context holds 64.*context_length"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        make_rows(pairs, 64)


def test_rows_are_padded_to_few_lengths():
    lengths = [padded_length(n) for n in range(1, 513)]
    assert sorted(set(lengths)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(n < padded and padded <= max(16, 1.5 * n) for n, padded in enumerate(lengths))


# Tasks


def test_all_loops_are_measured_in_one_pass(placed, tmp_path):
    loaded = tasks.load_tasks("all", write_tasks(tmp_path / "tasks"))
    assert list(loaded) == ["lambada_openai", "winogrande", "arc_easy"]  # the paper's order
    records = Records()
    found = harness.run(language_model(placed, records=records), loaded)
    assert len(records) == 2 + 4 + 8
    assert [found[name]["metric"] for name in loaded] == ["acc", "acc", "acc_norm"]
    task = found["arc_easy"]
    for loop, measured in enumerate(task["loops"]):
        right = []
        for item in evaluated.CHOICES:
            context = encode(f"{item['query']}\nAnswer:")
            sums = []
            for choice in item["choices"]:
                whole = encode(f"{item['query']}\nAnswer: {choice}")
                value, _ = expected(context, whole[len(context) :], loop)
                sums.append(value / len(choice))
            right.append(int(np.argmax(sums)) == item["gold"])
        assert measured["acc_norm"]["value"] == np.mean(right)
        assert measured["acc_norm"]["stderr"] == pytest.approx(np.std(right, ddof=1) / 2)
    assert task["value"] == task["loops"][-1]["acc_norm"]["value"]
    gain = task["rates"]["self_correction"][0] - task["rates"]["overthinking"][0]
    assert task["rates"]["loop_gain"] == [pytest.approx(gain)]
    ppl = found["lambada_openai"]["metrics"]["perplexity"]
    values = []
    for item in evaluated.LAST_WORDS:
        context, whole = (
            encode(item["context"]),
            encode(f"{item['context']} {item['continuation']}"),
        )
        values.append(expected(context, whole[len(context) :])[0])
    assert ppl["value"] == pytest.approx(math.exp(-np.mean(values)), rel=1e-4)
    spread = ppl["value"] * np.std(values, ddof=1) / 2**0.5
    assert ppl["stderr"] == pytest.approx(spread, rel=1e-3)


def test_what_further_loops_change():
    right = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 1]], bool)
    assert loop_report(right) == {
        "loop_gain": [0.25, 0.25],
        "self_correction": [0.5, 0.25],
        "overthinking": [0.25, 0.0],
        "ever_corrected": 0.5,
        "ever_overthought": 0.25,
    }


def test_generation_goes_through_the_engine(placed):
    """lm-eval's stop strings end an answer, and a long prompt is cut from the left."""
    model = make_model()
    generate = evaluating.generator(model, 64, "float32")
    lm = language_model(placed, generate=generate)
    prompts = ["Return the", "A list of names " * 40]
    kept = [lm.tok_encode(p)[-59:] for p in prompts]
    want = model.generate(
        [evaluating.make_request(n, ids, {"max_gen_toks": 5}, 64, model.stop)
         for n, ids in enumerate(kept)], dtype="float32",
    )  # fmt: skip
    texts = [completion.text for completion in want]
    stop = texts[0][2:4]
    for until, expected in (("\0", texts), (stop, [t.partition(stop)[0] for t in texts])):
        options = {"until": [until], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}
        got = lm.generate_until(requests("generate_until", *((p, options) for p in prompts)))
        assert got == expected and all(got)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, r"generates with \['num_beams'\], which the engine lacks"),
        ({"max_gen_toks": 64}, "up to 64 tokens, and the context holds 64"),
    ],
)
def test_generation_that_the_engine_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluating.make_request(0, [1, 2], options, 64, ())


def test_the_model_is_registered_with_lm_eval():
    assert get_model("recursive_jax") is harness.RecursiveLM
    lm = make_model().harness(context_length=32, dtype="float32")
    assert isinstance(lm, harness.RecursiveLM) and lm.max_length == 32
    with pytest.raises(ValueError, match=r"load\(NAME\).harness\(\)"):
        harness.RecursiveLM.create_from_arg_obj({"checkpoint": "tiny"})


# Local files


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "choices": ["x"', "no JSON object"),
        ('"a"', "no JSON object"),
        ('{"question": "a"}', r"fields \['question'\]; expected \{query, choices, gold\}, or"),
        ('{"query": "a", "choices": ["x"], "gold": 0}', "at least two texts"),
        (
            '{"query": "a", "choices": ["x", "y"], "gold": 2}',
            "gold is 2; expected an index",
        ),
        ('{"query": "a", "choices": ["x", "y"], "gold": "0"}', 'gold is "0"; expected a number'),
        ('{"query": "a", "choices": ["x", ""], "gold": 0}', "at least two texts"),
        ('{"query": " ", "choices": ["x", "y"], "gold": 0}', "query is empty"),
        ('{"context": "a", "continuation": "b"}', "the lines before have"),
    ],
)
def test_a_broken_line_is_named(line, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(evaluated.CHOICES[0]) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=f"mine.jsonl, line 3: .*{message}"):
        tasks.load_tasks("mine", tmp_path)


def test_a_missing_task_lists_those_that_are_there(tmp_path):
    write_tasks(tmp_path / "tasks")
    with pytest.raises(FileNotFoundError, match="no task piqa; it has arc_easy, lambada_openai,"):
        tasks.load_tasks("arc_easy,piqa", tmp_path / "tasks")
    with pytest.raises(FileNotFoundError, match="no directory .*none"):
        tasks.load_tasks("arc_easy", tmp_path / "none")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl has no items"):
        tasks.load_tasks("empty", tmp_path)


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch):
    """By a port of this machine at which nothing listens."""
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ValueError, match="127.0.0.1 cannot be reached.*--task_dir=DIR"):
            tasks.load_tasks("arc_easy", None)


def test_a_file_may_have_its_distributed_name(tmp_path):
    (tmp_path / "openbook_qa.jsonl").write_text(json.dumps(evaluated.CHOICES[0]) + "\n")
    for name in ("openbookqa", "openbook_qa"):
        assert list(tasks.load_tasks(name, tmp_path)) == ["openbookqa"]


@pytest.mark.torch
def test_scores_equal_those_of_lm_evals_own_model(tmp_path):
    """Random weights of torch, through lm-eval's `hf` and through our reader and decoder."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    from recursive_jax.model import load

    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    directory = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(directory)
    make_model().tokenizer.save_pretrained(directory)
    model = load(directory)
    placed = evaluating.Placed(model, "float32")
    ours = harness.RecursiveLM(model.tokenizer, 4096, 64, placed.likelihoods(64, 8))
    theirs = HFLM(str(directory), device="cpu", dtype="float32", batch_size=4)
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    loaded = tasks.load_tasks("all", write_tasks(tmp_path / "tasks"))
    found = [harness.answers(lm, loaded) for lm in (theirs, ours)]
    for name in loaded:
        np.testing.assert_allclose(*(np.array(f[name], float) for f in found), atol=1e-3)
    long = "Return the list of names that are in the file. " * 12
    rolls = [
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", (long,)))
        for lm in (theirs, ours)
    ]
    np.testing.assert_allclose(*rolls, atol=1e-2)
    pairs = [("", "Return"), ("The list  ", "is"), (long, "sorted")]
    values = [[value for value, _ in ask(lm, *pairs)] for lm in (theirs, ours)]
    np.testing.assert_allclose(*values, atol=1e-3)
