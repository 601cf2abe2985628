"""Text conventions: BOS rule, encoding, perplexity windows, stop ids, chat, vocabulary checks.

The tokenizers are built here, word by word, so that every id can be read off.
"""

import importlib.resources
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from recursive_jax import text

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e", "f"]
TINY = importlib.resources.files("recursive_jax") / "assets" / "tiny"


def word_tokenizer(template=None, **special):
    """Ids are positions in WORDS; `template` like '<s> $A' is the tokenizer's own rule."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[(w, i) for i, w in enumerate(WORDS) if w in template.split()],
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tiny():
    return text.load_tokenizer(TINY)


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        (None, []),  # names a BOS (all of these do) but never adds it
        ("<s> $A", [1]),
        ("<s> $A </s>", [1]),  # what it appends is not our business
        ("$A </s>", []),
        ("</s> <s> $A", [2, 1]),
    ],
)
def test_bos_rule_is_what_the_tokenizer_does(template, prefix):
    tokenizer = word_tokenizer(template)
    assert text.bos_prefix(tokenizer) == prefix
    assert text.encode(tokenizer, "b a") == [*prefix, 4, 3]
    assert text.encode(tokenizer, "") == prefix
    assert text.encode_batch(tokenizer, ["b a", "", "c"]) == [[4, 3], [], [5]]


def letters(letters, template=None, unk_token=None, **special):
    """A tokenizer of single letters that drops all others; `<s>` is the id after the letters."""
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unk_token))
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", len(letters))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **special)


def test_bos_rule_of_an_alphabet_without_an_a():
    tokenizer = letters("ACGT", "<s> $A")
    assert text.bos_prefix(tokenizer) == [4]
    assert text.encode(tokenizer, "ACGTACGT") == [4, 0, 1, 2, 3, 0, 1, 2, 3]
    assert text.encode(tokenizer, "ACGTACGT") == tokenizer("ACGTACGT")["input_ids"]
    assert text.encode(tokenizer, "") == [4]
    assert text.bos_prefix(letters("ACGT")) == []
    assert text.bos_prefix(letters("ACGT", "$A <s>")) == []
    tokens, scored = text.eval_windows(tokenizer, ["ACGT"], 3)
    assert tokens.tolist() == [[4, 0, 1], [4, 2, 3]] and scored.sum() == 4
    # The alphabet of a byte-level tokenizer has another spelling in the vocabulary.
    spaces = letters(["Ġ"], "<s> $A")
    spaces.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spaces.backend_tokenizer.decoder = decoders.ByteLevel()
    assert text.bos_prefix(spaces) == [1]


def test_bos_rule_where_the_unknown_token_is_bos():
    assert text.bos_prefix(letters("xy", "<s> $A", unk_token="<s>")) == [2]
    assert text.bos_prefix(letters("xy", unk_token="<s>")) == []


def test_a_text_of_which_nothing_is_left_is_refused():
    for tokenizer in (letters("ACGT", "<s> $A"), letters("ACGT")):
        with pytest.raises(ValueError, match="nothing is left of the text 'hello'"):
            text.encode(tokenizer, "hello")
        assert text.encode(tokenizer, "hello A")[-1] == 0


def test_encode_batch_ignores_what_the_last_call_left_behind():
    tokenizer = word_tokenizer("<s> $A", pad_token="<unk>")
    before = text.fingerprint(tokenizer)
    for check in (
        lambda: text.encode_batch(tokenizer, ["a b c d", "a"]) == [[3, 4, 5, 6], [3]],
        lambda: text.fingerprint(tokenizer) == before,
    ):
        tokenizer(["a b c", "a"], truncation=True, max_length=2, padding="max_length")
        assert check()


def test_fingerprint_follows_the_rules():
    prints = {text.fingerprint(word_tokenizer(t)) for t in (None, "<s> $A", "<s> $A </s>")}
    assert len(prints) == 3


class TestWindows:
    """Golden windows of short texts; ids are positions in WORDS."""

    def test_with_bos_every_token_is_scored_once(self):
        tokens, scored = text.eval_windows(word_tokenizer("<s> $A"), ["a b c d e", "f"], 4)
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, [[1, 3, 4, 5], [1, 6, 7, 0], [1, 8, 0, 0]])
        np.testing.assert_array_equal(scored, [[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]])

    def test_without_bos_first_tokens_are_not_scored(self):
        # "f" of the first text stands alone in its window: nothing to score there.
        tokens, scored = text.eval_windows(word_tokenizer(), ["a b c d e f a b c", "d e"], 4)
        np.testing.assert_array_equal(tokens, [[3, 4, 5, 6], [7, 8, 3, 4], [6, 7, 0, 0]])
        np.testing.assert_array_equal(scored, [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0]])

    def test_rule_of_two_tokens_is_not_scored(self):
        tokens, scored = text.eval_windows(word_tokenizer("</s> <s> $A"), ["a b c"], 4)
        np.testing.assert_array_equal(tokens, [[2, 1, 3, 4], [2, 1, 5, 0]])
        np.testing.assert_array_equal(scored, [[0, 0, 1, 1], [0, 0, 1, 0]])

    @pytest.mark.parametrize("template", [None, "<s> $A"])
    @pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 6])
    def test_budget_is_exact(self, template, max_tokens):
        windows = text.eval_windows(word_tokenizer(template), ["a b c d e f", "a b"], 3, max_tokens)
        full = text.eval_windows(word_tokenizer(template), ["a b c d e f", "a b"], 3)
        assert windows.scored.sum() == min(max_tokens, full.scored.sum())
        n = len(windows.tokens)
        np.testing.assert_array_equal(
            windows.tokens[windows.scored], full.tokens[:n][windows.scored]
        )

    def test_ids_and_strings_give_the_same_windows(self):
        tokenizer = word_tokenizer("<s> $A")
        from_ids = text.eval_windows(tokenizer, [np.array([3, 4, 5, 6, 7])], 4)
        from_text = text.eval_windows(tokenizer, ["a b c d e"], 4)
        np.testing.assert_array_equal(from_ids.tokens, from_text.tokens)

    def test_of_a_long_text_only_the_beginning_is_tokenised(self):
        """A token that the model lacks stands far behind the windows that were asked for."""
        tokenizer, long = word_tokenizer("<s> $A"), "a b c\n" * 200_000
        windows = text.eval_windows(tokenizer, [long + "f"], 5, 1000, vocab_size=6)
        np.testing.assert_array_equal(windows.tokens[windows.scored], [3, 4, 5] * 333 + [3])
        with pytest.raises(ValueError, match="contains 'f', id 8"):
            text.eval_windows(tokenizer, [long[:60_000] + "f"], 5, vocab_size=6)

    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(st.lists(st.integers(3, 8), max_size=20), min_size=1, max_size=5).filter(any),
        st.integers(2, 9),
    )
    def test_scored_tokens_are_the_texts(self, texts, length):
        windows = text.eval_windows(word_tokenizer("<s> $A"), texts, length)
        assert windows.tokens[windows.scored].tolist() == sum(texts, [])

    def test_nothing_to_score(self):
        with pytest.raises(ValueError, match="at least two tokens"):
            text.eval_windows(word_tokenizer(), ["a", ""], 4)
        with pytest.raises(ValueError, match="context_length=1 .* at least 2"):
            text.eval_windows(word_tokenizer("<s> $A"), ["a b"], 1)


def test_stop_ids_are_all_that_are_named():
    tokenizer = word_tokenizer()
    assert text.stop_ids(tokenizer) == (2,)
    assert text.stop_ids(tokenizer, {"bos_token_id": 1}) == (2,)
    assert text.stop_ids(tokenizer, {"eos_token_id": 7}) == (2, 7)
    assert text.stop_ids(tokenizer, {"eos_token_id": [8, 7, 2]}) == (2, 7, 8)
    assert text.stop_ids(tokenizer, {"eos_token_id": [7, None]}) == (2, 7)
    assert text.stop_ids(tokenizer, {"eos_token_id": []}) == (2,)
    assert text.stop_ids(word_tokenizer(eos_token=None)) == ()
    assert text.stop_ids(word_tokenizer(eos_token=None), {"eos_token_id": 0}) == (0,)
    tokenizer.init_kwargs["stop_token_ids"] = [5, 4]  # a GGUF's
    assert text.stop_ids(tokenizer, {}) == (2, 4, 5)
    assert text.stop_ids(tokenizer, {"eos_token_id": 7}) == (2, 4, 5, 7)


@pytest.mark.parametrize("value", [256.0, "256", [[256]], True, [2, False], -1, {"id": 2}])
def test_a_stop_id_that_is_no_id_is_named(value):
    with pytest.raises(ValueError) as error:
        text.stop_ids(word_tokenizer(), {"eos_token_id": value})
    message = str(error.value)
    assert f"eos_token_id in generation_config.json is {json.dumps(value)};" in message
    assert "\n" not in message


def test_chat_template_writes_its_own_bos():
    tokenizer = word_tokenizer("<s> $A")
    with pytest.raises(ValueError, match="no chat template.*--chat"):
        text.apply_chat(tokenizer, "a")
    tokenizer.chat_template = (
        "<s> {% for m in messages %}{{ 'd' if m.role == 'user' else 'e' }} {{ m.content }} "
        "{% endfor %}{% if add_generation_prompt %}e{% endif %}"
    )
    assert text.apply_chat(tokenizer, "a b") == [1, 6, 3, 4, 7]
    tokenizer_of_rules = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="template refuses the conversation: roles must alternate"):
        text.apply_chat(tokenizer, "a b")
    tokenizer.chat_template = tokenizer_of_rules
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert text.apply_chat(tokenizer, messages) == [1, 6, 3, 7, 4, 6, 5, 7]


class TestVocabulary:
    def test_more_rows_than_tokens_are_fine(self):
        refused = []
        for rows in (len(WORDS) - 1, len(WORDS), 64):
            try:
                text.check_vocabulary(word_tokenizer("<s> $A"), rows)
            except ValueError:
                refused.append(rows)
        assert refused == [len(WORDS) - 1]

    def test_ordinary_tokens_must_fit(self):
        with pytest.raises(ValueError, match=r"ids up to 8, .* rows for 0..6 \(2 .*'e' = 7"):
            text.check_vocabulary(word_tokenizer("<s> $A"), 7)

    def test_added_eos_must_fit(self):
        with pytest.raises(ValueError, match=r"'<end>' = 9"):
            text.check_vocabulary(word_tokenizer(eos_token="<end>"), len(WORDS))

    def test_token_without_a_row_is_refused_only_where_it_is_written(self):
        tokenizer = word_tokenizer("<s> $A")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        text.check_vocabulary(tokenizer, len(WORDS))
        assert text.encode(tokenizer, "a b", vocab_size=len(WORDS)) == [1, 3, 4]
        with pytest.raises(ValueError, match="contains '<image>', id 9"):
            text.encode(tokenizer, "a <image> b", vocab_size=len(WORDS))


class TestLoading:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no tokenizer directory"):
            text.load_tokenizer(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="no tokenizer in .* tokenizer.json"):
            text.load_tokenizer(tmp_path)

    def test_corrupt(self, tmp_path):
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
        (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
        with pytest.raises(ValueError, match="cannot be loaded"):
            text.load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        "values",
        [
            {"initializer_range": 1},
            {"attention_bias": 0},
            {"model_type": "qwen3", "head_dim": None},
        ],
    )
    def test_a_config_that_transformers_refuses(self, tmp_path, values):
        for file in TINY.iterdir():
            if "token" in file.name:
                (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((TINY / "config.json").read_text()) | values
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError) as error:
            text.load_tokenizer(tmp_path)
        message, (key, value) = str(error.value), list(values.items())[-1]
        assert f"refuses {tmp_path}/config.json" in message and "\n" not in message
        assert f"'{key}' expected " in message and f"(value: {value})" in message

    def test_sentencepiece_is_named_where_it_is_missing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
        (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        with pytest.raises(ValueError) as error:
            text.load_tokenizer(tmp_path)
        message = str(error.value)
        assert f"{tmp_path}/tokenizer.model" in message and "\n" not in message
        assert message.endswith("pip install sentencepiece") and "tiktoken" not in message

    def test_sentencepiece_alone(self, tmp_path):
        sentencepiece = pytest.importorskip("sentencepiece")
        (tmp_path / "corpus.txt").write_text("the old man looked at the sea\n" * 20)
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"),
            vocab_size=300, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
        ids = text.encode_batch(text.load_tokenizer(tmp_path), ["the sea, 42"])[0]
        assert ids == reference.encode("the sea, 42")

    def test_saved_tokenizer_comes_back(self, tmp_path):
        tokenizer = word_tokenizer("<s> $A")
        tokenizer.save_pretrained(tmp_path)
        loaded = text.load_tokenizer(tmp_path)
        assert text.encode(loaded, "a f") == [1, 3, 8]
        assert text.fingerprint(loaded) == text.fingerprint(tokenizer)


class TestTinyTokenizer:
    """The tokenizer shipped in assets/tiny."""

    def test_conventions(self, tiny):
        assert len(tiny) == 4096
        assert text.bos_prefix(tiny) == [tiny.bos_token_id]
        assert text.stop_ids(tiny) == (tiny.eos_token_id,)
        assert len({tiny.bos_token_id, tiny.eos_token_id, tiny.pad_token_id}) == 3
        assert sum(f.stat().st_size for f in TINY.iterdir() if "token" in f.name) < 300_000

    @settings(max_examples=200, deadline=None)
    @given(string=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def test_round_trip(self, tiny, string):
        assert tiny.decode(text.encode(tiny, string), skip_special_tokens=True) == string

    def test_words_digits_and_indentation_are_pieces(self, tiny):
        def pieces(string):
            return tiny.convert_ids_to_tokens(text.encode(tiny, string)[1:])

        assert pieces("The old man looked.") == ["The", "Ġold", "Ġman", "Ġlooked", "."]
        assert pieces(" in 1903") == ["Ġin", "Ġ", "1", "9", "0", "3"]
        assert pieces(":\n        return") == [":", "Ċ", "Ġ" * 7, "Ġreturn"]


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match="cannot be written as UTF-8"):
        text.encode(word_tokenizer(), "a \ud800 b")


def test_windows_refuse_ids_beyond_the_model():
    with pytest.raises(ValueError, match=r"id \d+, which this model does not have"):
        text.eval_windows(word_tokenizer(), ["a b c d"], 4, vocab_size=4)
