"""Tokenise a text once, into a directory that training reads on every host.

    python -m recursive_jax.tokenize --data=TEXT_DIR --tokenizer=MODEL --out=DIR
    python -m recursive_jax.train … --config.data.train=DIR

The directory holds array_record files of token ids and a manifest. The same command goes on with a
job that was stopped. docs/pods.md describes it.
"""

from __future__ import annotations

import functools
import pathlib
import re
import sys
import time

from absl import flags

from recursive_jax import text
from recursive_jax.console import app, output, stop, tables
from recursive_jax.console.progress import text_progress
from recursive_jax.text.documents import documents
from recursive_jax.training import shard_writer
from recursive_jax.training.token_manifest import Job
from recursive_jax.training.token_shards import TokenDirectory
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import ASSETS, open_source


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing this job adds no flags to another job."""
    string, integer = (
        functools.partial(kind, flag_values=values)
        for kind in (flags.DEFINE_string, flags.DEFINE_integer)
    )
    string(
        "data", None, "files, directories, jsonl(.gz .zst), tfds:NAME, docstrings; comma between"
    )
    string("tokenizer", None, "Hugging Face directory, checkpoint, .gguf, hub id, or 'tiny'")
    string("out", None, "directory to write; one that was stopped is gone on with")
    string("name", "text", "in the names of the files: NAME-train.array_record-00000-of-00010")
    flags.DEFINE_float(
        "valid_fraction", 0.01, "share of documents to hold out; 0: none", flag_values=values
    )
    integer("shard_tokens", 100_000_000, "a shard ends with the document that reaches so many")
    integer("workers", 1, "processes that tokenise; 1: this one, with the tokenizer's threads")
    flags.DEFINE_bool(
        "verify", False, "read all of --out and compare its checksums; write nothing",
        flag_values=values,
    )  # fmt: skip
    flags.mark_flag_as_required("out", values)


def main() -> None:
    with stop.on_signals():
        try:
            tokenize(flags.FLAGS)
        except stop.Stopped as signal:
            output.note(f"\n{signal}: stopped; run the same command to go on")
            sys.exit(signal.exit_code)


def tokenize(options: flags.FlagValues) -> None:
    """Run the job. A ValueError or OSError is a mistake of the user."""
    if options.verify:
        manifest = shard_writer.load_manifest(options.out)
        if manifest is None:
            raise ValueError(f"{options.out} has no manifest.json of tokenised text")
        TokenDirectory(options.out, manifest).verify()
        output.say(f"{describe(manifest)}\nall checksums of {options.out} are right")
        return
    check(options)
    tokenizer = load_tokenizer(options.tokenizer)
    docs = documents(options.data)
    job = Job(
        options.name,
        options.data,
        docs.fingerprint,
        options.tokenizer,
        text.fingerprint(tokenizer),
        2 if max(tokenizer.get_vocab().values()) < 2**16 else 4,
        options.valid_fraction,
        options.shard_tokens,
    )
    began = time.time()
    with text_progress(f"tokenising {docs.source}", docs.num_chars) as progress:
        manifest = shard_writer.write(options.out, job, docs, tokenizer, options.workers, progress)
    output.say(describe(manifest))
    output.say(
        f"{options.out} is whole ({time.time() - began:.0f} s); next: python -m "
        f"recursive_jax.train --config.data.train={options.out} …"
    )


def check(options: flags.FlagValues) -> None:
    """Raise ValueError for a flag that is missing or out of range."""
    for name in ("data", "tokenizer"):
        if not options[name].value:
            raise ValueError(f"--{name} is missing; see --help")
    if not re.fullmatch(r"[\w.]+", options.name):
        raise ValueError(f"--name={options.name!r}; expected letters, digits, '_' and '.'")
    if not 0 <= options.valid_fraction < 1:
        raise ValueError(f"--valid_fraction={options.valid_fraction}; expected a number in [0, 1)")
    for name in ("shard_tokens", "workers"):
        if options[name].value < 1:
            raise ValueError(f"--{name}={options[name].value}; expected at least 1")


def load_tokenizer(spec: str):
    """The tokenizer of a model, of a checkpoint, or of a directory with tokenizer files only."""
    if spec == "tiny":
        return text.load_tokenizer(ASSETS / "tiny")
    path = pathlib.Path(spec).expanduser()
    if checkpoint.is_checkpoint(spec):
        return text.load_tokenizer(path / checkpoint.TOKENIZER)
    if path.is_dir() and not (path / "config.json").exists():
        return text.load_tokenizer(path)
    return open_source(spec).load_tokenizer()


def describe(manifest) -> str:
    """Documents, tokens and shards of every split, as a table."""
    rows = [
        (name, f"{split.documents:,}", tables.count(split.tokens), str(len(split.shards)))
        for name, split in manifest.splits.items()
    ]
    return tables.table(rows, ("split", "documents", "tokens", "shards"))


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
