"""Meshes, and the table that maps the model's logical axis names to mesh axes."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recursive_jax import hosts

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes; None: not sharded.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("seq", None),
    ("embed_activation", None),
    ("embed", "fsdp"),
    ("embed_vector", None),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("vocab", "tensor"),
    ("rank", None),
    ("layer", None),
    ("loop", None),
    ("prefix", None),
    ("gate", None),
)


def compute_dtype(name: str) -> np.dtype:
    """The compute dtype called `name`; 'auto' is float32 on a CPU, else bfloat16.

    Raises:
      ValueError: `name` is not one of auto, float32, bfloat16.
    """
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={name!r}; expected auto, float32 or bfloat16")
    return jax.numpy.dtype(name)


def matmul_precision(dtype: Any) -> contextlib.AbstractContextManager:
    """A context in which float32 is multiplied in full float32.

    By default TPUs, and GPUs with TF32, round the factors. Other dtypes keep the default.
    """
    if jax.numpy.dtype(dtype) == np.float32 and jax.default_backend() != "cpu":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A `(data, fsdp, tensor)` mesh over all devices; one size may be -1 (the devices left).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    asked = dict(zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(f"mesh {asked}: sizes are positive, and at most one is -1")
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known:
        raise ValueError(f"mesh {asked} does not divide the {len(devices)} devices there are")
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {asked} uses {math.prod(sizes)} of {len(devices)} devices; "
            "set one of the sizes to -1 to use what is left"
        )
    if len(devices) == len(jax.devices()):
        return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def rules_for(mesh: Mesh, cfg) -> tuple[tuple[str, Any], ...]:
    """RULES for a `DecoderConfig`; a dimension that does not divide is not sharded (logged)."""
    sizes = {
        "mlp": cfg.mlp_dim,
        "heads": cfg.num_heads,
        "kv_heads": cfg.num_kv_heads,
        "vocab": cfg.vocab_size,
        "embed": cfg.embed_dim,
    }
    rules = []
    for name, axis in RULES:
        if axis is not None and name in sizes and sizes[name] % mesh.shape[axis]:
            logging.warning(
                "%s=%d is not divisible by mesh axis %s=%d: replicated",
                name,
                sizes[name],
                axis,
                mesh.shape[axis],
            )
            axis = None
        rules.append((name, axis))
    return tuple(rules)


def shardings(logical_axes: Any, mesh: Mesh, rules=RULES) -> Any:
    """NamedSharding for every leaf of a tree of logical PartitionSpecs."""
    return nn.logical_to_mesh_sharding(logical_axes, mesh, rules)


@contextlib.contextmanager
def use(mesh: Mesh, rules) -> Iterator[None]:
    """A context in which a jitted call traces the model's constraints on activations for this mesh.

    Without mesh and rules, `nn.with_logical_constraint` silently does nothing.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def data_shards(mesh: Mesh) -> int:
    """Number of devices that a batch is spread over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def state_shardings(abstract_state: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a train state: optimizer moments are sharded like their parameters.

    The path of a moment ends in the path of its parameter. All other leaves are replicated, such as
    the factors of second moments, which have fewer axes than their parameter.
    """
    by_path = {
        tuple(k.key for k in path): s
        for path, s in jax.tree_util.tree_leaves_with_path(param_shardings)
    }

    def find(path, leaf):
        keys = tuple(k.key for k in path if hasattr(k, "key"))
        for start in range(len(keys)):
            if keys[start:] in by_path and leaf.ndim >= len(by_path[keys[start:]].spec):
                return by_path[keys[start:]]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, abstract_state)


def check_batch_is_local(mesh: Mesh) -> None:
    """ValueError for a mesh on which two processes share rows of the batch.

    Every process reads its own rows. Devices that share rows must therefore be on one host.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(data_shards(mesh), -1)  # [shard, tensor]
    counts = np.bincount(owners[:, 0], minlength=jax.process_count())
    if (owners != owners[:, :1]).any() or (counts != counts[0]).any():
        sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"mesh {sizes} over {jax.process_count()} processes makes some of them share rows of "
            f"the batch; mesh.tensor may be at most the devices of a host "
            f"({jax.local_device_count()}), and data × fsdp a multiple of the processes"
        )


def put_global(tree: Any, sharding: Any) -> Any:
    """Global arrays from host arrays that every process has whole; `sharding`: one, or a tree."""

    def put(x, s):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, s, lambda index: x[index])

    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda x: put(x, sharding), tree)
    return jax.tree.map(put, tree, sharding)


def check_agreement(what: str, value: int) -> None:
    """ValueError on every process unless `value` is the same on all processes."""
    hosts.agree({what: value}, what)


def put_local_batch(batch: Any, mesh: Mesh) -> Any:
    """The global batch over the mesh, from this process's rows of it."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
