"""Pictures and tables of decoding."""

import numpy as np
import pytest

from recursive_jax.analysis.timing import Times
from recursive_jax.console import heatmap, report
from recursive_jax.console.progress import PromptProgress


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
    lines, rest = heatmap._lines([heatmap.Row("t" * 200, ["abcd "] * 50, [1] * 50)])
    assert len(lines[0]) <= heatmap.COLUMNS and rest == ""
    boxes = [box for line in lines if not isinstance(line, str) for box in line]
    assert len(boxes) == 50
    assert all(column + len(piece) <= heatmap.COLUMNS for column, piece, _ in boxes)
    lines, rest = heatmap._lines([heatmap.Row("t", ["a\n", "b", "c"], [1, 2, 1])])
    assert lines[1:] == [[(0, "a↵", 1)], [(0, "b", 2), (1, "c", 1)], ""]
    lines, rest = heatmap._lines([heatmap.Row("t", ["a\n"], [1])] * 300)
    assert len(lines) <= heatmap.MAX_LINES and rest == "the first 80 of 300 answers"
    assert lines[1] == [(0, "a↵", 1)]
    lines, rest = heatmap._lines([heatmap.Row("t", ["x" * 60] * 999, [1] * 999)])
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
    from recursive_jax.decoding.session import Stats

    stats = Stats(8, ticks=6, busy=24, head_rows=18, dropped=2, drafted=6, slot_ticks=12)
    stats.exit_loops.update({1: 4, 2: 4})
    times = Times(0.010, 0.008, 0.0, ((1, 0.001), (8, 0.008)))
    record = report.summary(
        _Engine(), stats, prompts=3, errors=1, tokens=7, seconds=2.0, lossless=True, times=times
    )
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


def test_progress_counts_parts_of_requests(capsys):
    progress = PromptProgress({0: 10, 1: 20})
    with progress:
        progress.add(0, 5, False)
        progress.add(1, 5, False)
        assert progress._share == pytest.approx(0.75)
        progress.add(0, 6, True)
        assert progress._share == pytest.approx(1.25)
        progress.add(1, 20, True)
    assert progress._share == pytest.approx(2.0)
    assert "2/2 prompts" in capsys.readouterr().err
