"""Checkpoint directories: Orbax arrays with their config, tokenizer, certificate and checksums.

    DIR/config.json          format, decoder config, source, tying, versions
    DIR/tokenizer/           Hugging Face tokenizer files
    DIR/certificate.json     what the conversion preserved (converted models)
    DIR/checkpoints/STEP/    Orbax: params, and opt_state when training can resume from it

Orbax commits a step whole or not at all, and reports missing and truncated files. It does not
notice a flipped bit. Every step therefore has a checksum per array, and config.json has checksums
of itself and of every tokenizer file. They are verified on load.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import tempfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params

FORMAT = 1
CONFIG = "config.json"
CERTIFICATE = "certificate.json"
STEPS = "checkpoints"
PIECE_BYTES = 64 << 20  # a checksum reads an array in pieces of this size


def write_json(path: pathlib.Path, data: Any) -> None:
    """Write `data` to a JSON file, whole or not at all."""
    text = json.dumps(data, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as f:
        f.write(text)
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def create(
    directory: str | os.PathLike,
    cfg: DecoderConfig,
    tokenizer: Any = None,
    **facts: Any,
) -> None:
    """Start a checkpoint directory: write its config.json and tokenizer.

    `facts` (source, tying, ...) must be JSON; `load_config` returns them.
    """
    directory = pathlib.Path(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory / "tokenizer"))
    import flax

    from recursive_jax import __version__

    versions = {"recursive_jax": __version__, "jax": jax.__version__, "flax": flax.__version__}
    record = {"format": FORMAT, "decoder": cfg.to_json(), "versions": versions, **facts}
    record["files"] = {
        str(file.relative_to(directory)): zlib.crc32(file.read_bytes())
        for file in sorted((directory / "tokenizer").glob("*"))
    }
    record = json.loads(json.dumps(record))  # the checksum is of the record as it is read back
    write_json(directory / CONFIG, record | {"checksum": _json_checksum(record)})


def local(directory: str | os.PathLike) -> pathlib.Path:
    """The path of a directory on this machine; ValueError for a URL, which pathlib would accept."""
    if "://" in str(directory):
        raise ValueError(
            f"{directory} is a URL, and checkpoints are files; mount it (a bucket with gcsfuse) "
            "and give the path. Several hosts need one that all of them see"
        )
    return pathlib.Path(directory)


def is_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether `directory` was made by `create` (it may have no step yet)."""
    directory = pathlib.Path(directory)
    return (directory / CONFIG).is_file() and (directory / STEPS).is_dir()


def load_config(directory: str | os.PathLike) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder config of a checkpoint, and the facts that `create` stored with it.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it is damaged, or another version wrote it.
    """
    path = local(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint in {directory} (expected {CONFIG}); create one with "
            "python -m recursive_jax.convert --source=MODEL --out=DIR"
        )
    try:
        record = json.loads(path.read_text())
        written_as = record.get("format")
        decoder = record.pop("decoder") if written_as == FORMAT else None
        cfg = None if decoder is None else DecoderConfig.from_json(decoder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error
    if cfg is None:
        raise ValueError(
            f"{path} has format {written_as}, this version reads {FORMAT}; "
            "if it is a Hugging Face model, give it as --source to convert"
        )
    expected = record.pop("checksum", None)  # the oldest checkpoints have none
    if expected is not None:
        whole = record | {"decoder": decoder}
        _verify(path, _json_checksum(whole) == expected)
        for name, checksum in record.pop("files").items():
            file = path.parent / name
            _verify(file, file.is_file() and zlib.crc32(file.read_bytes()) == checksum)
    return cfg, record


def _verify(file: pathlib.Path, same: bool) -> None:
    if not same:
        raise ValueError(
            f"{file} is damaged: it is not the file that was written with this checkpoint "
            "(checksums differ). Restore it from a copy, or convert again"
        )


def checksums(tree: Any) -> dict[str, int]:
    """A number per array that changes with any flipped bit and does not depend on the sharding.

    Σ bits·(2·index + 1) mod 2³². The factor is odd, so every single-bit change changes the sum.
    """
    return {
        jax.tree_util.keystr(path): _checksum(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _checksum(x: jax.Array | np.ndarray) -> int:
    x = x if np.ndim(x) else x.reshape(1)  # `jnp.atleast_1d` would copy an array that has an axis
    rows, here = len(x), isinstance(x, np.ndarray)
    if here or len(x.sharding.device_set) == 1:
        # In pieces: the integers of an array take as much memory as the array.
        rows = max(1, PIECE_BYTES * rows // max(x.nbytes, 1))
    total = 0
    for start in range(0, len(x), rows):
        size = min(rows, len(x) - start)
        piece = x[start : start + size] if here else _rows(x, start, size)
        total += int(_sum(piece, start))
    return total % 2**32


def _rows(x, start, size):
    # A static slice would be compiled anew for every start.
    return x if size == len(x) else jax.lax.dynamic_slice_in_dim(x, start, size)


@jax.jit
def _sum(x: jax.Array, start: int) -> jax.Array:
    """The part of an array's checksum that its rows x, from row `start` on, contribute."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    weight = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):  # the row-major index, modulo 2³²
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        iota = iota if axis else iota + start.astype(jnp.uint32)
        weight = weight * jnp.uint32(x.shape[axis]) + iota
    return (bits * (2 * weight + 1)).sum(dtype=jnp.uint32)


