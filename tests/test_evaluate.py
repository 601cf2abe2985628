"""The job `evaluate`, its report, and how it goes on after a kill."""

import json
import math
import re
import subprocess
import sys

import commands
import numpy as np
import pytest
from evaluated import make_model, reference, write_tasks

from recursive_jax import evaluating
from recursive_jax.console import evaluation_plots, evaluation_report
from recursive_jax.evaluation import rolling
from recursive_jax.evaluation.encoding import Encoder
from recursive_jax.evaluation.perplexity import perplexity
from recursive_jax.evaluation.records import Records
from recursive_jax.evaluation_settings import Settings
from recursive_jax.model import load
from recursive_jax.placed import Placed

TEXT = "Return the list of names that are in the file. Raise ValueError if there are none.\n" * 9


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a recursive checkpoint, its source, a text and three tasks."""
    place = tmp_path_factory.mktemp("evaluate")
    (place / "text.txt").write_text(TEXT)
    write_tasks(place / "tasks")
    source = make_model(num_loops=1)
    source.save(place / "source")
    model = make_model()
    certificate = {
        "text": str(place / "text.txt"), "text_tokens": 100, "context_length": 32,
        "energy_kept": {"q": 0.5, "up": 0.25},
        "source_nll": source.perplexity(place / "text.txt", 100, 32, dtype="float32")["nll"],
    }  # fmt: skip
    certificate["source_perplexity"] = math.exp(certificate["source_nll"])
    model = type(model)(
        model.cfg, model.tokenizer, model.weights, model.name,
        {"source": str(place / "source")}, certificate,
    )  # fmt: skip
    model.save(place / "model")
    return place


def evaluate(place, *flags, model="model"):
    return commands.run(
        "evaluate", f"--checkpoint={place / model}", "--dtype=float32", "--batch_size=4", *flags
    )


@pytest.fixture(scope="module")
def done(place):
    """The job's output, and its report: perplexity and tasks of a recursive model."""
    pytest.importorskip("lm_eval", reason="pip install 'lm-eval>=0.4.13'")
    done = evaluate(
        place, f"--text={place / 'text.txt'}", "--text_tokens=100", "--context_length=32",
        "--tasks=all", f"--task_dir={place / 'tasks'}", "--source=none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done, json.loads((place / "model" / "evaluation.json").read_text())


def test_both_perplexities_are_named_and_measured_after_every_loop(place, done):
    _, report = done
    model = load(place / "model")
    windows = report["perplexity"]["windows"]
    want = model.perplexity(place / "text.txt", 100, 32, dtype="float32")
    assert windows["nll_exits"] == pytest.approx(want["nll_exits"], rel=1e-5)
    assert windows["definition"].startswith("recursive_jax:") and windows["context_length"] == 32
    found = report["perplexity"]["rolling"]
    assert found["definition"].startswith("lm-eval loglikelihood_rolling")
    encoder = Encoder(model.tokenizer, model.cfg.vocab_size)
    (text,) = encoder.first_documents([TEXT], 100)
    assert TEXT.startswith(text) and 90 < len(encoder.encode(text)) <= 100
    pairs = rolling.windows(encoder.encode(text), encoder.prefix, 32)
    totals = np.sum([reference(model, *pair)[0] for pair in pairs], axis=0)
    for total, exit_ in zip(totals, found["loops"], strict=True):
        assert exit_["word_perplexity"] == pytest.approx(
            math.exp(-total / len(text.split())), rel=1e-4
        )
        assert exit_["byte_perplexity"] == pytest.approx(math.exp(-total / len(text)), rel=1e-4)
        assert exit_["nll"] == pytest.approx(-total / found["tokens"], rel=1e-5)
    assert found["word_perplexity"] == found["loops"][-1]["word_perplexity"]


def test_the_report_is_whole_and_names_what_was_measured(place, done):
    output, report = done
    assert report["model"]["num_loops"] == 2 and report["model"]["step"] == 0
    assert report["settings"]["text_tokens"] == 100
    assert set(report["tasks"]) == {"arc_easy", "winogrande", "lambada_openai"}
    assert all(len(task["loops"]) == 2 for task in report["tasks"].values())
    for words in ("after loop 1", "after loop 2", "arc_easy", "mean", "self-correction"):
        assert words in output.stdout
    assert "source" not in report and "source" not in output.stdout
    assert not list((place / "model").glob("*.part*"))
    assert "context" in output.stderr and "tasks" in output.stderr  # the start table


def test_the_source_is_measured_once_and_stored(place, tmp_path):
    flags = (f"--text={place / 'text.txt'}", "--text_tokens=100", "--context_length=32",
             f"--out={tmp_path / 'report.json'}")  # fmt: skip
    output, report = evaluate(place, *flags), json.loads((tmp_path / "report.json").read_text())
    assert "the source gives its certified nll" in output.stdout
    assert "nats per token against the source" in output.stdout
    assert report["source"]["from"] == "measured" and report["source"]["check"]["agrees"] is True
    source = load(place / "source")
    want = source.perplexity(place / "text.txt", 100, 32, dtype="float32")
    assert report["source"]["perplexity"]["windows"]["nll"] == pytest.approx(want["nll"], rel=1e-5)
    assert evaluate(place, *flags).returncode == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["source"] == report["source"] | {"from": "stored"}


def test_a_source_that_differs_from_its_certificate_refuses_the_comparison(place, tmp_path):
    """Numbers are not compared with a source that is not the one the certificate was made of."""
    path = place / "model" / "certificate.json"
    before = path.read_text()
    certificate = json.loads(before)
    try:
        path.write_text(json.dumps(certificate | {"source_nll": certificate["source_nll"] + 0.1}))
        done = evaluate(
            place, f"--text={place / 'text.txt'}", "--text_tokens=100", "--context_length=32",
            f"--out={tmp_path / 'report.json'}",
        )  # fmt: skip
    finally:
        path.write_text(before)
    assert done.returncode == 0 and "REFUSED: no number here may be called good" in done.stdout
    assert "against the source" not in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["source"]["check"]["agrees"] is False


def test_the_certificate_stands_in_for_a_source_that_is_gone(place, tmp_path):
    model = load(place / "model")
    model.facts["source"] = str(tmp_path / "gone")
    report = evaluating.evaluate(
        model, Settings(str(place / "text.txt"), 100, context_length=32), quiet=True
    )
    assert report["source"]["from"] == "certificate" and "gone" in report["source"]["reason"]
    nll = report["source"]["perplexity"]["windows"]["nll"]
    assert nll == model.certificate["source_nll"]
    other = Settings(str(place / "text.txt"), 50, context_length=32)
    assert evaluating.evaluate(model, other, quiet=True)["source"]["from"] == "nowhere"


def test_an_interrupted_evaluation_goes_on(place, tmp_path, monkeypatch):
    """A kill leaves OUT.part; the same call reads it, and computes the rest only."""
    pytest.importorskip("lm_eval", reason="pip install 'lm-eval>=0.4.13'")
    model = load(place / "model")
    settings = {"tasks": "all", "task_dir": str(place / "tasks"), "dtype": "float32"}
    want = model.evaluate(source=None, quiet=True, batch_size=8, **settings)["tasks"]
    out = tmp_path / "report.json"
    part = tmp_path / "report.json.part"
    add, calls = Records.add, []

    def killed(self, results):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        add(self, results)

    monkeypatch.setattr(Records, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        model.evaluate(source=None, out=out, quiet=True, batch_size=8, **settings)
    assert part.exists() and not out.exists()
    kept = len(part.read_bytes().splitlines()) - 1
    assert 0 < kept < 14
    with open(part, "ab") as file:
        file.write(b'["torn')
    added = []

    def counted(self, results):
        results = list(results)
        added.extend(results)
        add(self, results)

    monkeypatch.setattr(Records, "add", counted)
    got = model.evaluate(source=None, out=out, quiet=True, batch_size=8, **settings)
    assert got["tasks"] == want and len(added) == 14 - kept
    assert json.loads(out.read_text())["tasks"] == want and not part.exists()


def test_results_of_another_run_are_renamed(tmp_path):
    part, said = tmp_path / "out.part", []
    first = Records(part, "weights 1")
    first.add([("a", [1.0])])
    first.close()
    second = Records(part, "weights 2", said.append)
    assert "a" not in second and (tmp_path / "out.part.1").exists()
    assert "results of another run" in said[0] and "out.part.1" in said[0]
    second.add([("b", "text")])
    second.close()
    third = Records(part, "weights 2", said.append)
    assert third["b"] == "text" and "1 results are in" in said[1]
    third.close(remove=True)
    assert not part.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to evaluate"),
        (("--tasks=piqa", "--task_dir=TASKS"), "no task piqa; it has arc_easy, lambada_openai"),
        (("--tasks=all", "--task_dir=PLACE/none"), "no directory"),
        (("--text_tokens=20",), "--text_tokens without --text"),
        (("--text=PLACE/none.txt",), "none.txt.*does not exist"),
        (("--task_dir=TASKS", "--text=docstrings"), "task_dir without tasks"),
        (("--text=docstrings", "--text_tokens=20", "--limit=0"), "limit=0"),
        (("--text=docstrings", "--text_tokens=20", "--source=PLACE/gone"), "gone"),
    ],
)
def test_a_mistake_is_told_in_one_line(place, flags, message):
    flags = [f.replace("TASKS", str(place / "tasks")).replace("PLACE", str(place)) for f in flags]
    if "--tasks" in "".join(flags):
        pytest.importorskip("lm_eval", reason="pip install 'lm-eval>=0.4.13'")
    done = evaluate(place, *flags, f"--out={place / 'report.json'}")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert re.search(message, errors[0])
    assert not (place / "report.json").exists()


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'recursive_jax\[eval\]'"):
        make_model().evaluate(tasks="all", quiet=True)


