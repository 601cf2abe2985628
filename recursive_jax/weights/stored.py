"""Where the weights of a model are, and how they get onto devices."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params
from recursive_jax.weights import checkpoint, names
from recursive_jax.weights.integrity import Damaged, together
from recursive_jax.weights.source import Source


class Weights(Protocol):
    """The weights of a model, on disk or in memory."""

    def load(self, shardings: Any, dtype: Any) -> Any:
        """New nested params in `dtype` and `shardings` (a tree like the params)."""

    def read(self, shardings: Any, dtype: Any) -> Any:
        """As `load`, but arrays that are there already are not copied: do not donate them."""

    def as_source(self, cfg: DecoderConfig, tokenizer: Any, facts: Mapping[str, Any]) -> Source:
        """The vanilla model as `tying` and the certificate read it, a layer at a time."""

    def content(self) -> str:
        """A fingerprint of the weights that does not depend on where they are."""


@dataclasses.dataclass(frozen=True)
class SourceWeights:
    """Those of a pretrained model, read stack by stack: the host never has them all."""

    source: Source

    def load(self, shardings, dtype):
        def put(path, sharding):
            name = "/".join(key.key for key in path)
            return _put(np.asarray(self.source.params[name]).astype(dtype), sharding)

        return jax.tree_util.tree_map_with_path(put, shardings)

    read = load

    def as_source(self, cfg, tokenizer, facts):
        return self.source

    def content(self):
        path = self.source.path
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        files += sorted(file for file in (path / "params").rglob("*") if file.is_file())  # Orbax
        if path.is_dir():
            files = [path / "config.json", *files]
        digest = hashlib.blake2b(digest_size=12)
        for file in files:
            digest.update(_sample(file))
        return digest.hexdigest()


@dataclasses.dataclass
class CheckpointWeights:
    """Those of a step of a checkpoint directory, read straight onto their devices.

    Every use reads the same step, also while a training saves newer ones there.

    Attributes:
      directory: of the checkpoint.
      step: the step to read. Without `exact`, the one before it once it is found damaged.
      exact: no other step will do. Otherwise `step` was the newest when the model was loaded.
      say: is given a line per step that is set aside as damaged.
      ema: the averaged weights, or those that were trained; None: averaged where there are any.
    """

    directory: str | os.PathLike
    step: int
    exact: bool = True
    say: Callable[[str], None] = logging.warning
    ema: bool | None = None

    def load(self, shardings, dtype):
        return self._of_step(
            lambda step: checkpoint.load_step(
                self.directory, shardings, dtype, step, self.say, self.ema
            )
        )

    read = load

    def as_source(self, cfg, tokenizer, facts):
        params = self._of_step(
            lambda step: checkpoint.load_step(self.directory, step=step, say=self.say, ema=self.ema)
        )
        return ArrayWeights(params, str(self.directory)).as_source(cfg, tokenizer, facts)

    def content(self):
        def sums_of(step):
            step, _, sums = checkpoint.weights_of(self.directory, step, self.say, self.ema)
            return sums, step

        sums = self._of_step(sums_of)
        return hashlib.blake2b(json.dumps(sums).encode(), digest_size=12).hexdigest()

    def part(self) -> str:
        """Which weights these are: 'params' or, averaged, 'ema'."""
        return checkpoint.weights_of(self.directory, self.step, self.say, self.ema)[1]

    def _of_step(self, read: Callable[[int | None], tuple[Any, int]]) -> Any:
        """What `read` returns for the step, or for the newest whole one where it is damaged.

        Args:
          read: step or None -> result, and the step that was read.

        Raises:
          FileNotFoundError: the step has been removed since.
        """
        try:
            return read(self.step)[0]
        except (FileNotFoundError, Damaged) as error:
            if self.exact:
                raise
            together(functools.partial(self._check_still_newest, error))
        result, self.step = read(None)
        return result

    def _check_still_newest(self, error: Exception) -> None:
        latest = checkpoint.latest_step(self.directory)
        if latest != self.step:
            raise FileNotFoundError(
                f"step {self.step} of {self.directory} was the newest when the model was loaded, "
                "and cannot be read any more; a training there may have removed it. Load the model "
                f"again: the newest step is {latest} now"
            ) from error


@dataclasses.dataclass(frozen=True)
class ArrayWeights:
    """Nested arrays in memory. `name`: of the model, for messages."""

    params: Any
    name: str = "a model in memory"

    def load(self, shardings, dtype):
        def put(x, sharding):
            if isinstance(x, jax.Array):  # a copy: the caller's array must survive a donation
                return jax.device_put(jnp.array(x, dtype, copy=True), sharding)
            return _put(np.array(x, dtype, copy=True), sharding)

        return jax.tree.map(put, self.params, shardings)

    def read(self, shardings, dtype):
        def put(x, sharding):
            if isinstance(x, jax.Array):
                return jax.device_put(x.astype(dtype), sharding)
            return _put(np.array(x, dtype), sharding)

        return jax.tree.map(put, self.params, shardings)

    def as_source(self, cfg, tokenizer, facts):
        return Source(
            pathlib.Path(self.name),
            cfg,
            _Stacks(names.flat(self.params)),
            lambda: tokenizer,
            dict(facts.get("generation_config") or {}),
        )

    def content(self):
        sums = checkpoint.checksums(self.params)
        return hashlib.blake2b(json.dumps(sums).encode(), digest_size=12).hexdigest()


@functools.lru_cache(maxsize=64)
def _digest_of_pieces(path: pathlib.Path, size: int, modified: int) -> bytes:
    """A digest of 64 pieces of a file, spread over it: any other training differs in them."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=12)
    piece = 64 << 10
    with open(path, "rb") as file:
        for start in sorted({max(0, (size - piece) * n // 63) for n in range(64)}):
            file.seek(start)
            digest.update(file.read(piece))
    return digest.digest()


def _sample(path: pathlib.Path) -> bytes:
    status = path.stat()
    return _digest_of_pieces(path, status.st_size, status.st_mtime_ns)


class _Stacks(Mapping):
    """A flat mapping of arrays with the methods of `names.LazyParams`."""

    def __init__(self, flat: Mapping[str, Any]):
        self._flat = flat

    def __getitem__(self, path: str) -> np.ndarray:
        return np.asarray(self._flat[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._flat)

    def __len__(self) -> int:
        return len(self._flat)

    @property
    def num_tensors(self) -> int:
        return len(self._flat)

    def layers(self, path: str, depths: Sequence[int]) -> np.ndarray:
        return self[path][list(depths)]


def on_one_device(cfg: DecoderConfig) -> Any:
    """Shardings of params that lie whole on the default device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: device, abstract_params(cfg))


def _put(x: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
