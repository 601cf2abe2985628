"""Text and tokenised directories in a bucket: a file system of fsspec, as gcsfs is one.

The scheme is az://, so that gs:// is left to what is installed.
"""

import json

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from recursive_jax import text, tokenize
from recursive_jax.text.documents import documents
from recursive_jax.training import data, shard_writer, token_copy
from recursive_jax.training.token_manifest import Job, load_manifest
from recursive_jax.training.token_rows import open_mixture
from recursive_jax.training.token_shards import TokenDirectory

VOCAB = 4096


@pytest.fixture(scope="module")
def tokenizer():
    return tokenize.load_tokenizer("tiny")


class Objects(LocalFileSystem):
    """The objects of az:// in files. They need no directories, as in a bucket."""

    protocol, root = "az", ""

    def __init__(self, **options):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).removeprefix("az://")
        return path if path.startswith(cls.root) else f"{cls.root}/{path}".rstrip("/")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The local directory that holds the objects of az://bucket."""
    monkeypatch.setattr(Objects, "root", str(tmp_path / "objects"))
    fsspec.register_implementation("az", Objects, clobber=True)
    (tmp_path / "objects" / "bucket").mkdir(parents=True)
    return tmp_path / "objects" / "bucket"


def write(source, out, tokenizer, progress=lambda chars: None):
    docs = documents(str(source))
    print_of = text.fingerprint(tokenizer)
    job = Job("text", str(source), docs.fingerprint, "tiny", print_of, 2, 0.1, 2000)
    return shard_writer.write(out, job, docs, tokenizer, 1, progress)


@pytest.fixture
def both(bucket, tmp_path, tokenizer):
    """(local directory, the same text tokenised from a bucket into a bucket)."""
    lines = [f"line {i}: " + "the block of shared layers. " * (i % 7 + 1) for i in range(200)]
    for root in (bucket / "text", tmp_path / "text"):
        (root / "sub").mkdir(parents=True)
        (root / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines[:150]))
        (root / "sub" / "b.txt").write_text("\n".join(lines[150:]))
    write(tmp_path / "text", tmp_path / "tokens", tokenizer)
    write("az://bucket/text", "az://bucket/tokens", tokenizer)
    return tmp_path / "tokens", bucket / "tokens"


def names(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name != "manifest.json"}


def test_a_bucket_gets_the_bytes_of_a_directory(both, tokenizer):
    local, remote = both
    assert names(remote) == names(local) and len(names(local)) > 5
    manifest = load_manifest("az://bucket/tokens")
    assert manifest.splits == load_manifest(local).splits
    TokenDirectory("az://bucket/tokens", manifest).verify()


def test_an_interrupted_job_goes_on(both, tokenizer):
    _, remote = both
    seen = []

    def die(chars):
        seen.append(chars)
        if len(seen) == 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("az://bucket/text", "az://bucket/again", tokenizer, die)
    again, resumed = remote.parent / "again", []
    assert list(again.glob("section-*.json")) and not (again / "manifest.json").exists()
    write("az://bucket/text", "az://bucket/again", tokenizer, resumed.append)
    assert names(again) == names(remote) and len(resumed) < 151


def rows_of(spec, tokenizer, cache):
    mixture = open_mixture(spec, text.fingerprint(tokenizer), "tiny", VOCAB, str(cache))
    return mixture.rows(text.bos_prefix(tokenizer), 64, 0)


def test_rows_are_those_of_the_directory_and_the_copy_is_kept(both, tokenizer, tmp_path):
    local, remote = both
    found, expected = (
        next(data.batches(rows_of(spec, tokenizer, tmp_path / "cache"), 8, 0))
        for spec in ("az://bucket/tokens", str(local))
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    (copy,) = (tmp_path / "cache").iterdir()
    assert names(copy) == names(remote)
    shard = next(remote.glob("*train.array_record-00001*"))
    shard.unlink()
    rows_of("az://bucket/tokens:0.3", tokenizer, tmp_path / "cache")  # nothing is read again
    (copy / shard.name).unlink()
    with pytest.raises(ValueError, match=f"az://bucket/tokens/{shard.name} is damaged: it is miss"):
        rows_of("az://bucket/tokens", tokenizer, tmp_path / "cache")


def test_a_damaged_object_and_a_small_disk(both, tokenizer, tmp_path, monkeypatch):
    _, remote = both
    shard = next(remote.glob("*train.array_record-00001*"))
    whole = shard.read_bytes()
    for damaged in (whole[:-9], bytes([whole[0] ^ 1]) + whole[1:]):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"az://bucket/tokens/{shard.name} is damaged: "):
            rows_of("az://bucket/tokens", tokenizer, tmp_path / "cache")
    (copy,) = (tmp_path / "cache").iterdir()
    assert not list(copy.glob(f"{shard.name}*")), "no half of a file stays"
    shard.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(token_copy, "SPARE", 1 << 60)
        with pytest.raises(ValueError, match="does not fit on the disk of .*Set data.cache_dir"):
            rows_of("az://bucket/tokens", tokenizer, tmp_path / "cache")
    rows_of("az://bucket/tokens", tokenizer, tmp_path / "cache")
