"""Draws from a teacher: they are unbiased, their files are whole and of the right run."""

import copy
import dataclasses
import itertools
import json
import pathlib
import random
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from configs import common
from recursive_jax import start, teach, teaching
from recursive_jax.fit import make_mesh, plan_step
from recursive_jax.models.decoder import Decoder
from recursive_jax.trainer import Trainer
from recursive_jax.training import draw_files, draws
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.contract import RunContract
from recursive_jax.training.corpus import open_corpus
from recursive_jax.training.losses import Objective, divergence, token_losses
from recursive_jax.training.setup import TrainSetup

VOCAB, DRAWS = 61, 8  # no square: the last block of ids is not full
STEPS, LENGTH = 6, 32


def logits(seed, *shape, scale=2.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def counted(ids):
    """Draws `[N, K]` of sorted ids, by NumPy."""
    found = [np.unique(row, return_counts=True) for row in ids]
    out, counts = np.zeros(ids.shape, np.int32), np.zeros(ids.shape, np.uint8)
    for n, (values, times) in enumerate(found):
        out[n, : len(values)], counts[n, : len(values)] = values, times
    return out, counts


def drawn(teacher, trials):
    uniform = np.random.default_rng(5).random((trials, len(teacher), 2, DRAWS), np.float32)
    return jax.jit(jax.vmap(draws.draw, (None, 0)))(teacher, uniform)


def likeliest(teacher, trials):
    """The biased way: the K likeliest ids, in proportion to their probability."""
    p, rng = scipy.special.softmax(teacher, -1), np.random.default_rng(5)
    p = np.where(p >= np.sort(p)[:, -DRAWS:][:, :1], p, 0)
    p /= p.sum(-1, keepdims=True)
    ids = [[rng.choice(VOCAB, DRAWS, p=row) for row in p] for _ in range(trials)]
    return np.sort(ids), drawn(teacher, 1)[1].repeat(trials, 0)


def deviations(sample, trials=6000, temperature=1.5):
    """(gradients, values) of KD by draws against KD by logits, in standard errors of the mean.

    The gradient is that of the objective in the student's logits.
    """
    teacher = logits(0, 3, VOCAB)
    student = 0.5 * teacher + logits(1, 3, VOCAB)
    targets, weights = np.array([[4, 5, 6]], np.int32), np.array([[1.0, 0.5, 2.0]], np.float32)
    objective = Objective(ce=0.5, kd=2.0, temperature=temperature)

    def loss(student, theirs):
        return token_losses(objective, [student[None]], targets, weights, theirs)[0]

    value, gradient = jax.value_and_grad(loss)(student, teacher[None])
    ids, entropy = sample(teacher / temperature, trials)
    kept = [counted(np.asarray(x)) for x in ids]
    theirs = draws.Draws(
        np.stack([x for x, _ in kept])[:, None],
        np.stack([x for _, x in kept])[:, None],
        np.asarray(entropy)[:, None],
    )
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(student, theirs)

    def errors(found, true):
        found = np.asarray(found, np.float64)
        error = found.std(0, ddof=1) / np.sqrt(trials)
        return np.abs(found.mean(0) - true) / np.maximum(error, 1e-6)

    return errors(gradients, gradient), errors(values, value)


class TestDraws:
    def test_the_mean_of_the_gradient_is_that_of_the_whole_distribution(self):
        gradients, values = deviations(drawn)
        assert gradients.max() < 4.5 and values < 4.5
        assert np.sqrt((gradients**2).mean()) < 1.2, "standard errors, not more"

    def test_a_biased_sampler_is_seen(self):
        gradients, values = deviations(likeliest)
        assert gradients.max() > 20 and values > 20

    def test_unlikely_ids_of_a_large_vocabulary_are_all_drawn(self):
        """Their mass of 1e-4 is split into 7e-10 each. A step of float32 below 1 is 6e-8."""
        vocab, trials = 150_000, 5000
        teacher = np.zeros((1, vocab), np.float32)
        teacher[0, 0] = np.log(vocab * 1e4)
        uniform = np.random.default_rng(0).random((trials, 1, 2, 1), np.float32)
        uniform[:, :, 0] = 1 - 1e-4 * uniform[:, :, 0]  # all draws of one are from the tail
        ids, entropy = jax.jit(jax.vmap(draws.draw, (None, 0)))(teacher, uniform)
        assert len(np.unique(ids)) > 0.9 * trials
        assert abs(np.mean(ids) / vocab - 0.5) < 0.02 and np.max(ids) < vocab
        np.testing.assert_allclose(entropy, 1e-4 * (1 + np.log(vocab * 1e4)), rtol=1e-2)

    def test_an_id_without_probability_is_never_drawn(self):
        teacher = np.full((1, VOCAB), -np.inf, np.float32)
        teacher[0, [3, 50]] = 0
        for value in (0.0, np.nextafter(np.float32(1), np.float32(0))):
            ids, entropy = jax.jit(draws.draw)(teacher, np.full((1, 2, DRAWS), value, np.float32))
            assert set(np.unique(ids)) <= {3, 50}
        np.testing.assert_allclose(entropy, np.log(2), rtol=1e-6)

    @pytest.mark.parametrize("bytes_per_id", [2, 4])
    def test_records_hold_what_was_drawn(self, bytes_per_id):
        ids = np.sort(np.random.default_rng(0).integers(0, 9, (LENGTH, DRAWS)))
        ids[0], ids[1] = 7, np.arange(DRAWS)  # one id only; all different
        entropy, tokens = logits(0, LENGTH), np.arange(LENGTH, dtype=np.int32)
        record = draws.encode(5, tokens, ids, entropy, bytes_per_id)
        found = draws.decode(record, 5, tokens, DRAWS)
        for field, expected in zip(("ids", "counts"), counted(ids), strict=True):
            np.testing.assert_array_equal(getattr(found, field), expected)
        np.testing.assert_array_equal(found.entropy, entropy)
        with pytest.raises(ValueError, match="none of row 6"):
            draws.decode(record, 6, tokens, DRAWS)
        with pytest.raises(ValueError, match="row 5 of the text has other tokens"):
            draws.decode(record, 5, tokens + 1, DRAWS)

    def test_draws_of_the_student_itself_have_no_kl_on_the_whole(self):
        """An independent value of one case: all mass on one id."""
        teacher = draws.Draws(np.array([[2, 0]]), np.array([[2, 0]], np.uint8), np.zeros(1))
        student = logits(3, 1, VOCAB)
        expected = -scipy.special.log_softmax(student / 2.0)[0, 2] * 4
        np.testing.assert_allclose(
            draws.drawn_kl(jnp.asarray(student), teacher, 2.0), [expected], rtol=1e-5
        )
        sharp = np.where(np.arange(VOCAB) == 2, 60.0, 0.0).astype(np.float32)[None]
        np.testing.assert_allclose(divergence(student, sharp * 2, temperature=2.0), [expected],
                                   rtol=1e-5)  # fmt: skip


DECODER = dict(
    family="llama", vocab_size=4096, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=1,
    head_dim=8, num_layers=2, tied_head=True,
)  # fmt: skip


def make_model(seed):
    """A random one whose distributions are no longer flat."""
    model = start.from_scratch(DECODER, "tiny", seed).make()
    params = dict(model.weights.params)
    params["final_norm"] = {"scale": 40 * params["final_norm"]["scale"]}
    return dataclasses.replace(model, weights=dataclasses.replace(model.weights, params=params))


@dataclasses.dataclass
class Job:
    """What `teach` works with, and a finished directory."""

    config: TrainConfig
    corpus: Any
    teacher: Any
    job: draw_files.DrawJob
    directory: pathlib.Path

    def write(self, out, progress=lambda rows: None):
        config, corpus = self.config, self.corpus
        return teaching.write_draws(out, self.job, config, corpus, self.teacher, progress)

    def open(self, **changes):
        config = self.config.with_changes(**{"data.teacher": str(self.directory)} | changes)
        return teaching.open_draws(config, self.corpus, self.teacher, self.teacher)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    place = tmp_path_factory.mktemp("teach")
    words, rng = "the loop runs a block of layers again and keeps it".split(), random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randrange(9, 60))) for _ in range(30)]
    text = place / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = TrainConfig().with_changes(
        train=str(text), cache_dir=str(place / "cache"), valid_fraction=0.1, context_length=LENGTH,
        batch_size=8, eval_tokens=200, tokens=STEPS * 8 * LENGTH, warmup_steps=0,
        learning_rate=1e-2, log_every=1, checkpoint_every=2, eval_every=100,
    )  # fmt: skip
    teacher = make_model(1)
    corpus = open_corpus(config.data, teacher.tokenizer, 4096, config.seed, progress=False)
    assert len(corpus.rows) < STEPS * 8, "more than one epoch"
    described = teaching.make_job(config, corpus, teacher, teacher, num=50, shard_rows=13)
    job = Job(config, corpus, teacher, described, place / "draws")
    job.write(job.directory)
    return job


