"""Kernels of accelerators give what `attend` gives, and gradients; one function chooses."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax import sharding
from recursive_jax.models.attention import attend, attention_mask
from recursive_jax.models.batch_attention import choose, cudnn, distinct_windows, splash
from recursive_jax.models.config import DecoderConfig

ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 256, 4, 2, 64
SCALE = HEAD_DIM**-0.5


def inputs():
    """q, k, v, and positions and ids of two packed documents a row."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((ROWS, LENGTH, heads, HEAD_DIM)).astype(np.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    place = np.arange(LENGTH, dtype=np.int32)
    cut = np.array([[70], [201]], np.int32)
    segments = np.where(place < cut, 1, 2).astype(np.int32)
    return q, k, v, np.where(place < cut, place, place - cut), segments


def result_and_gradients(attention, *arrays):
    """The attention, and the gradient of a weighted sum of it."""
    weights = np.random.default_rng(1).standard_normal((ROWS, LENGTH, HEADS, HEAD_DIM))

    def value(*arrays):
        y = attention(*arrays)
        return (y * weights.astype(np.float32)).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(*arrays)
    return y, *grads


def assert_same(got, want):
    for x, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(x, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("windows", "softcap"), [((0, 90), 5.0), ((0,), None)])
def test_splash_attends_as_attend(windows, softcap):
    """The window is data, as of a scanned layer: each of them has its kernel."""
    *qkv, positions, segments = inputs()
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    rules = (("batch", ("data", "fsdp")), ("heads", "tensor"), ("kv_heads", "tensor"))
    for window in windows:
        data = None if len(windows) == 1 else jnp.int32(window)

        def reference(q, k, v, window=window):
            mask = attention_mask(positions, positions, segments, window)
            return attend(q, k, v, mask, SCALE, softcap)

        def kernel(q, k, v, data=data):
            return splash(q, k, v, segments, data, windows, SCALE, softcap, interpret=True)

        want = result_and_gradients(reference, *qkv)
        assert_same(result_and_gradients(kernel, *qkv), want)
    with sharding.use(mesh, rules):  # rows and heads are split by hand
        assert_same(result_and_gradients(kernel, *qkv), want)


def test_dot_product_attention_attends_as_attend():
    *qkv, positions, segments = inputs()
    mask = attention_mask(positions, positions, segments, 90)
    want = result_and_gradients(lambda *x: attend(*x, mask, SCALE, None), *qkv)
    assert_same(result_and_gradients(lambda *x: cudnn(*x, mask, SCALE, "xla"), *qkv), want)


GEMMA = DecoderConfig(
    "gemma", 64, 256, 64, num_heads=8, num_kv_heads=1, head_dim=256, num_layers=4,
    windows=(16, 0, 16, 0),
)  # fmt: skip


def test_one_function_chooses():
    cpu, tpu, h100, a100 = (
        types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
        for platform, kind, capability in (
            ("cpu", "cpu", None), ("tpu", "TPU v5 lite", None), ("gpu", "NVIDIA H100", "9.0"),
            ("gpu", "NVIDIA A100", "8.0"),
        )
    )  # fmt: skip
    bf16, f32 = jnp.bfloat16, jnp.float32
    softcap = GEMMA.replace(attn_softcap=50.0)
    assert choose(GEMMA, cpu, f32, 256) == ("xla", "XLA")
    assert choose(softcap, tpu, bf16, 256, 2)[0] == "splash"
    assert choose(GEMMA, h100, bf16, 256)[0] == "cudnn"
    for cfg, device, dtype, length, reason in (
        (GEMMA, tpu, bf16, 200, "rows of 200 tokens"),
        (GEMMA.replace(head_dim=96), tpu, bf16, 256, "head_dim=96"),
        (GEMMA, a100, bf16, 256, "head_dim=256"),
        (softcap, h100, bf16, 256, "a softcap"),
        (GEMMA, h100, f32, 256, "float32"),
    ):
        name, words = choose(cfg, device, dtype, length)
        assert name == "xla" and reason in words
    assert "2 kv heads" in choose(GEMMA.replace(num_kv_heads=2), tpu, bf16, 256, 4)[1]
    assert distinct_windows(GEMMA) == [0, 16] and distinct_windows(GEMMA.replace(windows=())) == [0]
