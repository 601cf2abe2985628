"""The page at `/`: its files and feed over HTTP, and the whole of it in a headless Chromium."""

import asyncio
import contextlib
import functools
import itertools
import json
import pathlib
import re
import shutil
import threading
import time

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="pip install 'recursive_jax[serve]'")

import serving  # noqa: E402
from serving import call  # noqa: E402

from recursive_jax.decoding.engine import NewToken, Tick  # noqa: E402
from recursive_jax.serving.page.feed import Feed  # noqa: E402

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PROMPT = "Return a new"


@pytest.fixture
def url():  # a server for each test: one engine has one server at a time
    with serving.running(serving.engine()) as found:
        yield found


@contextlib.contextmanager
def feed(url, every=0.1, **headers):
    """The messages of a feed, one after another."""
    connection = serving.connect(url)
    connection.request("GET", f"/engine?every={every}", headers=headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()

    def messages():
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    with contextlib.closing(connection):
        yield messages()


def test_files_need_no_other_host_and_no_inline_script(url):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "javascript")):
        connection = serving.connect(url)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        assert answer.status == 200 and kind in answer.getheader("Content-Type")
        assert "default-src 'none'" in answer.getheader("Content-Security-Policy")
        assert "unsafe" not in answer.getheader("Content-Security-Policy")
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert not re.search(r"https?://|//[a-z]+\.[a-z]|\bstyle=|\bon[a-z]+=|innerHTML", body)
        assert not re.search(r"<script(?![^>]* src=)|<style", body)


def test_feed_tells_facts_then_news(url):
    with feed(url) as messages:
        facts = next(messages)
        assert facts["model"] == "tiny" and facts["loops"] == 2 and facts["slots"] == 2
        assert facts["measure"]["name"] == "top1" and facts["measure"]["low"] == 0
        assert facts["measure"]["own"] == pytest.approx([0.002])
        assert facts["can_exit"] and facts["chat"] and not facts["lossless"]
        asked = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        found = []
        thread = threading.Thread(target=lambda: found.append(call(url, "/v1/completions", asked)))
        thread.start()
        exits, grid, ticks = [0, 0], [0] * 4, 0
        for news in messages:
            exits = [a + b for a, b in zip(exits, news["exits"], strict=True)]
            grid = [a + b for a, b in zip(grid, news["grid"], strict=True)]
            ticks += news["ticks"]
            if found and not news["ticks"]:
                break
        thread.join()
    usage = found[0][1]["usage"]
    assert exits == [usage["exit_loops"].get(str(n), 0) for n in (1, 2)] and sum(exits) == 40
    used = [grid[:2], grid[2:]]
    assert sorted(map(sum, used))[0] == 0  # one slot worked
    assert sum(grid) == sum(n * count for n, count in enumerate(exits, 1)) <= ticks
    assert news["running"] == news["waiting"] == 0


def test_feed_refuses_wrong_periods_and_too_many_watchers(url):
    for every in ("0", "nan", "1e9", "often", ""):
        status, answer = call(url, f"/engine?every={every}")
        assert status == 400 and answer["error"]["param"] == "every", every
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            next(stack.enter_context(feed(url, every=5)))
        status, answer = call(url, "/engine")
        assert status == 429 and "16 pages" in answer["error"]["message"]


def test_news_are_of_the_time_since_those_before():
    made = Feed(num_slots=2, num_loops=2)
    new = {1: NewToken(5, 2, -0.5)}
    tick = Tick({1: 1}, [1], [], new, busy=3, head_rows=1, drafted=0, dropped=0)

    async def read():
        made.round_ended([tick] * 5, 7, 1)  # before anybody watches
        watch = made.watch(0.01, over=lambda: False)
        first = await anext(watch)
        assert first["ticks"] == 0 and first["waiting"] == 7
        made.round_ended([tick, tick], 0, 1)
        second = await anext(watch)
        await watch.aclose()
        assert made.num_watchers == 0
        return second

    news = asyncio.run(read())
    assert news["seconds"] >= 0.01 and news["running"] == 1
    del news["seconds"], news["running"]
    assert news == {"ticks": 2, "busy": 6, "exits": [0, 2], "grid": [0, 0, 0, 2], "waiting": 0}