def test_lm_eval_needs_no_torch():
    pytest.importorskip("lm_eval", reason="pip install 'lm-eval>=0.4.13'")
    program = "import sys; sys.modules['torch'] = None\nimport lm_eval.evaluator, lm_eval.tasks\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_standard_error_of_a_mean_over_windows():
    """Against the ratio estimator, written out on the nll of every window."""
    model = make_model()
    windows = model.windows([TEXT], 150, 32)
    decoder = Placed(model, "float32").decoder
    found = perplexity(decoder.clone(data_shards=1), model.params, *windows, 4, all_loops=True)
    sums, counts = [], windows.scored[:, 1:].sum(1)
    for ids, scored in zip(*windows, strict=True):
        first = int(scored.argmax())
        values, _ = reference(model, ids[:first], ids[first : first + scored.sum()])
        sums.append(-np.array(values))
    sums, total = np.array(sums), counts.sum()
    for loop in range(2):
        rest = sums[:, loop] - counts * sums[:, loop].sum() / total
        error = np.sqrt(len(sums) / (len(sums) - 1) * (rest**2).sum()) / total
        assert found["nll_exits"][loop] == pytest.approx(sums[:, loop].sum() / total, rel=1e-5)
        assert found["nll_stderr_exits"][loop] == pytest.approx(error, rel=1e-2)
        assert rolling.ratio_error(sums[:, loop], counts) == pytest.approx(error, rel=1e-9)
    assert found["nll_stderr"] == found["nll_stderr_exits"][-1]


