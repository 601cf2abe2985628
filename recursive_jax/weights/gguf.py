"""GGUF files: config, lazily dequantised parameters and tokenizer of one file.

A GGUF is not a renamed Hugging Face checkpoint: see `gguf_names` for its tensors, `gguf_config` for
its settings. A tied head is simply absent.
"""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights import gguf_config, names
from recursive_jax.weights.gguf_config import ROPE_FACTORS
from recursive_jax.weights.gguf_names import ARCHITECTURES
from recursive_jax.weights.gguf_tokenizer import build_tokenizer


class GGUFFile:
    """One open GGUF file; reading the metadata of a 262k vocabulary takes seconds, so keep it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: truncated, damaged, of an unsupported architecture, with unknown settings, or
        the gguf package is not installed.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._reader = _read(self.path)
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = self.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{self.path}: GGUF architecture {self.architecture!r} is not supported; "
                f"expected one of {sorted(ARCHITECTURES)}"
            )
        if self.get("split.count", 1) > 1:
            raise ValueError(
                f"{self.path} is one of {self.get('split.count')} parts; join them first: "
                "llama-gguf-split --merge FIRST_PART OUT"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a plain Python value, arrays as lists."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, `[out, in]`."""
        return {n: tuple(int(d) for d in reversed(t.shape)) for n, t in self.tensors.items()}

    @functools.cached_property
    def config(self) -> DecoderConfig:
        return gguf_config.config_of(
            {key: self.get(key) for key in self._reader.fields if not key.startswith("tokenizer.")},
            self.shapes,
            self.tensors[ROPE_FACTORS].data if ROPE_FACTORS in self.tensors else None,
            str(self.path),
        )

    def params(self, dtype: np.dtype = np.float32) -> names.LazyParams:
        """The parameters as a lazy flat mapping, dequantised an item at a time; audited now."""
        from gguf.quants import dequantize

        cfg, table = self.config, ARCHITECTURES[self.architecture].table
        shapes, found = names.shapes(cfg), self.shapes
        found.pop(ROPE_FACTORS, None)  # part of the config
        names.audit(table, shapes, found, str(self.path))
        for tensor in {t.tensor_type: t for t in self.tensors.values()}.values():
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError as error:
                raise ValueError(
                    f"{self.path}: {tensor.name} has quantisation {tensor.tensor_type.name}, which "
                    "the gguf package cannot undo; take a file of another quantisation"
                ) from error

        def read(name):
            tensor = self.tensors[name]
            return dequantize(tensor.data, tensor.tensor_type)

        rows = names.used_rows(table, shapes)
        return names.LazyParams(
            rows, shapes, read, cfg, lambda name: np.dtype("f4"), dtype, str(self.path)
        )

    def tokenizer(self):
        """The tokenizer as a transformers `PreTrainedTokenizerFast`."""
        metadata = {
            key.removeprefix("tokenizer."): self.get(key)
            for key in self._reader.fields
            if key.startswith("tokenizer.")
        }
        try:
            tokenizer = build_tokenizer(metadata, self.architecture, self.config.max_length)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        except Exception as error:  # the tokenizers library raises many kinds
            raise ValueError(
                f"{self.path}: its tokenizer is damaged ({error or type(error).__name__}); "
                "download it again, or use the model's Hugging Face directory"
            ) from error
        if len(tokenizer) > self.config.vocab_size:
            raise ValueError(
                f"{self.path}: the tokenizer has {len(tokenizer)} tokens, the embedding only "
                f"{self.config.vocab_size} rows; the file is damaged or wrongly converted"
            )
        return tokenizer


def load_config(path: str | os.PathLike) -> DecoderConfig:
    """The config of the model in a GGUF file."""
    return GGUFFile(path).config


def open_params(
    path: str | os.PathLike, dtype: np.dtype = np.float32
) -> tuple[names.LazyParams, DecoderConfig]:
    """The parameters as a lazy flat mapping, and their config."""
    file = GGUFFile(path)
    return file.params(dtype), file.config


def load_params(
    path: str | os.PathLike, dtype: np.dtype = np.float32
) -> tuple[dict[str, Any], DecoderConfig, Any]:
    """All parameters as a nested dict of numpy arrays, their config, and the tokenizer."""
    file = GGUFFile(path)
    return names.nested(file.params(dtype)), file.config, file.tokenizer()


def load_tokenizer(path: str | os.PathLike):
    """The tokenizer of a GGUF file; its stop ids are `tokenizer.init_kwargs["stop_token_ids"]`."""
    return GGUFFile(path).tokenizer()


def _read(path: pathlib.Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a .gguf file")
    with open(path, "rb") as f:
        if f.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (it does not begin with 'GGUF')")
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: reading a GGUF file needs gguf, which is not installed; "
            "pip install 'recursive_jax[gguf]'"
        ) from error

    class Reader(gguf.GGUFReader):
        """A reader that stops at the end of the file, and is four times as fast."""

        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, value):
            self._data = np.asarray(value)  # slicing a memmap subclass is slow

        def _get(self, offset, dtype, count=1, *args, **kwargs):
            out = super()._get(offset, dtype, count, *args, **kwargs)
            if len(out) != count:  # else a truncated file gives short arrays, or none
                raise ValueError(f"it ends within the {int(count)} numbers at byte {int(offset)}")
            return out

    try:
        return Reader(path)
    except Exception as error:  # numpy and gguf raise many kinds on nonsense
        raise ValueError(
            f"{path} is truncated or damaged ({type(error).__name__}: {error}); download it again"
        ) from error
