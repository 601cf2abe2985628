"""Exports: a model written in a form that other programs read, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import files, model_card
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params, leaves
from recursive_jax.weights import checkpoint, hf, hf_config, own_format, tying
from recursive_jax.weights.integrity import storage_fault
from recursive_jax.weights.stored import CheckpointWeights

if TYPE_CHECKING:
    from recursive_jax.model import Model

FORMATS = ("hf", "gguf", "orbax", "recursive")
LAYOUTS = ("unrolled", "looped")
DTYPES = ("float32", "bfloat16", "float16")
BITS = {  # of a weight in GGUF, by type: blocks of 32 share a scale, and some an offset
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5,
}  # fmt: skip
GGUF_TYPES = tuple(BITS)
OTHER_FILES = 20_000_000  # bytes of tokenizer and texts, at most


@dataclasses.dataclass(frozen=True)
class Export:
    """An export that is about to be written. Everything is checked, and no weights are read.

    Attributes:
      model: to write.
      out: directory to make; a file of format 'gguf'.
      format: one of FORMATS.
      layout: one of LAYOUTS; None where the format has one layout only.
      dtype: of the stored weights; of format 'gguf' one of GGUF_TYPES.
      max_shard_bytes: of a safetensors file.
      cfg: that is written: unrolled, or that of the model.
      num_bytes: of them.
      free: bytes that the disk has.
    """

    model: Model
    out: pathlib.Path
    format: str
    layout: str | None
    dtype: str
    max_shard_bytes: int
    cfg: DecoderConfig
    num_bytes: int
    free: int

    def write(self) -> None:
        """Write it, whole or not at all.

        Raises:
          OSError: the disk is full or cannot be written; nothing is left under the final name.
          ValueError: a value is no finite number in `dtype`.
        """
        out = self.out
        with files.naming(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
        with scratch as partial:
            made = pathlib.Path(partial) / out.name  # moved to `out` when it is complete
            try:
                {"hf": self._hf, "gguf": self._gguf}.get(self.format, self._own)(made)
            except Exception as error:  # orbax, safetensors and tokenizers raise many kinds
                fault = storage_fault(error)
                if fault is None:
                    raise
                raise OSError(
                    f"{fault}: {out} is not written ({_gb(self.num_bytes)} of weights). Make room, "
                    "then run the same command again"
                ) from error
            with files.naming(out):
                files.put_in_place(made, out)

    def _hf(self, made: pathlib.Path) -> None:
        model, params = self.model, host_params(self.model)
        if self.layout == "unrolled":
            params = tying.Unrolled(params, model.cfg)
        generation = generation_config(model)
        ids = {name: generation.get(name) for name in ("bos_token_id", "pad_token_id")}
        ids["eos_token_id"] = model.tokenizer.eos_token_id
        hf.save_params(
            params, self.cfg, made, self.dtype, self.max_shard_bytes, ids, self.layout
        )  # fmt: skip
        _write_json(made / "generation_config.json", generation)
        model.tokenizer.save_pretrained(str(made))
        self._card(made)

    def _own(self, made: pathlib.Path) -> None:
        model = self.model
        facts = {n: model.facts[n] for n in ("source", "tying") if model.facts.get(n) is not None}
        if model.cfg.num_loops == 1:  # it is its own source
            facts.pop("source", None)
        facts["generation_config"] = generation_config(model)
        own_format.save(
            host_params(model), model.cfg, made, self.format, self.dtype, self.max_shard_bytes,
            facts,
        )  # fmt: skip
        model.tokenizer.save_pretrained(str(made / own_format.TOKENIZER))
        if model.certificate is not None:
            _write_json(made / own_format.CERTIFICATE, model.certificate)
        self._card(made)

    def _gguf(self, made: pathlib.Path) -> None:
        from recursive_jax.weights import gguf_writer

        model, params = self.model, host_params(self.model)
        if self.layout == "unrolled":
            params = tying.Unrolled(params, model.cfg)
        facts = model.facts | {"generation_config": generation_config(model)}
        gguf_writer.save(params, self.cfg, model.tokenizer, made, kind=self.dtype, facts=facts)

    def _card(self, made: pathlib.Path) -> None:
        (made / "README.md").write_text(model_card.card(self), encoding="utf-8")

    @property
    def how_to_load(self) -> str:
        """Python lines, or a command, that open the export."""
        return model_card.how_to_load(self, str(self.out.resolve()))


def plan(
    model: Model,
    out: str | os.PathLike,
    format: str = "hf",
    layout: str | None = None,
    dtype: str | None = None,
    max_shard_gb: float = 5.0,
) -> Export:
    """The export of a model, checked; arguments and errors as in `Model.export`."""
    layout, dtype = check_options(format, layout, dtype, max_shard_gb)
    out = check_target(out, format)
    cfg = model.cfg
    if format in ("hf", "gguf"):
        cfg = _stored_config(cfg, format, layout)
    num_bytes = _num_bytes(cfg, dtype)
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < num_bytes + OTHER_FILES:
        raise OSError(
            f"no room for {out}: the export needs {_gb(num_bytes + OTHER_FILES)}, and "
            f"{place} has {_gb(free)} free. Make room, or choose another disk or a smaller dtype"
        )
    return Export(model, out, format, layout, dtype, int(max_shard_gb * 1e9), cfg, num_bytes, free)


def check_options(
    format: str, layout: str | None, dtype: str | None, max_shard_gb: float
) -> tuple[str | None, str]:
    """Layout and dtype of an export, with defaults filled in; ValueError for an impossible one."""
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; expected one of {', '.join(FORMATS)}")
    types = GGUF_TYPES if format == "gguf" else DTYPES
    dtype = types[0] if dtype is None else dtype
    if dtype not in types:
        raise ValueError(f"format={format} has no type {dtype!r}; expected {', '.join(types)}")
    if format in ("hf", "gguf"):
        layout = LAYOUTS[0] if layout is None else layout
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r}; expected one of {', '.join(LAYOUTS)}")
    elif layout is not None:
        raise ValueError(
            f"layout={layout!r} beside format={format}, which stores the model as it is; leave it "
            "out"
        )
    if not (isinstance(max_shard_gb, int | float) and 1e-6 <= max_shard_gb < math.inf):
        raise ValueError(f"max_shard_gb={max_shard_gb!r}; expected a positive number, such as 5")
    return layout, dtype


def check_target(out: str | os.PathLike, format: str) -> pathlib.Path:
    """The path of an export; ValueError if something is there. Nothing else is read."""
    out = checkpoint.local(out)
    if out.is_dir() and not any(out.iterdir()) and format != "gguf":
        return out
    if out.exists():
        what = "is not empty" if out.is_dir() else "exists"
        raise ValueError(f"{out} {what}; choose another name, or remove it")
    if format == "gguf" and out.suffix != ".gguf":
        raise ValueError(f"{out}: format=gguf writes one file; give a name such as {out}.gguf")
    return out


def host_params(model: Model) -> Any:
    """Nested float32 params in the memory of the host, not of an accelerator."""
    if "params" in vars(model):
        return model.params
    sharding = own_format.host_sharding()
    places = jax.tree.map(lambda _: sharding, abstract_params(model.cfg))
    return model.weights.read(places, jnp.float32)


def generation_config(model: Model) -> dict[str, Any]:
    """A `generation_config.json`: that of the source, with all ids that end a text."""
    tokenizer, stop = model.tokenizer, list(model.stop)
    config = {
        name: getattr(tokenizer, name, None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    } | dict(model.facts.get("generation_config") or {})
    if stop:
        config["eos_token_id"] = stop[0] if len(stop) == 1 else stop
    config.pop("_from_model_config", None)  # else transformers makes it anew from config.json
    return {name: value for name, value in config.items() if value is not None}


def describe(export: Export) -> list[tuple[str, str]]:
    """Rows of the start table: source, form, size and free space."""
    model, cfg = export.model, export.cfg
    loras = f", LoRA rank {model_card.ranks(model.cfg)}" if model.cfg.lora_ranks else ""
    step = f", step {model.weights.step}" if isinstance(model.weights, CheckpointWeights) else ""
    form = export.format if export.layout is None else f"{export.format}, {export.layout}"
    layers = f"{cfg.num_layers} layers"
    if cfg.num_loops > 1:
        layers += f" stored once, run {cfg.num_loops} times"
    return [
        ("source", f"{model.name}{step} ({cfg.family}, {model.cfg.num_loops} loops × "
                   f"{model.cfg.num_layers} layers{loras})"),
        ("form", f"{form}: {layers}, {export.dtype}"),
        ("size", f"{_gb(export.num_bytes)} of weights; {_gb(export.free)} free"),
        ("out", str(export.out)),
    ]  # fmt: skip


def leftovers(out: pathlib.Path) -> list[pathlib.Path]:
    """What killed exports to this name have left beside it."""
    parent = out.parent
    return sorted(parent.glob(f".{out.name}-????????")) if parent.is_dir() else []


def _stored_config(cfg: DecoderConfig, format: str, layout: str | None) -> DecoderConfig:
    """The config that is written; ValueError if the format cannot express the model."""
    if cfg.prefix_length:
        raise ValueError(
            f"the model has prefixes (prefix_length={cfg.prefix_length}), which {format} cannot "
            "express; use format=recursive or format=orbax"
        )
    if layout == "unrolled":
        cfg = tying.unrolled_config(cfg)
    elif cfg.num_loops == 1:
        raise ValueError("layout=looped, but this model has one loop; use layout=unrolled")
    if format == "gguf":
        from recursive_jax.weights import gguf_config

        gguf_config.settings_of(cfg)
    elif layout == "looped":
        hf_config.looped_to_hf(cfg)
    else:
        hf_config.config_to_hf(cfg)
    return cfg


def _num_bytes(cfg: DecoderConfig, dtype: str) -> int:
    numbers = sum(math.prod(leaf.shape) for leaf in leaves(cfg).values())
    bits = BITS[dtype] if dtype in BITS else 8 * np.dtype(jnp.dtype(dtype)).itemsize
    return math.ceil(numbers * bits / 8)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _write_json(path: pathlib.Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
