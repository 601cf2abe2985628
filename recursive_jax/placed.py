"""A model on all devices, for measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from recursive_jax import sharding
from recursive_jax.evaluation.likelihood import Likelihoods
from recursive_jax.evaluation.perplexity import perplexity
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import logical_axes
from recursive_jax.text import Windows

if TYPE_CHECKING:
    from recursive_jax.model import Model


class Placed:
    """A model's decoder and weights on all devices, for measurements."""

    def __init__(self, model: Model, dtype: str):
        compute = sharding.compute_dtype(dtype)
        self.mesh = sharding.make_mesh()
        self._rules = sharding.rules_for(self.mesh, model.cfg)
        places = sharding.shardings(logical_axes(model.cfg), self.mesh, self._rules)
        self.decoder = Decoder(
            model.cfg, dtype=compute, data_shards=sharding.data_shards(self.mesh)
        )
        self.params = model.weights.read(places, jnp.float32)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        precise = sharding.matmul_precision(self.decoder.dtype)
        with sharding.use(self.mesh, self._rules), precise:
            yield

    def put(self, batch: Any) -> Any:
        return sharding.put_global(batch, sharding.batch_sharding(self.mesh))

    def perplexity(
        self, windows: Windows, batch_size: int, progress: Callable[[float], None] = float
    ) -> dict[str, Any]:
        """As `evaluation.perplexity` returns it; `progress` as in `Records`."""
        shards, number = self.decoder.data_shards, len(windows.tokens)
        rows = -(-min(batch_size, number) // shards) * shards
        batches, done = -(-number // rows), 0

        def put(batch):
            nonlocal done
            progress(done / batches)
            done += 1
            return self.put(batch)

        with self.use():
            every = self.decoder.cfg.has_exits
            found = perplexity(self.decoder, self.params, *windows, rows, every, put)
        progress(1.0)
        return found

    def likelihoods(self, max_length: int, batch_size: int) -> Likelihoods:
        return Likelihoods(
            self.decoder, self.params, max_length, batch_size, self.decoder.cfg.has_exits,
            self.put, sharding.replicated(self.mesh), self.use,
        )  # fmt: skip
