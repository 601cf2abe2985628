"""Hugging Face directories: `config.json` and safetensors, read lazily and written atomically.

Pickles are never read. A model that has only `*.bin` files is refused.
"""

from __future__ import annotations

import json
import logging
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
from recursive_jax.weights import hf_config, hf_files, looped, names

# Type of a stored tensor -> of the array it is read as.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}

# What torch.compile, DataParallel, FSDP and activation checkpointing put into names.
_INNER = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPERS = rf"^((module|{_INNER})\.)+|\b({_INNER})\."
# Other names of a tensor: multimodal Gemma 3 nests its text model, transformers 5 renamed a head,
# and a model without a head (AutoModel) leaves out its own prefix.
_BARE = ((r"(embed_tokens|layers|norm|rotary_emb)\.", r"model.\1."),)
ALIASES = dict.fromkeys(names.HF_TABLES, _BARE) | {
    "gemma3": (
        (r"(language_model\.model|model\.language_model)\.", "model."),
        (r"language_model\.lm_head\.", "lm_head."),
        (r"language_model\.", "model."),
        *_BARE,
    ),
    "gpt_neox": (
        (r"lm_head\.", "embed_out."),
        (r"(embed_in|layers|final_layer_norm)\.", r"gpt_neox.\1."),
    ),
}
# Tensors that a text model does not need: buffers, which are recomputed, and vision towers.
HARMLESS = {
    "gemma3": r"(model\.)?(vision_tower|multi_modal_projector)\..+",
    "gpt_neox": r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
}
HARMLESS_ANYWHERE = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
WANTED = ("*.json", "*.model", "*.jinja", "merges.txt", "README.md")  # README.md: the licence
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")


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
                allow_patterns=[*WANTED, "*.safetensors"],
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
        hf_files.name_other_format(file.parent)
        raise FileNotFoundError(
            f"no config.json in {path}; expected a Hugging Face model directory "
            "(config.json, *.safetensors)"
        )
    try:
        hf = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
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
    if cfg.num_loops > 1:  # `load_config` has read the stored-once layout
        cfg = looped.block(cfg)
    files = hf_files.open_files(path)
    owner: dict[str, Any] = {}  # name of a tensor in our table -> (file, its name there)
    wrapped = 0
    for file, handle in files.items():
        for spelling in handle.keys():
            name = re.sub(WRAPPERS, "", spelling)
            wrapped += name != spelling
            name = _canonical(name, cfg.family)
            if name is None:
                continue
            if name in owner:
                raise ValueError(
                    f"{path}: tensor {name} is there twice, in {owner[name][0]} and {file}; "
                    "delete the file that does not belong to the model"
                )
            owner[name] = (file, spelling)
    if (path / "adapter_config.json").is_file():
        logging.warning("%s also holds a LoRA adapter, which is not applied", path)
    if wrapped:
        logging.warning("%s: left out the wrapper prefix of %d tensor names", path, wrapped)

    slices = {name: files[file].get_slice(spelling) for name, (file, spelling) in owner.items()}
    types = {name: tensor.get_dtype() for name, tensor in slices.items()}
    odd = [f"{name} ({kind})" for name, kind in types.items() if kind not in DTYPES]
    if odd:
        raise ValueError(
            f"{path}: tensors of types that cannot be read as weights: {', '.join(odd[:6])}; "
            f"expected {', '.join(DTYPES)} (quantised checkpoints must be dequantised first)"
        )
    doubles = sum(kind == "F64" for kind in types.values())
    if doubles:
        logging.warning("%s: %d tensors are float64 and are read as float32", path, doubles)
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
    layout: str = "unrolled",
) -> None:
    """Write `config.json` and safetensors that transformers loads; all of them or nothing.

    Args:
      params: nested or a flat mapping (which may be lazy).
      cfg: their config.
      path: directory to make; must be empty if it exists.
      dtype: to store; None means that of each parameter.
      max_shard_bytes: a larger model is split into files of at most this size, with an index.
      config_extra: further keys of `config.json`, such as `bos_token_id` and `eos_token_id`.
      layout: 'unrolled', of a vanilla model; or 'looped', the stored-once layout (see `looped`).

    Raises:
      ValueError: the config cannot be expressed, or a value is no finite number in `dtype`.
    """
    path = pathlib.Path(path)
    if layout == "looped":
        config, cfg = hf_config.looped_to_hf(cfg), looped.block(cfg)
    else:
        config = hf_config.config_to_hf(cfg)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} already exists and is not empty; choose another directory")
    params = names.flat(params)
    shapes = names.leaf_shapes(cfg)
    names.check_paths(params, shapes)
    stored = np.dtype(dtype or params["embedding"].dtype)
    config |= {"torch_dtype": stored.name} | dict(config_extra or {})

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp makes it private
        tensors = names.tensors(params, names.HF_TABLES[cfg.family], shapes, cfg, dtype)
        checked = ((name, names.check_finite(f"tensor {name}", x)) for name, x in tensors)
        hf_files.write(temporary, checked, max_shard_bytes)
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, path)  # replaces an empty directory too
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _canonical(name: str, family: str) -> str | None:
    """The table's name for a tensor, None for one that is not needed."""
    for pattern, replacement in ALIASES[family]:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            name = renamed
            break
    for pattern in (HARMLESS.get(family), HARMLESS_ANYWHERE):
        if pattern and re.fullmatch(pattern, name):
            return None
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
