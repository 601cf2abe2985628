"""Files of prompts and answers, and what requests are checked for."""

import json
import os
import pathlib
import threading

import pytest

from recursive_jax.decoding.prompts import Answers, make_request, read_prompts
from recursive_jax.decoding.requests import Completion, Request

DEFAULTS = dict(max_new_tokens=9, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes('one\r\n\n  two \nzwölf\u2028 {"prompt": 1}'.encode())
    prompts = read_prompts(path, DEFAULTS)
    assert [(p.id, p.content) for p in prompts] == [
        (1, "one"), (3, "  two "), (4, 'zwölf\u2028 {"prompt": 1}')
    ]  # fmt: skip
    assert all(p.options | {"seed": 3} == DEFAULTS for p in prompts)
    assert len({p.options["seed"] for p in prompts}) == 3
    other = read_prompts(path, DEFAULTS | {"seed": 4})
    assert not {p.options["seed"] for p in prompts} & {p.options["seed"] for p in other}


def test_prompts_of_a_jsonl_file_and_what_is_wrong_with_them(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    lines = [
        ({"prompt": "x", "id": "a", "top_k": 5, "seed": 8}, None),
        ({"messages": chat, "max_new_tokens": 2}, None),
        ('{"prompt": ', ":3: not JSON"),
        ([1], ":4: expected an object"),
        ({"prompt": "x", "temprature": 1}, r":5: unknown fields \['temprature'\]; expected"),
        ({"prompt": "x", "messages": chat}, ":6: expected either prompt or messages"),
        ({"id": 7}, ":7: expected either prompt or messages"),
        ({"prompt": 5}, ":8: prompt=5; expected a string"),
        ({"messages": [{"role": "user"}]}, ":9: messages: expected a list"),
        ({"messages": []}, ":10: messages: expected a list"),
        ({"prompt": "x", "id": True}, ":11: id=True; expected"),
        ({"prompt": "x", "id": "a"}, ":12: id 'a' is taken by line 1"),
        ({"prompt": "x", "recorded_loops": 5}, ":13: recorded_loops=5; expected a list"),
        ("[" * 100_000, ":14: a number of too many digits, or lists too deep"),
        (f'{{"prompt": "a", "seed": {"1" * 5000}}}', ":15: a number of too many digits"),
    ]
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x, _ in lines))
    prompts = read_prompts(path, DEFAULTS)
    for prompt, (_, message) in zip(prompts, lines, strict=True):
        if message is None:
            assert prompt.error is None
        else:
            with pytest.raises(ValueError, match=message):
                raise ValueError(prompt.error)
    assert prompts[0].id == "a" and prompts[0].options == DEFAULTS | {"top_k": 5, "seed": 8}
    assert prompts[1].content == chat and prompts[1].options["max_new_tokens"] == 2


def test_lines_without_an_id_make_room_for_those_with_one(tmp_path):
    path = tmp_path / "prompts.jsonl"
    ids = [{}, {"id": 1}, {"id": 3}, {"id": 2}, {}, {"id": 3}]
    lines = [json.dumps({"prompt": "x"} | name) for name in ids]
    path.write_text("\n".join(lines), encoding="utf-8-sig")  # Windows marks UTF-8 so
    prompts = read_prompts(path, DEFAULTS)
    assert [p.id for p in prompts] == ["line 1", 1, 3, 2, 5, 3]
    assert [p.error is None for p in prompts] == [True] * 5 + [False]
    assert "id 3 is taken by line 3" in prompts[5].error


def test_prompt_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompts(tmp_path / "missing.txt", DEFAULTS)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt", DEFAULTS)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "binary.txt", DEFAULTS)
    with pytest.raises(ValueError, match="is a directory; expected a file of prompts in it"):
        read_prompts(tmp_path, DEFAULTS)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files' names are Linux's")
