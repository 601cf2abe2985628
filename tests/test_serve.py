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


def expected(count=12, **options):
    """What the engine itself answers; it may be used while no request runs."""
    ids = serving.model().tokenizer.encode(PROMPT)
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
