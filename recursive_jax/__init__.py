"""Relaxed Recursive Transformers in JAX: fold a pretrained model's layers into one looped block.

    import recursive_jax as rj

    source = rj.load("tiny")
    model = source.convert(num_loops=2, lora_rank=16)

Importing this package is cheap: it starts no JAX and defines no flags. docs/api.md shows the rest.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "load": "model",
    "Model": "model",
    "TieConfig": "weights.tie_config",
    "TrainConfig": "training.config",
    "EngineConfig": "decoding.config",
    "Request": "decoding.requests",
    "Sampling": "decoding.requests",
    "Completion": "decoding.requests",
    "Event": "decoding.requests",
    **dict.fromkeys(
        ("Static", "TopProbability", "Margin", "Stable", "Cosine", "Recorded", "Oracle"),
        "decoding.exit_measures",
    ),
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from recursive_jax.decoding.config import EngineConfig as EngineConfig
    from recursive_jax.decoding.exit_measures import Cosine as Cosine
    from recursive_jax.decoding.exit_measures import Margin as Margin
    from recursive_jax.decoding.exit_measures import Oracle as Oracle
    from recursive_jax.decoding.exit_measures import Recorded as Recorded
    from recursive_jax.decoding.exit_measures import Stable as Stable
    from recursive_jax.decoding.exit_measures import Static as Static
    from recursive_jax.decoding.exit_measures import TopProbability as TopProbability
    from recursive_jax.decoding.requests import Completion as Completion
    from recursive_jax.decoding.requests import Event as Event
    from recursive_jax.decoding.requests import Request as Request
    from recursive_jax.decoding.requests import Sampling as Sampling
    from recursive_jax.model import Model as Model
    from recursive_jax.model import load as load
    from recursive_jax.training.config import TrainConfig as TrainConfig
    from recursive_jax.weights.tie_config import TieConfig as TieConfig


def __getattr__(name: str):
    """The public name, imported when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'recursive_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"recursive_jax.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
