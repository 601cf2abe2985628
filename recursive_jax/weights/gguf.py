"""GGUF files: config, lazily dequantised parameters and tokenizer of one file.

A GGUF is not a renamed Hugging Face checkpoint. Files of the llama architecture store query and key
rows in another rope layout, Gemma files store norm scales with the 1 already added, llama3 rope
scaling is a tensor of factors, and a tied head is simply absent.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from recursive_jax.models.config import DecoderConfig, Rope
from recursive_jax.weights import hf_config, names
from recursive_jax.weights.gguf_tokenizer import build_tokenizer
from recursive_jax.weights.names import AS_IS, TRANSPOSE, Row, Transform


def _unpermuted(x: np.ndarray, cfg: DecoderConfig) -> np.ndarray:
    """Rows `[head, head_dim / 2, 2]`, the halves interleaved, back to `[head, 2, head_dim / 2]`."""
    pairs = x.reshape(-1, cfg.head_dim // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


UNPERMUTE = Transform(lambda x, cfg: _unpermuted(x, cfg).T, None, lambda s: s[::-1])
MINUS_ONE = Transform(lambda x, cfg: x - 1, None, lambda s: s)


def _table(permuted: bool = False, norm: Transform = AS_IS) -> list[Row]:
    linears = {
        "attention/q": "attn_q",
        "attention/k": "attn_k",
        "attention/v": "attn_v",
        "attention/o": "attn_output",
        "mlp/gate": "ffn_gate",
        "mlp/up": "ffn_up",
        "mlp/down": "ffn_down",
    }
    norms = {
        "final_norm": "output_norm",
        "block/attention/q_norm": "blk.{}.attn_q_norm",
        "block/attention/k_norm": "blk.{}.attn_k_norm",
        "block/pre_attention_norm": "blk.{}.attn_norm",
        "block/post_attention_norm": "blk.{}.post_attention_norm",
        "block/pre_mlp_norm": "blk.{}.ffn_norm",
        "block/post_mlp_norm": "blk.{}.post_ffw_norm",
    }
    rows = [Row("embedding", "token_embd.weight", AS_IS), Row("head", "output.weight", TRANSPOSE)]
    for ours, theirs in linears.items():
        turn = permuted and ours in ("attention/q", "attention/k")
        rows += [
            Row(f"block/{ours}/w", f"blk.{{}}.{theirs}.weight", UNPERMUTE if turn else TRANSPOSE),
            Row(f"block/{ours}/b", f"blk.{{}}.{theirs}.bias", UNPERMUTE if turn else AS_IS),
        ]
    return rows + [Row(f"{ours}/scale", f"{theirs}.weight", norm) for ours, theirs in norms.items()]


class Architecture(NamedTuple):
    model_type: str  # of the Hugging Face config these files describe
    table: list[Row]


_GEMMA_TABLE = _table(norm=MINUS_ONE)
ARCHITECTURES = {
    "llama": Architecture("llama", _table(permuted=True)),
    "gemma": Architecture("gemma", _GEMMA_TABLE),
    "gemma2": Architecture("gemma2", _GEMMA_TABLE),
    "gemma3": Architecture("gemma3_text", _GEMMA_TABLE),
    "qwen2": Architecture("qwen2", _table()),
    "qwen3": Architecture("qwen3", _table()),
}
# Metadata (after 'ARCHITECTURE.') -> config.json
CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
HANDLED_APART = {
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
}
# Published settings of llama3 rope scaling: (low_freq_factor, high_freq_factor, original_length).
# Files store only the factors they lead to, in the tensor rope_freqs.weight.
LLAMA3_ROPE = (1.0, 4.0, 8192)


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

    @functools.cached_property
    def config(self) -> DecoderConfig:
        return hf_config.config_from_hf(self._hf_config())

    def params(self, dtype: np.dtype = np.float32) -> names.LazyParams:
        """The parameters as a lazy flat mapping, dequantised an item at a time; audited now."""
        from gguf.quants import dequantize

        cfg, table = self.config, ARCHITECTURES[self.architecture].table
        shapes = names.leaf_shapes(cfg)
        found = {n: tuple(int(d) for d in reversed(t.shape)) for n, t in self.tensors.items()}
        found.pop("rope_freqs.weight", None)  # part of the config, see _llama3_rope
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

    def _hf_config(self) -> dict[str, Any]:
        """These metadata as a Hugging Face config; `weights.hf_config` audits the values."""
        prefix = self.architecture + "."
        settings = {
            key.removeprefix(prefix): self._uniform(key)
            for key in self._reader.fields
            if key.startswith(prefix)
        }
        unknown = {k: v for k, v in settings.items() if k not in CONFIG_KEYS.keys() | HANDLED_APART}
        if unknown:
            raise ValueError(
                f"{self.path}: settings that are not implemented: "
                + ", ".join(f"{prefix}{k}={v!r}" for k, v in sorted(unknown.items()))
            )
        hf = {CONFIG_KEYS[k]: v for k, v in settings.items() if k in CONFIG_KEYS}
        hf["model_type"] = ARCHITECTURES[self.architecture].model_type
        if "token_embd.weight" not in self.tensors:
            raise ValueError(f"{self.path}: tensor token_embd.weight is missing")
        hf["vocab_size"] = int(self.tensors["token_embd.weight"].shape[1])
        hf["tie_word_embeddings"] = "output.weight" not in self.tensors
        for key, tensor in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")):
            if key in hf_config.MODEL_TYPES[hf["model_type"]].keys:
                hf[key] = f"blk.0.{tensor}.bias" in self.tensors
        self._check_head_dim(hf, settings)
        if self.architecture in ("gemma2", "gemma3"):
            # not in the file: llama.cpp knows the one size whose query scale is not its head_dim
            largest = {"gemma2": 46, "gemma3": 62}[self.architecture] == hf["num_hidden_layers"]
            per_head = hf["hidden_size"] // hf["num_attention_heads"]
            hf["query_pre_attn_scalar"] = per_head if largest else hf["head_dim"]
        pattern = hf.get("sliding_window_pattern")
        if isinstance(pattern, list):  # one flag per layer
            hf["layer_types"] = ["sliding_attention" if s else "full_attention" for s in pattern]
            del hf["sliding_window_pattern"]
        hf["rope_scaling"] = self._rope_scaling(settings, hf)
        return hf

    def _uniform(self, key: str) -> Any:
        """A setting; one given per layer counts as a number when all layers agree."""
        value = self.get(key)
        if isinstance(value, list) and not key.endswith("pattern"):
            if len(set(value)) != 1:
                raise ValueError(f"{self.path}: {key} differs between layers, {value}")
            return value[0]
        return value

    def _check_head_dim(self, hf: dict[str, Any], settings: Mapping[str, Any]) -> None:
        for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            if not isinstance(hf.get(key), int) or hf[key] < 1:
                raise ValueError(f"{self.path}: no usable {key} in the metadata ({hf.get(key)!r})")
        hf.setdefault("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
        for key in ("attention.value_length", "rope.dimension_count"):
            if settings.get(key, hf["head_dim"]) != hf["head_dim"]:
                raise ValueError(
                    f"{self.path}: {self.architecture}.{key}={settings[key]} differs from "
                    f"head_dim={hf['head_dim']}; that is not implemented"
                )

    def _rope_scaling(self, settings: Mapping[str, Any], hf: Mapping[str, Any]) -> dict | None:
        factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 1.0))
        kind = settings.get("rope.scaling.type", "linear" if factor != 1.0 else "none")
        if "rope_freqs.weight" in self.tensors:
            return self._llama3_rope(hf)
        if kind == "none":
            return None
        return {"rope_type": kind, "factor": factor}  # hf_config refuses all but linear

    def _llama3_rope(self, hf: Mapping[str, Any]) -> dict:
        """Recognise the published llama3 scalings in the tensor of frequency factors."""
        factors = np.asarray(self.tensors["rope_freqs.weight"].data, np.float32)
        low, high, length = LLAMA3_ROPE
        guess = dict(factor=float(factors.max()), low_freq_factor=low, high_freq_factor=high)
        theta = hf.get("rope_theta", 10000.0)
        plain = Rope(theta).frequencies(hf["head_dim"])
        scaled = Rope(theta, "llama3", original_length=length, **guess).frequencies(hf["head_dim"])
        if factors.shape != plain.shape or not np.allclose(factors, plain / scaled, rtol=1e-3):
            raise ValueError(
                f"{self.path}: rope_freqs.weight is not the llama3 rope scaling of a published "
                f"model (low_freq_factor {low}, high_freq_factor {high}, length {length})"
            )
        return guess | {"rope_type": "llama3", "original_max_position_embeddings": length}


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