def content(directory):
    return {f.name: f.read_bytes() for f in sorted(directory.iterdir())}


class TestFiles:
    def test_every_row_has_draws_of_its_teacher(self, job):
        """By the decoder alone: frequencies of ids over all rows are those of the distributions."""
        found, rows = job.open().draws, job.corpus.rows.endless(job.config.seed)
        assert job.job.shards == 4 and len(content(job.directory)) == 5
        decoder, params = Decoder(job.teacher.cfg), {"params": job.teacher.weights.params}

        @jax.jit
        def logits_of(*inputs):
            hidden = decoder.apply(params, *(x[None] for x in inputs))
            return decoder.apply(params, hidden, method="unembed")[0]

        expected, seen, kept, before = np.zeros(4096), np.zeros(4096), [], {}
        for row in range(job.job.rows):
            batch = found.join(row, rows[row])
            assert (batch.teacher.counts.sum(-1, dtype=int) == 50).all()
            again = before.setdefault(batch.tokens.tobytes(), batch.teacher.ids)
            assert again is batch.teacher.ids or (again != batch.teacher.ids).any()
            np.add.at(seen, batch.teacher.ids, batch.teacher.counts)
            theirs = logits_of(batch.tokens, batch.positions, batch.segment_ids)
            p = scipy.special.softmax(np.asarray(theirs, np.float64), -1)
            expected += 50 * p.sum(0)
            entropy = -(p * np.log(p)).sum(-1)
            np.testing.assert_allclose(batch.teacher.entropy, entropy, rtol=1e-3)
            kept.append(entropy)
        assert 1 < np.mean(kept) < 8
        assert len(before) == len(job.corpus.rows), "the second epoch has other draws"
        chi = ((seen - expected) ** 2 / expected)[expected > 5]
        assert len(chi) > 100 and chi.mean() < 1.2, "1 for independent draws, less for these"

    @pytest.mark.parametrize("at", [14, 47])
    def test_a_killed_job_goes_on_to_the_same_bytes(self, job, tmp_path, at):
        count = itertools.count()

        def die(rows):
            if next(count) == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            job.write(tmp_path / "o", die)
        shutil.copy(job.directory / job.job.file(3), tmp_path / "o" / f"{job.job.file(3)}.partial")
        done = sorted(p.name for p in tmp_path.glob("o/*.json") if p.name != "job.json")
        assert len(done) == at // 13 and not (tmp_path / "o" / "manifest.json").exists()
        resumed = []
        job.write(tmp_path / "o", resumed.append)
        assert len(resumed) == job.job.rows - 13 * len(done)
        assert content(tmp_path / "o") == content(job.directory)
        job.write(tmp_path / "o", resumed.append)
        assert len(resumed) == job.job.rows - 13 * len(done), "finished: nothing to do"

    def test_any_mesh_draws_the_same(self, job, tmp_path):
        sizes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
        other = dataclasses.replace(job, config=job.config.with_changes(**sizes))
        other.write(tmp_path / "o")
        other.directory = tmp_path / "o"
        rows, same = job.corpus.rows.endless(0), []
        for row in range(0, job.job.rows, 7):
            pair = [d.open().draws.join(row, rows[row]).teacher for d in (job, other)]
            same.append((pair[0].ids == pair[1].ids).mean())
            np.testing.assert_allclose(pair[0].entropy, pair[1].entropy, rtol=1e-4)
        assert np.mean(same) > 0.999, "sums in another order move a draw to the next id at times"


