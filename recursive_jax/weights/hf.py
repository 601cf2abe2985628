"""Hugging Face directories: `config.json` and safetensors, read lazily and written atomically.

Pickles are never read. A model that has only `*.bin` files is refused.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16, which safetensors then reads)
import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights import hf_config, names

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Other names of a tensor: multimodal Gemma 3 nests its text model, transformers 5 renamed a head.
ALIASES = {
    "gemma3": (
        (r"(language_model\.model|model\.language_model)\.", "model."),
        (r"language_model\.lm_head\.", "lm_head."),
    ),
    "gpt_neox": ((r"lm_head\.", "embed_out."),),
}
# Tensors that a text model does not need: buffers, which are recomputed, and vision towers.
HARMLESS = {
    "gemma3": r"(model\.)?(vision_tower|multi_modal_projector)\..+",
    "gpt_neox": r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
}
HARMLESS_ANYWHERE = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(source: str) -> pathlib.Path:
    """Local path of `source`: a directory, a file, or a Hugging Face hub id (downloaded).

    Raises:
      FileNotFoundError: it is neither here nor on the hub, or the hub cannot be reached.
    """
    path = pathlib.Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", str(source)):
        raise FileNotFoundError(
            f"{source} does not exist; expected a Hugging Face directory, a GGUF file or a hub id "
            "such as HuggingFaceTB/SmolLM2-135M"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{source} does not exist here. If it is a hub id: pip install 'recursive_jax[hub]'"
        ) from error
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                source,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"],
            )
        )
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise FileNotFoundError(
            f"{source} does not exist here, and it could not be downloaded from the Hugging Face "
            f"hub ({type(error).__name__}: {reason}). Check the name and the network, or give a "
            "local directory"
        ) from error


def load_config(path: str | os.PathLike) -> DecoderConfig:
    """The model's config from `path/config.json`."""
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no config.json in {path}; expected a Hugging Face model directory "
            "(config.json, *.safetensors)"
        )
    try:
        hf = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy it again") from error
    if not isinstance(hf, dict):
        raise ValueError(f"{file} holds a {type(hf).__name__}; expected an object")
    return hf_config.config_from_hf(hf)


def open_params(
    path: str | os.PathLike, cfg: DecoderConfig, dtype: np.dtype | None = None
) -> names.LazyParams:
    """The parameters as a lazy flat mapping; opening checks every tensor's name, type and shape.

    Args:
      path: Hugging Face directory.
      cfg: its config, see `load_config`.
      dtype: of the arrays; None means as stored.

    Raises:
      ValueError: tensors are missing, left over, duplicate, misshapen or of an unknown type, or a
        file is damaged.
      FileNotFoundError: there are no safetensors.
    """
    path = pathlib.Path(path)
    files = _open_files(path)
    owner: dict[str, Any] = {}  # name of a tensor in our table -> (file, its name there)
    for file, handle in files.items():
        for spelling in handle.keys():
            name = _canonical(spelling, cfg.family)
            if name is None:
                continue
            if name in owner:
                raise ValueError(
                    f"{path}: tensor {name} is there twice, in {owner[name][0]} and {file}; "
                    "delete the file that does not belong to the model"
                )
            owner[name] = (file, spelling)

    slices = {name: files[file].get_slice(spelling) for name, (file, spelling) in owner.items()}
    types = {name: tensor.get_dtype() for name, tensor in slices.items()}
    odd = [f"{name} ({kind})" for name, kind in types.items() if kind not in DTYPES]
    if odd:
        raise ValueError(
            f"{path}: tensors of types that cannot be read as weights: {', '.join(odd[:6])}; "
            f"expected {', '.join(DTYPES)} (quantised checkpoints must be dequantised first)"
        )
    table = names.HF_TABLES[cfg.family]
    shapes = names.leaf_shapes(cfg)
    found = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    if cfg.tied_head:
        _drop_tied_head(path, table, slices, found)
    names.audit(table, shapes, found, str(path))

    def read(name):
        file, spelling = owner[name]
        return files[file].get_tensor(spelling)

    def stored(name):
        return np.dtype(DTYPES[types[name]])

    rows = names.used_rows(table, shapes)
    return names.LazyParams(rows, shapes, read, cfg, stored, dtype, str(path))