def test_pictures(place, done, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'recursive_jax[plot]'")
    _, report = done
    rows = [{"step": 0, "source/perplexity": 3.0}, {"step": 4, "train/tokens": 10.0}]
    for step, values in ((0, (9.0, 5.0)), (4, (8.0, 4.0))):
        exits = {f"valid/perplexity_exit_{n}": value for n, value in enumerate(values, 1)}
        rows.append({"step": step, "valid/perplexity": values[-1], **exits})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{")
    evaluation_plots.check(tmp_path / "plots")
    certificate = load(place / "model").certificate
    files = evaluation_plots.save(
        tmp_path / "plots", report, certificate, tmp_path / "metrics.jsonl"
    )
    names = ["quality", "perplexity", "energy", "recovery"]
    assert [file.name for file in files] == [f"{name}.svg" for name in names]
    assert all("<svg" in file.read_text() for file in files)


def test_tasks_of_the_source_stand_beside_those_of_the_model():
    task = {"items": 4, "metric": "acc", "value": 0.5, "stderr": 0.25}
    task |= {"metrics": {"acc": {"value": 0.5, "stderr": 0.25}}}
    exits = [{"acc": {"value": value, "stderr": 0.25}} for value in (0.25, 0.5)]
    better = task | {"value": 0.75}
    source = {"from": "measured", "tasks": {"piqa": better}, "check": {"agrees": None}}
    source["check"]["reason"] = "no certificate"
    report = {"tasks": {"piqa": task | {"loops": exits}}, "source": source}
    lines = evaluation_report.table(report).splitlines()
    assert lines[0].split() == ["task", "items", "metric", "loop", "1", "loop", "2", "source"]
    values = re.findall(r"[\d.]+ ± [\d.]+ %", lines[2])
    assert values == ["25.0 ± 25.0 %", "50.0 ± 25.0 %", "75.0 ± 25.0 %"]
    assert lines[-1] == "-25.0 points of accuracy against the source, tasks: 1"
    source["check"] = {"agrees": False, "text": "T", "measured": 2.0, "stored": 1.0}
    assert "points of accuracy" not in evaluation_report.table(report)
