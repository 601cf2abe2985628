"""Write a model as a GGUF file that llama.cpp runs.

A vanilla model takes the architecture of its family. A looped one takes the architecture
`nanbeige`, whose layers run several times while their weights are stored once.
"""

from __future__ import annotations

import logging
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from recursive_jax import files
from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights import gguf_config, names
from recursive_jax.weights.gguf_names import ARCHITECTURES
from recursive_jax.weights.gguf_tokenizer_writer import tokenizer_metadata

# How weights may be stored. The gguf package reads more kinds than it can write.
KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
NEEDED = "pip install 'recursive_jax[gguf]'"


def save(
    params: Mapping[str, Any],
    cfg: DecoderConfig,
    tokenizer: Any,
    path: str | os.PathLike,
    *,
    kind: str = "f32",
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = logging.warning,
) -> None:
    """Write a GGUF file, whole or not at all.

    Vectors are always float32. The logits come from a matrix of at least q8_0, as in llama.cpp's
    own files: the head, or the embedding of a tied model. A matrix whose rows are no multiple of a
    quantised kind's block of 32 is stored as f16.

    Args:
      params: nested or flat (perhaps lazy) params.
      cfg: their config: vanilla, or one that `looped.block` accepts.
      tokenizer: a fast tokenizer of transformers.
      path: file to make.
      kind: one of `KINDS`.
      facts: where the model comes from: `name` or `source`, and `generation_config`.
      say: takes one line about what differs from what was asked.

    Raises:
      ValueError: `path` exists, the kind is unknown, GGUF or llama.cpp has no such model or
        tokenizer, a weight is not finite, or the gguf package is not installed.
      OSError: the file cannot be written, or the disk has too little space.
    """
    path, facts = pathlib.Path(path), dict(facts or {})
    if path.exists():
        raise ValueError(f"{path} already exists; choose another name, or remove it")
    if kind not in KINDS:
        raise ValueError(
            f"GGUF type {kind!r}; expected one of {', '.join(KINDS)}. For others, write f16 and "
            "run llama-quantize of llama.cpp on the file"
        )
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError(f"a GGUF file needs gguf, which is not installed; {NEEDED}") from error

    architecture, metadata, factors = gguf_config.settings_of(cfg)
    table, shapes, params = ARCHITECTURES[architecture].table, names.shapes(cfg), names.flat(params)
    tensors = names.tensor_shapes(table, shapes)
    found = gguf_config.config_of(metadata, tensors, factors, str(path))
    gguf_config.check_round_trip(cfg, found)
    names.check_paths(params, shapes)
    types = _types(tensors, kind, cfg.tied_head, say)
    metadata |= _general(kind, facts)
    metadata |= {
        f"tokenizer.{key}": value
        for key, value in tokenizer_metadata(
            tokenizer, architecture, cfg.vocab_size, facts.get("generation_config"), say
        ).items()
    }
    sizes = {name: _bytes(tensors[name], types[name]) for name in tensors}
    with files.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path, sum(sizes.values()))
        descriptor, made = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(descriptor)
        writer = gguf.GGUFWriter(made, architecture)
        try:
            for key, value in metadata.items():
                _add(writer, key, value)
            if factors is not None:
                info = (factors.shape, factors.dtype, factors.nbytes)
                writer.add_tensor_info(gguf_config.ROPE_FACTORS, *info)
            for name, shape in tensors.items():
                writer.add_tensor_info(
                    name, shape, np.dtype("f4"), sizes[name], raw_dtype=types[name]
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for name, tensor in names.tensors(params, table, shapes, cfg, np.dtype("f4")):
                writer.write_tensor_data(_stored(name, tensor, types[name]))
            writer.close()
            os.chmod(made, 0o644)
            files.put_in_place(made, path)
        except BaseException:
            writer.close()
            pathlib.Path(made).unlink(missing_ok=True)
            raise


def _types(
    tensors: Mapping[str, tuple[int, ...]], kind: str, tied: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """The stored type of every tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[kind.upper()]
    block, bits = GGML_QUANT_SIZES[wanted]
    logits = "token_embd.weight" if tied else "output.weight"
    out, odd = {}, []
    for name, shape in tensors.items():
        stored = wanted
        if len(shape) == 1:
            stored = GGMLQuantizationType.F32
        elif shape[-1] % block:
            stored = GGMLQuantizationType.F16
            odd.append(f"{name} {list(shape)}")
        elif name == logits and bits / block < 1:
            stored = GGMLQuantizationType.Q8_0
        out[name] = stored
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        say(
            f"stored as f16, since their rows are no multiple of {block}: "
            f"{', '.join(odd[:3])}{more}"
        )
    return out


def _bytes(shape: tuple[int, ...], stored: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[stored]
    return math.prod(shape) // block * size


def _stored(name: str, tensor: np.ndarray, stored: Any) -> np.ndarray:
    """The bytes of a float32 tensor in its stored type."""
    from gguf.quants import quantize

    finite = names.all_finite(tensor)
    if finite:
        with np.errstate(over="ignore"):  # a large float32 is no float16: infinity
            out = quantize(tensor, stored)
        finite = out.dtype.kind != "f" or names.all_finite(out)
    if not finite:
        raise ValueError(
            f"tensor {name} holds NaN or infinity in {stored.name.lower()}. If its weights are "
            "finite, choose f32 or bf16; else take an earlier checkpoint"
        )
    return out


def _general(kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of the file as a whole."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    out = {"general.type": "model", "general.file_type": int(LlamaFileType[file_type])}
    source = pathlib.Path(str(facts.get("source") or "")).name  # such as SmolLM2-1.7B: no suffix
    name = facts.get("name") or source.removesuffix(".gguf")
    if name:
        out["general.name"] = name
    return out | ({"general.quantization_version": GGML_QUANT_VERSION} if "q" in kind else {})


def _check_space(path: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"{path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "make room, or choose another directory or a smaller type"
        )


def _add(writer: Any, key: str, value: Any) -> None:
    if key == "general.architecture":  # the writer adds it
        return
    for kind, add in (
        (bool, writer.add_bool),  # before int: a bool is one
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (list, writer.add_array),
    ):
        if isinstance(value, kind):
            add(key, value)
            return
    raise TypeError(f"{key}={value!r}")
