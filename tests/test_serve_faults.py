"""What a server does with clients' mistakes, with clients that vanish, and with its own faults."""

import concurrent.futures
import dataclasses
import functools
import http.client
import json
import logging
import re
import time

import jax
import numpy as np
import pytest
from absl import flags

pytest.importorskip("uvicorn", reason="pip install 'recursive_jax[serve]'")

import serving  # noqa: E402
from serving import call  # noqa: E402

from recursive_jax import serve  # noqa: E402
from recursive_jax.model import load  # noqa: E402
from recursive_jax.serving import server as server_lib  # noqa: E402
from recursive_jax.serving.limits import ServerLimits  # noqa: E402
from recursive_jax.weights import checkpoint as checkpoint_lib  # noqa: E402

PATH, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"prompt": "Return a new", "max_tokens": 80, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def url():
    with serving.running(serving.engine()) as found:
        yield found


@pytest.fixture
def slow(monkeypatch):
    """An engine whose steps take a while."""
    engine = serving.engine()
    step = engine.step

    def slow_step(*args, **options):
        time.sleep(0.05)
        return step(*args, **options)

    monkeypatch.setattr(engine, "step", slow_step)
    return engine


def metric(url, name):
    text = call(url, "/metrics")[1]
    return float(re.search(rf"^recursive_jax_{name} (\S+)$", text, re.M)[1])


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def body(**changes):
    return {"prompt": "a", "max_tokens": 2, **changes}


MISTAKES = [
    (b"{", "not JSON"),
    (b"", "prompt"),
    (b"[1]", "object"),
    (b"[" * 10_000, "not JSON"),
    (b'{"prompt": "\\ud800"}', "not JSON"),
    (b'{"prompt": "\xff"}', "not JSON"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "a", "n": 1' + b"0" * 3000 + b"}", "n"),
    (body(temperature=1e308), "temperature"),
    (body(temperature="1"), "temperature"),
    (body(temperature=-1), "temperature"),
    (body(top_p=0), "top_p"),
    (body(n=0), "n"),
    (body(n=True), "n"),
    (body(n=10**9), "8 choices"),
    (body(prompt=["a"] * 9), "8 choices"),
    (body(prompt=[]), "empty"),
    (body(prompt=[[]]), "no tokens"),
    (body(prompt=[[1], "a"]), "expected a text"),
    (body(prompt=[-1]), "expected a text"),
    (body(prompt=[4096]), "4095"),
    (body(prompt={"a": 1}), "expected a text"),
    (body(prompt="word " * 200), "exceed the context of 96"),
    (body(max_tokens=10**9), "exceed the context of 96"),
    (body(max_tokens=0), "max_tokens"),
    (body(stop=["a"] * 17), "stop"),
    (body(stop=""), "stop"),
    (body(stop=["a" * 300]), "stop"),
    (body(stop=["a<|eos|>b"]), "special token"),
    (body(stop=5), "stop"),
    (body(logprobs=6), "logprobs"),
    (body(seed=2**70), "seed"),
    (body(model="gpt"), "'tiny'"),
    (body(tools=[{}]), "tools is not supported"),
    (body(response_format={"type": "json_object"}), "response_format is not supported"),
    (body(logit_bias={"5": 1}), "logit_bias is not supported"),
    (body(best_of=2), "best_of is not supported"),
    (body(nonsense=1), "nonsense"),
    (body(stream_options={"a": 1}), "stream_options.a"),
    (body(max_loops=3), "2 loops"),
    (body(min_loops=2, max_loops=1), "max_loops"),
    (body(exit_measure_threshold=7), "threshold"),
    (body(lossless=True, max_loops=1), "lossless"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}, "logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1,
      "max_completion_tokens": 2}, "differ"),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "words"), MISTAKES)