@pytest.mark.parametrize("depth", [{"max_loops": 1}, {"lossless": True}])
def test_probabilities_by_loop_are_those_of_the_answer(url, depth):
    """Those that the engine computes, token by token, when it leaves after that loop."""
    prompt = call(url, "/tokenize", {"prompt": PROMPT})[1]["tokens"]
    asked = {"prompt": prompt, "max_tokens": 9, "temperature": 0, "logprobs": 0, **depth}
    asked |= {"return_token_ids": True, "return_exit_loops": True, "ignore_eos": True}
    choice = call(url, "/v1/completions", asked)[1]["choices"][0]
    body = {"tokens": prompt + choice["token_ids"], "start": len(prompt)}
    status, answer = call(url, "/by_loop", body)
    assert status == 200 and [len(row) for row in answer["probabilities"]] == [2] * 9
    rows = zip(answer["probabilities"], choice["exit_loops"], strict=True)
    found = [row[loops - 1] for row, loops in rows]
    assert found == pytest.approx(np.exp(choice["logprobs"]["token_logprobs"]), abs=2e-4)
    assert choice["exit_loops"] == [2] + [depth.get("max_loops", 2)] * 8


def test_probabilities_by_loop_of_wrong_ids(url):
    for tokens, start in (([1, 5000], 1), ([1] * 97, 1), ([1], 1), ([1, 2], 0), ([1, -2], 1)):
        assert call(url, "/by_loop", {"tokens": tokens, "start": start})[0] == 400


def test_page_is_open_and_its_feed_needs_the_key():
    with serving.running(serving.engine(), key="secret") as url:
        assert call(url, "/")[0] == call(url, "/page.js")[0] == 200
        assert call(url, "/engine")[0] == 401
        with feed(url, Authorization="Bearer secret") as messages:
            assert next(messages)["model"] == "tiny"


def test_an_open_feed_does_not_hold_up_the_end():
    with contextlib.ExitStack() as stack:
        with serving.running(serving.engine(), drain_seconds=60) as url:
            messages = stack.enter_context(feed(url))
            next(messages)
        assert all("ticks" in news for news in messages)  # it ended; `running` waits 20 s at most


# In a browser.


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium; apt-get install chromium-headless-shell")
    with api.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser):
    """An empty page. Errors of its script, and what its policy refuses, fail the test."""
    context = browser.new_context()
    made = context.new_page()
    errors = []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda line: "Content Security" in line.text and errors.append(line.text))
    made.set_default_timeout(20_000)
    yield made
    context.close()
    assert errors == []


def ask(page, prompt=PROMPT, count=24):
    """Type a prompt and wait for the whole answer; returns its mean loops."""
    page.wait_for_selector("#send:enabled")
    page.fill("#prompt", prompt)
    page.fill("#max-tokens", str(count))
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#send:enabled")  # it was disabled by the key
    assert page.inner_text("#problem") == ""
    return float(page.get_attribute("#answer", "data-mean-loops"))


def test_tokens_are_coloured_by_depth_and_fewer_loops_run_below_a_lower_threshold(page, url):
    page.goto(url)
    mean = ask(page)
    want = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "return_exit_loops": True}
    choice = call(url, "/v1/completions", want)[1]["choices"][0]
    spans = page.locator(".tokens span")
    loops = [int(n) for n in spans.evaluate_all("all => all.map(one => one.dataset.loop)")]
    assert loops == choice["exit_loops"] and set(loops) == {1, 2}
    assert mean == pytest.approx(sum(loops) / len(loops), abs=1e-3)
    colours = spans.evaluate_all("all => all.map(one => one.style.backgroundColor)")
    assert {n: c for n, c in zip(loops, colours, strict=True)} == {
        1: "rgb(255, 248, 187)", 2: "rgb(253, 116, 53)",
    }  # fmt: skip
    shown = "".join(spans.all_text_contents())
    assert shown.replace("·", "") == choice["text"].replace("\n", "↵")
    assert page.inner_text("#summary").startswith(f"24 tokens, {mean:.2f} loops on average")
    page.focus("#threshold")
    page.keyboard.press("End")  # no probability is above 1
    assert page.inner_text("#threshold-value") == "1.000"
    full = ask(page)
    page.focus("#threshold")
    page.keyboard.press("Home")  # every token but the first leaves after loop 1
    assert full == 2 > ask(page) == pytest.approx(1 + 1 / 24, abs=1e-3)
    page.check("#lossless")
    assert page.is_disabled("#threshold") and page.is_disabled("#loops")
    assert ask(page) == 2


