"""Second moments of a vanilla model on calibration text: what `weights.joint` fits in.

For every projection of every layer: C = E[xᵀx] of its input, and G = E[gᵀg] of the gradient of the
loss at its output. The labels of the loss are sampled from the model itself, so that C ⊗ G stands
for the Fisher matrix of the weight (K-FAC's approximation).

All windows pass one layer before the next layer is read, forward and then backward. One layer is in
memory at a time. The states between layers, and the moments, are on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import mmap
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from recursive_jax.evaluation.certificate import exact
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.layers import Linear
from recursive_jax.models.parameters import head_params
from recursive_jax.weights import joint
from recursive_jax.weights.source import Source

VERSION = 1  # of the files
MAX_BLOCK = 2048  # a wider moment is block-diagonal, of equal blocks no larger than this
WINDOWS = 4  # that run at once on a device
_META = "moments.json"

# Projections that read the same input have one C, named after one of them.
_READS = {"k": "q", "v": "q", "gate": "up"}


def reads(projection: str) -> str:
    """The projection whose C is that of this one."""
    return _READS.get(projection, projection)


def block_shape(n: int, largest: int | None = None) -> tuple[int, int, int]:
    """`[blocks, m, m]` of a moment of n channels: the fewest equal blocks of at most `largest`.

    `largest` is MAX_BLOCK unless given.
    """
    largest = largest or MAX_BLOCK
    count = next(count for count in range(-(-n // largest), n + 1) if n % count == 0)
    return count, n // count, n // count


def probe_shapes(cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all moments of one layer, by name: 'C/q', 'mean/q', 'C/up', 'G/q', 'G/k' …"""
    shapes = {}
    for name, (in_dim, out_dim) in cfg.projections.items():
        if reads(name) == name:
            shapes[f"C/{name}"], shapes[f"mean/{name}"] = block_shape(in_dim), (in_dim,)
        shapes[f"G/{name}"] = block_shape(out_dim)
    return shapes


def num_bytes(cfg: DecoderConfig) -> int:
    """Size of the moments of all layers on disk."""
    return cfg.depth * sum(4 * int(np.prod(shape)) for shape in probe_shapes(cfg).values())


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments on disk, read one at a time.

    Attributes:
      directory: of one file per layer, and moments.json.
      tokens: how many positions they are means of.
    """

    directory: pathlib.Path
    tokens: int

    @classmethod
    def open(cls, directory: pathlib.Path) -> Moments | None:
        """The moments in a directory; None if they are absent or damaged."""
        try:
            meta = json.loads((directory / _META).read_text())
            for depth in range(meta["depth"]):
                with zipfile.ZipFile(_file(directory, depth)) as file:
                    if file.testzip() is not None:  # reads all, and compares the CRC-32
                        return None
            return cls(directory, meta["tokens"])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None

    def metric(
        self,
        projection: str,
        depth: int,
        kind: str,
        scale: np.ndarray | None = None,
        bias: np.ndarray | None = None,
    ) -> joint.Metric:
        """The metric of one source layer's weight.

        Args:
          projection, depth: which weight.
          kind: 'fisher', or 'activations' (G = 1).
          scale, bias: `[in]` of the norm in front, where they are folded into the weight: the
            metric is then that of the norm's output without them.

        Raises:
          ValueError: rounding has left a moment that is no positive definite matrix.
        """
        with np.load(_file(self.directory, depth)) as file:
            inputs, outputs = file[f"C/{reads(projection)}"], file[f"G/{projection}"]
            if scale is not None:
                inputs = _normalised(inputs, file[f"mean/{reads(projection)}"], scale, bias)
        try:
            if kind == "activations":
                out_dim = outputs.shape[0] * outputs.shape[1]
                return joint.Metric(joint.Moment.of(inputs), joint.Moment.identity(out_dim))
            return joint.Metric(joint.Moment.of(inputs), joint.Moment.of(outputs))
        except np.linalg.LinAlgError as error:
            raise ValueError(
                f"the calibration moments of projection {projection} in layer {depth} are not "
                "positive definite: rounding is larger than their ridge. Convert with "
                "--lora_init=svd, or with --norms=per_loop if norms are folded"
            ) from error


def _normalised(inputs, mean, scale, bias) -> np.ndarray:
    """The moment of x̂ where `inputs` is that of `x = x̂ * scale + bias`."""
    shape = inputs.shape[:2]
    alive = np.abs(scale) > 1e-6 * np.abs(scale).max()  # of the others, x̂ cannot be known
    scale = np.where(alive, scale, 1.0).reshape(shape)
    out = inputs.astype(np.float64)
    if bias is not None:
        mean, bias = mean.reshape(shape), bias.reshape(shape)
        cross = mean[:, :, None] * bias[:, None]
        out = out - cross - cross.swapaxes(1, 2) + bias[:, :, None] * bias[:, None]
    out *= alive.reshape(shape)[:, :, None] * alive.reshape(shape)[:, None]
    return out / (scale[:, :, None] * scale[:, None])


def measure(
    source: Source, rows: Any, directory: pathlib.Path, seed: int = 0, progress: bool = True
) -> Moments:
    """The moments of a model on packed rows of text, written to `directory`, whole or not at all.

    Args:
      source: vanilla.
      rows: a `training.data.Batch` of `[N, T]` arrays. Positions of segment 0 are padding, and do
        not count.
      directory: must not exist.
      seed: of the sampled labels.
      progress: show a bar.

    Raises:
      ValueError: a moment is not finite; the layer is named.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        tokens = int((rows.segment_ids > 0).sum())
        total = 2 * source.cfg.depth + 1
        with tqdm(total=total, desc="calibration", unit="pass", disable=not progress) as bar:
            _measure(source, rows, partial, seed, tokens, bar)
        meta = {"version": VERSION, "depth": source.cfg.depth, "tokens": tokens}
        (partial / _META).write_text(json.dumps(meta))
        try:
            partial.rename(directory)
        except OSError:  # another process was faster
            if Moments.open(directory) is None:
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Moments(directory, tokens)


