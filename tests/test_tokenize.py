"""Tokenised directories: the same rows as the text, resuming, hosts, mixtures, errors."""

import collections
import itertools
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags

from recursive_jax import paths, text, tokenize
from recursive_jax.text.documents import documents
from recursive_jax.training import data, shard_writer, token_rows
from recursive_jax.training.config import DataConfig
from recursive_jax.training.corpus import open_corpus
from recursive_jax.training.token_manifest import GROUP_DOCUMENTS, PART_TOKENS, load_manifest
from recursive_jax.training.token_shards import TokenDirectory

VOCAB = 4096
FIELDS = ("tokens", "targets", "weights", "positions", "segment_ids")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenize.load_tokenizer("tiny")


def sentences(count, seed, length=12):
    words = "loop depth shared block token layer rank exit cache row the of and with".split()
    draw = random.Random(seed)
    return [f"{i}: " + " ".join(draw.choices(words, k=draw.randrange(3, length))) + "." for i in
            range(count)]  # fmt: skip


def write_text(file, texts):
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(file)


def job_flags(*args):
    values = flags.FlagValues()
    tokenize.define_flags(values)
    flags.DEFINE_integer("verbosity", 0, "", flag_values=values)
    values(["tokenize", *args])
    return values


def run(source, out, *args):
    tokenize.tokenize(job_flags(f"--data={source}", "--tokenizer=tiny", f"--out={out}", *args))
    return load_manifest(out)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(text source, tokenised directory): two files, a long document, several shards."""
    root = tmp_path_factory.mktemp("corpus")
    texts = sentences(300, 0)
    long = "\n".join(sentences(2500, 3))
    write_text(root / "a.jsonl", [*texts[:150], "", long])
    write_text(root / "b.jsonl", texts[150:])
    run(root, root.parent / "tokens", "--valid_fraction=0.1", "--shard_tokens=600")
    return str(root), str(root.parent / "tokens")


def opened(spec, tokenizer, tmp_path, **settings):
    settings = {"valid_fraction": 0.1, "context_length": 64, "eval_tokens": 2000} | settings
    config = DataConfig(train=spec, cache_dir=str(tmp_path / "cache"), **settings)
    return open_corpus(config, tokenizer, VOCAB, seed=3, progress=False)


def equal(a, b):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def together(shares):
    """The batch of which every host has one share."""
    count = len(shares)
    size = count * len(shares[0].tokens)
    order = np.arange(size).reshape(-1, count).T.ravel()  # host p has rows p, p + count, ...
    merge = {f: np.concatenate([getattr(s, f) for s in shares]) for f in FIELDS}
    return data.Batch(**{f: rows[np.argsort(order)] for f, rows in merge.items()})


def content(directory):
    return {f.name: f.read_bytes() for f in sorted(directory.iterdir())}


class TestRows:
    def test_rows_and_windows_are_those_of_the_text(self, corpus, tokenizer, tmp_path):
        source, directory = corpus
        manifest = load_manifest(directory)
        assert manifest.held_out == "hash" and len(manifest.splits["train"].shards) > 3
        direct, stored = (opened(spec, tokenizer, tmp_path) for spec in corpus)
        assert len(direct.rows) == len(stored.rows) > 100
        assert any(len(direct.rows.docs[d]) > PART_TOKENS for d in range(len(direct.rows.docs)))
        for i in range(len(direct.rows)):
            equal(direct.rows[i], stored.rows[i])
        np.testing.assert_array_equal(direct.windows.tokens, stored.windows.tokens)
        assert direct.rows.content == stored.rows.content, "a run may go on with either"
        equal(*(next(data.batches(c.rows, 8, seed=1)) for c in (direct, stored)))

    @pytest.mark.parametrize("count", [1, 5])
    def test_few_documents_hold_out_their_tails(self, tokenizer, tmp_path, count):
        source = write_text(
            tmp_path / "few.jsonl", [" ".join(sentences(60, s)) for s in range(count)]
        )
        assert run(source, tmp_path / "out").held_out == "reader"
        settings = {"valid_fraction": 0.01, "eval_tokens": 50}
        direct, stored = (
            opened(spec, tokenizer, tmp_path, **settings) for spec in (source, f"{tmp_path}/out")
        )
        assert len(direct.rows) == len(stored.rows)
        for i in range(len(direct.rows)):
            equal(direct.rows[i], stored.rows[i])
        np.testing.assert_array_equal(direct.windows.tokens, stored.windows.tokens)
        assert direct.rows.content == stored.rows.content

    def test_many_documents_are_packed_in_groups(self, tokenizer, tmp_path):
        """By design, another order than that of the text; the same tokens, each predicted once."""
        count = GROUP_DOCUMENTS + 100
        source = write_text(tmp_path / "many.jsonl", (f"n{i}" for i in range(count)))
        manifest = run(source, tmp_path / "out", "--valid_fraction=0", "--shard_tokens=6000")
        split = manifest.splits["train"]
        assert len(split.group_tokens) == 2 and len(split.shards) > 1
        rows = token_rows.open_mixture(
            f"{tmp_path}/out", text.fingerprint(tokenizer), "tiny", VOCAB
        ).rows(text.bos_prefix(tokenizer), 128, 0)
        found = collections.Counter()
        for i in range(len(rows)):
            row = rows[i]
            found.update(row.targets[row.weights > 0].tolist())
        ids = itertools.chain(*text.encode_batch(tokenizer, [f"n{i}" for i in range(count)]))
        assert found == collections.Counter(ids)
        assert "in 2 groups" in rows.content

    def test_docs_of_other_lengths_keep_their_ids(self, corpus, tokenizer):
        directory = TokenDirectory(corpus[1], load_manifest(corpus[1]))
        docs = directory.documents("train")
        d = int(np.argmax(docs.lengths))
        assert len(docs[d]) > PART_TOKENS
        whole = docs[d][:]
        for low, high in ((0, 5), (PART_TOKENS - 2, PART_TOKENS + 2), (len(whole) - 1, len(whole))):
            np.testing.assert_array_equal(docs[d][low:high], whole[low:high])
        assert docs[d][9:9].size == 0


class TestResume:
    @pytest.fixture
    def job(self, corpus, tokenizer):
        source, directory = corpus
        expected = content(pathlib.Path(directory))
        return source, load_manifest(directory).job, tokenizer, expected

    @pytest.mark.parametrize("at", [0, 3, 60, 200, 300])
    def test_an_interrupted_job_gives_the_same_bytes(self, job, tmp_path, at):
        source, settings, tokenizer, expected = job
        count = itertools.count()

        def die(chars):
            if next(count) == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            shard_writer.write(tmp_path / "o", settings, documents(source), tokenizer, 1, die)
        finished = sorted(p.name for p in (tmp_path / "o").glob("section-*.json"))
        times = {p: (tmp_path / "o" / p).stat().st_mtime_ns for p in finished}
        assert (len(finished) > 0) == (at >= 60)
        resumed = []
        begin = shard_writer.begin(tmp_path / "o", settings)
        assert len(begin) == len(finished)
        shard_writer.write(
            tmp_path / "o", settings, documents(source), tokenizer, 1, resumed.append
        )
        assert len(resumed) < 302 or not times
        assert content(tmp_path / "o") == expected

    @pytest.mark.parametrize("name", ["text-valid.lengths", "manifest.json", "section-00000.json"])
    def test_an_interrupted_end_gives_the_same_bytes(self, job, tmp_path, monkeypatch, name):
        source, settings, tokenizer, expected = job
        with monkeypatch.context() as patch:
            for function in ("put", "write_whole"):
                original = getattr(shard_writer.paths, function)

                def failing(a, b, original=original):
                    if name in (getattr(a, "name", ""), getattr(b, "name", "")):
                        raise OSError("the disk is full")
                    original(a, b)

                patch.setattr(shard_writer.paths, function, failing)
            with pytest.raises(OSError, match="disk is full"):
                shard_writer.write(tmp_path / "o", settings, documents(source), tokenizer)
        assert not (tmp_path / "o" / "manifest.json").exists()
        shard_writer.write(tmp_path / "o", settings, documents(source), tokenizer)
        assert content(tmp_path / "o") == expected

    def test_worker_processes_give_the_same_bytes(self, job, tmp_path):
        source, settings, tokenizer, expected = job
        shard_writer.write(tmp_path / "o", settings, documents(source), tokenizer, workers=2)
        assert content(tmp_path / "o") == expected

    def test_a_finished_directory_is_left_as_it_is(self, corpus, capsys):
        before = content(pathlib.Path(corpus[1]))
        run(*corpus, "--valid_fraction=0.1", "--shard_tokens=600")
        assert content(pathlib.Path(corpus[1])) == before
        assert "is whole" in capsys.readouterr().out

    @pytest.mark.slow
    def test_kill_9(self, job, tmp_path):
        source, settings, tokenizer, expected = job
        command = [
            sys.executable, "-m", "recursive_jax.tokenize", f"--data={source}", "--tokenizer=tiny",
            f"--out={tmp_path}/o", "--valid_fraction=0.1", "--shard_tokens=600",
        ]  # fmt: skip
        process = subprocess.Popen(command)
        while process.poll() is None and not list(tmp_path.glob("o/section-*.json")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run(command, check=True)
        assert content(tmp_path / "o") == expected


class TestMixtures:
    @pytest.fixture
    def three(self, tmp_path):
        for k, name in enumerate("abc"):
            source = write_text(tmp_path / f"{name}.jsonl", sentences(80 * (k + 1), 5 + k))
            run(source, tmp_path / name, "--valid_fraction=0.05", "--shard_tokens=1500")
        return tmp_path

    def rows(self, tokenizer, tmp_path, spec):
        return opened(spec, tokenizer, tmp_path, valid_fraction=0.05).rows

    @pytest.mark.parametrize("spec", ["{0}/b", "{0}/a:0.6,{0}/b:0.3, {0}/c:0.1"])
    def test_hosts_read_together_what_one_host_reads(self, three, tokenizer, spec):
        """Also where each stretch of batches has another number of hosts than the one before."""
        rows = self.rows(tokenizer, three, spec.format(three))
        whole = list(itertools.islice(data.batches(rows, 8, seed=5), 12))
        assert len({b.tokens.tobytes() for b in whole}) == 12
        for stretches in ((1,), (2,), (4,), (1, 2, 4, 1), (4, 1, 2)):
            found, state = [], None
            for count in stretches:
                shares = [data.batches(rows, 8, 5, p, count) for p in range(count)]
                for share in shares:
                    if state is not None:
                        share.set_state(json.loads(state))
                found += [
                    together([next(share) for share in shares]) for _ in range(12 // len(stretches))
                ]
                states = {json.dumps(share.get_state()) for share in shares}
                assert len(states) == 1, "any host may save it"
                state = states.pop()
            for batch, expected in zip(found, whole, strict=True):
                equal(batch, expected)

    def test_shares_follow_the_weights_and_position_is_restored(self, three, tokenizer):
        rows = self.rows(tokenizer, three, f"{three}/a:3,{three}/c:1")
        own = [
            {rows.parts[k][i].tokens.tobytes() for i in range(len(rows.parts[k]))} for k in (0, 1)
        ]
        assert not own[0] & own[1]
        iterator = data.batches(rows, 8, seed=0)
        found = [row.tobytes() for _ in range(25) for row in next(iterator).tokens]
        assert sum(row in own[0] for row in found) == 150
        assert sum(row in own[1] for row in found) == 50
        resumed = data.batches(rows, 8, seed=0)
        resumed.set_state(json.loads(json.dumps(iterator.get_state())))
        for _ in range(3):
            equal(next(iterator), next(resumed))

    def test_without_weights_an_epoch_has_every_row_once(self, three, tokenizer):
        rows = self.rows(tokenizer, three, f"{three}/a,{three}/b,{three}/c")
        iterator = data.batches(rows, 1, seed=0)
        seen = [next(iterator).tokens.tobytes() for _ in range(len(rows))]
        assert len(set(seen)) >= 0.98 * len(rows)  # grain rounds the weights
        again = self.rows(tokenizer, three, f"{three}/a,{three}/b,{three}/c")
        assert again.content == rows.content
        assert self.rows(tokenizer, three, f"{three}/b,{three}/a,{three}/c").content != rows.content

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("{0}/a:0.5,{0}/b", "/b has no weight, and others have; write .*/b:WEIGHT, or none"),
            ("{0}/a:0,{0}/b:1", "/a:0: the weight '0' is no number above 0; write .*/a:0.5"),
            ("{0}/a:x", "/a:x: the weight 'x' is no number above 0"),
            ("{0}/a,{0}/b.jsonl", "b.jsonl is text, beside directories of tokenised text"),
            ("{0}/a:1,{0}/b.jsonl:2", "jsonl:2: weights are for .*text, .*/b.jsonl is text"),
            ("{0}/b.jsonl:0.5", "is text; tokenise it .*--data=.*/b.jsonl.$"),
            ("{0}/gone:0.5", "data source '.*/gone:0.5' does not exist"),
        ],
    )
    def test_mistakes(self, three, tokenizer, spec, message):
        with pytest.raises((ValueError, OSError), match=message):
            self.rows(tokenizer, three, spec.format(three))


class TestErrors:
    @pytest.fixture
    def copy(self, corpus, tmp_path):
        return shutil.copytree(corpus[1], tmp_path / "copy")

    def test_a_shard_that_is_cut_or_missing(self, copy, tokenizer, tmp_path):
        shard = next(copy.glob("*train.array_record-00001*"))
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-100])
        with pytest.raises(
            ValueError, match=rf"{shard} is damaged: it has \d+ bytes, expected \d+"
        ):
            opened(str(copy), tokenizer, tmp_path)
        shard.unlink()
        with pytest.raises(ValueError, match=rf"{shard} is damaged: it is missing"):
            opened(str(copy), tokenizer, tmp_path)

    def test_a_shard_that_is_gone_while_rows_are_read(self, copy, tokenizer, tmp_path):
        found = opened(str(copy), tokenizer, tmp_path)
        shard = next(copy.glob("*train.array_record-00001*"))
        shard.unlink()
        with pytest.raises(paths.StorageFault, match=f"data.train: {shard} is damaged: it is mis"):
            [found.rows[n] for n in range(len(found.rows))]

    def test_a_finished_directory_that_has_lost_a_file(self, corpus, copy):
        shard = next(copy.glob("*train.array_record-00001*"))
        before = shard.read_bytes()
        again = [corpus[0], copy, "--valid_fraction=0.1", "--shard_tokens=600"]
        for change in (lambda: shard.write_bytes(before[:-100]), shard.unlink):
            change()
            with pytest.raises(ValueError, match=f"{shard} is damaged: .* into another directory"):
                run(*again)
        shard.write_bytes(before)
        run(*again)

    def test_a_shard_with_another_bit(self, copy, tokenizer, tmp_path):
        shard = next(copy.glob("*train.array_record-00000*"))
        corpus = opened(str(copy), tokenizer, tmp_path)
        damaged = bytearray(shard.read_bytes())
        damaged[damaged.index(b"RT\x01") + 40] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{shard} is damaged: .*hash mismatch"):
            for i in range(len(corpus.rows)):
                corpus.rows[i]
        with pytest.raises(ValueError, match=f"{shard} is damaged: its checksum is another"):
            tokenize.tokenize(job_flags(f"--out={copy}", "--verify"))

    def test_a_shard_of_another_directory(self, copy, tokenizer, tmp_path):
        """Of the right size; the number of records is another."""
        one, other = sorted(copy.glob("*train.array_record*"))[:2]
        assert one.stat().st_size == other.stat().st_size
        shutil.copy(other, one)
        corpus = opened(str(copy), tokenizer, tmp_path)
        with pytest.raises(ValueError, match=rf"{one} is damaged: it has \d+ records, expected"):
            for i in range(len(corpus.rows)):
                corpus.rows[i]

    def test_lengths_with_another_bit(self, copy, tokenizer, tmp_path):
        file = copy / "text-train.lengths"
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        with pytest.raises(ValueError, match=f"{file} is damaged: its checksum is another"):
            opened(str(copy), tokenizer, tmp_path)

    def test_a_damaged_manifest(self, copy, tokenizer, tmp_path):
        file = copy / "manifest.json"
        values = json.loads(file.read_text())
        file.write_text(file.read_text()[:-200])
        with pytest.raises(ValueError, match=f"{file} is damaged"):
            opened(str(copy), tokenizer, tmp_path)
        file.write_text(json.dumps(values | {"version": 7}))
        with pytest.raises(ValueError, match=f"{file} is of format version 7"):
            opened(str(copy), tokenizer, tmp_path)
        del values["job"]
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=f"{file} is damaged"):
            opened(str(copy), tokenizer, tmp_path)

    def test_another_tokenizer_and_another_vocabulary(self, copy, tokenizer):
        with pytest.raises(ValueError, match="copy was tokenised with tiny .*the model has the toke"
                           "nizer other .fingerprint ffff.; tokenise"):  # fmt: skip
            token_rows.open_mixture(str(copy), "ffff", "other", VOCAB)
        with pytest.raises(ValueError, match=r"copy has token id \d+, which .*\(vocab_size=100\)"):
            token_rows.open_mixture(str(copy), text.fingerprint(tokenizer), "tiny", 100)

    def test_fewer_tokens_than_asked(self, copy, tokenizer, tmp_path):
        corpus = opened(str(copy), tokenizer, tmp_path)
        rows = len(corpus.rows)
        corpus.check_enough(rows, 1)
        corpus.check_enough(2 * rows, 2)
        with pytest.raises(ValueError, match="copy has .* tokens to train on, .* 1.50 epochs. Token"
                           "ise more text, lower config.tokens, or set data.epochs=2"):  # fmt: skip
            corpus.check_enough(rows * 3 // 2 + rows % 2, 1)
        mixed = opened(f"{copy}:1,{copy}:9", tokenizer, tmp_path)
        mixed.check_enough(rows, 1)
        with pytest.raises(ValueError, match="1.80 epochs"):
            mixed.check_enough(2 * rows, 1)

    def test_held_out_shares_that_differ(self, copy, corpus, tokenizer, tmp_path):
        with pytest.raises(
            ValueError, match="holds a share of 0.1 out, data.valid_fraction is 0.2"
        ):
            opened(str(copy), tokenizer, tmp_path, valid_fraction=0.2)
        run(corpus[0], tmp_path / "all", "--valid_fraction=0")
        with pytest.raises(ValueError, match="all holds no documents out; set data.valid"):
            opened(f"{tmp_path}/all", tokenizer, tmp_path)
        ours = opened(f"{tmp_path}/all", tokenizer, tmp_path, valid=str(copy))
        own = opened(str(copy), tokenizer, tmp_path)
        np.testing.assert_array_equal(ours.windows.tokens, own.windows.tokens)

    def test_out_holds_something_else(self, corpus, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match=f"{tmp_path} holds something else than tokenised"):
            run(corpus[0], tmp_path)
        with pytest.raises(ValueError, match="file is a file; give a directory"):
            run(corpus[0], tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1

    def test_out_holds_another_job(self, corpus, copy):
        same = ["--valid_fraction=0.1", "--shard_tokens=600"]
        with pytest.raises(ValueError, match="was begun with valid_fraction 0.1, now 0.3"):
            run(corpus[0], copy, "--valid_fraction=0.3", "--shard_tokens=600")
        with pytest.raises(ValueError, match="was begun with source .*, now .*a.jsonl"):
            run(f"{corpus[0]}/a.jsonl", copy, *same)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--out=o", "--tokenizer=tiny"], "--data is missing"),
            (["--out=o", "--data=x"], "--tokenizer is missing"),
            (
                ["--out=o", "--data=x", "--tokenizer=tiny", "--workers=0"],
                "--workers=0; expected at",
            ),
            (["--out=o", "--data=x", "--tokenizer=tiny", "--name=a/b"], "--name='a/b'; expected"),
            (["--out=o", "--data=x", "--tokenizer=tiny", "--valid_fraction=1"], r"in \[0, 1\)"),
            (["--out=o", "--data=x", "--tokenizer=/nowhere"], "/nowhere"),
            (["--out=o", "--data=/nowhere", "--tokenizer=tiny"], "'/nowhere' does not exist"),
            (["--out=o", "--verify"], "o has no manifest.json of tokenised text"),
        ],
    )
    def test_flags(self, args, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises((ValueError, OSError), match=message):
            tokenize.tokenize(job_flags(*args))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["", ""], "no text in .*e.jsonl: every document is empty"),
            (["", " "], "e.jsonl: nothing is left to train on: every document has one token"),
        ],
    )
    def test_no_text(self, tmp_path, texts, message):
        source = write_text(tmp_path / "e.jsonl", texts)
        with pytest.raises(ValueError, match=message):
            run(source, tmp_path / "o")

    def test_everything_held_out(self, tmp_path):
        source = write_text(tmp_path / "e.jsonl", ["the same text"] * 300)
        with pytest.raises(ValueError, match="e.jsonl: nothing is left to train on"):
            run(source, tmp_path / "o")
