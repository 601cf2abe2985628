"""Attention of a batch of whole sequences: by XLA, or by the kernels of an accelerator.

The kernels keep no scores `[B, N, T, T]` in memory. `choose` names the one for a device. Each gives
what `attention.attend` gives.

Axes: B batch, T length, N query heads, K kv heads, G = N/K, H head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from recursive_jax.models.config import DecoderConfig

KERNELS = ("xla", "splash", "cudnn")
BLOCKS = (512, 256, 128)  # positions that the splash kernel holds at once; fewer are slower
HOPPER = 9.0  # compute capability from which cuDNN takes a head_dim above 128


def choose(
    cfg: DecoderConfig, device: Any, dtype: Any, length: int, head_shards: int = 1
) -> tuple[str, str]:
    """One of `KERNELS` for training, and it in words, with the reason where it is not the fastest.

    Args:
      cfg: of the model.
      device: that it runs on.
      dtype: of queries, keys and values.
      length: of a row.
      head_shards: devices that the heads are split over.
    """
    platform = device.platform
    if platform == "tpu":
        why = _splash_lacks(cfg, length, head_shards)
        return (
            ("xla", f"XLA; the splash kernel lacks {why}") if why else ("splash", "splash kernel")
        )
    if platform in ("gpu", "cuda", "rocm"):
        why = _cudnn_lacks(cfg, device, dtype, length)
        return ("xla", f"XLA; cuDNN lacks {why}") if why else ("cudnn", "cuDNN")
    return "xla", "XLA"


def _splash_lacks(cfg: DecoderConfig, length: int, head_shards: int) -> str | None:
    if length % BLOCKS[-1]:
        return f"rows of {length} tokens: a multiple of {BLOCKS[-1]} is needed"
    if cfg.head_dim % 64:
        return f"head_dim={cfg.head_dim}: a multiple of 64 is needed"
    if cfg.num_heads % head_shards or (cfg.num_kv_heads > 1 and cfg.num_kv_heads % head_shards):
        return f"{cfg.num_kv_heads} kv heads over {head_shards} devices"
    return None


def _cudnn_lacks(cfg: DecoderConfig, device: Any, dtype: Any, length: int) -> str | None:
    if device.platform == "rocm" or "NVIDIA" not in device.device_kind:
        return f"a {device.device_kind}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"{jnp.dtype(dtype).name}"
    if cfg.attn_softcap is not None:
        return "a softcap"
    most = 256 if float(getattr(device, "compute_capability", 0)) >= HOPPER else 128
    if cfg.head_dim > most or cfg.head_dim % 8:
        return f"head_dim={cfg.head_dim}"
    return f"an odd length, {length}" if length % 2 else None


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: jax.Array | None,
    windows: Sequence[int],
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention by the TPU's splash kernel (`jax.experimental.pallas.ops.tpu`).

    A token sees earlier places of its row, so positions must rise within a segment. The kernel's
    mask is static: there is one kernel for each window, and `window` chooses.

    Args:
      q: `[B, T, N, H]`; k, v: `[B, T, K, H]`. T is a multiple of 128.
      segment_ids: int32 `[B, T]`.
      window: int32 `[]`, one of `windows`; None: the only one.
      windows: the different ones; 0 = unlimited.
      scale, softcap: of the scores.
      interpret: run the kernel's steps by XLA, on any device.
    """
    kernels = [_kernel(q.shape, k.shape, w, softcap, interpret) for w in windows]

    def run(kernel, q, k, v, segment_ids):
        batch, length, _, head_dim = q.shape
        by_kv_head = (q * scale).transpose(0, 2, 1, 3)
        by_kv_head = by_kv_head.reshape(batch, k.shape[2], -1, length, head_dim)
        heads = jax.vmap(kernel, (0, 0, 0, None))
        y = jax.vmap(heads)(
            by_kv_head, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), segment_ids
        )
        return y.reshape(batch, -1, length, head_dim).transpose(0, 2, 1, 3)

    def chosen(q, k, v, segment_ids, window):
        if segment_ids is not None:
            from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

            segment_ids = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
        branches = [functools.partial(run, kernel) for kernel in kernels]
        if len(branches) == 1:
            return branches[0](q, k, v, segment_ids)
        index = jnp.argmax(jnp.asarray(windows) == window)
        return jax.lax.switch(index, branches, q, k, v, segment_ids)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return chosen(q, k, v, segment_ids, window)
    # The compiler does not partition a kernel: rows and heads are split here, by the axis rules.
    rows, heads, kv_heads = (
        nn.logical_to_mesh_axes((name,))[0] for name in ("batch", "heads", "kv_heads")
    )
    whole = PartitionSpec()
    return jax.shard_map(
        chosen,
        in_specs=(
            PartitionSpec(rows, None, heads),
            PartitionSpec(rows, None, kv_heads),
            PartitionSpec(rows, None, kv_heads),
            PartitionSpec(rows) if segment_ids is not None else None,
            whole if window is not None else None,
        ),
        out_specs=PartitionSpec(rows, None, heads),
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )(q, k, v, segment_ids, window)


def _kernel(shape, kv_shape, window: int, softcap: float | None, interpret: bool):
    """The splash kernel of the G query heads of one kv head."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, group = shape[1], shape[2] // kv_shape[2]
    block = next(n for n in BLOCKS if length % n == 0)
    causal = masks.CausalMask((length, length))
    mask = masks.LocalMask((length, length), (window - 1, 0), 0) if window else causal
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return library.make_splash_mqa_single_device(
        mask=masks.MultiHeadMask([mask] * group),
        block_sizes=library.BlockSizes(**{f"block_{name}": block for name in names}),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def cudnn(q, k, v, mask, scale: float, implementation: str = "cudnn") -> jax.Array:
    """Attention by cuDNN; arguments as `attention.attend`, without softcap."""
    options = dict(scale=scale, implementation=implementation)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], **options)


def distinct_windows(cfg: DecoderConfig) -> list[int]:
    """The windows of a model's layers, each once; 0 = unlimited."""
    table = cfg.window_table()
    return [0] if table is None else np.unique(table).tolist()
