"""Resident memory of a process that reads random rows of 60 billion tokens.

    python tests/benchmarks/token_memory.py [--tokens=60e9] [--rows=2000] [--dir=DIR]

Synthetic: the ids are random, and all shards are hard links to one file (100,000 documents of 200
to 1,800 tokens, 0.2 GB). Their number, their sizes, the manifest, the file of lengths and all code
that reads them are those of a real directory. The rows come from `data.batches`, as in training.
Prints one JSON row: MB of resident memory before the directory is opened, after it, after a tenth
of the rows and after all; the peak; seconds until the first row; milliseconds per row.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from recursive_jax import paths
from recursive_jax.training import data, token_shards
from recursive_jax.training.token_manifest import (
    GROUP_DOCUMENTS,
    MANIFEST,
    PART_TOKENS,
    File,
    Job,
    Manifest,
    Shard,
    Split,
)
from recursive_jax.training.token_rows import open_mixture

DOCUMENTS, VOCAB = 100_000, 49_152  # of a shard; of the model
PREFIX, CONTEXT, BATCH = (1,), 2048, 8


def make(directory: pathlib.Path, tokens: float) -> Manifest:
    """Write a directory of about `tokens` tokens."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(200, 1801, DOCUMENTS).astype("<u4")
    name = "text-train.array_record-{:05d}-of-{:05d}".format
    count = max(1, round(tokens / lengths.sum()))
    first = directory / name(0, count)
    writer = ArrayRecordWriter(str(first), token_shards.WRITER_OPTIONS)
    for length in lengths:
        for record in token_shards.encode_records(draw.integers(0, VOCAB, length), 0, 2):
            writer.write(record)
    writer.close()
    size, checksum = first.stat().st_size, paths.crc32(first)
    shards = []
    for number in range(count):
        if number:
            os.link(first, directory / name(number, count))
        shards.append(
            Shard(name(number, count), size, checksum, DOCUMENTS, int(lengths.sum()), DOCUMENTS)
        )
    file = directory / "text-train.lengths"
    with open(file, "wb") as out:
        for _ in range(count):
            out.write(lengths.tobytes())
    assert lengths.max() <= PART_TOKENS, "one record for each document"
    group_records = range(0, count * DOCUMENTS, GROUP_DOCUMENTS)
    twice = np.concatenate([lengths, lengths]).astype(np.int64)  # a group is shorter than a shard
    group_tokens = [
        int(
            twice[g % DOCUMENTS :][: min(GROUP_DOCUMENTS, count * DOCUMENTS - g)].sum()
        )
        for g in group_records
    ]  # fmt: skip
    split = Split(
        tuple(shards), File(file.name, file.stat().st_size, paths.crc32(file)),
        tuple(group_tokens), tuple(group_records), "synthetic",
    )  # fmt: skip
    job = Job("text", "random", "none", "random", "random", 2, 0.0, int(lengths.sum()))
    manifest = Manifest(job, VOCAB - 1, "none", {"train": split})
    (directory / MANIFEST).write_text(json.dumps(manifest.to_json()))
    return manifest


def resident(field: str = "VmRSS") -> float:
    """MB of resident memory of this process; VmHWM: its peak."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise OSError(f"no {field} in /proc/self/status")


def measure(directory: pathlib.Path, rows: int) -> dict[str, float]:
    found = {"before_mb": resident()}
    began = time.perf_counter()
    mixture = open_mixture(str(directory), "random", "random", VOCAB)
    found["opened_mb"] = resident()
    packed = mixture.rows(PREFIX, CONTEXT, 0)
    batches = data.batches(packed, BATCH, seed=0)
    next(batches)
    found["first_batch_s"] = time.perf_counter() - began
    began = time.perf_counter()
    for done in range(rows // BATCH):
        next(batches)
        if done == rows // BATCH // 10:
            found["tenth_mb"] = resident()
    found["row_ms"] = (time.perf_counter() - began) / rows * 1e3
    found |= {"all_mb": resident(), "peak_mb": resident("VmHWM")}
    return {name: round(value, 1) for name, value in found.items()} | {"epoch_rows": len(packed)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=float, default=60e9)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--dir", default=None, help="on a disk with 1 GB; removed at the end")
    parser.add_argument("--open", default=None, help="a directory that is there: measure only")
    args = parser.parse_args()
    if args.open:  # a process that has written nothing
        print(json.dumps(measure(pathlib.Path(args.open), args.rows)))
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        split = make(pathlib.Path(scratch), args.tokens).splits["train"]
        command = [sys.executable, __file__, f"--open={scratch}", f"--rows={args.rows}"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    row = {
        "benchmark": "token_memory", "tokens": split.tokens, "documents": split.documents,
        "shards": len(split.shards), "context": CONTEXT, "rows": args.rows, **found,
        "cpu": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main()
