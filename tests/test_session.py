"""Sessions: events and completions, text in pieces, and stop strings."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from decode_models import make_engine, scanned
from hypothesis import given, settings
from hypothesis import strategies as st

from recursive_jax import text
from recursive_jax.decoding.exit_measures import Recorded, Static
from recursive_jax.decoding.prompts import Prompt, to_request
from recursive_jax.decoding.requests import Request, Sampling
from recursive_jax.decoding.session import Session, generate, stream
from recursive_jax.decoding.stop_strings import StopStrings
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params
from recursive_jax.weights.source import ASSETS

TINY = DecoderConfig(
    family="llama", vocab_size=4096, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
    head_dim=8, num_layers=1, num_loops=2, norms="per_loop", lora_ranks=dict(q=2, down=3),
    max_length=64,
)  # fmt: skip
WORDS = ["Once upon", "a", "日本", "list of", "x = 1"]


@functools.cache
def tokenizer():
    return text.load_tokenizer(ASSETS / "tiny")


@functools.cache
def engine_of(num_slots=2, **options):
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (rng.normal(size=leaf.shape) * 0.4).astype(np.float32)

    params = jax.device_put(jax.tree.map(draw, abstract_params(TINY)))
    return make_engine(scanned(TINY), params, num_slots, 64, chunk_length=4, **options)


@settings(max_examples=300, deadline=None)
@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("ab", max_size=3), max_size=9),
)
def test_stop_strings_are_found_and_held_back(strings, pieces):
    """Against a search of the whole text after every piece."""
    stop, whole, released = StopStrings(strings), "", ""
    for piece in pieces:
        whole += piece
        released += stop.add(piece)
        found = min((whole.find(s) for s in strings if s in whole), default=None)
        assert stop.found == found
        if found is not None:
            assert released == whole[:found]
            return
        ends = [whole[len(whole) - n :] for n in range(1, len(whole) + 1)]
        held = [end for end in ends if any(s.startswith(end) for s in strings)]
        assert released + max(held, key=len, default="") == whole
    assert released + stop.finish() == whole


def answers_of(engine, requests, max_ticks=8):
    """Completions, pieces of each, and the number of ticks."""
    session = Session(engine, tokenizer())
    indices = [session.submit(request) for request in requests]
    done, pieces = {}, {index: [] for index in indices}
    tokens = {index: [] for index in indices}
    while not session.idle:
        for event in session.round(max_ticks)[0]:
            assert event.index not in done, "an event after the last"
            pieces[event.index].append(event.piece)
            tokens[event.index] += event.tokens
            assert len(event.tokens) == len(event.exit_loops) == len(event.logprobs)
            if event.completion:
                done[event.index] = event.completion
                assert event.finish_reason == event.completion.finish_reason
                whole = event.completion.tokens
                stops = requests[indices.index(event.index)].stop_strings
                # a stop string may begin in the tokens of an earlier event
                assert tokens[event.index][: len(whole)] == whole
                assert stops or tokens[event.index] == whole
            else:
                assert event.finish_reason is None
    return [done[i] for i in indices], [pieces[i] for i in indices], session.stats.ticks


def requests_of(number=5):
    return [
        Request(i, text.encode(tokenizer(), word), 24, sampling=Sampling(1.0 * (i % 2), seed=i))
        for i, word in zip(range(number), WORDS[:number], strict=True)
    ]


@pytest.mark.parametrize("max_ticks", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"measure": Static(1), "missing_kv": "propagate"},
        {"measure": Static(1), "lossless": True},
    ],
    ids=["full depth", "propagate", "lossless"],
)
def test_text_ends_where_a_stop_string_begins(options, max_ticks):
    """Strings that cross tokens, begin with the answer, never come; two slots for five requests."""
    engine, decode = engine_of(**options), functools.partial(tokenizer().decode)
    requests = requests_of()
    whole, pieces, ticks = answers_of(engine, requests)
    for request, completion, parts in zip(requests, whole, pieces, strict=True):
        assert completion.finish_reason == "length"
        prompt = decode(request.tokens, skip_special_tokens=True)
        everything = decode([*request.tokens, *completion.tokens], skip_special_tokens=True)
        assert completion.text == everything[len(prompt) :] == "".join(parts)
    strings = [c.text[5 * (i > 0) + i :][: 4 + i] for i, c in enumerate(whole)]
    assert len({len(s) for s in strings}) > 2 and whole[0].text.startswith(strings[0])
    strings[4] = "this never comes"
    cut = [
        dataclasses.replace(r, stop_strings=("\0", s))
        for r, s in zip(requests, strings, strict=True)
    ]
    ours, pieces, fewer = answers_of(engine, cut, max_ticks)
    assert fewer < ticks or max_ticks == 1, "a slot that stopped is free for the next request"
    for mine, full, request, parts in zip(ours, whole, cut, pieces, strict=True):
        string = request.stop_strings[1]
        end = full.text.find(string)
        expected = full.text if end < 0 else full.text[:end]
        assert mine.text == expected == "".join(parts)
        assert mine.finish_reason == ("length" if end < 0 else "stop")
        count = len(mine.tokens)
        assert (mine.tokens, mine.exit_loops) == (full.tokens[:count], full.exit_loops[:count])
        assert len(mine.logprobs) == count
        # the fewest tokens that hold the text
        before = len(decode(request.tokens, skip_special_tokens=True))
        texts = [
            decode([*request.tokens, *full.tokens[:n]], skip_special_tokens=True)[before:]
            for n in range(len(full.tokens) + 1)
        ]
        if end >= 0:
            assert count == min(n for n, t in enumerate(texts) if t.startswith(expected))


def test_a_stop_string_beats_what_comes_behind_it_in_the_same_round():
    """The last token the limit allows, and a stop token, are decoded in the round of the match."""
    engine = engine_of()
    request = requests_of()[0]
    (whole,), _, _ = answers_of(engine, [request])
    pieces = [tokenizer().decode([t]) for t in whole.tokens[:3]]
    cut = dataclasses.replace(
        request, max_new_tokens=4, stop=(whole.tokens[3],), stop_strings=(pieces[1],)
    )
    (mine,), _, _ = answers_of(engine, [cut])
    assert mine.finish_reason == "stop" and mine.text == whole.text[: whole.text.find(pieces[1])]
    nothing = dataclasses.replace(request, max_new_tokens=4, stop_strings=("never",))
    (mine,), parts, _ = answers_of(engine, [nothing])
    assert mine.finish_reason == "length" and mine.text == "".join(parts[0])


def test_a_special_token_is_a_stop_string():
    """Texts hold no special tokens: it stops at the id, or with other text beside is refused."""
    engine, pad = engine_of(), tokenizer().pad_token_id
    prompt = Prompt("x", "Once upon", {"max_new_tokens": 24})
    sizes = {"vocab_size": TINY.vocab_size, "stop_ids": (1,), "context_length": 64}
    request = to_request(prompt, tokenizer(), **sizes)
    (whole,) = generate(engine, [request], tokenizer())
    token = whole.tokens[6]
    count = whole.tokens.index(token)
    assert token not in request.tokens and token not in (1, pad)
    # The same model with other names for two tokens: it says <|pad|> where it said `token`.
    order = np.arange(TINY.vocab_size)
    order[[pad, token]] = token, pad
    params = engine.params
    engine.params = {**params, "embedding": params["embedding"][order]}
    try:
        stop = tokenizer().pad_token
        prompt.options["stop"] = [stop, "\0"]
        request = to_request(prompt, tokenizer(), **sizes)
        assert request.stop == (1, pad)
        (mine,) = generate(engine, [request], tokenizer())
        assert mine.finish_reason == "stop" and mine.tokens == whole.tokens[:count]
        assert mine.text == tokenizer().decode(mine.tokens)
        prompt.options["stop"] = f"\n{stop}"
        with pytest.raises(
            ValueError, match=r"stop='\\n<\|pad\|>' holds the special token '<\|pad"
        ):
            to_request(prompt, tokenizer(), **sizes)
    finally:
        engine.params = params


def test_cancelled_and_refused_requests_have_no_events():
    engine = engine_of(measure=Recorded())
    session = Session(engine, tokenizer())
    requests = [dataclasses.replace(r, recorded_loops=(2, 1) * 12) for r in requests_of()]
    with pytest.raises(ValueError, match="recorded_loops"):
        session.submit(requests_of()[0])
    indices = [session.submit(r) for r in requests]
    assert indices == [1, 2, 3, 4, 5]
    session.round()
    session.cancel(1)
    session.cancel(4)
    events = list(session.events())
    assert sorted(e.index for e in events if e.completion) == [2, 3, 5]
    assert {e.index for e in events} == {2, 3, 5}


def test_a_session_without_a_tokenizer_has_the_same_tokens_and_no_text():
    engine, requests = engine_of(), requests_of()
    with_text, without = generate(engine, requests, tokenizer()), generate(engine, requests)
    assert all(c.text for c in with_text)
    assert without == [dataclasses.replace(c, text="") for c in with_text]
    (cut,) = generate(engine, [dataclasses.replace(requests[0], stop_strings=(" ",))])
    assert cut == without[0], "stop strings need a tokenizer"


def test_a_stop_string_frees_the_slot_for_the_next_request():
    """Two slots: the third request ends while the second one still decodes."""
    engine, (first, second, *_) = engine_of(), requests_of()
    (whole,), _, _ = answers_of(engine, [first])
    session = Session(engine, tokenizer())
    session.submit(dataclasses.replace(first, stop_strings=(whole.text[:1],)))
    session.submit(second)
    session.submit(dataclasses.replace(first, max_new_tokens=2))
    stopped, third, last = [event for event in session.events(2) if event.completion]
    assert (stopped.index, stopped.finish_reason, stopped.completion.text) == (0, "stop", "")
    assert stopped.tokens == () and stopped.completion.tokens == []
    assert (third.index, third.completion.tokens) == (2, whole.tokens[:2])
    assert (last.index, last.finish_reason) == (1, "length")


def test_a_stream_goes_on_after_a_request_that_cannot_be_answered():
    engine = engine_of()
    good, bad = requests_of(2)
    bad = dataclasses.replace(bad, max_new_tokens=64)
    events = list(stream(engine, [bad, good], tokenizer(), max_ticks=4))
    assert (events[0].index, events[0].finish_reason) == (0, "error")
    assert "max_new_tokens=64 do not fit into" in events[0].error == events[0].completion.error
    assert events[0].completion.id == bad.id and not events[0].tokens
    assert all(e.index == 1 for e in events[1:]) and len(events) > 4
    failed, answer = generate(engine, [bad, good], tokenizer())
    assert failed == events[0].completion and answer == events[-1].completion
    assert answer.text == "".join(e.piece for e in events[1:])
