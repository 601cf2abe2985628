"""A local copy of tokenised text in a bucket, as array_record reads local files only."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import zlib
from typing import Any

from recursive_jax import files, paths
from recursive_jax.training.data import default_cache_dir
from recursive_jax.training.token_manifest import MANIFEST, Manifest

SPARE = 1 << 30  # bytes of the disk that a copy leaves free


def local_copy(
    directory: Any, manifest: Manifest, cache_dir: str | None = None, progress: bool = True
) -> pathlib.Path:
    """The directory itself, or for one in a bucket its whole copy below `cache_dir`.

    Every row may come from any shard, so that each host needs all of them. A copy that was stopped
    is gone on with. The checksum of every file is verified while it is copied.

    Args:
      directory: path of the tokenised text.
      manifest: of the directory.
      cache_dir: None: `data.default_cache_dir()`.
      progress: show a progress bar.

    Raises:
      ValueError: a file is missing or damaged, or the disk is too small for the copy.
    """
    from tqdm import tqdm

    if not paths.is_remote(directory):
        return pathlib.Path(directory)
    text = json.dumps(manifest.to_json(), indent=1)
    cache = pathlib.Path(cache_dir or default_cache_dir()).expanduser()
    copy = cache / f"tokens-{zlib.crc32(text.encode()):08x}-{directory.name}"
    copy.mkdir(parents=True, exist_ok=True)
    missing = [file for file in manifest.files() if not _is_there(copy / file.file, file.bytes)]
    total, free = sum(file.bytes for file in missing), shutil.disk_usage(copy).free
    if total + SPARE > free:
        raise ValueError(
            f"{directory}: array_record reads local files only, and the copy of {total / 1e9:.1f} "
            f"GB does not fit on the disk of {cache}, which has {free / 1e9:.1f} GB free. Set "
            "data.cache_dir to a larger disk, or mount the bucket (gcsfuse) and give its path"
        )
    with tqdm(
        total=total, desc=f"copying {directory} to {copy}", unit="B", unit_scale=True, delay=3,
        disable=not progress,
    ) as bar:  # fmt: skip
        for file in missing:
            _copy(directory / file.file, copy / file.file, file, bar.update)
    files.write_whole(copy / MANIFEST, text)
    return copy


def _is_there(path: pathlib.Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _copy(source: Any, target: pathlib.Path, file: Any, progress: Any) -> None:
    """Copy a file whole or not at all, with its checksum verified."""
    checksum = 0

    def blocks():
        nonlocal checksum
        with source.open("rb") as data:
            while block := data.read(paths.BLOCK):
                checksum = zlib.crc32(block, checksum)
                progress(len(block))
                yield block

    made = target.with_name(f"{target.name}.{os.getpid()}.partial")  # others may copy it too
    try:
        with files.naming(made), open(made, "wb") as out:
            out.writelines(blocks())
        if (made.stat().st_size, checksum) != (file.bytes, file.crc32):
            raise ValueError(f"{source} is damaged: its checksum is another. Copy it again")
        files.put_in_place(made, target)
    except FileNotFoundError as error:
        raise ValueError(f"{source} is damaged: it is missing. Copy it again") from error
    finally:
        made.unlink(missing_ok=True)
