"""Decode models and engines for tests, as `recursive_jax.model` would choose them for one CPU."""

from recursive_jax.cpu.cache import cache_class
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.engine import Engine
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.scanned import ScannedModel


def scanned(cfg, **options):
    """The scanned model with the CPU's cache, as small models run."""
    decoder = Decoder(cfg, **options)
    return ScannedModel(decoder, cache_class(cfg, decoder.dtype)[0])


def make_engine(model, params, num_slots, context_length, mesh=None, rules=(), **settings):
    """An engine with these settings of `EngineConfig`."""
    config = EngineConfig(num_slots=num_slots, context_length=context_length, **settings)
    return Engine(model, params, config, mesh, rules)
