"""Meshes, and the table that maps the model's logical axis names to mesh axes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
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
    ("lora_mlp", ("tensor", "fsdp")),
    ("lora_heads", ("tensor", "fsdp")),
    ("lora_kv_heads", ("tensor", "fsdp")),
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

    `fsdp` 0 is automatic: the chips of a TPU slice, so that `data` is the slices; elsewhere 1. With
    several slices, the slices are along `data`: only sums of gradients cross the slower network.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or cut a slice.
    """
    everything = devices is None or len(devices) == len(jax.devices())
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if fsdp == 0:
        fsdp = _automatic_fsdp(data, tensor, len(devices) // slices, devices[0].platform)
    sizes = [data, fsdp, tensor]
    asked = dict(zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(f"mesh {asked}: sizes are positive, and at most one is -1")
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known:
        raise ValueError(
            f"mesh {asked} does not divide the {len(devices)} devices there are{by_host(devices)}"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {asked} uses {math.prod(sizes)} of {len(devices)} devices{by_host(devices)}; "
            "set one of the sizes to -1 to use what is left"
        )
    if sizes[0] % slices:
        raise ValueError(f"mesh {asked} cuts a slice: data must be a multiple of {slices} slices")
    if everything or devices[0].platform == "tpu":
        placed = _by_network(sizes, devices, slices)
    else:
        placed = np.asarray(devices).reshape(sizes)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _automatic_fsdp(data: int, tensor: int, chips: int, platform: str) -> int:
    """`chips`: of a slice."""
    if platform != "tpu":
        return 1
    return chips // tensor if data == -1 and tensor > 0 and chips % tensor == 0 else -1


def _by_network(sizes: Sequence[int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """Devices `[data, fsdp, tensor]`, so that neighbours on an axis are neighbours in the network.

    Where fsdp is a whole slice, it walks the axes of the slice one inside the other; see `rings`.
    """
    data, fsdp, tensor = sizes
    if devices[0].platform == "tpu" and fsdp * slices == len(devices):
        by_place = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), *_place(d)))
        return np.array(by_place).reshape(sizes)
    inner = (data // slices, fsdp, tensor)
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices)
    return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)


def rings(mesh: Mesh) -> tuple[int, ...]:
    """Sizes of the physical rings that the mesh axis fsdp walks, the outermost first.

    A collective over several rings is best done ring by ring: TPU's compiler makes a reduction over
    an axis that spans two of them an all-reduce of the whole, which is twice the bytes.
    """
    line = mesh.devices[0, :, 0]
    if not hasattr(line[0], "coords"):
        return (len(line),)
    places = np.array([_place(d) for d in line])
    moving = [x for x in places.T if len(set(x)) > 1]
    moving.sort(key=lambda x: -np.argmax(x != x[0]))  # what changes first is innermost
    steps = [tuple(dict.fromkeys(x)) for x in moving]
    regular = list(itertools.product(*steps)) == list(zip(*moving, strict=True))
    return tuple(len(x) for x in steps) if regular and moving else (len(line),)


def _place(device: Any) -> tuple[int, ...]:
    """Of a TPU in the network of its slice."""
    return *device.coords, getattr(device, "core_on_chip", 0)


def rules_for(mesh: Mesh, cfg) -> tuple[tuple[str, Any], ...]:
    """RULES for a `DecoderConfig`; a dimension that does not divide is not sharded (logged)."""
    sizes = {
        "mlp": cfg.mlp_dim,
        "heads": cfg.num_heads,
        "kv_heads": cfg.num_kv_heads,
        "vocab": cfg.vocab_size,
        "embed": cfg.embed_dim,
    }
    wide = {
        "lora_mlp": ("mlp", cfg.mlp_dim),
        "lora_heads": ("heads", cfg.num_heads * cfg.head_dim),
        "lora_kv_heads": ("kv_heads", cfg.num_kv_heads * cfg.head_dim),
    }
    rules: dict[str, Any] = {}
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
        if name in wide:  # as the axis of the weight, and further if it divides
            base, size = wide[name]
            further = tuple(a for a in axis if a == rules[base] or a != "tensor")
            divides = size % math.prod(mesh.shape[a] for a in further) == 0
            axis = further if divides else rules[base]
        rules[name] = axis
    return tuple(rules.items())


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


def by_host(devices: Iterable[Any]) -> str:
    """How many of the devices each host has, such as ' (4 on process 0 of 2 (a), 2 on …)'.

    Empty for one process.
    """
    if jax.process_count() == 1:
        return ""
    found: dict[int, list[int]] = {}
    for process, count in sorted(Counter(d.process_index for d in devices).items()):
        found.setdefault(count, []).append(process)
    each = {count: " each" if len(who) > 1 else "" for count, who in found.items()}
    parts = [f"{n}{each[n]} on {hosts.names_of(who)}" for n, who in found.items()]
    return f" ({', '.join(parts)})"


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
            f"the batch{by_host(mesh.devices.flat)}; mesh.tensor may be at most the devices of a "
            f"host ({jax.local_device_count()}), and data × fsdp a multiple of the processes"
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