def test_a_mistake_is_told_in_a_sentence(url, sent, words):
    path = CHAT if isinstance(sent, dict) and "messages" in sent else PATH
    status, found = call(url, path, sent)
    assert status == (404 if words == "'tiny'" else 400), found
    message = found["error"]["message"]
    assert words in message and len(message) < 500 and "\n" not in message


def test_null_and_neutral_values_are_no_mistakes(url):
    neutral = {"tools": [], "response_format": {"type": "text"}, "logit_bias": {}, "best_of": 1}
    nothing = {"temperature": None, "stop": None, "logprobs": None, "seed": None, "user": "me"}
    status, found = call(url, PATH, body(**neutral, **nothing))
    assert status == 200 and found["usage"]["completion_tokens"] <= 2


def test_bodies_hosts_and_kinds(url):
    assert call(url, PATH, body(prompt="a" * 30_000))[0] == 413
    assert call(url, PATH, b"{}", **{"Content-Length": "99999999999"})[0] == 413
    assert call(url, PATH, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert call(url, "/v1/models", Host="evil.example")[0] == 400
    assert call(url, "/nothing")[0] == 404
    assert call(url, PATH)[0] == 405
    connection = serving.connect(url)  # chunked, without a length
    connection.request("POST", PATH, iter([b"a" * 9000] * 9), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 413


def test_a_key(caplog):
    with serving.running(serving.engine(), key="sésame") as url:
        assert call(url, "/health")[0] == 200
        for value in ("", "Bearer", "Bearer wrong", "Basic s\xe9same", "Bearer s\xff"):
            assert call(url, PATH, body(), Authorization=value)[0] == 401
            assert call(url, "/admin/reload", {}, Authorization=value)[0] == 401
        key = "Bearer sésame".encode()
        assert call(url, PATH, body(), Authorization=key)[0] == 200


def test_a_client_that_goes_away_frees_its_slot(slow):
    with serving.running(slow) as url:
        for stream in (True, False):
            connection = serving.connect(url)
            sent = json.dumps(LONG | {"n": 2, "stream": stream})
            connection.request("POST", PATH, sent, {"Content-Type": "application/json"})
            wait_until(lambda: metric(url, "requests_running") == 2)
            before = metric(url, "ticks_total")
            if stream:
                connection.getresponse().close()
            connection.close()
            assert call(url, PATH, body(max_tokens=1))[0] == 200
            assert metric(url, "ticks_total") - before < 60  # of 160 that they would have taken
            wait_until(lambda: metric(url, "requests_running") == 0)


def test_a_full_queue_and_the_time_limit(slow):
    limits = ServerLimits(max_queue=2, max_seconds=0.9)  # twenty steps of 0.05 s are needed
    longer = LONG | {"min_loops": 2}
    with serving.running(slow, limits=limits) as url:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(call, url, PATH, longer) for _ in range(6)]
            statuses = sorted(answer.result()[0] for answer in answers)
        assert statuses == [429, 429, 504, 504, 504, 504]
        stream = call(url, PATH, longer | {"stream": True, "n": 4})[1]
        assert "not answered within 0.9 s" in stream and "[DONE]" not in stream
        assert call(url, PATH, body())[0] == 200


def test_a_failure_of_the_engine_ends_the_requests_in_slots_only(monkeypatch, caplog):
    engine = serving.engine()
    step, fails = engine.step, []

    def failing(*args, **options):
        time.sleep(0.02)
        if fails:
            raise RuntimeError(fails.pop())
        return step(*args, **options)

    monkeypatch.setattr(engine, "step", failing)
    with serving.running(engine) as url:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(call, url, PATH, LONG | {"seed": n}) for n in range(4)]
            wait_until(lambda: metric(url, "requests_waiting") == 2)
            stream = pool.submit(call, url, PATH, LONG | {"stream": True})
            fails.append("out of luck")
            found = [answer.result() for answer in answers]
        assert sorted(status for status, _ in found) == [200, 200, 500, 500]
        (message,) = {f["error"]["message"] for status, f in found if status == 500}
        assert "the engine failed" in message and "luck" not in message
        assert stream.result()[1].endswith("data: [DONE]\n\n")
        texts = {f["choices"][0]["text"] for status, f in found if status == 200}
        assert texts == {call(url, PATH, LONG)[1]["choices"][0]["text"]}


