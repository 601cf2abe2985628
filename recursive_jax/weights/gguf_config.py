"""Settings of a GGUF file to `DecoderConfig`, and back.

llama.cpp knows some values that are not in the file, such as the query scale of a Gemma. A config
with another value cannot be written: `settings_of` reads its own settings back, and refuses a
config that comes back changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from recursive_jax.models.config import DecoderConfig, Rope
from recursive_jax.weights import hf_config, looped
from recursive_jax.weights.gguf_names import ARCHITECTURES, BY_FAMILY, LOOPED

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
MORE_KEYS = {
    "gptneox": {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
        "rope.freq_base": "rotary_emb_base",
    }
}
HANDLED_APART = {
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scale_linear",
}
LOOP_KEYS = {"num_loops", "skip_loop_final_norm"}
# Metadata that change nothing while they have this value.
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "leading_dense_block_count": 0,
    "logit_scale": 1,
    "pooling_type": 0,
    "residual_scale": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "use_parallel_residual": False,
}
# `tensor_data_layout` by architecture: the rope layout that the name table undoes.
LAYOUTS = dict.fromkeys(("llama", LOOPED), "Meta AI original pth")
# By architecture, what llama.cpp's loader takes for granted.
_NO_BIAS = dict(qkv_bias=False, o_bias=False)
NEEDS = {
    "gemma": dict(tied_head=True, **_NO_BIAS),
    "gemma2": dict(tied_head=True, **_NO_BIAS),
    "gemma3": _NO_BIAS,
    "qwen3": _NO_BIAS,
    "gptneox": dict(tied_head=False, qkv_bias=True, o_bias=True),
}
WINDOWED = ("gemma2", "gemma3")  # architectures with attention windows
ROPE_FACTORS = "rope_freqs.weight"
# Published settings of llama3 rope scaling: (low_freq_factor, high_freq_factor, original_length).
# Files store only the factors they lead to, in the tensor ROPE_FACTORS. Ours add the settings.
LLAMA3_ROPE = (1.0, 4.0, 8192)
LLAMA3_KEY = "recursive_jax.llama3_rope"  # factor and these three; other readers skip it


def config_keys(architecture: str) -> dict[str, str]:
    """`CONFIG_KEYS` of one architecture."""
    return CONFIG_KEYS | MORE_KEYS.get(architecture, {})


def config_of(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None,
    where: str,
) -> DecoderConfig:
    """The config of a GGUF model.

    Args:
      metadata: of the file, as plain values.
      shapes: of its tensors, `[out, in]`.
      rope_factors: the tensor `ROPE_FACTORS`, where there is one.
      where: the file, for messages.

    Raises:
      ValueError: a setting is missing, not implemented, or contradicts another one.
    """
    return _Reading(metadata, shapes, rope_factors, where).config()


class _Reading:
    """The arguments of `config_of`, and what follows from them."""

    def __init__(self, metadata, shapes, rope_factors, where):
        self.metadata, self.shapes, self.where = metadata, shapes, where
        self.rope_factors = rope_factors
        self.architecture = metadata["general.architecture"]

    def config(self) -> DecoderConfig:
        prefix = self.architecture + "."
        settings = {
            key.removeprefix(prefix): self.uniform(key)
            for key in self.metadata
            if key.startswith(prefix)
        }
        keys = config_keys(self.architecture)
        neutral = NEUTRAL | {"tensor_data_layout": LAYOUTS.get(self.architecture, "reference")}
        neutral = {k: v for k, v in neutral.items() if k not in keys}
        if self.architecture not in WINDOWED:  # these cannot do without a window
            neutral["attention.sliding_window"] = 0
        settings = {k: v for k, v in settings.items() if neutral.get(k, ...) != v}
        known = keys.keys() | HANDLED_APART | (LOOP_KEYS if self.architecture == LOOPED else set())
        unknown = {k: v for k, v in settings.items() if k not in known}
        if unknown:
            raise ValueError(
                f"{self.where}: settings that are not implemented: "
                + ", ".join(f"{prefix}{k}={v!r}" for k, v in sorted(unknown.items()))
            )
        loops = self.loops(settings)
        cfg = hf_config.config_from_hf(self.hugging_face(settings, keys))
        return cfg.replace(num_loops=loops)

    def hugging_face(self, settings, keys) -> dict[str, Any]:
        """These settings as a `config.json`; `weights.hf_config` audits the values."""
        hf = {keys[k]: v for k, v in settings.items() if k in keys}
        hf["model_type"] = ARCHITECTURES[self.architecture].model_type
        if "token_embd.weight" not in self.shapes:
            raise ValueError(f"{self.where}: tensor token_embd.weight is missing")
        hf["vocab_size"] = int(self.shapes["token_embd.weight"][0])
        hf["tie_word_embeddings"] = "output.weight" not in self.shapes
        for key, tensors in (
            ("attention_bias", ("attn_q", "attn_qkv")),
            ("mlp_bias", ("ffn_up",)),
        ):
            if key in hf_config.MODEL_TYPES[hf["model_type"]].keys:
                hf[key] = any(f"blk.0.{tensor}.bias" in self.shapes for tensor in tensors)
        self.check_head_dim(hf, settings)
        if self.architecture in ("gemma2", "gemma3"):
            # not in the file: llama.cpp knows the one size whose query scale is not its head_dim
            largest = {"gemma2": 46, "gemma3": 62}[self.architecture] == hf["num_hidden_layers"]
            per_head = hf["hidden_size"] // hf["num_attention_heads"]
            hf["query_pre_attn_scalar"] = per_head if largest else hf["head_dim"]
        pattern = hf.get("sliding_window_pattern")
        if isinstance(pattern, list):  # one flag per layer
            hf["layer_types"] = ["sliding_attention" if s else "full_attention" for s in pattern]
            del hf["sliding_window_pattern"]
        hf["rope_scaling"] = self.rope_scaling(settings, hf)
        return hf

    def uniform(self, key: str) -> Any:
        """A setting; one given per layer counts as a number when all layers agree."""
        value = self.metadata[key]
        if isinstance(value, list) and not key.endswith("pattern"):
            if len(set(value)) != 1:
                raise ValueError(f"{self.where}: {key} differs between layers, {value}")
            return value[0]
        return value

    def loops(self, settings: Mapping[str, Any]) -> int:
        """How often the layers run."""
        loops = settings.get("num_loops", 1)
        if type(loops) is not int or loops < 1:
            raise ValueError(f"{self.where}: {LOOPED}.num_loops is {loops!r}; expected at least 1")
        if loops > 1 and not settings.get("skip_loop_final_norm", False):
            raise ValueError(
                f"{self.where}: {LOOPED}.skip_loop_final_norm is false; a final norm between the "
                "loops is not implemented"
            )
        return loops

    def check_head_dim(self, hf: dict[str, Any], settings: Mapping[str, Any]) -> None:
        for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            if not isinstance(hf.get(key), int) or hf[key] < 1:
                raise ValueError(f"{self.where}: no usable {key} in the metadata ({hf.get(key)!r})")
        hf.setdefault("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
        checked = ["attention.value_length", "rope.dimension_count"]
        if self.architecture == "gptneox":
            checked.remove("rope.dimension_count")
            rotated = settings.get("rope.dimension_count", hf["head_dim"])
            hf["rotary_pct"] = rotated / hf["head_dim"]
        for key in checked:
            if settings.get(key, hf["head_dim"]) != hf["head_dim"]:
                raise ValueError(
                    f"{self.where}: {self.architecture}.{key}={settings[key]} differs from "
                    f"head_dim={hf['head_dim']}; that is not implemented"
                )

    def rope_scaling(self, settings: Mapping[str, Any], hf: Mapping[str, Any]) -> dict | None:
        factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 1.0))
        kind = settings.get("rope.scaling.type", "linear" if factor != 1.0 else "none")
        if self.rope_factors is not None:
            return self.llama3_rope(hf)
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": factor}  # hf_config refuses types it does not know
        if kind == "yarn":
            scaling |= {
                "original_max_position_embeddings": settings.get(
                    "rope.scaling.original_context_length"
                ),
                "beta_fast": settings.get("rope.scaling.yarn_beta_fast"),
                "beta_slow": settings.get("rope.scaling.yarn_beta_slow"),
            }
        return scaling

    def llama3_rope(self, hf: Mapping[str, Any]) -> dict:
        """Recognise llama3 scaling in the tensor of frequency factors."""
        factors = np.asarray(self.rope_factors, np.float32)
        given = self.metadata.get(LLAMA3_KEY, (float(factors.max()), *LLAMA3_ROPE))
        factor, low, high, length = given
        guess = dict(factor=factor, low_freq_factor=low, high_freq_factor=high)
        rope = Rope(hf.get("rope_theta", 10000.0), "llama3", original_length=int(length), **guess)
        expected = llama3_factors(rope, hf["head_dim"])
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
            raise ValueError(
                f"{self.where}: {ROPE_FACTORS} is not the llama3 rope scaling of a published "
                f"model (low_freq_factor {low}, high_freq_factor {high}, length {length})"
            )
        length = {"original_max_position_embeddings": int(length)}
        return guess | {"rope_type": "llama3"} | length


def llama3_factors(rope: Rope, rotary_dim: int) -> np.ndarray:
    """By which llama3 scaling divides the frequencies: f32 `[rotary_dim / 2]`."""
    return Rope(rope.theta).frequencies(rotary_dim) / rope.frequencies(rotary_dim)


def settings_of(cfg: DecoderConfig) -> tuple[str, dict[str, Any], np.ndarray | None]:
    """Architecture, metadata and rope factors of a model; the inverse of `config_of`.

    Args:
      cfg: vanilla, or a looped model that `looped.block` accepts.

    Raises:
      ValueError: llama.cpp has no such family, or cannot run a model with these settings.
    """
    if cfg.family not in BY_FAMILY:
        raise ValueError(
            f"GGUF files of the {cfg.family} family are not implemented; expected one of "
            f"{', '.join(BY_FAMILY)}. Export it as hf or recursive"
        )
    if cfg.num_loops > 1:
        looped.block(cfg, ("none", "linear", "llama3", "yarn"))
    architecture = LOOPED if cfg.num_loops > 1 else BY_FAMILY[cfg.family]
    said = _as_said(cfg)
    needs = NEEDS.get(architecture, {})
    wrong = [
        f"{name}={getattr(said, name)}" for name in needs if getattr(said, name) != needs[name]
    ]
    if any(said.windows) and architecture not in WINDOWED:
        wrong.append(f"windows={said.windows}")
    if wrong:
        raise ValueError(
            f"llama.cpp's architecture {architecture} cannot run {', '.join(wrong)}. "
            "Export the model as hf or recursive"
        )
    hf = hf_config.config_to_hf(said.replace(num_loops=1))
    if "layer_types" in hf and any(said.windows):
        hf["sliding_window_pattern"] = [t == "sliding_attention" for t in hf["layer_types"]]
    settings = {
        key: hf[theirs]
        for key, theirs in config_keys(architecture).items()
        if hf.get(theirs) is not None
    }
    settings |= {"vocab_size": cfg.vocab_size, "rope.dimension_count": cfg.rotary_dim}
    settings |= dict.fromkeys(("attention.key_length", "attention.value_length"), cfg.head_dim)
    if architecture == LOOPED:
        settings |= {"num_loops": cfg.num_loops, "skip_loop_final_norm": True}
    factors, more = None, {}
    rope = cfg.ropes[0]
    if rope.scaling == "llama3":
        factors = llama3_factors(rope, cfg.rotary_dim)
        lengths = (rope.low_freq_factor, rope.high_freq_factor, float(rope.original_length))
        more[LLAMA3_KEY] = [float(rope.factor), *map(float, lengths)]
    elif rope.scaling != "none":
        settings |= {"rope.scaling.type": rope.scaling, "rope.scaling.factor": float(rope.factor)}
    if rope.scaling == "yarn":
        settings |= {
            "rope.scaling.original_context_length": int(rope.original_length),
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
    metadata = {"general.architecture": architecture}
    metadata |= {f"{architecture}.{key}": value for key, value in settings.items()} | more
    return architecture, metadata, factors


def check_round_trip(cfg: DecoderConfig, found: DecoderConfig) -> None:
    """Raise ValueError unless `found`, read back from a file, is the config that was written."""
    said = _as_said(cfg)
    fields = [field.name for field in dataclasses.fields(said)]
    lost = [name for name in fields if getattr(said, name) != getattr(found, name)]
    if lost:
        raise ValueError(
            f"a GGUF file of architecture {BY_FAMILY[cfg.family]} cannot express "
            + ", ".join(f"{name}={getattr(said, name)!r}" for name in lost)
            + ". Export the model as hf or recursive"
        )


def _windows(cfg: DecoderConfig) -> tuple[int, ...]:
    """Windows by depth; those of a Mistral that are no shorter than its context do nothing."""
    does_nothing = cfg.family == "mistral" and all(not 0 < w < cfg.max_length for w in cfg.windows)
    return () if does_nothing else cfg.windows


def _as_said(cfg: DecoderConfig) -> DecoderConfig:
    """The config that a file stores: floats are float32, and a Mistral is a llama."""

    def f32(x: float | None) -> float | None:
        return None if x is None else float(np.float32(x))

    architecture = BY_FAMILY[cfg.family]
    family = hf_config.MODEL_TYPES[ARCHITECTURES[architecture].model_type].name
    scaled = ("theta", "factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
    ropes = tuple(
        dataclasses.replace(rope, **{name: f32(getattr(rope, name)) for name in scaled})
        for rope in cfg.ropes
    )
    return cfg.replace(
        family=family,
        windows=_windows(cfg),
        norm_eps=f32(cfg.norm_eps),
        attn_softcap=f32(cfg.attn_softcap),
        final_softcap=f32(cfg.final_softcap),
        rotary_fraction=cfg.rotary_dim / cfg.head_dim,
        ropes=ropes,
    )
