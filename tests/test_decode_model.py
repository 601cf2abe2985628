"""Which implementation decodes a model on which devices."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax import sharding
from recursive_jax.cpu.cache import CpuCache, cache_class
from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.decode_model import decode_model
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.kv_cache import KVCache
from recursive_jax.models.scanned import ScannedModel

SMALL = DecoderConfig(
    "llama", 32, 64, 32, num_heads=4, num_kv_heads=2, head_dim=16, num_layers=2, num_loops=2
)
LARGE = SMALL.replace(embed_dim=1024, mlp_dim=8192)


def choose(cfg, mesh=None, passes=0, dtype=jnp.float32):
    mesh = mesh or sharding.make_mesh(1, 1, 1, devices=[jax.devices()[0]])
    return decode_model(cfg, dtype, mesh, 1024, passes)


@pytest.mark.parametrize(
    ("cfg", "passes", "expected"),
    [(SMALL, 10_000, ScannedModel), (LARGE, 100, ScannedModel), (LARGE, 10_000, CpuModel)],
)
def test_one_cpu_unstacks_large_blocks_for_many_passes(cfg, passes, expected):
    chosen = choose(cfg, passes=passes)
    assert type(chosen) is expected
    kernel_or_not, words = cache_class(cfg, jnp.float32)
    assert type(chosen.new_cache(2, 64)) is kernel_or_not and chosen.attention == words


def test_the_cache_is_plain_where_the_kernel_cannot_serve():
    assert CpuCache.unsupported(SMALL, jnp.bfloat16, 64) == "it does not take bfloat16"
    chosen = choose(SMALL, dtype=jnp.dtype("bfloat16"))
    assert type(chosen.new_cache(2, 64)) is KVCache
    assert chosen.attention == "XLA (decode_attention.cc: it does not take bfloat16)"


def test_several_cpu_devices_have_no_kernels():
    chosen = choose(LARGE, sharding.make_mesh(4, 1, 2), passes=10_000)
    assert type(chosen) is ScannedModel and type(chosen.new_cache(8, 64)) is KVCache
    assert "one device" in chosen.attention


@pytest.mark.parametrize(
    ("length", "block_length"), [(128, 128), (512, 512), (1024, 512), (1100, 368)]
)
def test_a_gpu_reads_long_blocks_and_short_caches_whole(length, block_length):
    """A CPU reads 32 rows at once."""
    device = types.SimpleNamespace(platform="gpu")
    mesh = types.SimpleNamespace(devices=np.array([device]), size=1)
    chosen = choose(SMALL, mesh)
    cache = chosen.new_cache(2, length)
    assert type(cache) is KVCache and cache.block_length == block_length
    assert length <= cache.length < length + 8 * 3
    assert choose(SMALL).new_cache(2, length).block_length == 32
    assert chosen.attention == "XLA (our kernels are for TPUs and CPUs, not gpu)"