def test_answers_do_not_replace_what_is_no_file(tmp_path):
    """A link stays one, and a pipe or a device is written to."""
    link, target, pipe = tmp_path / "link", tmp_path / "there" / "target", tmp_path / "pipe"
    target.parent.mkdir()
    link.symlink_to(target)
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.extend(pipe.read_text().splitlines()))
    reader.daemon = True
    reader.start()
    opened = open(tmp_path / "opened", "w+")
    print("before", file=opened, flush=True)
    for path in (link, pipe, f"/proc/self/fd/{opened.fileno()}"):
        with Answers(path) as answers:
            answers.add(1, Completion("b"))
            answers.add(0, Completion("a"))
            answers.close()
    reader.join(timeout=10)
    assert link.is_symlink() and pipe.is_fifo()
    assert [json.loads(line)["id"] for line in read] == ["a", "b"]
    assert target.read_text().splitlines() == read
    print("after", file=opened)
    opened.close()
    assert (tmp_path / "opened").read_text().splitlines() == ["before", *read, "after"]
    names = sorted(p.name for p in tmp_path.rglob("*"))
    assert names == ["link", "opened", "pipe", "target", "there"]


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "x.jsonl", "/proc/x.jsonl", "/dev/fd/999"):
        with pytest.raises(ValueError, match=f"cannot write {path}; expected a file in a"):
            Answers(path)


def test_answers_are_on_disk_at_once_and_in_order_at_the_end(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    answers = Answers(path)
    for index, name in ((2, "c"), (0, "\ud800"), (1, "b")):
        answers.add(index, Completion(name, text="é" + str(name)[:0], finish_reason="stop"))
        part = pathlib.Path(f"{path}.part").read_text().splitlines()
        assert json.loads(part[-1])["id"] == name and not path.exists()
    answers.close()
    assert [json.loads(x)["id"] for x in path.read_text().splitlines()] == ["\ud800", "b", "c"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.jsonl"]
    with pytest.raises(ValueError, match="cannot write"):
        Answers(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0; expected"),
        ({"max_new_tokens": "9"}, "max_new_tokens='9'"),
        ({"temperature": float("nan")}, "temperature=nan; expected"),
        ({"top_p": 0}, "top_p=0 keeps no token"),
        ({"repetition_penalty": 0}, "repetition_penalty=0; expected"),
        ({"frequency_penalty": None}, "frequency_penalty=None; expected"),
        ({"stop": [""]}, r"stop=\[''\]; expected a text, or a list"),
        ({"stop": 5}, "stop=5; expected"),
        ({"min_loops": 0}, "min_loops=0; expected"),
        ({"min_loops": 2, "max_loops": 1}, "max_loops=1; expected an integer, at least 2"),
        ({"logprobs": 1}, "logprobs=1; expected true or false"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    make_request("x", (1,), (2,), DEFAULTS)
    with pytest.raises(ValueError, match=message):
        make_request("x", (1,), (2,), DEFAULTS | options)


def test_options_find_their_place():
    options = DEFAULTS | {"stop": "end", "min_p": 0.5, "presence_penalty": 1, "max_loops": 2}
    options |= {"exit_threshold": 0.25, "logprobs": True, "recorded_loops": [1, 2]}
    request = make_request("x", [1], [2], options)
    assert (request.tokens, request.stop, request.stop_strings) == ((1,), (2,), ("end",))
    assert (request.sampling.min_p, request.sampling.presence_penalty) == (0.5, 1)
    assert (request.sampling.seed, request.sampling.repetition_penalty) == (3, 1.0)
    assert (request.max_loops, request.exit_threshold, request.logprobs) == (2, 0.25, True)
    assert (request.max_new_tokens, request.recorded_loops) == (9, (1, 2))
    with pytest.raises(ValueError, match="no tokens"):
        Request(0, (), 1)


def test_log_probabilities_are_told_when_asked_for(tmp_path):
    answers = Answers(tmp_path / "out.jsonl")
    for index, asked in enumerate((True, False)):
        completion = Completion(index, "a", [3], [1], [-0.12345678], "length")
        answers.add(index, completion, logprobs=asked)
    answers.close()
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first.pop("logprobs") == [-0.123457]
    assert first | {"id": 1} == second
