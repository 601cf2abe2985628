"""The server, driven over HTTP by the clients that people have."""

import configparser
import json
import pathlib
import re
import shlex

import pytest
from absl import flags

pytest.importorskip("uvicorn", reason="pip install 'recursive_jax[serve]'")

import serving  # noqa: E402
from serving import call  # noqa: E402

from recursive_jax import serve  # noqa: E402
from recursive_jax.decoding.prompts import make_request  # noqa: E402
from recursive_jax.decoding.session import generate  # noqa: E402

PROMPT = "Return a new"


@pytest.fixture(scope="module")
def url():
    with serving.running(serving.engine()) as found:
        yield found


def expected(count=12, prompt=None, **options):
    """What the engine itself answers."""
    ids = prompt or serving.model().tokenizer.encode(PROMPT)
    options = {"max_new_tokens": count, "temperature": 0.0, **options}
    request = make_request(0, ids, serving.model().stop, options)
    return generate(own_engine(), [request], serving.model().tokenizer)[0]


def own_engine():
    return serving.engine(1)


@pytest.fixture(scope="module")
def openai(url):
    package = pytest.importorskip("openai", reason="pip install openai")
    return package.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_openai_completions(openai):
    want = expected()
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    options["extra_body"] = {"return_exit_loops": True}
    answer = openai.completions.create(**options)
    (choice,) = answer.choices
    assert choice.text == want.text and choice.finish_reason == want.finish_reason
    assert choice.exit_loops == want.exit_loops and set(want.exit_loops) == {1, 2}
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 12)
    assert usage.mean_loops == pytest.approx(sum(want.exit_loops) / 12)
    assert usage.exit_loops == {str(n): want.exit_loops.count(n) for n in (1, 2)}
    stream = openai.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == want.text
    assert sum((chunk.choices[0].exit_loops for chunk in chunks), []) == want.exit_loops
    assert len(chunks) > 3 and not last.choices
    assert last.usage.exit_loops == usage.exit_loops