def test_tokens_by_keyboard(page, url):
    page.goto(url)
    ask(page)
    page.focus(".tokens")
    page.keyboard.press("End")
    last = page.locator(".tokens span").last
    assert last.get_attribute("aria-selected") == "true"
    assert page.get_attribute(".tokens", "aria-activedescendant") == last.get_attribute("id")
    assert last.get_attribute("aria-label") == page.inner_text("#token-words")
    assert re.search(r"left after loop [12] of 2, probability \d+ %", page.inner_text("#token"))
    meters = page.locator("#token-loops meter")
    meters.nth(1).wait_for()
    loops = int(last.get_attribute("data-loop"))
    chance = float(meters.nth(loops - 1).get_attribute("value"))
    assert page.inner_text("#token-words").endswith(f"probability {round(100 * chance)} %")
    page.keyboard.press("ArrowLeft")
    assert last.get_attribute("aria-selected") == "false"
    assert "loops on average" in page.text_content("#spoken")  # a screen reader has read it


def test_markup_in_prompts_is_text(page, url):
    page.goto(url)
    prompt = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"
    ask(page, prompt, 4)
    assert page.inner_text(".asked") == prompt
    assert page.locator("main img, main script").count() == 0


def test_stop_frees_the_slot(page, url, monkeypatch):
    count = Feed.round_ended

    def slowly(*args):
        time.sleep(0.1)
        count(*args)

    monkeypatch.setattr(Feed, "round_ended", slowly)
    with feed(url) as messages:
        page.goto(url)
        page.wait_for_selector("#send:enabled")
        page.fill("#prompt", PROMPT)
        page.fill("#max-tokens", "60")
        page.click("#send")
        page.wait_for_selector(".tokens span")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:enabled")
        assert "stopped" in page.inner_text("#summary")
        counts = [news.get("running") for news in itertools.islice(messages, 40)]
    assert counts.count(1) > 1 and counts[-1] == 0  # it takes 60 rounds, thus 6 s


def test_chat_goes_on(page, url):
    page.goto(url)
    page.wait_for_selector("#send:enabled")
    page.check("input[value=chat]")
    ask(page, "Hi", 6)
    ask(page, "And now?", 6)
    assert page.locator(".asked").all_text_contents() == ["Hi", "And now?"]
    assert page.locator(".tokens").count() == 2
    page.click("#clear")
    assert page.locator(".asked").count() == 0


def test_errors_are_one_line(page, url):
    page.goto(url)
    page.wait_for_selector("#send:enabled")
    for status, words in (
        (429, "The server is busy: too many requests wait."),
        (503, "The server is still loading the model."),
        (401, "This server needs an API key. Enter it below the prompt."),
        (400, "Max_tokens: too many."),
    ):
        message = {429: "too many requests wait", 400: "max_tokens: too many"}.get(status, "no")
        answer = {"status": status, "json": {"error": {"message": message}}}
        page.route("**/v1/completions", functools.partial(_answer, answer))
        page.fill("#prompt", PROMPT)
        page.click("#send")
        page.wait_for_selector("#problem:not(:empty)")
        page.wait_for_selector("#send:enabled")
        assert page.inner_text("#problem") == words
    assert page.is_visible("#key")


def _answer(answer, route):
    route.fulfill(**answer)


def test_a_server_with_a_key(page):
    with serving.running(serving.engine(), key="secret") as url:
        page.goto(url)
        page.wait_for_selector("#key")
        assert "needs an API key" in page.inner_text("#problem") and page.is_disabled("#send")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        ask(page)
        assert page.inner_text("#problem") == ""


def test_fits_a_phone(browser, url):
    context = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme="dark")
    page = context.new_page()
    page.goto(url)
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    small = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter("
        "one => one.offsetParent && one.getBoundingClientRect().height < 24"
        " && !['checkbox', 'radio'].includes(one.type)).map(one => one.id)"
    )
    assert small == []
    context.close()


def test_page_files_are_installed():
    setup = pathlib.Path(__file__).resolve().parents[1] / "setup.py"
    assert "serving/page/page.*" in setup.read_text()
