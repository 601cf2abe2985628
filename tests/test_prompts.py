"""Files of prompts and answers, and what requests are checked for."""

import json
import os
import pathlib
import resource
import threading

import pytest

from recursive_jax.decoding.answers import Answers, digest
from recursive_jax.decoding.limits import Limits
from recursive_jax.decoding.prompts import make_request, read_prompts
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
    assert [p.id for p in prompts] == ["line 1", 1, 3, 2, 5, "line 6"]
    assert [p.error is None for p in prompts] == [True] * 5 + [False]
    assert "id 3 is taken by line 3" in prompts[5].error


def test_every_answer_has_an_id_of_its_own(tmp_path):
    """Also where a bad line doubles an id, and where a line has the name of another."""
    path = tmp_path / "prompts.jsonl"
    records = [{"id": "a"}, {"id": "a", "typo": 1}, {"id": "a"}, {"id": "line 3"}, {"id": 6}, {}]
    path.write_text("\n".join(json.dumps({"prompt": "x"} | record) for record in records))
    prompts = read_prompts(path, DEFAULTS)
    assert [p.error is None for p in prompts] == [True, False, False, True, True, True]
    ids = [p.id for p in prompts]
    assert len(set(ids)) == 6 and [ids[i] for i in (0, 3, 4)] == ["a", "line 3", 6]
    assert ids[1] == "line 2" and "unknown fields" in prompts[1].error


def test_errors_show_the_beginning_and_the_end_of_long_values(tmp_path):
    path = tmp_path / "prompts.jsonl"
    name, tokens = "a" * 100_000 + "z", [7] * 100_000
    records = [
        {"prompt": "x", "id": name},
        {"prompt": "x", "id": name},
        {"prompt": tokens},
        {"prompt": "x", "recorded_loops": [*tokens, "x"]},
        {"prompt": "x", name: 1},
        {"prompt": "x", "id": tokens},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    first, *bad = read_prompts(path, DEFAULTS)
    assert first.id == name and first.error is None
    assert all(prompt.error and len(prompt.error) < 500 for prompt in bad)
    assert "aaa...aaa" in bad[0].error and "z' is taken by line 1" in bad[0].error
    with pytest.raises(ValueError, match=r"stop=\['aaa") as told:
        Request(0, (1,), 1, stop_strings=[name, ""])
    assert len(str(told.value)) < 500
    limits = Limits(context_length=9, vocab_size=5, num_loops=1, num_stop=1)
    with pytest.raises(ValueError, match="request 'aaa.*has token 7") as told:
        limits.check(Request(name, (7,), 1))
    assert len(str(told.value)) < 500


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


def answer(name, tokens=(3, 4)):
    """An answer with all that a record may hold; half of a surrogate pair included."""
    loops, logprobs = [1] * len(tokens), [-0.5 - 1e-6] * len(tokens)
    return Completion(name, "é\ud800", list(tokens), loops, logprobs, "length")


NAMES = ("a", 2, "\ud800", "d")


def digests(run="a model", **changes):
    """As `resume` takes them, for requests of these names."""
    requests = [Request(name, (5, 6), changes.get(str(name), 9)) for name in NAMES]
    return {r.id: (place, digest(r, run)) for place, r in enumerate(requests)}


def interrupted(path, places=(2, 0, 1)):
    """FILE.part of a run that was stopped after some answers; the last line is torn."""
    with pytest.raises(KeyboardInterrupt), Answers(path) as answers:
        answers.resume(digests(), print)
        answers.add(3, Completion.failed("d", "too long"))
        for place in places:
            answers.add(place, answer(NAMES[place]), logprobs=place == 2)
        raise KeyboardInterrupt
    part = pathlib.Path(f"{path}.part")
    with open(part, "ab") as f:
        f.write(part.read_bytes().split(b"\n")[1][:40])
    return part


def go_on(path, run_digests):
    """The places of the answers that a next run takes, and the ids of its file."""
    lines = []
    with Answers(path) as answers:
        kept = answers.resume(run_digests, lines.append)
        for place, completion in kept.items():
            assert completion.id == NAMES[place] and completion.text == "é\ud800"
            assert completion.logprobs == (answer("a").logprobs if place == 2 else [])
        for place in set(range(4)) - set(kept):
            answers.add(place, answer(NAMES[place]))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["id"] for record in records] == list(NAMES)
    assert all(record["tokens"] == [3, 4] and "checksum" not in record for record in records)
    assert "logprobs" in records[2] or 2 not in kept
    return sorted(kept), lines


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "out.jsonl"
    part = interrupted(path)
    kept, lines = go_on(path, digests())
    assert kept == [0, 1, 2], "not the one that failed, and not the torn line"
    assert lines == [f"3 answers are in {part} already"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]


def test_one_run_at_a_time_writes_a_file(tmp_path):
    """The second is told of the first, also when it names the file by a link."""
    path, link = tmp_path / "out.jsonl", tmp_path / "link"
    link.symlink_to(path)
    with Answers(path) as first:
        first.add(1, answer("b"))
        for name in (path, link):
            words = rf"out.jsonl.part is in use by process {os.getpid()} on .* give another --out"
            with pytest.raises(ValueError, match=words), Answers(name) as second:
                second.resume(digests(), print)
        first.add(0, answer("a"))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out.jsonl"]


def test_a_run_may_be_interrupted_more_than_once(tmp_path):
    path = tmp_path / "out.jsonl"
    interrupted(path, places=(2,))
    interrupted(path, places=(1,))
    assert go_on(path, digests())[0] == [1, 2]


def test_answers_of_another_run_are_neither_used_nor_lost(tmp_path):
    """Of another model or other settings all, of another prompt or a flipped bit that one."""
    path = tmp_path / "out.jsonl"
    part = interrupted(path)
    flipped = part.read_bytes().replace(b"[3, 4]", b"[3, 5]", 1)
    part.unlink()
    cases = [
        (digests("another model"), None, []),
        (digests(a=8), None, [1, 2]),
        (digests(), flipped, [0, 1]),
    ]
    for number, (run_digests, data, expected) in enumerate(cases, 1):
        interrupted(path)
        if data is not None:
            part.write_bytes(data)
        before = part.read_bytes()
        kept, lines = go_on(path, run_digests)
        assert kept == expected
        aside = pathlib.Path(f"{part}.{number}")
        assert aside.read_bytes() == before
        assert f"{3 - len(kept)} answers of another run" in lines[0] and str(aside) in lines[0]
        assert not part.exists()


def test_a_part_that_nobody_asks_for_is_not_written_over(tmp_path):
    part = interrupted(tmp_path / "out.jsonl")
    before = part.read_bytes()
    with Answers(tmp_path / "out.jsonl") as answers:
        answers.add(0, answer("new"))
    assert pathlib.Path(f"{part}.1").read_bytes() == before


def test_a_full_disk_is_told_with_the_file_and_the_answers_that_are_there(tmp_path):
    path, limits = tmp_path / "out.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as told, Answers(path) as answers:
            answers.resume(digests(), print)
            answers.add(0, answer("a"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
            answers.add(1, answer(2, tokens=[7] * 500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    part = f"{path}.part"
    assert str(told.value) == (
        f"cannot write {part}: File too large. 1 answers are in {part}; mend this, then run the "
        "same command again to go on from there"
    )
    assert go_on(path, digests())[0] == [0]


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
