"""Our own export forms: `config.json` with a schema number, and safetensors or Orbax arrays.

The shared block is stored once, and the LoRA factors of a projection lie stacked by loop.
docs/format.md is the specification, with a reader that needs NumPy only.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches numpy bfloat16, which safetensors then reads)
import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights import hf_files, names

MODEL_TYPE = "recursive_jax"
SCHEMA = 1
FORMS = ("recursive", "orbax")
PARAMS = "params"  # directory of the Orbax arrays
TOKENIZER = "tokenizer"
CERTIFICATE = "certificate.json"
_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def save(
    params: Mapping[str, Any],
    cfg: DecoderConfig,
    path: str | os.PathLike,
    form: str,
    dtype: np.dtype,
    max_shard_bytes: int = 5 * 10**9,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and the arrays into an empty or new directory.

    Args:
      params: nested or flat.
      cfg: their config.
      path: the directory.
      form: 'recursive' (safetensors) or 'orbax'.
      dtype: of the stored arrays.
      max_shard_bytes: of a safetensors file.
      facts: JSON: further keys of config.json.

    Raises:
      ValueError: a value is no finite number in `dtype`.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    flat = names.flat(params)
    arrays = ((name, _cast(name, flat[name], dtype)) for name in names.shapes(cfg))
    if form == "recursive":
        dotted = ((name.replace("/", "."), x) for name, x in arrays)
        hf_files.write(path, dotted, max_shard_bytes)
    else:
        import orbax.checkpoint as ocp

        # The layout that both of Orbax's interfaces read. Of NumPy arrays it would record the type.
        host = host_sharding()
        tree = {name: jax.device_put(x, host) for name, x in arrays}
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(path.resolve() / PARAMS, names.nested(tree))
        checkpointer.wait_until_finished()
        checkpointer.close()
    record = {
        "model_type": MODEL_TYPE,
        "schema": SCHEMA,
        "form": form,
        "dtype": np.dtype(dtype).name,
        "decoder": cfg.to_json(),
        **(facts or {}),
    }
    (path / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _cast(name: str, x: Any, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity, found next
        return names.check_finite(f"parameter {name}", np.asarray(x).astype(dtype, copy=False))


def is_ours(path: str | os.PathLike) -> bool:
    """Whether a directory is an export of ours, of this or another version."""
    file = pathlib.Path(path) / "config.json"
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.get("model_type") == MODEL_TYPE


def load_config(path: str | os.PathLike) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder config of an export, and the other keys of its config.json.

    Raises:
      ValueError: another version wrote it, or it is damaged.
    """
    file = pathlib.Path(path) / "config.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    if record.get("schema") != SCHEMA or record.get("form") not in FORMS:
        raise ValueError(
            f"{file} has schema {record.get('schema')!r} and form {record.get('form')!r}; this "
            f"version reads schema {SCHEMA} and the forms {', '.join(FORMS)}"
        )
    try:
        cfg = DecoderConfig.from_json(record.pop("decoder"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from error
    return cfg, record


def open_params(path: str | os.PathLike, cfg: DecoderConfig, form: str) -> Arrays:
    """The parameters of an export as a flat lazy mapping; names, types and shapes are checked.

    Raises:
      ValueError: tensors are missing, left over, misshapen or of another type.
      FileNotFoundError: there are no arrays.
    """
    path = pathlib.Path(path)
    found, read = _of_safetensors(path) if form == "recursive" else _of_orbax(path)
    rows = [names.Row(name, name, names.AS_IS) for name in names.shapes(cfg)]
    names.audit(rows, names.shapes(cfg), found, str(path))
    return Arrays(list(names.shapes(cfg)), read, str(path))


class Arrays(Mapping):
    """A flat mapping of stored parameters with the methods of `names.LazyParams`."""

    def __init__(
        self,
        paths: Sequence[str],
        read: Callable[[str, Sequence[int] | None], np.ndarray],
        where: str,
    ):
        """A mapping that has read nothing yet. `read`: path, layers or None for all -> array."""
        self._paths, self._read, self._where = list(paths), read, where

    def __getitem__(self, path: str) -> np.ndarray:
        if path not in self._paths:
            raise KeyError(path)
        return self._checked(path, self._read(path, None))

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def num_tensors(self) -> int:
        return len(self._paths)

    def layers(self, path: str, depths: Sequence[int]) -> np.ndarray:
        """`self[path][depths]`; of safetensors the other layers are not read."""
        return self._checked(path, self._read(path, list(depths)))

    def _checked(self, path: str, x: np.ndarray) -> np.ndarray:
        try:
            return names.check_finite(path, x)
        except ValueError as error:
            raise ValueError(f"{self._where} may be damaged: {error}") from error


def _of_safetensors(path: pathlib.Path):
    handles = hf_files.open_files(path)
    slices = {
        name.replace(".", "/"): handle.get_slice(name)
        for handle in handles.values()
        for name in handle.keys()
    }
    odd = [f"{n} ({s.get_dtype()})" for n, s in slices.items() if s.get_dtype() not in _TYPES]
    if odd:
        raise ValueError(
            f"{path}: tensors of other types: {', '.join(odd[:6])}; expected {', '.join(_TYPES)}"
        )

    def read(name, layers):
        tensor = slices[name]
        if layers is None:
            return tensor[:]
        return np.stack([tensor[layer] for layer in layers])

    return {name: tuple(s.get_shape()) for name, s in slices.items()}, read


def _of_orbax(path: pathlib.Path):
    from orbax.checkpoint import v1 as ocp

    directory = str((path / PARAMS).resolve())
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"no directory {PARAMS} in {path}; copy the export again, whole")
    try:
        described = names.flat(ocp.metadata(directory).metadata)
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise ValueError(f"{directory} is damaged ({error}); copy it again") from error

    @functools.cache
    def whole():
        """All arrays on the host; Orbax reads a tree in one go."""
        host = host_sharding()
        like = {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host) for n, x in described.items()
        }
        return names.flat(jax.tree.map(np.asarray, ocp.load(directory, names.nested(like))))

    def read(name, layers):
        return whole()[name] if layers is None else whole()[name][layers]

    return {name: tuple(x.shape) for name, x in described.items()}, read


def host_sharding() -> jax.sharding.Sharding:
    """The memory of the host; that of the default device where JAX has no CPU backend."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)