def _json_checksum(data: Any) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


class Writer:
    """Saves steps asynchronously and keeps the latest `keep` of them."""

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        from orbax.checkpoint import v1 as ocp

        self._manager = ocp.training.Checkpointer(
            str(pathlib.Path(directory).resolve() / STEPS),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        # zstd needs a copy of each array and shortens float32 weights by only a twelfth.
        self._context = ocp.Context()
        self._context.array.saving.use_compression = False
        self._pending = None

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any = None,
        progress: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        """Write a step; the arrays may be donated when this returns. `progress` is JSON."""
        self.wait()
        arrays = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
        if jax.default_backend() == "cpu" and not wait:
            # A host "copy" may alias the device buffer, which the next step donates.
            arrays = jax.tree.map(jnp.copy, arrays)
        progress = json.loads(json.dumps(dict(progress or {})))  # a copy: the caller's may change
        sums = checksums(arrays) | {"progress": _json_checksum(progress)}
        metadata = {"checksums": sums, "progress": progress}
        with self._context:
            self._pending = self._manager.save_checkpointables_async(
                step, arrays, force=True, overwrite=True, custom_metadata=metadata
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Block until the pending save is on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        self.wait()
        self._manager.close()


def latest_step(directory: str | os.PathLike) -> int | None:
    """The newest complete step, None when there is none."""
    steps = pathlib.Path(directory) / STEPS
    if not steps.is_dir():
        return None
    found = [int(p.name) for p in steps.iterdir() if p.name.isdigit() and any(p.iterdir())]
    return max(found, default=None)


def restore(
    directory: str | os.PathLike,
    abstract: Mapping[str, Any],
    step: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Arrays of a step in the given shapes, dtypes and shardings, with their checksums verified.

    Args:
      directory: of the checkpoint.
      abstract: `params` and optionally `opt_state`: trees of `jax.ShapeDtypeStruct`. Arrays stored
        in another dtype are converted after the check.
      step: None for the latest.

    Returns:
      The arrays, the `progress` that was saved with them, and the step.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: it is damaged, or has other shapes.
    """
    from orbax.checkpoint import v1 as ocp

    path, step = _step(directory, step)
    metadata = _metadata(path)
    try:
        stored = jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=_sharding(x))
                if x.dtype == jnp.bfloat16
                else x
            ),
            abstract,
        )
        arrays = ocp.load_checkpointables(str(path), dict(stored))
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds
        if "RESOURCE_EXHAUSTED" in str(error):  # not a sign of damage
            raise ValueError(f"checkpoint {path} does not fit into memory: {error}") from error
        raise _unreadable(path, error) from error
    expected, progress = metadata["checksums"], metadata["progress"]
    found = checksums(arrays)
    if "progress" in expected:  # the oldest checkpoints have no checksum of it
        found["progress"] = _json_checksum(progress)
    broken = [name for name, value in found.items() if expected.get(name) != value]
    if broken:
        raise ValueError(
            f"checkpoint {path} is corrupt: checksums differ for {broken[:3]}"
            f"{' …' if len(broken) > 3 else ''}. {_WAY_OUT}"
        )
    arrays = jax.tree.map(lambda x, want: x.astype(want.dtype), arrays, dict(abstract))
    logging.info("restored step %d of %s", step, directory)
    return arrays, progress, step


_WAY_OUT = "Remove its directory to use the step saved before it, or convert again"


def load_progress(directory: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """The `progress` that was saved with a step (None: the latest); no array is read.

    Raises:
      FileNotFoundError, ValueError: as in `restore`.
    """
    return _metadata(_step(directory, step)[0])["progress"]


def _step(directory: str | os.PathLike, step: int | None) -> tuple[pathlib.Path, int]:
    """Directory and number of a step."""
    directory = pathlib.Path(directory)
    step = latest_step(directory) if step is None else step
    path = directory.resolve() / STEPS / str(step)
    if step is None or not path.is_dir():
        raise FileNotFoundError(
            f"no saved step {'' if step is None else step} in {directory / STEPS}; "
            "a run that was interrupted before its first save has to start again"
        )
    return path, step


def _metadata(path: pathlib.Path) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    try:
        metadata = ocp.checkpointables_metadata(str(path)).custom_metadata or {}
        if not {"checksums", "progress"} <= set(metadata):
            raise ValueError("its metadata holds no checksums")
    except PermissionError:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise _unreadable(path, error) from error
    return metadata


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return ValueError(
        f"checkpoint {path} cannot be read ({reason[:300]}); it is damaged or of another "
        f"model. {_WAY_OUT}"
    )


def _sharding(x):
    return getattr(x, "sharding", None)


def load_params(
    directory: str | os.PathLike,
    shardings: Any = None,
    dtype: Any = jnp.float32,
    step: int | None = None,
) -> tuple[Any, DecoderConfig]:
    """Params and config of a checkpoint, on one device or in `shardings`; nothing else is read."""
    cfg, _ = load_config(directory)
    abstract = abstract_params(cfg)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), abstract, shardings
    )
    arrays, _, _ = restore(directory, {"params": abstract}, step)
    return arrays["params"], cfg


def as_numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)