@exact
def _measure(source, rows, directory, seed, tokens, bar):
    cfg, place = source.cfg, _places()
    group = WINDOWS * len(place.split.mesh.devices)
    rows = jax.tree.map(lambda x: np.pad(x, ((0, -len(x) % group), (0, 0))), rows)
    count = len(rows.tokens)
    groups = [slice(start, start + group) for start in range(0, count, group)]
    outer = jax.tree.map(lambda x: _put(x, place.replicated), source.outer_params())
    # States before every layer; at last the gradient replaces them, from the top layer down.
    shape = (cfg.depth + 1, count, rows.tokens.shape[1], cfg.embed_dim)
    states = _OnDisk(directory / "states.f32", shape)

    def batch(at: slice) -> dict[str, Any]:
        names = ("tokens", "positions", "segment_ids", "weights")
        return {name: _put(getattr(rows, name)[at], place.split) for name in names}

    embed = jax.jit(lambda p, t: Decoder(cfg).apply({"params": p}, t, method="embed"))
    for at in groups:
        states[0, at] = embed(outer, batch(at)["tokens"])
    for depth in range(cfg.depth):
        bar.set_postfix_str(f"forward, layer {depth}")
        here, params = _layer(source, depth, outer, place)
        run = _forward(here)
        for at in groups:
            states[depth + 1, at] = run(params, _put(states[depth, at], place.split), batch(at))
        states.release()
        bar.update()
    bar.set_postfix_str("labels")
    head, gradient = head_params(outer), _label_gradient(Decoder(cfg))
    for n, at in enumerate(groups):
        key = jax.random.fold_in(jax.random.key(seed), n)
        x = _put(states[-1, at], place.split)
        states[-1, at] = gradient(head, x, batch(at)["segment_ids"], key)
    bar.update()
    for depth in reversed(range(cfg.depth)):
        bar.set_postfix_str(f"backward, layer {depth}")
        here, params = _layer(source, depth, outer, place)
        run, sums = _backward(here), None
        for at in groups:
            x, g = (_put(states[d, at], place.split) for d in (depth, depth + 1))
            gradient, found = run(params, x, g, batch(at))
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
            states[depth, at] = gradient
        arrays = {name: np.asarray(total) / tokens for name, total in sums.items()}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{source.path}: the calibration moment {name} of layer {depth} is not finite: "
                    "activations or gradients exceed float32. Nothing was written; check the "
                    "source, or convert with --lora_init=svd"
                )
        np.savez(_file(directory, depth), **arrays)
        states.release()
        bar.update()
    del states
    (directory / "states.f32").unlink()


def _layer(source: Source, depth: int, outer: Mapping[str, Any], place: _Places):
    cfg, block = source.layers([depth])
    block = jax.tree.map(lambda x: _put(np.asarray(x, np.float32), place.replicated), block)
    return Decoder(cfg), outer | block


@functools.lru_cache(maxsize=8)  # few distinct configs: layers differ in window and rope only
def _forward(model: Decoder):
    return jax.jit(lambda params, x, batch: _run(model, params, x, batch))


