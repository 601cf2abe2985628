"""The most likely token of each row of logits, on one CPU.

`kernels/top1.cc` finds token, logit and logsumexp in one pass over the logits, by all threads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recursive_jax.cpu import build
from recursive_jax.models import scanned


def top1(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`interface.DecodeModel.top1` of logits f32 `[R, V]`: by the kernel, or by XLA without it."""
    if not build.has("Top1"):
        return scanned.top1(logits)

    def result(dtype):
        return jax.ShapeDtypeStruct(logits.shape[:1], dtype)

    results = result(jnp.float32), result(jnp.int32), result(jnp.float32)
    logit, token, logsumexp = build.call("Top1", results)(logits)
    return token, logit, logsumexp
