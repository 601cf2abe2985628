"""The server, driven over HTTP by the clients that people have."""

import pytest

pytest.importorskip("uvicorn", reason="pip install 'recursive_jax[serve]'")

import serving  # noqa: E402
from serving import call  # noqa: E402

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
    return serving.engine(num_stop=19)


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