@functools.lru_cache(maxsize=8)
def _backward(model: Decoder):
    """Jitted `(params, x, gradient of the output, batch) -> (gradient of x, sums of moments)`."""
    shapes = probe_shapes(model.cfg)

    def run(params, x, gradient, batch):
        probes = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        mask = (batch["segment_ids"] > 0).astype(jnp.float32)

        def layer(x, probes):
            with nn.intercept_methods(functools.partial(_intercept, probes=probes, mask=mask)):
                return _run(model, params, x, batch)

        _, pull = jax.vjp(layer, x, probes)
        return pull(gradient)

    return jax.jit(run)


def _run(model, params, x, batch):
    return model.apply(
        {"params": params}, x, jnp.int32(0), batch["positions"], batch["segment_ids"],
        method="run_loop",
    )  # fmt: skip


def _intercept(call, args, kwargs, context, probes, mask):
    """Tap the input and the output of every `Linear`."""
    module = context.module
    if not isinstance(module, Linear) or context.method_name != "__call__":
        return call(*args, **kwargs)
    x, *rest = args
    name = module.projection
    if reads(name) == name:
        x = _tap_input(x, probes[f"C/{name}"], probes[f"mean/{name}"], mask)
    return _tap_output(call(x, *rest, **kwargs), probes[f"G/{name}"])


# A tap is the identity. The gradient of a probe is the moment: Σ xᵀx and Σ x of the tapped
# activation, or Σ gᵀg of its gradient.
@jax.custom_vjp
def _tap_input(x, square, mean, mask):
    return x


def _tap_input_forward(x, square, mean, mask):
    return x, (x, square, mask)


def _tap_input_backward(kept, g):
    x, square, mask = kept
    x = x * mask[..., None]
    return g, _moment(x, square.shape), x.sum((0, 1)), jnp.zeros_like(mask)


_tap_input.defvjp(_tap_input_forward, _tap_input_backward)


@jax.custom_vjp
def _tap_output(y, square):
    return y


def _tap_output_forward(y, square):
    return y, square


def _tap_output_backward(square, g):
    return g, _moment(g, square.shape)


_tap_output.defvjp(_tap_output_forward, _tap_output_backward)


def _moment(x: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Σ xᵀx over all positions of x `[B, T, n]`, its diagonal blocks `[blocks, m, m]`."""
    x = x.reshape(-1, *shape[:2])
    return jnp.einsum("tbi,tbj->bij", x, x)


@functools.lru_cache(maxsize=8)
def _label_gradient(model: Decoder, positions: int = 64):
    """Jitted `(head, hidden [B, T, D], segment_ids, key) -> gradient of the summed loss [B, T, D]`.

    A label is sampled from the model at each position. Some positions at a time: their logits have
    up to 262k columns.
    """

    def chunk_gradient(params, x, key):
        def loss(x):
            logits = model.apply({"params": params}, x, method="unembed")
            label = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            log_p = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(log_p, label[..., None], axis=-1).sum()

        return jax.grad(loss)(x)

    @jax.jit
    def run(params, x, segment_ids, key):
        batch, length, dim = x.shape
        chunks = -(-length // positions)
        padded = jnp.pad(x, ((0, 0), (0, chunks * positions - length), (0, 0)))
        parts = padded.reshape(batch, chunks, positions, dim).swapaxes(0, 1)
        keys = jax.random.split(key, chunks)
        g = jax.lax.map(lambda part: chunk_gradient(params, *part), (parts, keys))
        g = g.swapaxes(0, 1).reshape(batch, -1, dim)[:, :length]
        return g * (segment_ids > 0)[..., None]

    return run


@dataclasses.dataclass(frozen=True)
class _Places:
    split: NamedSharding  # a batch, over the local devices
    replicated: NamedSharding


def _places() -> _Places:
    """Shardings over the local devices: every process measures the same text on its own."""
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    return _Places(split, NamedSharding(mesh, PartitionSpec()))


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    return jax.device_put(jnp.asarray(x), sharding)


class _OnDisk:
    """A float32 array in a file; `release` frees the memory of what was read and written."""

    def __init__(self, path: pathlib.Path, shape: tuple[int, ...]):
        size = 4 * int(np.prod(shape))
        with open(path, "w+b") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk raises here, not SIGBUS on a write
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self._array = np.frombuffer(self._map, np.float32).reshape(shape)

    def __getitem__(self, at: Any) -> np.ndarray:
        return self._array[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self._array[at] = value

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _file(directory: pathlib.Path, depth: int) -> pathlib.Path:
    return directory / f"layer_{depth:03}.npz"
