"""`python -m recursive_jax.train` end to end: a run, an interrupted run, and every refusal.

The source is a random Llama of width 32 with the embedded model's tokenizer, so nothing here
depends on a pretrained model.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import commands
import jax
import local_multiprocess
import numpy as np
import pytest
from commands import ROOT

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params
from recursive_jax.training import loop
from recursive_jax.training.optimizer import OptimizerConfig, make_optimizer
from recursive_jax.weights import checkpoint, hf
from recursive_jax.weights.source import ASSETS

CONFIG = "configs/tiny_smoke.py"
STEPS = 60
LLAMA = DecoderConfig(
    "llama", 4096, 32, 64, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=4, tied_head=True
)


def random_leaf(path, x):
    if path[-1].key == "scale":
        return np.ones(x.shape, np.float32)
    return (0.05 * np.random.default_rng(x.size).standard_normal(x.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with `source` (Hugging Face model), `small_vocab` (another) and `text`."""
    place = tmp_path_factory.mktemp("train")
    tokenizer = [ASSETS / "tiny" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    for name, cfg in (("source", LLAMA), ("small_vocab", LLAMA.replace(vocab_size=99))):
        params = jax.tree_util.tree_map_with_path(random_leaf, abstract_params(cfg))
        hf.save_params(params, cfg, place / name)
        for file in tokenizer:
            shutil.copy(file, place / name)
    (place / "text").mkdir()
    rng = np.random.default_rng(0)
    words = "the loop runs a block of layers again and keeps what it learned before".split()
    with open(place / "text" / "train.jsonl", "w") as f:
        for _ in range(300):
            sentence = " ".join(rng.choice(words, size=rng.integers(20, 90)))
            f.write(json.dumps({"text": sentence}) + "\n")
    return place


def command(place, workdir, *overrides):
    chosen = [o for o in overrides if o.startswith("--config=")] or [f"--config={CONFIG}"]
    overrides = [o for o in overrides if o not in chosen]
    return [
        *chosen,
        f"--workdir={workdir}",
        f"--config.source={place / 'source'}",
        f"--config.data.train={place / 'text'}",
        f"--config.data.cache_dir={place / 'cache'}",
        "--config.data.context_length=32",
        "--config.data.batch_size=4",
        f"--config.tokens={STEPS * 32 * 4}",
        "--config.eval_every=30",
        "--config.checkpoint_every=20",
        *overrides,
    ]


# The job, with a standard output that waits behind every step's line for a line of standard input,
# until that is closed. The run then stands still between steps, however fast the machine is.
STEPWISE = """
import runpy, sys

class Output:
    def __init__(self, file):
        self.file, self.waits = file, False

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        self.waits = self.waits or text.startswith("step ")
        return self.file.write(text)

    def flush(self):
        self.file.flush()
        if self.waits:
            self.waits = False
            sys.stdin.readline()

sys.stdout = Output(sys.stdout)
runpy.run_module("recursive_jax.train", run_name="__main__", alter_sys=True)
"""


def launch(place, workdir, *overrides, env=None, stepwise=False):
    """The real command line, as a child process; `stepwise` is for `steps`."""
    program = ["-c", STEPWISE] if stepwise else ["-m", "recursive_jax.train"]
    return subprocess.Popen(
        [sys.executable, *program, *command(place, workdir, *overrides)],
        cwd=ROOT, env=env or commands.environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def steps(process, lines):
    """Yields n behind step n, where the process stands still until the next n is taken.

    Its output is appended to `lines`. `process.communicate()` lets it run on by itself.
    """
    for line in iter(process.stdout.readline, ""):
        lines.append(line)
        if line.startswith("step "):
            yield int(line.removeprefix("step ").partition("/")[0])
            process.stdin.write("\n")
            process.stdin.flush()


@pytest.fixture(scope="module")
def runs(place):
    """name -> (workdir, stdout, stderr, exit code), and the step the interrupted run stopped at."""
    workdirs = {"whole": place / "whole", "interrupted": place / "parts"}
    workdirs["resumed"] = workdirs["interrupted"]
    out, stopped_at = {}, None
    for name, workdir in workdirs.items():
        process = launch(place, workdir, stepwise=name == "interrupted")
        lines = []
        if name == "interrupted":
            assert 3 in steps(process, lines), process.communicate()
            process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate()
        out[name] = (workdir, "".join(lines) + stdout, stderr, process.returncode)
        if name == "interrupted":
            stopped_at = checkpoint.latest_step(workdir)
    return out, stopped_at


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_converts_saves_and_says_so(runs):
    workdir, stdout, stderr, code = runs[0]["whole"]
    assert code == 0, stderr
    assert "Traceback" not in stderr and "rematerialization" not in stderr
    # progress a person can read: start-up table, one line per step, what came of it
    for words in ("2 loops × 2 layers", "mesh data=1 × fsdp=1 × tensor=1", "60 steps × 128 tokens"):
        assert words in stdout
    assert stdout.count("tok/s  ETA ") == STEPS - 1
    assert f"generate --checkpoint={workdir}" in stdout

    records = metrics_of(workdir)
    losses = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert np.mean([losses[n] for n in range(STEPS - 4, STEPS + 1)]) < 0.7 * losses[1]
    one = next(r for r in records if r["step"] == 5 and "train/loss" in r)
    names = "loss ce kd ce_exit_1 accuracy accuracy_exit_1 tokens learning_rate skipped".split()
    groups = "shared lora_loop_1 lora_loop_2 norms embedding".split()
    names += ["grad_norm", *(f"grad_norm_{group}" for group in groups)]
    rates = "tokens_per_second flops_per_second data_wait save_seconds goodput".split()
    expected = {f"train/{n}" for n in names} | {f"perf/{n}" for n in rates}
    assert set(one) == {"step", "time"} | expected, "no MFU on a CPU"
    np.testing.assert_allclose(one["train/learning_rate"], 3e-3 * 4 / 5, rtol=1e-6)
    np.testing.assert_allclose(
        one["train/loss"],
        one["train/ce"] + one["train/kd"] + 0.1 * one["train/ce_exit_1"],
        rtol=1e-5,
    )
    evaluated = [r["step"] for r in records if "valid/perplexity" in r]
    assert evaluated == [0, 30, STEPS]
    assert any("source/perplexity" in r for r in records)
    assert any((workdir / "tensorboard").iterdir())

    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["tokens"] == STEPS * 128
    assert summary["after"]["perplexity"] < 0.2 * summary["before"]["perplexity"]
    np.testing.assert_allclose(
        np.exp(summary["after"]["nll"]), summary["after"]["perplexity"], rtol=1e-6
    )
    assert len(summary["after"]["perplexity_exits"]) == 2
    assert summary["config"]["objective"]["exit_coefficient"] == 0.1
    assert summary["skipped_steps"] == 0 and 0 < summary["goodput"] < 1
    assert summary["flops_per_second"] > 0 and "mfu" not in summary
    certificate = json.loads((workdir / checkpoint.CERTIFICATE).read_text())
    assert certificate["parameters"]["lora"] == summary["parameters"]["lora"] > 0
    assert len(certificate["energy_kept"]) == 7 and certificate["tensors"] == 2 + 4 * 9


def test_a_checkpoint_knows_what_it_is(runs, place):
    workdir = runs[0]["whole"][0]
    params, cfg = checkpoint.load_params(workdir)
    assert (cfg.num_loops, cfg.num_layers, cfg.rank("q")) == (2, 2, 4)
    assert params["block"]["mlp"]["up"]["w"].shape == (2, 32, 64)
    _, facts = checkpoint.load_config(workdir)
    assert facts["source"] == str(place / "source") and facts["tying"]["num_loops"] == 2
    assert (workdir / "tokenizer" / "tokenizer.json").is_file()
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert steps == [40, 60], "the latest two are kept, nothing else is left there"


def test_two_processes_train_as_one(runs, place):
    """Of two hosts, each with half of every batch; SIGTERM to one of them stops both."""
    whole, workdir = runs[0]["whole"][0], place / "hosts"

    def start(stepwise=False):
        for n, flags in enumerate(local_multiprocess.places(2)):
            yield launch(place, workdir, *flags, stepwise=stepwise and n == 0)

    first, second = start(stepwise=True)
    lines = []
    for step in steps(first, lines):
        if step == 3:
            second.send_signal(signal.SIGTERM)
        if step >= 3:  # JAX tells the processes of a signal within about a second
            time.sleep(0.2)
    ends = [process.communicate() for process in (first, second)]
    stopped_at = checkpoint.latest_step(workdir)
    assert f"stopped at step {stopped_at} and saved; run the same" in "".join(lines), (lines, ends)
    assert 3 <= stopped_at < STEPS

    processes = list(start())
    ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert f"resumed from {workdir}" in ends[0][0] and "model " not in ends[1][0], "one speaks"
    losses = [
        [r["train/loss"] for r in metrics_of(directory) if "train/loss" in r]
        for directory in (whole, workdir)
    ]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)
    shutil.rmtree(workdir)


def test_interrupted_and_resumed_is_uninterrupted(runs):
    """Bitwise: parameters, moments, every logged loss, every evaluation."""
    done, step = runs
    assert done["interrupted"][3] == 75, done["interrupted"][2]  # it can go on
    assert done["resumed"][3] == 0, done["resumed"][2]
    assert 3 <= step < STEPS
    assert f"stopped at step {step} and saved; run the same command" in done["interrupted"][1]
    assert f"resumed from {done['resumed'][0]}" in done["resumed"][1]
    assert f"{STEPS - step} steps × 128 tokens" in done["resumed"][1]

    def logged(workdir):
        keep = ("step", "train/loss", "train/grad_norm", "valid/nll", "source/nll")
        records = [{k: r[k] for k in keep if k in r} for r in metrics_of(workdir)]
        return [record for record in records if len(record) > 1]  # not those of saves

    whole, parts = done["whole"][0], done["resumed"][0]
    assert logged(parts) == logged(whole)
    one, other = (json.loads((w / "summary.json").read_text()) for w in (whole, parts))
    for key in ("steps", "tokens", "parameters", "before", "after", "source"):
        assert one[key] == other[key], key

    cfg, _ = checkpoint.load_config(whole)
    abstract = {"params": abstract_params(cfg)}
    abstract["opt_state"] = jax.eval_shape(
        make_optimizer(OptimizerConfig(), STEPS).init, abstract["params"]
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
    )
    (a, saved_a, step_a), (b, saved_b, step_b) = (
        checkpoint.restore(w, abstract) for w in (whole, parts)
    )
    for saved in (saved_a, saved_b):
        assert saved.pop("seconds") > 0 and saved.pop("clock")["steps"] == STEPS
    assert step_a == step_b == STEPS and saved_a == saved_b
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


# Refusals: exit code 2, one line, nothing left behind

REFUSED = {
    "unknown key": (
        ["--config.data.trian=x"],
        r"unknown config key 'data.trian'; config.data has batch_size, .*train",
    ),
    "unknown group": (["--config.optimiser.b1=1"], "unknown config key 'optimiser.b1'; config has"),
    "key of a number": (["--config.tokens.x=1"], "'tokens.x'; config.tokens has no keys below"),
    "wrong type": (["--config.tokens=many"], "--config.tokens=many.* int"),
    "unknown flag": (["--confg=x"], "Unknown command line flag 'confg'"),
    "argument": (["tokens=5"], "unexpected arguments .*tokens=5.*flags start with --"),
    "missing config": (["--config=configs/none.py"], "no config file configs/none.py"),
    "config argument": ([f"--config={CONFIG}:speps=3"], "unknown config argument 'speps'.*steps"),
    "nothing to train": (
        ["--config.source=", "--config.objective.kd=0"],
        "nothing to train: set --config.source=MODEL",
    ),
    "no teacher": (["--config.source="], "needs the model to distil from: set --config.source"),
    "missing source": (["--config.source=/no/such/model"], "/no/such/model does not exist"),
    "missing checkpoint": (["--config.init_from={place}/nowhere"], "no checkpoint in .*nowhere"),
    "loop count": (["--config.model.num_loops=3"], r"num_loops=3 .*4 layers.*1, 2,? (or )?4"),
    "loop count of a baseline": (
        ["--config.model.num_loops=3", "--config.model.reduced_baseline=true"],
        r"num_loops=3 .*4 layers",
    ),
    "exits in another order": (
        ["--config.model.sharing=sequence"],
        "a loss of exits needs sharing='cycle'.* this model has sharing='sequence'",
    ),
    "negative rank": (["--config.model.lora_rank=-7"], "rank -7 of .* is impossible"),
    "bucket": (["--config.init_from=gs:///run"], "gs:///run names no bucket"),
    "key of a file": (["--config={place}/typo.py"], 'Key "trian" does not exist'),
    "objective of a run": (
        ["--workdir={place}/whole", "--config.objective.exit_coefficient=0.5"],
        "whole cannot go on where it stopped: objective was .*0.1.*now objective is .*0.5",
    ),
    "method": (["--config.model.method=middle"], "middle.*stepwise.*average"),
    "norms": (["--config.model.norms=shared"], "shared.*tied.*per_loop.*folded"),
    "vocabulary": (
        ["--config.source={place}/small_vocab"],
        "tokenizer and model do not belong together",
    ),
    "missing text": (["--config.data.train={place}/none.txt"], "none.txt' does not exist"),
    "empty directory": (["--config.data.train={place}/empty"], "no text in directory .*empty"),
    "empty file": (["--config.data.train={place}/empty.txt"], "no text in .*empty.txt"),
    "empty validation": (["--config.data.valid={place}/empty.txt"], "no text in .*empty.txt"),
    "batch size": (["--config.data.batch_size=0"], "data.batch_size must be at least 1, got 0"),
    "context": (["--config.data.context_length=1"], "context_length=1"),
    "interval": (["--config.eval_every=0"], "eval_every must be at least 1 step, got 0"),
    "budget": (["--config.tokens=0"], "tokens must be at least 1, got 0"),
    "mesh": (["--config.mesh.data=3"], "mesh .*'data': 3.* 1 devices"),
    "remat": (["--config.remat=some"], "remat='some'; expected one of none, full"),
    "dtype": (["--config.dtype=float8"], "dtype='float8'; expected auto, float32 or bfloat16"),
    "objective": (["--config.objective.kd_loss=l2"], "kd_loss='l2'; expected one of"),
    "optimizer": (["--config.optimizer.learning_rate=0"], "learning_rate must be > 0, got 0"),
    "clipping": (["--config.optimizer.clip_norm=-1"], "clip_norm must be >= 0, got -1"),
    "kept checkpoints": (["--config.keep_checkpoints=0"], "keep_checkpoints must be at least 1"),
    "another teacher": (
        ["--config.init_from={place}/whole", "--config.source={place}/other_words"],
        "other_words and the model .*whole.* have different vocabularies",
    ),
    "a token the model lacks": (
        ["--config.source={place}/added_word", "--config.data.train={place}/added.txt"],
        r"the text contains '<image>', id 4096, which this model does not have",
    ),
    "import": (["--config={place}/elsewhere.py"], "imports what is not there: .*no_such_room"),
    "scratch": (
        ["--config={place}/scratch.py", "--config.source="],
        "decoder config .*missing.*num_heads",
    ),
    "workdir is a file": (["--workdir={place}/empty.txt/run"], "empty.txt"),
    "not finite": (
        ["--config.optimizer.learning_rate=1e38", "--config.optimizer.warmup_steps=0"],
        r"steps 2 to 9 were skipped .max_skipped_steps=8.: .*not finite; at step 9 the loss is nan"
        ".*optimizer.learning_rate",
    ),
    "not finite after a save": (
        [
            "--config.optimizer.learning_rate=1e38",
            "--config.optimizer.warmup_steps=0",
            "--config.checkpoint_every=1",
            "--config.max_skipped_steps=3",
        ],
        "steps 2 to 4 were skipped .*No checkpoint has changed by them",
    ),
    # refused by the run that lives in the workdir
    "another model": (
        ["--workdir={place}/whole", "--config.model.num_loops=4"],
        "whole holds a run of another model: model was .*2.*, now .*4.* --workdir",
    ),
    "another length": (
        ["--workdir={place}/whole", f"--config.tokens={70 * 32 * 4}"],
        "whole cannot go on where it stopped: num_steps was 60; now num_steps is 70",
    ),
    "other rows": (
        [
            "--workdir={place}/whole",
            "--config.data.batch_size=2",
            "--config.data.context_length=64",
        ],
        "batch_size was 4, context_length was 32.* now batch_size is 2, context_length is 64",
    ),
    "another order": (["--workdir={place}/whole", "--config.seed=5"], "seed was 0; now seed is 5"),
    "another optimizer": (
        ["--workdir={place}/whole", "--config.optimizer.clip_norm=0"],
        "gradient clipping was True; now gradient clipping is False",
    ),
}


@pytest.fixture(scope="module")
def refusals(place, runs):
    """case -> its CompletedProcess."""
    (place / "empty").mkdir()
    (place / "empty.txt").write_text("")
    (place / "added.txt").write_text("a picture <image> in the text\n" * 50)
    (place / "elsewhere.py").write_text("import no_such_room\n")
    (place / "typo.py").write_text(
        "from configs import tiny_smoke\n\n\ndef get_config():\n"
        "    c = tiny_smoke.get_config()\n    c.data.trian = 'x'\n    return c\n"
    )
    words = json.loads((place / "source" / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added |= {"id": 4096, "content": "<image>", "special": True}
    for name, change in (
        ("added_word", lambda: words["added_tokens"].append(added)),
        ("other_words", lambda: words["model"]["vocab"].update(swapped(words["model"]["vocab"]))),
    ):
        shutil.copytree(place / "source", place / name)
        change()
        (place / name / "tokenizer.json").write_text(json.dumps(words))
        if name == "added_word":
            del words["added_tokens"][-1]
    (place / "scratch.py").write_text(
        "from configs import tiny_pretrain\n\n\ndef get_config():\n"
        "    c = tiny_pretrain.get_config()\n    del c.scratch['num_heads']\n    return c\n"
    )
    before, done = listing(place / "whole"), {}
    for n, (name, (overrides, _)) in enumerate(REFUSED.items()):
        argv = command(place, place / f"refused_{n}", *(o.format(place=place) for o in overrides))
        done[name] = commands.run("train", *argv)
    assert listing(place / "whole") == before, "a refusal touched the finished run"
    return done


def swapped(vocab):
    """Two tokens with each other's ids."""
    (a, i), (b, j) = list(vocab.items())[-2:]
    return {a: j, b: i}


def listing(directory):
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(name, refusals, place):
    stderr = refusals[name].stderr
    assert refusals[name].returncode == 2, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    assert re.search(REFUSED[name][1], lines[0]), lines[0]
    left = place / f"refused_{list(REFUSED).index(name)}"
    if name.startswith("not finite"):  # that run did begin; what was being saved is whole
        assert (checkpoint.latest_step(left) == 0) == (name == "not finite")
        assert all(p.name.isdigit() for p in (left / checkpoint.STEPS).iterdir())
    else:
        assert not left.exists(), list(left.rglob("*"))


def test_refusals_leave_no_other_files(refusals, place):
    expected = {"cache", "empty", "empty.txt", "parts", "scratch.py", "small_vocab", "source"}
    expected |= {"added.txt", "added_word", "elsewhere.py", "other_words", "typo.py"}
    expected |= {"text", "whole"}
    expected |= {f"refused_{i}" for i, name in enumerate(REFUSED) if name.startswith("not finite")}
    found = {p.name for p in place.iterdir() if not p.name.startswith(("log_", "__pycache__"))}
    assert found == expected
    entries = {p.name[:1] for p in (place / "cache").iterdir()}
    assert "." not in entries, "half-written token caches"


def test_a_signal_passes_code_that_catches_every_exception():
    """Libraries that a start calls, such as Orbax and transformers, do so."""
    with pytest.raises(loop.NotStarted, match="SIGTERM"), loop.Stop():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Exception:
            pass