class TestTraining:
    def test_a_run_without_the_teacher_learns_what_it_teaches_and_goes_on(self, job, tmp_path):
        student, config = make_model(2), job.config.with_changes(ce=0.0)
        student.train(None, config, teacher=job.teacher, workdir=tmp_path / "online",
                               quiet=True)  # fmt: skip
        # moments in other forms, which are saved as well
        config = config.with_changes(
            mu_dtype="bfloat16", rates=".*scale=0 .*=1",
            **{"data.teacher": str(job.directory), "optimizer.name": "muon"},
        )  # fmt: skip
        whole = student.train(None, config, workdir=tmp_path / "whole", quiet=True)
        kd = [kd_of(tmp_path / name) for name in ("online", "whole")]
        assert abs(kd[1][0] - kd[0][0]) < 0.02 < kd[0][0], "before the first update"
        assert kd[1][-1] < 0.3 * kd[1][0], "it learns"
        # a run that died behind step 4
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(STEPS))
        resumed = student.train(None, config, workdir=tmp_path / "cut", quiet=True)
        jax.tree.map(np.testing.assert_array_equal, resumed.weights.params, whole.weights.params)

    def test_a_run_goes_on_with_its_own_draws_only(self, job):
        def contract(draws):
            return RunContract.of(job.config, "text", np.zeros((1, 2)), teacher_draws=draws)

        older = contract("").to_json()
        del older["draws of the teacher"]
        contract("").check(older, "run")
        with pytest.raises(ValueError, match="draws of the teacher was a; now .* teacher is b"):
            contract("b").check(contract("a").to_json(), "run")
        longer = dataclasses.replace(job.job, rows=999, shard_rows=64, teacher="moved")
        assert longer.fingerprint == job.job.fingerprint
        assert dataclasses.replace(job.job, draws=9).fingerprint != job.job.fingerprint

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"seed": 1}, "has draws of seed 0, not 1 of this run"),
            ({"temperature": 2.0}, "temperature 1.0, not 2.0 of this run"),
            ({"tokens": 7 * 8 * LENGTH}, "has draws of 48 rows, this run takes 56"),
            ({"data.teacher": "nowhere"}, "nowhere is no finished directory of draws"),
        ],
    )
    def test_draws_for_another_run_are_refused(self, job, changes, message):
        with pytest.raises(ValueError, match=message):
            job.open(**changes)

    def test_draws_of_another_teacher_text_or_tokenizer_are_refused(self, job):
        with pytest.raises(ValueError, match="draws of content .*, not .* of this run"):
            dataclasses.replace(job, teacher=make_model(3)).open()
        data = dataclasses.replace(job.config.data, valid_fraction=0.4)
        corpus = open_corpus(data, job.teacher.tokenizer, 4096, 0, progress=False)
        with pytest.raises(ValueError, match="draws of text .*, not .* of this run"):
            dataclasses.replace(job, corpus=corpus).open()
        tokenizer = copy.deepcopy(job.teacher.tokenizer)
        tokenizer.add_tokens(["<loop>"])
        other = dataclasses.replace(job.teacher, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="draws of tokenizer .*, not .* of this run"):
            dataclasses.replace(job, teacher=other).open()
        wide = dataclasses.replace(job.teacher, cfg=job.teacher.cfg.replace(vocab_size=5000))
        opened = dataclasses.replace(job, teacher=wide).open()
        assert opened.draws.job.num_ids == 4096, "a padded vocabulary"

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"kd": 0.0}, "data.teacher=.* with objective.kd=0 would teach nothing"),
            ({"kd_loss": "jsd"}, "kd_loss='jsd' needs the whole distributions"),
        ],
    )
    def test_objectives_that_draws_do_not_serve(self, job, changes, message):
        with pytest.raises(ValueError, match=message):
            job.config.with_changes(**{"data.teacher": str(job.directory)} | changes)
        if "kd_loss" in changes:
            with pytest.raises(ValueError, match=message):
                TrainSetup(Decoder(job.teacher.cfg), None, Objective(**changes), draws=8)

    def test_a_step_is_lowered_for_draws(self, job):
        config = job.config.with_changes(**{"data.teacher": str(job.directory)})
        mesh = make_mesh(config)
        setup = plan_step(job.teacher, config, None, mesh).setup
        assert setup.teacher is None and (setup.draws, setup.num_ids) == (50, 4096)
        inputs = jax.tree.leaves(Trainer(setup, mesh).lower(8, LENGTH).in_avals)
        found = [(x.shape, x.dtype.name) for x in inputs]
        shape = (8, LENGTH, 50)
        assert found.count((shape, "int32")) == found.count((shape, "uint8")) == 1

    def test_damage_names_the_file(self, job, tmp_path):
        shutil.copytree(job.directory, tmp_path / "o")
        other = dataclasses.replace(job, directory=tmp_path / "o")
        file = tmp_path / "o" / job.job.file(1)
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=r"00001-of-00004 is damaged: .* recursive_jax.teach"):
            other.open()
        middle = len(whole) // 40
        file.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
        rows = job.corpus.rows.endless(0)
        with pytest.raises(ValueError, match=r"00001-of-00004: .*"):
            for row in range(13, 26):
                other.open().draws.join(row, rows[row])

    def test_a_directory_of_another_job_is_not_touched(self, job, tmp_path):
        before = content(job.directory)
        other = dataclasses.replace(job, job=dataclasses.replace(job.job, draws=30))
        with pytest.raises(ValueError, match="begun by another command: this one has draws 30, no"):
            other.write(job.directory)
        assert content(job.directory) == before
        (tmp_path / "mine.txt").write_text("")
        with pytest.raises(ValueError, match="holds something else than draws"):
            job.write(tmp_path)


def kd_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line).get("train/kd") for line in lines]
    return [x for x in found if x is not None]


def test_what_cannot_be_taught_is_refused_before_anything_is_read(tmp_path):
    config = common.get_config()
    config.objective.kd = 0.0
    with pytest.raises(ValueError, match="set objective.kd > 0"):
        teach.teach(config, tmp_path / "o")
    config.objective.kd, config.objective.kd_loss = 1.0, "tvd"
    with pytest.raises(ValueError, match="kd_loss='tvd' needs the whole distributions"):
        teach.teach(config, tmp_path / "o")
    config.objective.kd_loss = "forward_kl"
    with pytest.raises(ValueError, match="set --config.source"):
        teach.teach(config, tmp_path / "o")
    assert not list(tmp_path.iterdir())
