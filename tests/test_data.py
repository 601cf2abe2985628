"""The data pipeline: readers, token cache, held-out split, packing, shuffling, resume."""

import functools
import gzip
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recursive_jax.text import readers
from recursive_jax.text.documents import Documents, documents
from recursive_jax.training import data


def encode_batch(texts):
    """One id per character, so that ids can be read back: chr(id)."""
    return [[ord(c) for c in text] for text in texts]


def corpus(*texts):
    """Documents in memory."""
    return Documents(
        "test", repr(texts), 0, lambda: iter([(str(i), t) for i, t in enumerate(texts)])
    )


def tokenized(lists):
    """TokenizedDocuments of lists of ids; the hash of document d is spread by d."""
    lengths = np.asarray([len(ids) for ids in lists], np.int64)
    ids = np.asarray(sum(lists, []), np.int32)
    hashes = np.linspace(0, 2**63, len(lists)).astype(np.uint64)
    return data.TokenizedDocuments(ids, np.cumsum(lengths) - lengths, lengths, hashes)


def texts_of(source):
    return [text for _, text in documents(str(source))]


class TestReaders:
    def test_text_file_and_directory(self, tmp_path):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "two.md").write_text("zwei\r\nü", encoding="utf-8", newline="")
        (tmp_path / "a.txt").write_text("one")
        (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "n": 1}\n')
        (tmp_path / "picture.png").write_bytes(b"\x89")
        assert texts_of(tmp_path) == ["one", "zwei\r\nü", "three", "four"]
        assert texts_of(tmp_path / "a.txt") == ["one"]
        assert texts_of(f"{tmp_path}/c.jsonl, {tmp_path}/a.txt") == ["three", "four", "one"]

    @pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
    def test_jsonl_compressions(self, tmp_path, suffix):
        texts = ["first\nline", "ü" * 100_000, ""]
        raw = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(pack[suffix](raw))
        assert texts_of(path) == texts
        # Appended archives are one archive; a file need not end with a line end.
        path.write_bytes(pack[suffix](raw[:500]) + pack[suffix](raw[500:-1]))
        assert texts_of(path) == texts

    @pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
    def test_damaged_compression_is_named(self, tmp_path, suffix):
        raw = "".join(
            json.dumps({"text": os.urandom(20).hex()}) + "\n" for _ in range(999)
        ).encode()
        packed = (gzip.compress if suffix.endswith("gz") else zstandard.compress)(raw)
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(packed[: len(packed) // 2])
        with pytest.raises(ValueError, match=f"x.{suffix} is damaged after line"):
            texts_of(path)
        path.write_bytes(b"plain text")
        with pytest.raises(ValueError, match=f"x.{suffix} is damaged after line 0"):
            texts_of(path)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"text": "a"', "bad.jsonl, line 2 is not JSON"),
            (b'{"body": "a"}', r'bad.jsonl, line 2 has no string field "text" \(found \[.body.\]'),
            (b'{"text": null}', r'line 2 has no string field "text"'),
            (b'["a"]', "line 2 has no string field .*found list"),
            (b'{"text": "\xff"}', "bad.jsonl, line 2 is not UTF-8"),
            (
                rb'{"text": "a \ud83d b"}',
                "bad.jsonl, line 2: half a surrogate pair in .text. .character 2",
            ),
            (
                b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
                "bad.jsonl, line 2 is not read: .*lists too deep",
            ),
            (b'{"text": "a", "x": ' + b"9" * 5_000 + b"}", "line 2 is not read: .*too many digits"),
        ],
    )
    def test_bad_line_is_named(self, tmp_path, line, message):
        (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
        with pytest.raises(ValueError, match=message):
            texts_of(tmp_path)

    def test_bad_sources(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere.*does not exist.*docstrings"):
            documents(str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="no text in directory"):
            documents(str(tmp_path))
        with pytest.raises(ValueError, match="no data source"):
            documents(" , ")
        with pytest.raises(ValueError, match="megabytes"):
            documents("docstrings:many")
        (tmp_path / "x.pdf").write_bytes(b"%PDF")
        with pytest.raises(ValueError, match="cannot read .*x.pdf"):
            documents(str(tmp_path / "x.pdf"))
        (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
        with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
            texts_of(tmp_path / "latin.txt")

    def test_a_card_is_not_the_corpus_of_its_data(self, tmp_path):
        (tmp_path / "README.md").write_text("What the data are.")
        assert texts_of(tmp_path) == ["What the data are."]
        (tmp_path / "data").mkdir()
        for i in range(2):
            (tmp_path / "data" / f"train-0000{i}-of-00002.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match="README.md.*train-00000-of-00002.parquet and 1 more"):
            documents(str(tmp_path))
        assert texts_of(tmp_path / "README.md") == ["What the data are."]
        (tmp_path / "README.md").unlink()
        with pytest.raises(ValueError, match="no text in .*found data/train-00000-of-00002"):
            documents(str(tmp_path))

    def test_files_that_are_not_read_are_counted(self, tmp_path, caplog):
        (tmp_path / "a.txt").write_text("one")
        (tmp_path / ".gitattributes").write_text("hidden files are no data")
        assert texts_of(tmp_path) == ["one"] and not caplog.records
        for name in ("b.parquet", "c.csv"):
            (tmp_path / name).write_bytes(b"")
        assert texts_of(tmp_path) == ["one"]
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "2 of 3 files are left out, b.parquet and 1 more" in record.getMessage()

    def test_text_files_are_read_in_blocks(self, tmp_path):
        """Characters that cross a block, a byte order mark, and the position of a bad byte."""
        block, file = readers.BLOCK_BYTES, tmp_path / "a.txt"
        content = "\ufeffa" + "ü" * (block * 3 // 4) + "\r\n"
        file.write_text(content, encoding="utf-8", newline="")
        ((_, parts),) = documents(str(file)).read()
        parts = list(parts)
        assert "".join(parts) == content[1:] == texts_of(file)[0]
        assert max(map(len, parts)) <= block
        file.write_bytes(b"a" * (block + 7) + b"\xff")
        with pytest.raises(ValueError, match=rf"a.txt is not UTF-8 text \(byte {block + 7}\)"):
            texts_of(file)
        file.write_bytes(b"a" * (block - 1) + b"\xc3")
        with pytest.raises(ValueError, match=rf"\(byte {block - 1}\)"):
            texts_of(file)

    def test_fingerprint_follows_the_files(self, tmp_path):
        (tmp_path / "a.txt").write_text("one")
        before = documents(str(tmp_path)).fingerprint
        assert documents(str(tmp_path)).fingerprint == before
        (tmp_path / "a.txt").write_text("other")
        changed = documents(str(tmp_path)).fingerprint
        (tmp_path / "b.txt").write_text("")
        assert len({before, changed, documents(str(tmp_path)).fingerprint}) == 3

    def test_tfds(self, tmp_path):
        tfds = pytest.importorskip("tensorflow_datasets")

        class LittleText(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(
                        {"body": tfds.features.Text(), "year": np.int64}
                    ),
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples("t"), "test": self._generate_examples("e")}

            def _generate_examples(self, letter):
                for i in range(10):
                    yield i, {"body": f"{letter}{i} ü", "year": i}

        builder = LittleText(data_dir=tmp_path, file_format="array_record")
        builder.download_and_prepare()
        expected = {f"t{i} ü" for i in range(10)}
        assert set(texts_of(f"tfds:{builder.data_dir}")) == expected
        assert set(texts_of(builder.data_dir)) == expected
        assert len(texts_of(f"tfds:{builder.data_dir}@test[:3]")) == 3
        assert "tensorflow" not in sys.modules
        with pytest.raises(FileNotFoundError, match="split 'nope'.*array_record"):
            documents(f"tfds:{builder.data_dir}@nope")
        with pytest.raises(FileNotFoundError, match="no_such_set"):
            documents("tfds:no_such_set")


FAKE_MODULE = '''"""Module  text.

    Indented.
"""

def function(a, /, b, *args, c=1, **kwargs):
    """Does it."""
    def inner():
        """Not public."""

class Outer(Base):
    r"""Raw \\d."""

    def method(self, x): "One line."

    async def run(self):
        """Runs."""

    class Inner:
        """Nested."""

    def silent(self): ...

raise RuntimeError("reading must not run this")
'''
FAKE_DOCUMENT = """pkg.mod

Module  text.

Indented.


function(a, b, c)

Does it.


Outer

Raw \\d.


Outer.method(x)

One line.


Outer.run()

Runs.


Outer.Inner

Nested."""


class TestDocstrings:
    @pytest.fixture
    def installed(self, tmp_path, monkeypatch):
        """An installation of our own making: {relative path: source} -> documents."""

        def install(files):
            lib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
            for name, source in files.items():
                (lib / name).parent.mkdir(parents=True, exist_ok=True)
                (lib / name).write_text(source)
            paths = {"stdlib": str(lib), "purelib": str(site), "platlib": str(site)}
            monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
            return dict(documents("docstrings"))

        return install

    def test_golden(self, installed):
        assert installed({"site-packages/pkg/mod.py": FAKE_MODULE}) == {"pkg.mod": FAKE_DOCUMENT}

    def test_what_counts_as_a_module(self, installed):
        doc = '"""Says {}."""'
        names = [
            "json/__init__",
            "site-packages/a/b",
            "a-script",
            "test/x",
            "pkg/tests/y",
            "x_test",
        ]
        found = installed({f"{n}.py": doc.format(n) for n in names} | {"old.py": 'print """x"""'})
        assert set(found) == {"json", "a.b"}

    def test_copies_count_once(self, installed):
        found = installed({f"m{i}.py": f'"""Same."""\ndef f(): """Own {i}."""' for i in range(3)})
        assert sum("Same." in text for text in found.values()) == 1
        assert sorted(text.count("Own") for text in found.values()) == [1, 1, 1]

    def test_topics_of_the_language(self, installed):
        found = installed({"pydoc_data/topics.py": "topics = {'b': 'Bee\\n', 'a': 'Ay'}"})
        assert found == {"pydoc_data.topics[a]": "Ay", "pydoc_data.topics[b]": "Bee"}

    def test_this_installation(self):
        """A capped read is deterministic, long enough, and mixes packages."""
        sample = list(documents("docstrings:0.3"))
        assert 300_000 <= sum(len(text) for _, text in sample) < 1_000_000
        assert len({name.partition(".")[0] for name, _ in sample}) >= 10
        again = documents("docstrings:0.3").read()
        assert [next(again) for _ in range(10)] == sample[:10]


class TestCache:
    def test_tokenised_once(self, tmp_path):
        calls = []

        def counting(texts):
            calls.append(texts)
            return encode_batch(texts)

        docs = corpus("ab", "", "cde")
        for _ in range(2):
            out = data.tokenize(docs, counting, "tok", tmp_path)
            assert [out[d].tolist() for d in range(len(out))] == [[97, 98], [99, 100, 101]]
        assert len(calls) == 1
        data.tokenize(docs, counting, "other tokenizer", tmp_path)
        data.tokenize(corpus("ab"), counting, "tok", tmp_path)
        assert len(calls) == 3

    def test_interrupted_run_leaves_nothing_behind(self, tmp_path):
        def failing():
            yield "0", "x" * data.CHARS_PER_CALL
            raise ValueError("line 7 is bad")

        with pytest.raises(ValueError, match="line 7"):
            data.tokenize(Documents("s", "f", 0, failing), encode_batch, "t", tmp_path, False)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("file", ["ids.i32", "index.npz", "meta.json"])
    @pytest.mark.parametrize("damage", ["flipped", "zeros", "cut", "longer", "missing"])
    def test_damaged_entry_is_made_again(self, tmp_path, file, damage):
        docs = corpus("ab", "cde")
        before = data.tokenize(docs, encode_batch, "t", tmp_path)
        (path,) = tmp_path.glob(f"*/{file}")
        content = path.read_bytes()
        path.unlink()  # `before` keeps its mapping
        if damage != "missing":
            flipped = bytearray(content)
            flipped[len(content) // 2] ^= 1
            new = {"flipped": flipped, "zeros": bytes(len(content)), "cut": content[:-3]}
            path.write_bytes(new.get(damage, content + b"more"))
        for _ in range(2):
            after = data.tokenize(docs, encode_batch, "t", tmp_path)
            assert [after[d].tolist() for d in range(2)] == [[97, 98], [99, 100, 101]]
            assert after.hashes.tolist() == before.hashes.tolist()
        assert len(list(tmp_path.iterdir())) == 1
        if file != "meta.json":  # there, a bit may be part of a name
            assert path.read_bytes() == content

    def test_an_entry_without_checksums_is_made_again(self, tmp_path):
        docs = corpus("ab", "cde")
        data.tokenize(docs, encode_batch, "t", tmp_path)
        (ids,) = tmp_path.glob("*/ids.i32")
        meta = {"source": "test", "documents": 2, "ids_bytes": ids.stat().st_size}
        (ids.parent / "meta.json").write_text(json.dumps(meta))
        ids.write_bytes(bytes(ids.stat().st_size))
        assert data.tokenize(docs, encode_batch, "t", tmp_path)[1].tolist() == [99, 100, 101]

    def test_files_are_on_the_disk_before_they_get_their_name(self, tmp_path, monkeypatch):
        events, fsync, replace = [], os.fsync, os.replace

        def recorded_fsync(handle):
            fsync(handle)
            events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))

        def recorded_replace(old, new):
            events.append(f"rename {os.path.basename(old)}")
            replace(old, new)

        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("the names of open files are read from /proc")
        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "replace", recorded_replace)
        data.tokenize(corpus("ab"), encode_batch, "t", tmp_path)
        directory = events[3]
        expected = ["ids.i32", "index.npz", "meta.json", directory, f"rename {directory}"]
        assert events == [*expected, tmp_path.name]

    def test_an_entry_that_may_not_be_read_is_kept(self, tmp_path):
        data.tokenize(corpus("ab"), encode_batch, "t", tmp_path)
        (ids,) = tmp_path.glob("*/ids.i32")
        ids.chmod(0)
        if os.access(ids, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(PermissionError, match="ids.i32"):
            data.tokenize(corpus("ab"), encode_batch, "t", tmp_path)

    def test_one_large_document_is_tokenised_in_many_calls(self, tmp_path, monkeypatch):
        text = "".join(f"word {i}\n" for i in range(60_000))
        (tmp_path / "book.txt").write_text(text)
        calls = []

        def counting(texts):
            calls.append(sum(map(len, texts)))
            return encode_batch(texts)

        docs = documents(f"{tmp_path}/book.txt")
        monkeypatch.setattr(data, "CHARS_PER_CALL", 300_000)
        out = data.tokenize(docs, counting, "t", tmp_path / "cache")
        assert len(out) == 1
        np.testing.assert_array_equal(out[0], np.frombuffer(text.encode(), np.uint8))
        assert max(calls) < 600_000 < len(text)
        whole = data.tokenize(corpus(text), encode_batch, "t", tmp_path / "cache")
        assert out.hashes.tolist() == whole.hashes.tolist()

    def test_documents_that_the_tokenizer_drops(self, tmp_path, caplog):
        def digits(texts):
            return [[int(c) for c in text if c.isdigit()] for text in texts]

        with pytest.raises(ValueError, match="no text in test: the tokenizer drops every char"):
            data.tokenize(corpus("hello", "world"), digits, "t", tmp_path)
        out = data.tokenize(corpus("12", "hello", " "), digits, "t", tmp_path)
        assert [out[d].tolist() for d in range(len(out))] == [[1, 2]]
        (record,) = caplog.records
        assert "test: 1 documents are left out" in record.getMessage()

    def test_no_text_at_all(self, tmp_path):
        with pytest.raises(ValueError, match="no text in test"):
            data.tokenize(corpus("", ""), encode_batch, "t", tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestSplit:
    def texts(self, docs):
        return {"".join(map(chr, docs[d])) for d in range(len(docs))}

    def test_disjoint_covering_and_stable_under_additions(self, tmp_path):
        texts = [f"document {i}" for i in range(400)]

        def make(*texts):
            return data.tokenize(corpus(*texts), encode_batch, "t", tmp_path)

        small, large = make(*texts[:200]), make(*random.Random(0).sample(texts, 400))
        train, valid = (self.texts(small.split(w, 0.1)) for w in ("train", "valid"))
        assert not train & valid and train | valid == set(texts[:200])
        assert 8 <= len(valid) <= 35
        assert valid <= self.texts(large.split("valid", 0.1))
        assert train <= self.texts(large.split("train", 0.1))

    def test_at_least_one_document_is_held_out(self):
        docs = tokenized([[i] for i in range(1, 11)])
        docs.hashes[:] = np.linspace(2**63, 2**64 - 2**50, 10).astype(np.uint64)
        assert docs.split("valid", 0.1).num_tokens == 1

    @pytest.mark.parametrize("which", ["train", "valid"])
    def test_nothing_left_to_train_on(self, which):
        same = tokenized([[1, 2]] * 200)
        same.hashes[:] = 2**63
        with pytest.raises(
            ValueError, match="all documents have the same text.*valid_fraction=0.0"
        ):
            same.split(which, 0.01)
        with pytest.raises(ValueError, match="every document has one token, and the held-out"):
            tokenized([[1], [2], [3]]).split(which, 0.01)
        with pytest.raises(ValueError, match="held-out share .valid_fraction=0.99. took all"):
            tokenized([[1, 2]] * 20).split(which, 0.99)

    @pytest.mark.parametrize("count", [1, 3])
    def test_few_documents_give_their_tails(self, count):
        docs = tokenized([list(range(100 * d, 100 * d + 100)) for d in range(count)])
        train, valid = docs.split("train", 0.1), docs.split("valid", 0.1)
        for d in range(count):
            assert train[d].tolist() == list(range(100 * d, 100 * d + 90))
            assert valid[d].tolist() == list(range(100 * d + 90, 100 * d + 100))

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="'train' or 'valid'"):
            tokenized([[1]]).split("test", 0.1)
        with pytest.raises(ValueError, match="valid_fraction=0"):
            tokenized([[1]]).split("train", 0)


def stitch(rows, bos):
    """Reads rows back: the documents, and how often each of their tokens is a weighted target.

    Knows only what the model sees: tokens, targets, weights, positions, segment ids.
    """
    found, predicted, last = [], [], None
    for i in range(len(rows)):
        row = rows[i]
        ids = row.segment_ids
        used = int((ids > 0).sum())
        assert (ids[:used] > 0).all() and not row.weights[used:].any()
        for segment in range(1, ids.max() + 1):
            here = np.flatnonzero(ids == segment)
            np.testing.assert_array_equal(here, np.arange(here[0], here[0] + len(here)))
            np.testing.assert_array_equal(row.positions[here], np.arange(len(here)))
            tokens = row.tokens[here].tolist()
            assert tokens[: len(bos)] == bos[: len(tokens)]
            goes_on = segment == 1 and last is not None
            for p, (target, weight) in enumerate(
                zip(row.targets[here], row.weights[here], strict=True)
            ):
                if weight:
                    assert weight == 1
                    predicted.append(int(target))
                    if p + 1 < len(tokens):
                        assert tokens[p + 1] == target
                if p + 1 == len(tokens):
                    last = int(target) if weight else None
            if goes_on:
                found[-1] += tokens[len(bos) :]
            else:
                found.append(tokens[len(bos) :])
    return found, predicted


class TestPacking:
    def test_golden_with_bos(self):
        rows = data.PackedRows(tokenized([[11, 12], [21, 22, 23, 24, 25], [31]]), [1], 5)
        assert (len(rows), rows.num_tokens) == (3, 8)
        # stream: 1 11 12 1 | 21 22 23 24 | 25 1 31
        expected = {
            "tokens": [[1, 11, 12, 1, 0], [1, 21, 22, 23, 24], [1, 25, 1, 31, 0]],
            "targets": [[11, 12, 0, 21, 0], [0, 22, 23, 24, 25], [0, 0, 31, 0, 0]],
            "weights": [[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]],
            "positions": [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 1, 0, 1, 0]],
            "segment_ids": [[1, 1, 1, 2, 0], [1, 1, 1, 1, 1], [1, 1, 2, 2, 0]],
        }
        for name, value in expected.items():
            for i in range(3):
                np.testing.assert_array_equal(getattr(rows[i], name), value[i], f"{name} {i}")

    def test_golden_without_bos(self):
        rows = data.PackedRows(tokenized([[11, 12], [21, 22, 23, 24, 25], [31]]), [], 4)
        assert len(rows) == 2
        np.testing.assert_array_equal(rows[0].tokens, [11, 12, 21, 22])
        np.testing.assert_array_equal(rows[0].targets, [12, 0, 22, 23])
        np.testing.assert_array_equal(rows[0].weights, [1, 0, 1, 1])
        np.testing.assert_array_equal(rows[1].tokens, [23, 24, 25, 31])
        np.testing.assert_array_equal(rows[1].weights, [1, 1, 0, 0])
        np.testing.assert_array_equal(rows[1].segment_ids, [1, 1, 1, 2])

    @settings(max_examples=200, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12),
        bos=st.sampled_from([[], [1], [2, 1]]),
        room=st.integers(1, 20),
        seed=st.none() | st.integers(0, 5),
    )
    def test_documents_come_back_and_every_token_is_predicted_once(self, lengths, bos, room, seed):
        # Token = 1000 * document + index, so nothing can be mistaken for something else.
        texts = [[1000 * (d + 1) + k for k in range(n)] for d, n in enumerate(lengths)]
        assume(bos or max(lengths) > 1)
        rows = data.PackedRows(tokenized(texts), bos, len(bos) + room, seed)
        assert rows.num_tokens == sum(lengths)
        tokens = np.concatenate([rows[i].tokens[rows[i].segment_ids > 0] for i in range(len(rows))])
        assert sorted(tokens[tokens > 2].tolist()) == sorted(sum(texts, []))
        targets = np.concatenate([rows[i].targets[rows[i].weights > 0] for i in range(len(rows))])
        first = 0 if bos else 1  # without BOS nothing stands before a document's first token
        assert sorted(targets.tolist()) == sorted(sum((t[first:] for t in texts), []))
        if seed is None and len(bos) < 2:
            assert stitch(rows, bos)[0] == texts

    def test_seed_changes_the_neighbours(self):
        docs = tokenized([[10 * d, 10 * d + 1] for d in range(1, 30)])

        def order(seed):
            return data.PackedRows(docs, [], 8, seed)[0].tokens.tolist()

        assert order(None) == [10, 11, 20, 21, 30, 31, 40, 41]
        assert order(1) == order(1) != order(2)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="context_length=1 .* at least 2"):
            data.PackedRows(tokenized([[5]]), [1], 1)
        with pytest.raises(ValueError, match="no documents"):
            data.PackedRows(tokenized([]), [1], 8)

    def test_no_position_to_predict(self):
        bytes_ = tokenized([[1], [2], [3]])
        with pytest.raises(ValueError, match="no position to predict: .* one token .*no BOS"):
            data.PackedRows(bytes_, [], 8)
        assert data.PackedRows(bytes_, [9], 8)[0].weights.sum() == 3
        assert data.PackedRows(tokenized([[1], [2, 3]]), [], 8)[0].weights.sum() == 1


class TestBatches:
    @pytest.fixture(scope="class")
    def rows(self):
        return data.PackedRows(tokenized([list(range(7 * d, 7 * d + 7)) for d in range(37)]), [], 7)

    def take(self, iterator, count):
        return [next(iterator) for _ in range(count)]

    def test_shapes_and_types(self, rows):
        batch = next(data.batches(rows, 4, seed=0))
        assert batch.teacher is None
        for field in sorted(set(data.Batch.__dataclass_fields__) - {"teacher"}):
            value = getattr(batch, field)
            assert isinstance(value, np.ndarray) and value.shape == (4, 7), field
            assert value.dtype == (np.float32 if field == "weights" else np.int32), field

    def test_an_epoch_is_every_row_once_and_epochs_differ(self, rows):
        iterator = data.batches(rows, 1, seed=3)
        epochs = [[int(next(iterator).tokens[0, 0]) for _ in rows] for _ in range(2)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 7 * 37, 7))
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])

    @settings(max_examples=10, deadline=None)
    @given(step=st.integers(0, 30), seed=st.integers(0, 100))
    def test_resume_is_exact(self, rows, step, seed):
        iterator = data.batches(rows, 4, seed)
        self.take(iterator, step)
        state = json.loads(json.dumps(iterator.get_state()))
        assert len(json.dumps(state)) < 100
        expected = self.take(iterator, 15)  # crosses an epoch's end: 37 rows are 9.25 batches
        resumed = data.batches(rows, 4, seed)
        resumed.set_state(state)
        for ours, theirs in zip(self.take(resumed, 15), expected, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.weights, theirs.weights)

    @pytest.mark.parametrize("count", [2, 3])
    def test_processes_share_the_global_batch(self, rows, count):
        whole = data.batches(rows, 6, seed=1)
        shares = [data.batches(rows, 6, 1, p, count) for p in range(count)]
        for _ in range(20):
            together = np.concatenate([next(share).tokens for share in shares])
            alone = next(whole).tokens
            assert together.shape == alone.shape
            assert sorted(map(tuple, together)) == sorted(map(tuple, alone))

    def test_bad_arguments(self, rows):
        with pytest.raises(ValueError, match="batch_size=4 cannot be shared by 3"):
            data.batches(rows, 4, 0, 0, 3)
        with pytest.raises(ValueError, match="process_index=2"):
            data.batches(rows, 4, 0, 2, 2)

    def test_without_absl_flags_in_a_fresh_process(self):
        """grain reads absl flags in places; a job that parsed none must still get its batches."""
        program = (
            "import numpy as np\n"
            "from recursive_jax.training import data\n"
            "one = np.ones(1, np.int64)\n"
            "docs = data.TokenizedDocuments(np.arange(9, dtype=np.int32), 0 * one, 9 * one, one)\n"
            "print(next(data.batches(data.PackedRows(docs, [], 3), 3, 0)).tokens.sum())\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.strip() == "36", done.stderr


def test_novels_end_to_end(shared_text, tmp_path):
    """From files to batches and back to the words, with the tiny model's tokenizer."""
    import importlib.resources

    from recursive_jax import text

    tokenizer = text.load_tokenizer(importlib.resources.files("recursive_jax") / "assets" / "tiny")
    file = shared_text / "train" / "Lee_Penelope_1903.txt"
    encode = functools.partial(text.encode_batch, tokenizer)
    docs = data.tokenize(documents(str(file)), encode, text.fingerprint(tokenizer), tmp_path)
    bos = text.bos_prefix(tokenizer)
    rows = data.PackedRows(docs, bos, 128)
    novel, predicted = stitch(rows, bos)
    assert tokenizer.decode(novel[0]) == file.read_text(encoding="utf-8")
    assert predicted == novel[0] and len(predicted) == rows.num_tokens


def test_pieces_take_turns():
    """One long text must not be all that is measured."""
    lengths = np.array([7, 1, 4])
    starts = np.cumsum(lengths) - lengths
    docs = data.TokenizedDocuments(np.arange(12), starts, lengths, np.arange(3).astype(np.uint64))
    pieces = [p.tolist() for p in docs.pieces(3)]
    rounds = [{0: [0, 1, 2], 1: [7], 2: [8, 9, 10]}, {0: [3, 4, 5], 2: [11]}, {0: [6]}]
    assert sorted(pieces[:3]) == sorted(rounds[0].values())
    assert sorted(pieces[3:5]) == sorted(rounds[1].values())
    assert pieces[5:] == list(rounds[2].values())
