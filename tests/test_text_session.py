"""Stop strings, held back and found, and text that follows what an engine decodes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recursive_jax import text
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.exit_measures import Recorded, Static
from recursive_jax.decoding.requests import Request, Sampling
from recursive_jax.decoding.text_session import StopStrings, TextSession
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params
from recursive_jax.weights.source import ASSETS

TINY = DecoderConfig(
    family="llama", vocab_size=4096, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
    head_dim=8, num_layers=1, num_loops=2, norms="per_loop", lora_ranks=dict(q=2, down=3),
    max_length=64,
)  # fmt: skip


@functools.cache
def tokenizer():
    return text.load_tokenizer(ASSETS / "tiny")


@functools.cache
def engine_of(num_slots=2, **options):
    rng = np.random.default_rng(0)
    draw = lambda leaf: (rng.normal(size=leaf.shape) * 0.4).astype(np.float32)  # noqa: E731
    params = jax.device_put(jax.tree.map(draw, abstract_params(TINY)))
    return Engine(Decoder(TINY), params, num_slots, 64, chunk_length=4, **options)


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
    """Completions, pieces of each, and how many ticks it took."""
    session = TextSession(engine, tokenizer())
    indices = [session.submit(request) for request in requests]
    done, pieces = {}, {index: [] for index in indices}
    while not session.idle:
        for news in session.round(max_ticks):
            assert news.index not in done, "news after the last"
            pieces[news.index].append(news.piece)
            if news.completion:
                done[news.index] = news.completion
                assert news.tokens == len(news.completion.tokens)
    return [done[i] for i in indices], [pieces[i] for i in indices], session.stats.ticks


def requests_of(number=5):
    return [
        Request(i, text.encode(tokenizer(), word), 24, sampling=Sampling(1.0 * (i % 2), seed=i))
        for i, word in zip(
            range(number), ["Once upon", "a", "日本", "list of", "x = 1"], strict=True
        )
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


def test_cancelled_and_refused_requests_bring_no_news():
    engine = engine_of(measure=Recorded())
    session = TextSession(engine, tokenizer())
    requests = [dataclasses.replace(r, recorded_loops=(2, 1) * 12) for r in requests_of()]
    with pytest.raises(ValueError, match="recorded_loops"):
        session.submit(requests_of()[0])
    indices = [session.submit(r) for r in requests]
    assert indices == [1, 2, 3, 4, 5]
    session.round()
    session.cancel(1)
    session.cancel(4)
    done = []
    while not session.idle:
        done += [n.index for n in session.round() if n.completion]
    assert sorted(done) == [2, 3, 5]