def load_params(
    path: str | os.PathLike, cfg: DecoderConfig, dtype: np.dtype | None = np.float32
) -> dict[str, Any]:
    """All parameters as a nested dict of numpy arrays; `dtype` None keeps the stored types."""
    return names.nested(open_params(path, cfg, dtype))


def save_params(
    params: Mapping[str, Any],
    cfg: DecoderConfig,
    path: str | os.PathLike,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    config_extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json` and safetensors that transformers loads; all of them or nothing.

    Args:
      params: of a vanilla model, nested or a flat mapping (which may be lazy).
      cfg: their config.
      path: directory to make; must be empty if it exists.
      dtype: to store; None means that of each parameter.
      max_shard_bytes: a larger model is split into files of at most this size, with an index.
      config_extra: further keys of `config.json`, such as `bos_token_id` and `eos_token_id`.
    """
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} already exists and is not empty; choose another directory")
    params = names.flat(params)
    shapes = names.leaf_shapes(cfg)
    wrong = sorted(set(shapes) ^ set(params))
    if wrong:
        raise ValueError(f"parameters missing or left over for this config: {', '.join(wrong)}")
    stored = np.dtype(dtype or params["embedding"].dtype)
    config = hf_config.config_to_hf(cfg) | {"torch_dtype": stored.name} | dict(config_extra or {})

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp makes it private
        _write_shards(params, cfg, shapes, temporary, dtype, max_shard_bytes)
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, path)  # replaces an empty directory too
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _canonical(name: str, family: str) -> str | None:
    """The table's name for a tensor, None for one that is not needed."""
    for pattern in (HARMLESS.get(family), HARMLESS_ANYWHERE):
        if pattern and re.fullmatch(pattern, name):
            return None
    for pattern, replacement in ALIASES.get(family, ()):
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return renamed
    return name


def _drop_tied_head(path, table, slices, found) -> None:
    """Drop the head of a tied model from `found`; ValueError unless it equals the embedding."""
    head = next((name for name in HEAD_NAMES if name in found), None)
    if head is None:
        return
    embedding = next(row.theirs for row in table if row.ours == "embedding")
    same, rows = found.get(embedding) == found[head], found[head][0]
    for start in range(0, rows if same else 0, 4096):
        a, b = (slices[n][start : min(start + 4096, rows)] for n in (embedding, head))
        same = same and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if not same:
        raise ValueError(
            f"{path}: {head} differs from {embedding}, but config.json ties them; "
            'set "tie_word_embeddings": false if the head was trained apart'
        )
    del found[head]


def _open_files(path: pathlib.Path) -> dict[str, Any]:
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


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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


def _write_shards(params, cfg, shapes, directory, dtype, max_shard_bytes) -> None:
    """Write all tensors into one file, or into numbered files with an index."""
    from safetensors.numpy import save_file

    groups: dict[str, list[names.Row]] = {}
    for row in names.used_rows(names.HF_TABLES[cfg.family], shapes).values():
        groups.setdefault(row.theirs, []).append(row)  # several rows: a fused tensor

    shards: list[list[str]] = []  # tensor names by shard
    shard, size, total = {}, 0, 0

    def flush():
        nonlocal shard, size
        # The final name contains the number of shards: renamed below.
        part = directory / f"{len(shards)}.part"
        save_file(shard, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes files that only the owner may read
        shards.append(list(shard))
        shard, size = {}, 0

    for rows in groups.values():
        leaves = [np.asarray(params[row.ours]) for row in rows]
        for row, leaf in zip(rows, leaves, strict=True):
            if leaf.shape != shapes[row.ours]:
                raise ValueError(
                    f"parameter {row.ours} is {list(leaf.shape)}; the config expects "
                    f"{list(shapes[row.ours])}"
                )
        leaves = [leaf if dtype is None else leaf.astype(dtype) for leaf in leaves]
        tensors = names.layer_names(rows[0], shapes[rows[0].ours])
        for i, name in enumerate(tensors):
            pieces = [leaf[i] if "{}" in rows[0].theirs else leaf for leaf in leaves]
            tensor = np.ascontiguousarray(rows[0].transform.join(pieces, cfg))
            if shard and size + tensor.nbytes > max_shard_bytes:
                flush()
            shard[name] = tensor
            size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()

    if len(shards) == 1:
        os.replace(directory / "0.part", directory / "model.safetensors")
        return
    weight_map = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(directory / f"{i}.part", directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
