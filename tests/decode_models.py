"""Decode models for tests, as `recursive_jax.model` would choose them for one CPU."""

from recursive_jax.cpu.cache import cache_class
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.scanned import ScannedModel


def scanned(cfg, **options):
    """The scanned model with the CPU's cache, as small models run."""
    decoder = Decoder(cfg, **options)
    return ScannedModel(decoder, cache_class(cfg, decoder.dtype)[0])
