"""The Python API: a model from its source to its checkpoint, and docs/api.md."""

import dataclasses
import gc
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import weakref

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax import fit
from recursive_jax.evaluation.certificate import certified_kl
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import init_params
from recursive_jax.training import callbacks, loop
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.contract import RunContract
from recursive_jax.weights import hf
from recursive_jax.weights.source import ASSETS
from recursive_jax.weights.stored import ArrayWeights

ROOT = pathlib.Path(__file__).resolve().parents[1]
LLAMA = DecoderConfig(
    "llama", 4096, 32, 64, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=4, tied_head=True
)
SMALL = {"context_length": 32, "batch_size": 8, "eval_tokens": 200, "warmup_steps": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random Llama with the embedded tokenizer, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("api") / "llama"
    params = jax.tree.map(
        lambda x: np.asarray(x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)),
        init_params(LLAMA, jax.random.key(0)),
    )
    hf.save_params(params, LLAMA, directory, dtype=np.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((ASSETS / "tiny" / name).read_bytes())
    return rj.load(directory)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    file = tmp_path_factory.mktemp("words") / "text.jsonl"
    rng = np.random.default_rng(0)
    vocabulary = "the loop runs a block of layers again and keeps what it learned".split()
    lines = (" ".join(rng.choice(vocabulary, 40)) for _ in range(60))
    file.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return str(file)


def logits(model, length=9):
    tokens = np.random.default_rng(1).integers(0, 4096, (2, length))
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    decoder, params = Decoder(model.cfg), {"params": model.params}
    hidden = decoder.apply(params, tokens, positions)
    return np.asarray(decoder.apply(params, hidden, method="unembed"))


def test_importing_is_cheap():
    """No JAX, no flags; every public name is there."""
    program = (
        "import sys, recursive_jax as rj\n"
        "assert 'jax' not in sys.modules and 'absl' not in sys.modules, 'slow import'\n"
        "print(*dir(rj))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in done.stdout.split():
        assert getattr(rj, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        rj.lode  # noqa: B018


def test_jobs_can_be_imported_together():
    """Their flags are defined when they run, so that one process may import all of them."""
    program = (
        "from absl import flags\n"
        "from recursive_jax import convert, generate, train\n"
        "assert 'source' not in flags.FLAGS and 'workdir' not in flags.FLAGS\n"
        "for job in (convert, generate, train):\n"
        "    values = flags.FlagValues()\n"
        "    job.define_flags(values)\n"
        "    assert len(list(values)) >= 3\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_package_lists_its_jobs():
    done = subprocess.run(
        [sys.executable, "-m", "recursive_jax"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for job in ("convert", "train", "generate"):
        assert re.search(rf"python -m recursive_jax\.{job}  +\w", done.stdout)


def test_from_a_source_to_a_checkpoint_and_back(source, words, tmp_path):
    assert source.certificate is None
    model = source.convert(num_loops=2, lora_rank="full", quiet=True)
    assert (model.cfg.num_loops, model.cfg.num_layers) == (2, 2)
    assert model.certificate["recipe"]["lora_rank"] == "full"
    np.testing.assert_allclose(logits(model), logits(source), atol=1e-4)  # full rank: the source

    trained = model.train(
        words, teacher=source, tokens=20 * 256, learning_rate=1e-2, quiet=True, **SMALL
    )
    before, after = (m.perplexity(words, tokens=300, context_length=32) for m in (model, trained))
    assert after["nll"] < before["nll"] - 0.3
    assert len(after["nll_exits"]) == 2
    assert trained.certificate == model.certificate

    trained.save(tmp_path / "ckpt")
    again = rj.load(tmp_path / "ckpt")
    np.testing.assert_array_equal(logits(again), logits(trained))
    assert again.certificate == model.certificate
    vanilla = again.untie()
    assert (vanilla.cfg.num_loops, vanilla.cfg.num_layers) == (1, 4)
    np.testing.assert_allclose(logits(vanilla), logits(trained), atol=1e-4)
    with pytest.raises(ValueError, match="ckpt is not empty"):
        trained.save(tmp_path / "ckpt")
    with pytest.raises(ValueError, match="untie it first"):
        again.convert(num_loops=2)
    folded = vanilla.convert(num_loops=2, lora_rank="full", quiet=True)  # a model in memory
    np.testing.assert_allclose(logits(folded), logits(trained), atol=1e-3)


def test_nothing_that_the_caller_holds_is_changed(source, words):
    """Neither arrays nor settings of JAX: training and decoding donate copies."""
    settings = dict(jax.config.values)
    params = jax.tree.map(jnp.array, source.params)
    mine = dataclasses.replace(source, weights=ArrayWeights(params, "mine"))
    kept = jax.tree.map(np.array, params)
    mine.train(words, tokens=2 * 256, kd=0.0, quiet=True, **SMALL)
    mine.generate("the loop", max_new_tokens=3, dtype="float32")
    mine.generate("the loop", max_new_tokens=3, dtype="bfloat16")
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(kept), strict=True):
        assert not got.is_deleted()
        np.testing.assert_array_equal(got, want)
    assert dict(jax.config.values) == settings


def test_weights_are_in_memory_once(source, words, tmp_path, monkeypatch):
    """A model that its caller does not keep is freed while it trains; saving copies nothing."""

    def live():
        gc.collect()
        pieces = (s.data for x in jax.live_arrays() for s in x.addressable_shards)
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in pieces}.values())

    models = [source.convert(num_loops=2, lora_rank=4, lora_init="svd", quiet=True)]
    started, seen, run = weakref.ref(models[0].weights), [], loop.run

    def look(*arguments):
        gc.collect()
        seen.append(started())
        return run(*arguments)

    monkeypatch.setattr(loop, "run", look)
    trained = models.pop().train(
        words, tokens=256, quiet=True, context_length=32, batch_size=8, eval_tokens=200
    )
    assert seen == [None]
    before = live()
    trained.save(tmp_path / "saved")
    assert live() == before


def test_a_run_in_a_workdir_goes_on(source, words, tmp_path):
    """Without its newest step, the same call gives the bits of one run."""
    settings = {"tokens": 6 * 256, "kd": 0.0, "checkpoint_every": 2, "quiet": True, **SMALL}
    whole = source.train(words, workdir=tmp_path / "whole", **settings)
    steps = tmp_path / "whole" / "checkpoints"
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / max(p.name for p in steps.iterdir()))
    resumed = source.train(words, workdir=tmp_path / "part", **settings)
    np.testing.assert_array_equal(logits(resumed), logits(whole))
    with pytest.raises(ValueError, match="holds a run of another model: its sizes"):
        source.convert(lora_rank=2, lora_init="svd", quiet=True).train(
            words, workdir=tmp_path / "part", **settings
        )
    with pytest.raises(ValueError, match="its start or teacher is"):
        whole.train(words, workdir=tmp_path / "part", **settings)
    with pytest.raises(ValueError, match="num_steps was 6; now num_steps is 7"):
        source.train(words, workdir=tmp_path / "part", **settings | {"tokens": 7 * 256})


def test_a_run_goes_on_whose_conversion_was_recorded_by_an_older_version(source, words, tmp_path):
    """Options that are newer than the record have their defaults; others are another model."""
    settings = {"tokens": 256, "kd": 0.0, "quiet": True, "workdir": tmp_path / "run", **SMALL}
    now = rj.TieConfig(num_loops=1).to_json()
    then = {name: value for name, value in now.items() if name != "sharing"}
    for record in (then, now):
        dataclasses.replace(source, facts=source.facts | {"tying": record}).train(words, **settings)
    other = dataclasses.replace(source, facts=source.facts | {"tying": now | {"seed": 7}})
    with pytest.raises(ValueError, match="another model: its conversion is"):
        other.train(words, **settings)


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a process in the background of a shell may lack."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_the_steps_that_are_done(source, words, tmp_path, monkeypatch, interruptible):
    """The same call then goes on from there."""
    settings = {"tokens": 6 * 256, "kd": 0.0, "quiet": True, "log_every": 1, **SMALL}
    run, handler, steps = tmp_path / "run", signal.getsignal(signal.SIGINT), []

    class Interrupting(callbacks.Record):
        def on_log(self, step, metrics):
            steps.append(step)
            if steps == [1, 2, 3]:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(fit, "Record", Interrupting)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 4 and saved"):
        source.train(words, workdir=run, **settings)
    assert signal.getsignal(signal.SIGINT) is handler
    trained = source.train(words, workdir=run, **settings)
    assert trained.name.endswith("1,536 tokens") and steps == [1, 2, 3, 4, 5, 6]


def test_a_run_does_not_write_into_a_directory_of_another_kind(source, words, tmp_path):
    settings = SMALL | {"tokens": 256, "quiet": True}
    model = source.convert(num_loops=2, quiet=True)
    model.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds a model that was saved, not a run"):
        model.train(words, workdir=tmp_path / "saved", **settings)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="has format None"):
        model.train(pathlib.Path(words), workdir=theirs, **settings)
    assert (theirs / "config.json").read_text() == '{"model_type": "llama"}'


def test_a_quiet_conversion_shows_no_bar(source, words, tmp_path, capfd):
    model = source.convert(
        num_loops=2, text=words, text_tokens=40, context_length=32, scratch=tmp_path, quiet=True
    )
    assert model.certificate["text_tokens"] == 40
    assert capfd.readouterr() == ("", "") and not any(tmp_path.iterdir())


def test_generate_and_stream_agree(source):
    model = source.convert(num_loops=2, lora_rank=4, lora_init="svd", quiet=True)
    prompts = ["the loop runs", "a block", [{"role": "user", "content": "again"}]]
    with pytest.raises(ValueError, match="prompt 2: .*chat template"):
        model.generate(prompts, max_new_tokens=4)
    answers = model.generate(prompts[:2], max_new_tokens=6, logprobs=True)
    assert [len(a.tokens) for a in answers] == [6, 6] and len(answers[0].logprobs) == 6
    assert all(set(a.exit_loops) == {2} for a in answers)
    events = list(model.stream(prompts[0], max_new_tokens=6))
    assert len(events) > 1 and "".join(e.piece for e in events) == answers[0].text
    early = model.generate(prompts[0], max_new_tokens=6, exits=rj.TopProbability(0.0))
    assert 1 in early[0].exit_loops[1:]
    strict = model.generate(prompts[0], max_new_tokens=6, exits=rj.TopProbability(1.0))
    assert strict[0].tokens == answers[0].tokens
    lossless = rj.EngineConfig(lossless=True, measure=rj.Static(1))
    assert model.generate(prompts[0], max_new_tokens=6, engine=lossless)[0].tokens == (
        answers[0].tokens
    )
    request = rj.Request("mine", (5, 6, 7), 3)
    assert model.generate([request])[0].id == "mine"
    left, other = (model.stream(prompts[0], max_new_tokens=6) for _ in range(2))
    next(left)
    assert "".join(e.piece for e in other) == answers[0].text
    with pytest.raises(ValueError, match="a newer session uses this engine"):
        next(left)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.convert(num_loop=2), r"unknown options \['num_loop'\]; expected some of num_"),
        (lambda m: m.convert(rj.TieConfig(), lora_rank=3), "how beside lora_rank"),
        (lambda m: m.convert(num_loops=3), "num_loops=3 does not divide the model's 4 layers"),
        (
            lambda m: m.train("docstrings", learningrate=1),
            "unknown training setting 'learn",
        ),
        (lambda m: m.train("docstrings", tokens=0), "tokens must be at least 1"),
        (lambda m: m.train("docstrings", tokens=1e6), "tokens=1000000.0; expected an integer"),
        (lambda m: m.train("docstrings", learning_rate="1"), "learning_rate='1'; expected a num"),
        (lambda m: m.train("docstrings", m), "config=Model.*expected a TrainConfig"),
        (lambda m: m.train("docstrings", teacher="tiny"), "teacher='tiny'; expected a Model"),
        (lambda m: m.train("docstrings", teacher=m, kd=0.0), "a teacher with kd=0"),
        (lambda m: m.train("docstrings", workdir="foo://bucket/run"), "unknown scheme foo"),
        (lambda m: m.convert(num_loops="2"), "num_loops='2'; expected an integer"),
        (lambda m: m.perplexity(["a b c"], batch_size=0), "batch_size=0; expected an integer"),
        (lambda m: m.generate("x", engine={}), "engine={}; expected an EngineConfig"),
        (lambda m: m.train("docstrings", accumulate=3), "accumulate=3 does not divide data.batch"),
        (lambda m: m.train("docstrings", kd=1.0, quiet=True), "teacher=MODEL in Python"),
        (lambda m: m.generate("x", max_tokens=3), r"unknown options \['max_tokens'\]"),
        (lambda m: m.generate([]), "no prompts"),
        (lambda m: m.generate("x", exits=rj.TopProbability(0.5)), "needs a model of at least 2"),
        (lambda m: rj.load("/no/such/model"), "/no/such/model does not exist"),
    ],
)
def test_mistakes_are_named(source, call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(source)


def test_the_code_of_the_documentation_runs(tmp_path):
    """docs/api.md from top to bottom, in one fresh process."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert code.count("model.") >= 8
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=commands.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and done.stdout.rstrip().endswith("1 12")
    assert "near start" in done.stdout, "the joint start is distilled by its recipe"


def test_a_near_start_learns_from_the_source_alone():
    """Distillation alone at half of the rate; a run that began otherwise is not changed."""
    config = TrainConfig().with_changes(learning_rate=1e-3, warmup_steps=40)
    documents = np.arange(3, dtype=np.uint64), np.arange(4)

    def contract(config, kl):
        return RunContract.of(config, *documents, kl)

    near, kl = fit.for_start(config, {"kl": 0.5})
    assert kl == 0.5 and (near.objective.ce, near.objective.kd) == (0.0, 1.0)
    assert (near.optimizer.learning_rate, near.optimizer.warmup_steps) == (5e-4, 20)
    assert fit.for_start(config, {"kl": 3.0}) == fit.for_start(config, None) == (config, None)
    off = config.with_changes(**{"near.kl": 0.1})
    assert fit.for_start(off, {"kl": 0.5}) == (off, None)

    began = contract(near, kl).to_json()
    again, kl = fit.for_start(config, {"kl": 0.5}, began)
    contract(again, kl).check(began, "RUN")
    with pytest.raises(ValueError, match="near start was True; now .*near start is False"):
        contract(off, None).check(began, "RUN")
    older = {k: v for k, v in contract(config, None).to_json().items() if k != "near start"}
    again, kl = fit.for_start(config, {"kl": 0.5}, older)
    assert (again, kl) == (config, None), "its steps were those of the settings"
    contract(again, kl).check(older, "RUN")


def test_which_starts_are_near():
    config = TrainConfig()
    assert config.is_near(0.1) and not config.is_near(3.0) and not config.is_near(None)
    assert not config.is_near(float("nan"))
    assert not config.with_changes(kd=0.0).is_near(0.1), "nothing to learn from but labels"
    assert not config.with_changes(exit_coefficient=0.1).is_near(0.1)
    assert certified_kl(None) is certified_kl({"calibration": {"text": "-"}}) is None
    fitted = {"metric": "fisher", "kl_by_metric": {"fisher": 0.2, "activations": 0.1}}
    assert certified_kl({"calibration": fitted}) == 0.2
    assert certified_kl({"calibration": fitted, "kl": 0.3}) == 0.3
    for change in ({"near.kl": -1.0}, {"near.learning_rate_scale": 0.0}, {"near.kl": "2"}):
        with pytest.raises(ValueError, match="near."):
            config.with_changes(**change)
