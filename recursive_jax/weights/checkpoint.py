"""Checkpoint directories: Orbax arrays with their config, tokenizer, certificate and checksums.

    DIR/config.json          format, decoder config, source, tying, versions
    DIR/tokenizer/           Hugging Face tokenizer files
    DIR/certificate.json     what the conversion preserved (converted models)
    DIR/checkpoints/STEP/    Orbax: params, and opt_state when training can resume from it

Orbax commits a step whole or not at all. It does not notice a flipped bit. Every step therefore has
a checksum per array, and config.json has checksums of itself and of every tokenizer file. They are
verified on load. The metadata of a step also holds a copy of config.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import files, paths
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params
from recursive_jax.weights.integrity import checksums, json_checksum
from recursive_jax.weights.steps import (
    CONFIG,
    STEPS,
    Say,
    config_copy,
    latest_step,
    load_progress,
    params_checksum,
    restore,
    saved_steps,
    weights_of,
)
from recursive_jax.weights.writer import Writer

__all__ = [
    "CERTIFICATE",
    "CONFIG",
    "STEPS",
    "Writer",
    "as_numpy",
    "check_ours",
    "checksums",
    "create",
    "is_checkpoint",
    "latest_step",
    "load_certificate",
    "load_config",
    "load_params",
    "load_progress",
    "load_step",
    "local",
    "params_checksum",
    "restore",
    "saved_steps",
    "weights_of",
    "write_json",
]

FORMAT = 1
CERTIFICATE = "certificate.json"
TOKENIZER = "tokenizer"


def write_json(path: Any, data: Any) -> None:
    """Write `data` to a JSON file, whole or not at all. An OSError names `path`."""
    paths.write_whole(path, json.dumps(data, indent=1) + "\n")


def create(
    directory: str | os.PathLike,
    cfg: DecoderConfig,
    tokenizer: Any = None,
    **facts: Any,
) -> None:
    """Start a checkpoint directory: write its config.json and tokenizer.

    `facts` (source, tying, ...) must be JSON; `load_config` returns them. An older tokenizer is
    replaced without being read.
    """
    directory = paths.path_of(directory)
    if tokenizer is not None:
        _write_tokenizer(directory, tokenizer)
    import flax

    from recursive_jax import __version__

    versions = {"recursive_jax": __version__, "jax": jax.__version__, "flax": flax.__version__}
    record = {"format": FORMAT, "decoder": cfg.to_json(), "versions": versions, **facts}
    record["files"] = {
        f"{TOKENIZER}/{name}": paths.crc32(file)
        for name, file in paths.files_below(directory / TOKENIZER)
    }
    record = json.loads(json.dumps(record))  # the checksum is of the record as it is read back
    write_json(directory / CONFIG, record | {"checksum": json_checksum(record)})


def _write_tokenizer(directory: Any, tokenizer: Any) -> None:
    """Write the tokenizer's files, all or none; in a bucket one after the other."""
    place, prefix = directory / TOKENIZER, f".{TOKENIZER}-"
    if paths.is_remote(directory):
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            for _, old in list(paths.files_below(place)):
                old.unlink()
            for name, made in paths.files_below(pathlib.Path(scratch)):
                paths.upload(made, place / name)
        return
    with files.naming(place):
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{prefix}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=directory) as scratch:
            made = pathlib.Path(scratch) / TOKENIZER
            try:
                tokenizer.save_pretrained(str(made))
            except Exception as error:  # the tokenizers library raises plain exceptions
                number = re.search(r"os error (\d+)", str(error))
                if number is None:
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            if place.exists():
                shutil.rmtree(place)
            files.put_in_place(made, place)


def local(directory: str | os.PathLike) -> pathlib.Path:
    """The path of a directory on this machine; ValueError for a URL, which pathlib would accept."""
    if paths.is_remote(directory):
        raise ValueError(
            f"{directory} is a URL, and other libraries write these files; give a directory, then "
            "copy it (to gs:// with: gcloud storage cp --recursive)"
        )
    return pathlib.Path(directory).expanduser()


