"""The teacher of a run, once and before it: draws from its distributions, written as files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grain
import jax
import numpy as np

from recursive_jax import file_lock, hosts, paths, sharding, text
from recursive_jax.fit import make_mesh, shared_ids
from recursive_jax.models.chunked_head import chunk_length
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import head_params
from recursive_jax.trainer import teacher_shardings
from recursive_jax.training import draw_files, draws
from recursive_jax.training.config import TrainConfig
from recursive_jax.training.corpus import Corpus
from recursive_jax.training.data import Batch, Rows
from recursive_jax.training.draw_files import DrawDirectory, DrawJob, DrawManifest

if TYPE_CHECKING:
    from recursive_jax.model import Model

LOGITS_BYTES = 256 << 20  # per device, for the distributions of one chunk of positions


def open_draws(
    config: TrainConfig, corpus: Corpus, model: Any, teacher: Model | None, progress: bool = True
) -> Corpus:
    """The corpus with the draws of `config.data.teacher`; as it is where there are none.

    Args:
      config: of the run.
      corpus: its text.
      model: a `Model` or `Start` to train, for its tokenizer and config.
      teacher: whose draws are expected; None: those of any.
      progress: of a copy from a bucket.

    Raises:
      ValueError: the draws are of another teacher, tokenizer, text, seed, length or temperature, or
        of too few rows.
    """
    if not config.data.teacher:
        return corpus
    found = DrawDirectory(config.data.teacher, config.data.cache_dir or None, progress)
    run = _of_run(config, corpus, model.tokenizer)
    if teacher is not None:
        run["content"] = teacher.weights.content()
    sizes = (model.cfg.vocab_size, max(model.tokenizer.get_vocab().values()) + 1)
    if found.job.num_ids not in sizes:
        run["num_ids"] = sizes[0]
    found.check(run, config.num_steps * config.data.batch_size)
    return dataclasses.replace(corpus, draws=found)


def _of_run(config: TrainConfig, corpus: Corpus, tokenizer: Any) -> dict[str, Any]:
    """What the draws of a run have in common with it: fields of `DrawJob`."""
    return {
        "tokenizer": text.fingerprint(tokenizer),
        "text": draw_files.text_of(corpus.rows),
        "seed": config.seed,
        "context_length": config.data.context_length,
        "temperature": config.objective.temperature,
    }


def make_job(
    config: TrainConfig, corpus: Corpus, model: Model, teacher: Model, num: int, shard_rows: int
) -> DrawJob:
    """The draws of a run.

    Args:
      config, corpus: of the run.
      model: to be taught, or any with its tokenizer and vocabulary.
      teacher: it learns from.
      num: draws of a token.
      shard_rows: rows of a file.
    """
    return DrawJob(
        teacher=teacher.name,
        content=teacher.weights.content(),
        rows=config.num_steps * config.data.batch_size,
        draws=num,
        num_ids=shared_ids(model, teacher) or teacher.cfg.vocab_size,
        dtype=sharding.compute_dtype(config.dtype).name,
        shard_rows=shard_rows,
        **_of_run(config, corpus, model.tokenizer),
    )


def write_draws(
    out: str | os.PathLike,
    job: DrawJob,
    config: TrainConfig,
    corpus: Corpus,
    teacher: Model,
    progress: Callable[[int], None] = lambda rows: None,
) -> DrawManifest:
    """The manifest of a finished directory of draws; one that was stopped is gone on with.

    The processes of a job share the mesh and the teacher. Each of them reads and writes shards of
    its own.

    Args:
      out: the directory, which all processes see.
      job: what to write.
      config: mesh, dtype and rows of a step.
      corpus: the text.
      teacher: draws are taken from it.
      progress: is called with the rows that this process has written.

    Raises:
      ValueError: the directory holds something else.
      OSError: a file cannot be written.
    """
    out, me, count = paths.path_of(out), jax.process_index(), jax.process_count()
    mesh = make_mesh(config)
    missing: list[int] = []
    with contextlib.ExitStack() as stack:
        if not me:
            missing = draw_files.begin(out, job)
            if not paths.is_remote(out):
                stack.enter_context(file_lock.hold(out / draw_files.LOCK, out, "--out"))
        hosts.see_one_directory(out)
        missing = hosts.decide("the shards to write", missing, lambda found: found[0])
        if missing:
            size = config.data.batch_size // config.accumulate // count
            teach = Teaching(job, config, mesh, teacher)
            for first in range(0, len(missing), count):
                turn = missing[first : first + count]
                mine = turn[me] if me < len(turn) else None
                steps = -(-max(len(job.rows_of(shard)) for shard in turn) // size)
                rows = job.rows_of(turn[0] if mine is None else mine)
                found = teach.rows(_batches(corpus.rows, job.seed, rows, size, steps))
                _write_shard(out, job, mine, found, progress)
        hosts.barrier("the end of all shards")
        if not me:
            draw_files.finish(out, job)
        hosts.barrier("the manifest")
    return draw_files.find_manifest(out)


def _write_shard(out, job, shard: int | None, found: Iterator[Any], progress) -> None:
    """Write the rows of a shard; a process without one only takes part in their computation."""
    writer = None if shard is None else draw_files.ShardWriter(out, job, shard)
    bytes_per_id = 2 if job.num_ids <= 2**16 else 4
    try:
        for row, tokens, ids, entropy in found:
            if writer is not None:
                writer.write(draws.encode(row, tokens, ids, entropy, bytes_per_id))
                progress(1)
        if writer is not None:
            writer.close()
    finally:
        if writer is not None:
            writer.discard()


def _batches(
    rows: Rows, seed: int, numbers: range, size: int, steps: int
) -> Iterator[tuple[range, Batch]]:
    """`steps` batches of `size` rows, each with the numbers of its first rows.

    Behind the last of `numbers` rows are repeated; they have no number.
    """
    share = rows.endless(seed)[numbers.start : numbers.stop].batch(size)
    found = iter(share.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    batch = None
    for step in range(steps):
        here = numbers[step * size : (step + 1) * size]
        batch = next(found) if here else batch
        yield here, jax.tree.map(lambda x: np.resize(x, (size, *x.shape[1:])), batch)


class Teaching:
    """Runs the teacher on a mesh.

    Args:
      job: which draws.
      config: dtype of the computation.
      mesh: of all processes.
      teacher: is loaded onto the mesh.
    """

    def __init__(self, job: DrawJob, config: TrainConfig, mesh: Any, teacher: Model):
        self._mesh, self._rules = mesh, sharding.rules_for(mesh, teacher.cfg)
        dtype = sharding.compute_dtype(config.dtype)
        shards = sharding.data_shards(mesh)
        self._decoder = Decoder(teacher.cfg, dtype=dtype, data_shards=shards)
        self._params = teacher.weights.load(teacher_shardings(teacher.cfg, mesh), dtype)
        self._draw = jax.jit(
            functools.partial(draw_rows, self._decoder, job),
            out_shardings=sharding.batch_sharding(mesh),
        )

    def rows(self, batches: Iterator[tuple[range, Batch]]) -> Iterator[Any]:
        """(number, tokens, ids, entropy) of every row that has a number, as numpy arrays."""
        before = None
        for numbers, batch in batches:
            after = numbers, batch, self._dispatch(numbers, batch)
            if before is not None:  # read while the devices are busy
                yield from _read(*before)
            before = after
        if before is not None:
            yield from _read(*before)

    def _dispatch(self, numbers: range, batch: Batch) -> Any:
        padded = np.zeros(len(batch.tokens), np.uint32)
        padded[: len(numbers)] = numbers
        precision = sharding.matmul_precision(self._decoder.dtype)
        with sharding.use(self._mesh, self._rules), precision:
            inputs = (batch.tokens, batch.positions, batch.segment_ids, padded)
            return self._draw(self._params, *sharding.put_local_batch(inputs, self._mesh))


def draw_rows(decoder: Decoder, job: DrawJob, params, tokens, positions, segment_ids, numbers):
    """Sorted ids `[B, T, K]` and entropies `[B, T]` of rows; a function of row and its number."""
    hidden = decoder.apply({"params": params}, tokens, positions, segment_ids)
    head = {"params": head_params(params)}
    length, key = tokens.shape[1], jax.random.key(job.seed)

    def uniform_of(number):
        return jax.random.uniform(jax.random.fold_in(key, number), (length, 2, job.draws))

    def at_position(inputs):  # [B, D] and [B, 2, K]
        hidden, uniform = inputs
        logits = decoder.apply(head, hidden, method="unembed")[..., : job.num_ids]
        return draws.draw(logits / job.temperature, uniform)

    rows = -(-len(tokens) // decoder.data_shards)
    chunk = chunk_length(rows, length, job.num_ids, 4, LOGITS_BYTES)
    inputs = hidden.swapaxes(0, 1), jax.vmap(uniform_of, out_axes=1)(numbers)
    ids, entropy = jax.lax.map(at_position, inputs, batch_size=chunk)
    return ids.swapaxes(0, 1), entropy.swapaxes(0, 1)


def _read(numbers: range, batch: Batch, found: Any) -> Iterator[Any]:
    """The rows of this process, out of what the devices return."""
    ids, entropy = (_local(array) for array in found)
    for n, number in enumerate(numbers):
        yield number, batch.tokens[n], ids[n], entropy[n]


def _local(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is sharded by rows."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