def test_openai_chat(openai):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 6}
    answer = openai.chat.completions.create(**options)
    ids = serving.model().tokenizer.encode("system: Be brief.\nuser: Hi\n")
    assert answer.usage.prompt_tokens == len(ids)
    request = make_request(0, ids, serving.model().stop, {"max_new_tokens": 6})
    want = generate(own_engine(), [request], serving.model().tokenizer)[0]
    assert answer.choices[0].message.content == want.text
    assert answer.choices[0].finish_reason == "length"
    chunks = list(openai.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == want.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models_and_health(url, openai):
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert call(url, "/health") == (200, {"status": "ok"})


def test_lm_eval_gives_the_scores_of_our_own_evaluate(url, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install 'lm-eval[api]'")
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    pairs = [("The list", " is sorted"), ("Return a new", " string"), ("", "Once upon a time")]
    pairs += [("x = 1", "\ny = 2"), ("The first word that the list has", " is a long name")]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    tokenizer = serving.model().tokenizer
    ids = tokenizer.encode("Return a new")
    top = generate(own_engine(), [make_request(0, ids, (), {"max_new_tokens": 1})], tokenizer)
    greedy = Instance("loglikelihood", {}, ("Return a new", top[0].text), len(pairs))
    tokenizer.save_pretrained(tmp_path)
    theirs = get_model("local-completions").create_from_arg_string(
        f"model=tiny,base_url={url}/v1/completions,tokenizer={tmp_path},add_bos_token=True,"
        "tokenizer_backend=huggingface,max_length=96,max_retries=1,batch_size=2"
    )
    got = theirs.loglikelihood([*asked, greedy], disable_tqdm=True)
    want = serving.model().harness(dtype="float32").loglikelihood([*asked, greedy])
    assert [value for value, _ in got] == pytest.approx([value for value, _ in want], abs=1e-4)
    assert [likeliest for _, likeliest in got] == [likeliest for _, likeliest in want]
    assert want[-1][1]
    remote = get_model("local-completions").create_from_arg_string(
        f"model=tiny,base_url={url}/v1/completions,max_length=96,max_retries=1"
    )
    assert remote.tokenizer_backend == "remote" and remote.tok_encode("Return a new") == ids[1:]
    until = Instance(
        "generate_until", {}, ("Return a new", {"until": ["\n"], "max_gen_toks": 9}), 0
    )
    answer = expected(9, stop=("\n",), prompt=ids[1:])
    assert remote.generate_until([until], disable_tqdm=True) == [answer.text]


def test_langchain(url):
    package = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    options = dict(model="tiny", base_url=f"{url}/v1", api_key="none", temperature=0, max_retries=0)
    model = package.ChatOpenAI(**options, max_tokens=6)
    messages = [("system", "Be brief."), ("user", [{"type": "text", "text": "Hi"}])]
    ids = serving.model().tokenizer.encode("system: Be brief.\nuser: Hi\n")
    want = expected(6, prompt=ids)
    answer = model.invoke(messages)
    assert answer.content == want.text and answer.usage_metadata["output_tokens"] == 6
    assert "".join(chunk.content for chunk in model.stream(messages)) == want.text
    assert package.OpenAI(**options, max_tokens=12).invoke(PROMPT) == expected().text


def test_llm(url, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")  # others' may lack what they import
    cli = pytest.importorskip("llm.cli", reason="pip install llm")
    from click.testing import CliRunner

    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    arguments = ["openai", "endpoint", f"{url}/v1", "Hi", "-m", "tiny", "-o", "temperature", "0"]
    arguments += ["-o", "max_tokens", "6"]
    want = expected(6, prompt=serving.model().tokenizer.encode("user: Hi\n"))
    for more in ([], ["--no-stream"]):
        result = CliRunner().invoke(cli.cli, [*arguments, *more])
        assert result.exit_code == 0 and result.output.rstrip("\n") == want.text.rstrip("\n")


def test_the_openapi_document_describes_every_route(url):
    document = call(url, "/docs")[1]
    for path, methods in document["paths"].items():
        for method in methods:
            status, _ = call(url, path, {} if method == "post" else None, method.upper())
            assert status in (200, 400), path  # 404 and 405 if there were no such route
    fields = document["components"]["schemas"]["CompletionBody"]["properties"]
    assert {"prompt", "max_loops", "lossless"} <= set(fields)


def test_the_files_of_launch_name_what_there_is(url):
    yaml = pytest.importorskip("yaml")
    launch = pathlib.Path(__file__).resolve().parents[1] / "launch"
    dashboard = (launch / "serve_grafana.json").read_text()
    assert len(json.loads(dashboard)["panels"]) == 8
    known = call(url, "/metrics")[1]
    named = set(re.findall(r"recursive_jax_\w+", dashboard))
    assert named and all(re.search(rf"(?m)^{name}[ {{]", known) for name in named), named
    compose = yaml.safe_load((launch / "serve.compose.yaml").read_text())["services"]
    files = [v.partition(":")[0] for s in compose.values() for v in s.get("volumes", [])]
    for name in (compose["serve"]["build"]["dockerfile"].partition("/")[2], *files):
        assert name.startswith("$") or (launch / name).exists()
    scrape = yaml.safe_load((launch / "serve_prometheus.yaml").read_text())["scrape_configs"]
    assert scrape[0]["static_configs"][0]["targets"] == ["serve:8000"]
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str
    unit.read(launch / "recursive-jax-serve.service")
    command = shlex.split(unit["Service"]["ExecStart"])
    image = (launch / "serve.Dockerfile").read_text()
    entry = json.loads(re.search(r"(?m)^ENTRYPOINT (.*)$", image)[1])
    arguments = json.loads(re.search(r"(?m)^CMD (.*)$", image)[1])
    for words in (command, entry + arguments, entry + compose["serve"]["command"]):
        values = flags.FlagValues()
        serve.define_flags(values)
        place = words.index("recursive_jax.serve")
        assert words[place - 1] == "-m" and values(words[place:])


def test_values_that_shape_an_answer(url):
    """Seeds, several choices, stops, echo and log-probabilities."""
    sampled = {"prompt": [PROMPT, "a"], "n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    found = call(url, "/v1/completions", sampled)[1]["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    for number, choice in enumerate(found):
        prompt = serving.model().tokenizer.encode([PROMPT, "a"][number // 2])
        assert choice["text"] == expected(8, prompt, temperature=1.0, seed=5 + number).text
    whole = expected()
    stop = whole.text[4:6]
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    cut = call(url, "/v1/completions", body | {"stop": stop, "logprobs": 0})[1]
    assert cut["choices"][0]["text"] == whole.text[: whole.text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    count = cut["usage"]["completion_tokens"]
    listed = cut["choices"][0]["logprobs"]
    assert listed["token_logprobs"] == pytest.approx(whole.logprobs[:count], abs=1e-4)
    for options in ({"min_loops": 2}, {"lossless": True}):
        loops = call(url, "/v1/completions", body | options)[1]["usage"]["exit_loops"]
        assert loops == {"2": 12}
    early = call(url, "/v1/completions", body | {"max_loops": 1, "return_exit_loops": True})[1]
    assert early["choices"][0]["exit_loops"] == [2] + [1] * 11
    deep = call(url, "/v1/completions", body | {"exit_measure_threshold": 1.0})[1]
    assert deep["usage"]["mean_loops"] == 2
    for more in (0, 3):
        ids = serving.model().tokenizer.encode(PROMPT)
        echoed = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": more}
        echoed |= {"temperature": 0} if more else {}
        (choice,) = call(url, "/v1/completions", echoed)[1]["choices"]
        assert choice["text"] == PROMPT + expected(3).text * bool(more)
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + more and logprobs["token_logprobs"][0] is None
        joined = "".join(logprobs["tokens"][1:])
        assert joined == choice["text"]
        stream = call(url, "/v1/completions", echoed | {"stream": True})[1]
        pieces = [
            json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")
        ]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]


def test_the_most_likely_tokens_beside_sampled_ones(url):
    """A second pass over the answer finds them; its log-probabilities are those of the engine."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "seed": 3}
    body |= {"logprobs": True, "top_logprobs": 3}
    for refused in (body, body | {"lossless": True, "stream": True}):
        status, found = call(url, "/v1/chat/completions", refused)
        assert status == 400 and found["error"]["message"].startswith("logprobs: ")
    found = call(url, "/v1/chat/completions", body | {"lossless": True})[1]["choices"][0]
    prompt = serving.model().tokenizer.encode("user: Hi\n")
    want = expected(5, prompt, temperature=1.0, seed=3, min_loops=2)
    assert found["message"]["content"] == want.text
    content = found["logprobs"]["content"]
    assert [token["logprob"] for token in content] == pytest.approx(want.logprobs, abs=1e-4)
    for token in content:
        tops = [top["logprob"] for top in token["top_logprobs"]]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True)
        assert token["logprob"] <= tops[0]
        listed = token["token"] in [top["token"] for top in token["top_logprobs"]]
        assert listed is (token["logprob"] >= tops[-1])
