"""Pictures, tables and progress of decoding."""

import dataclasses

import numpy as np
import pytest

from recursive_jax.analysis.timing import Times
from recursive_jax.console import heatmap, report
from recursive_jax.console import progress as progress_lib
from recursive_jax.console.progress import PrintedAnswer, PromptProgress
from recursive_jax.decoding.requests import Completion, Event
from recursive_jax.decoding.session import Stats


def test_a_picture_has_the_colour_of_every_loop(tmp_path):
    """The first box of each answer is looked at where it stands."""
    pytest.importorskip("matplotlib")
    from matplotlib import image

    word = "wwwwwwww"
    rows = [heatmap.Row("ask", [word] * 20, [1] * 20), heatmap.Row("$x_", [word, "日$"], [2, 3])]
    colours = []
    for name, shown in (("both.png", rows), ("none.png", [])):
        path = tmp_path / name
        heatmap.check(path)
        heatmap.save(path, shown, 3, "title")
        pixels = (image.imread(path)[..., :3] * 255).astype(int).reshape(-1, 3)
        values, counts = np.unique(pixels, axis=0, return_counts=True)
        colours.append({tuple(v): n for v, n in zip(values.tolist(), counts.tolist(), strict=True)})
    both, none = colours
    shades = sorted((c for c in none if none[c] > 200 and len(set(c)) > 1), key=sum)
    assert len(shades) == 3, "the legend"
    more = [both[c] - none[c] for c in shades]  # the strongest first: three loops
    assert more[2] > 8 * more[1] > 0 and more[1] > more[0] > 0


def test_long_answers_are_wrapped_and_many_left_out():
    lines, rest = heatmap.wrap([heatmap.Row("t" * 200, ["abcd "] * 50, [1] * 50)])
    assert len(lines[0]) <= heatmap.COLUMNS and rest == ""
    boxes = [box for line in lines if not isinstance(line, str) for box in line]
    assert len(boxes) == 50
    assert all(column + len(piece) <= heatmap.COLUMNS for column, piece, _ in boxes)
    lines, rest = heatmap.wrap([heatmap.Row("t", ["a\n", "b", "c"], [1, 2, 1])])
    assert lines[1:] == [[(0, "a↵", 1)], [(0, "b", 2), (1, "c", 1)], ""]
    lines, rest = heatmap.wrap([heatmap.Row("t", ["a\n"], [1])] * 300)
    assert len(lines) <= heatmap.MAX_LINES and rest == "the first 80 of 300 answers"
    assert lines[1] == [(0, "a↵", 1)]
    lines, rest = heatmap.wrap([heatmap.Row("t", ["x" * 60] * 999, [1] * 999)])
    assert rest.startswith("the beginning")


def test_pictures_that_cannot_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"no picture; expected a name that ends in .*\.png"):
        heatmap.check(tmp_path / "map")
    (tmp_path / "map.png").mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        heatmap.check(tmp_path / "map.png")


class _Engine:
    num_slots, num_loops, can_exit = 4, 2, True


def test_a_lossless_run_in_numbers():
    """Eight tokens of four slots in six ticks: four drafts of six were right."""
    stats = Stats(8, ticks=6, busy=24, head_rows=18, dropped=2, drafted=6, slot_ticks=12)
    stats.exit_loops.update({1: 4, 2: 4})
    times = Times(0.010, 0.008, 0.0, ((1, 0.001), (8, 0.008)))
    completions = [
        Completion(1, tokens=[5] * 4, finish_reason="length"),
        Completion(2, tokens=[5] * 3, finish_reason="stop"),
        Completion.failed(3, "too long"),
    ]
    record = report.summary(_Engine(), stats, completions, 2.0, lossless=True, times=times)
    assert (record["prompts"], record["errors"], record["tokens"]) == (3, 1, 7)
    assert (record["drafted"], record["accepted"], record["ticks"]) == (6, 4, 6)
    assert record["agreement"] == pytest.approx(4 / 6)
    assert record["ticks_per_token"] == 1.5 and record["tokens_per_second"] == 3.5
    assert record["gain_over_full_depth"] == pytest.approx(20 / (1.5 * 13))
    bound = 4 / (1.5 * (0.010 + 0.001 * 4 / 1.5))
    assert record["bound_tokens_per_second"] == pytest.approx(bound)
    assert record["share_of_bound"] == pytest.approx(4.0 / bound)
    rows = dict(line.rstrip().rsplit("  ", 1) for line in report.table(record).splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["drafts accepted"] == "4 of 6" and rows["errors"] == "1"
    assert rows["lane occupancy"] == "50%" and rows["lanes dropped"] == "2"
    assert rows["1 loop"] == "50% " + "█" * 10 + "░" * 10
    assert rows["share of the bound"] == f"{4.0 / bound:.0%}"
    plain = report.summary(_Engine(), stats, completions, 2.0)
    assert "bound" not in report.table(plain) and "times" not in plain


def test_progress_counts_parts_of_requests(capsys):
    with PromptProgress({0: 10, 1: 20}) as progress:
        progress.add(event(0, 5))
        progress.add(event(1, 5))
        assert progress.done == pytest.approx(0.75)
        progress.add(event(0, 1, Completion(0, tokens=[7] * 6, finish_reason="stop")))
        assert progress.done == pytest.approx(1.25)
        progress.add(event(1, 10))
        assert progress.done == pytest.approx(1.75)
        # a stop string that began in an earlier event
        progress.add(event(1, 0, Completion(1, tokens=[7] * 14, finish_reason="stop")))
    assert progress.done == pytest.approx(2.0)
    assert "2/2 prompts" in capsys.readouterr().err


def test_one_answer_is_printed_as_it_comes(capsys, monkeypatch):
    now = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr(progress_lib.time, "perf_counter", lambda: next(now))
    printed = PrintedAnswer()
    printed.add(dataclasses.replace(event(0, 2), piece="ab"))
    assert capsys.readouterr().out == "ab"
    completion = Completion(0, tokens=[7] * 8, finish_reason="length")
    printed.add(dataclasses.replace(event(0, 6, completion), piece="c"))
    assert capsys.readouterr().out == "c\n"
    assert printed.seconds == 5.0
    assert printed.summary(completion) == "8 tokens (length), 2.0 tok/s, first token after 2.00 s"


def test_an_answer_without_tokens_has_no_rate(capsys):
    printed, nothing = PrintedAnswer(), Completion(0, finish_reason="stop")
    printed.add(event(0, 0, nothing))
    assert capsys.readouterr().out == "\n"
    assert printed.summary(nothing) == "0 tokens (stop)"


def event(index, count, completion=None):
    reason = None if completion is None else completion.finish_reason
    columns = (7,) * count, (1,) * count, (0.0,) * count
    return Event(index, *columns, finish_reason=reason, completion=completion)