def is_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether `directory` was made by `create`. It may have no step yet, or only steps."""
    path = paths.path_of(directory)
    if not (path / STEPS).is_dir():
        return False
    return (path / CONFIG).is_file() or latest_step(directory) is not None


def check_ours(directory: str | os.PathLike) -> None:
    """Raise a ValueError if `directory` has a config.json of another program or version.

    A config.json that is not JSON is no error, and nothing else is read.
    """
    path = paths.path_of(directory) / CONFIG
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return
    if isinstance(record, dict) and record.get("format") != FORMAT:
        raise _foreign(path, record)


def _foreign(path: Any, record: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"{path} has format {record.get('format')}, this version reads {FORMAT}; "
        "if it is a Hugging Face model, give it as --source to convert"
    )


def load_config(
    directory: str | os.PathLike, say: Say = logging.warning
) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder config of a checkpoint, and the facts that `create` stored with it.

    Args:
      directory: of the checkpoint.
      say: is given one line if config.json is missing and is made again from the copy in a step.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it is damaged, or another version wrote it.
    """
    path = paths.path_of(directory) / CONFIG
    record = None if path.is_file() else _rebuild(path, say)
    try:
        record = record or json.loads(path.read_text())
        is_ours = record.get("format") == FORMAT
        decoder = record.pop("decoder") if is_ours else None
        cfg = DecoderConfig.from_json(decoder) if is_ours else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_remedy(path)}") from error
    if cfg is None:
        raise _foreign(path, record)
    expected = record.pop("checksum", None)  # the oldest checkpoints have none
    if expected is not None:
        if json_checksum(record | {"decoder": decoder}) != expected:
            raise ValueError(f"{path} is damaged (checksums differ); {_remedy(path)}")
        for name, checksum in record.pop("files").items():
            file = path.parent / name
            if not (file.is_file() and paths.crc32(file) == checksum):
                raise ValueError(
                    f"{file} is damaged: it is not the file that was written with this checkpoint "
                    "(checksums differ). Restore it from a copy, or convert again"
                )
    return cfg, record


def _rebuild(path: Any, say: Say) -> dict[str, Any]:
    """The record of a missing config.json, from the copy in a saved step; written if possible."""
    directory = path.parent
    there = saved_steps(directory)
    if not there:
        raise FileNotFoundError(
            f"no checkpoint in {directory} (expected {CONFIG}); create one with "
            "python -m recursive_jax.convert --source=MODEL --out=DIR"
        )
    record, step = config_copy(directory)
    if record is None:
        raise ValueError(
            f"{path} is missing, and {directory / STEPS} has steps {', '.join(map(str, there))} "
            f"without a copy of it. Restore {CONFIG} from a copy, or give another directory"
        )
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # the disk is read-only
            write_json(path, record)
        say(f"warning: {path} was missing; it is made again from the copy in step {step}")
    return record


def _remedy(path: Any) -> str:
    """What to do about a damaged config.json."""
    step = config_copy(path.parent)[1]
    if step is None:
        return "restore it from a copy"
    return f"remove the file: it is then made again from the copy in step {step}"


def load_params(
    directory: str | os.PathLike,
    shardings: Any = None,
    dtype: Any = jnp.float32,
    step: int | None = None,
    say: Say = logging.warning,
) -> tuple[Any, DecoderConfig]:
    """Params and config of a checkpoint. Arguments and errors as in `load_step`."""
    return load_step(directory, shardings, dtype, step, say)[0], load_config(directory)[0]


def load_step(
    directory: str | os.PathLike,
    shardings: Any = None,
    dtype: Any = jnp.float32,
    step: int | None = None,
    say: Say = logging.warning,
    ema: bool | None = None,
) -> tuple[Any, int]:
    """Params of a step, on one device or in `shardings`, and the step; nothing else is read.

    Of a run that averages its weights these are the averaged ones, unless `ema` is false. `step`
    and `say` are those of `restore`.
    """
    cfg, _ = load_config(directory)
    _, part, _ = weights_of(directory, step, say, ema)
    abstract = abstract_params(cfg)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), abstract, shardings
    )
    arrays, _, step = restore(directory, {part: abstract}, step, say)
    return arrays[part], step


def load_certificate(directory: str | os.PathLike) -> dict[str, Any] | None:
    """The certificate of a converted model, None without one."""
    path = paths.path_of(directory) / CERTIFICATE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or convert again") from error


def as_numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)