def test_no_prompt_in_logs_or_metrics(url, caplog):
    caplog.set_level(logging.DEBUG)
    call(url, PATH, body(prompt="<|bos|>xylophone"))
    call(url, PATH, b'{"prompt": "xylophone')
    call(url, PATH, body(prompt="xylophone " * 100))
    assert "two BOS" in caplog.text
    assert "xylophone" not in caplog.text + call(url, "/metrics")[1]


def read_stream(connection):
    """The text that a stream brings before it ends or breaks, and whether it broke."""
    try:
        return connection.getresponse().read(), False
    except http.client.IncompleteRead as error:
        return error.partial, True


@pytest.mark.parametrize(("seconds", "done"), [(20, True), (0, False)])
def test_a_server_that_ends_drains_until_its_deadline(slow, seconds, done):
    with serving.running(slow, drain_seconds=seconds) as url:
        connection = serving.connect(url)
        sent = json.dumps(LONG | {"stream": True})
        connection.request("POST", PATH, sent, {"Content-Type": "application/json"})
        wait_until(lambda: metric(url, "requests_running") == 1)
    text, broken = read_stream(connection)
    assert text.startswith(b"data:") and (b"[DONE]" in text) is done and broken is not done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Step 0; `write(step, seed)` adds others."""
    directory = tmp_path_factory.mktemp("served") / "run"
    serving.model().save(directory)
    return directory


def write(directory, step, values):
    writer = checkpoint_lib.Writer(directory, keep=9)
    writer.save(step, values, wait=True)
    writer.close()


def test_weights_are_replaced_while_requests_run(checkpoint, slow):
    options = flags.FlagValues()
    serve.define_flags(options)
    options(["serve", f"--checkpoint={checkpoint}"])
    old = load(str(checkpoint))
    config = dataclasses.replace(slow.config, num_stop=4)
    reload = functools.partial(serve.reload, options, config, serving.placed(), old)
    first = slow.params
    with serving.running(slow, load=reload) as url:
        before = call(url, PATH, LONG)[1]["choices"][0]["text"]
        write(checkpoint, 1, serving.params(1))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            exchange = pool.submit(call, url, "/admin/reload", {})
            texts = []
            while not exchange.done():
                answers = [pool.submit(call, url, PATH, LONG) for _ in range(3)]
                texts += [answer.result()[1]["choices"][0]["text"] for answer in answers]
        assert exchange.result()[0] == 200 and exchange.result()[1]["step"] == 1
        status, after = call(url, PATH, LONG)
        assert after["system_fingerprint"] == "step-1"
        after = after["choices"][0]["text"]
        assert before != after and texts[0] == before and set(texts) <= {before, after}
        damaged = jax.tree.map(lambda x: x * np.float32("nan"), serving.params(2))
        write(checkpoint, 2, damaged)
        status, found = call(url, "/admin/reload", {})
        assert status == 400 and "not finite" in found["error"]["message"]
        assert call(url, "/admin/reload", {"step": 7})[0] == 400
        assert call(url, PATH, LONG)[1]["choices"][0]["text"] == after
        assert call(url, "/admin/reload", {"step": 0})[1]["step"] == 0
        assert call(url, PATH, LONG)[1]["choices"][0]["text"] == before
    slow.params = first


def test_an_address_that_is_taken_or_wrong():
    with server_lib.bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        for host, number in (("127.0.0.1", port), ("no such host", 0), ("127.0.0.1", 99999)):
            with pytest.raises(ValueError, match=f"--host={host} --port={number}: .*choose"):
                server_lib.bind(host, number)
