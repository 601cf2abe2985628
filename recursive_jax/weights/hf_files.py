"""The safetensors files of a directory, read and written. Pickles are never read."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_files(path: pathlib.Path) -> dict[str, Any]:
    """Open handles of the safetensors files that make up the model, by file name."""
    if path.is_file():
        raise ValueError(f"{path} is a file; expected a Hugging Face directory")
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {single.name: _open(single)}
    if index.is_file():
        weight_map = _weight_map(index)
        handles = {file: _open(path / file) for file in sorted(set(weight_map.values()))}
        held = {(name, file) for file, handle in handles.items() for name in handle.keys()}
        strays = sorted(held ^ set(weight_map.items()))
        if strays:
            name, file = strays[0]
            verb = "holds" if (name, file) in held else "does not hold"
            raise ValueError(
                f"{index} does not describe its files: {file} {verb} {name} "
                f"({len(strays)} such tensors); download the model again"
            )
        return handles
    name_other_format(path)
    pickles = sorted(f.name for pattern in PICKLES for f in path.glob(pattern))
    if pickles:
        raise FileNotFoundError(
            f"{path} has only pickled weights ({', '.join(pickles[:3])}), which can run code when "
            "read. Take the model's safetensors files, or convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    raise FileNotFoundError(
        f"no model.safetensors or model.safetensors.index.json in {path}; expected a "
        "Hugging Face model directory"
    )


def write(
    directory: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Write tensors into one file, or into numbered files of a size, with an index."""
    from safetensors.numpy import save_file

    shards: list[list[str]] = []  # tensor names by shard
    shard: dict[str, np.ndarray] = {}
    size = total = 0

    def flush():
        nonlocal shard, size
        # The final name contains the number of shards: renamed below.
        part = directory / f"{len(shards)}.part"
        save_file(shard, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes files that only the owner may read
        shards.append(list(shard))
        shard, size = {}, 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
        shard[name] = np.ascontiguousarray(tensor)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()

    if len(shards) == 1:
        os.replace(directory / "0.part", directory / "model.safetensors")
        return
    weight_map = {}
    for i, held in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(directory / f"{i}.part", directory / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def name_other_format(path: pathlib.Path) -> None:
    """ValueError if a directory that is no Hugging Face model is a LoRA adapter or holds GGUFs."""
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text())["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError, RecursionError):
            base = None
        raise ValueError(
            f"{path} holds a LoRA adapter, not a model; merge it into its base"
            f"{f' ({base})' if base else ''} first: merge_and_unload() and save_pretrained() of "
            "peft"
        )
    files = sorted(path.iterdir()) if path.is_dir() else []
    found = [file for file in files if file.is_file() and is_gguf(file)]
    if found:
        raise ValueError(
            f"{path} is no Hugging Face model, but it holds a GGUF file; give that: {found[0]}"
        )


def is_gguf(file: pathlib.Path) -> bool:
    """Whether a file begins like a GGUF file."""
    with open(file, "rb") as f:
        return f.read(4) == b"GGUF"


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is not a safetensors index ({type(error).__name__}: {error}); copy it again"
        ) from error
    for name, file in items:
        # A file outside the directory is not part of the model, and may not be the user's.
        if not isinstance(file, str) or file in (".", "..") or re.search(r"[/\\:\0]", file):
            raise ValueError(f"{index}: {name} is said to be in {file!r}; expected a file name")
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not there; download it")
    return weight_map


def _open(file: pathlib.Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError, ValueError) as error:
        with open(file, "rb") as f:
            pointer = f.read(24).startswith(b"version https://git-lfs")
        problem = (
            "is a git-lfs pointer, not the weights; run git lfs pull"
            if pointer
            else f"is truncated or damaged ({error}); download it again"
        )
        raise ValueError(f"{file} {problem}") from error
