"""Hugging Face `config.json` to `DecoderConfig` and back. Each family is a row of `families`.

`config_from_hf` refuses every key that it does not implement, by name. Skipping a key that changes
the mathematics would give a model that runs and is wrong. A key counts as absent if its value is
null or neutral (`FIXED`), or if it only concerns training, generation or serving (`IRRELEVANT`).
`config_to_hf` is its inverse. `preset` returns full-size configs by name, for shapes, costs and
parameter counts.

To add a family: add a row to `families`, a name table in `weights.hf`, a case in
`tests/test_hf_consistency.py`, and run `tests/golden/generate.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights import looped
from recursive_jax.weights.families import (
    ACTIVATIONS,
    COMMON_KEYS,
    FAMILIES,
    FIXED,
    HEADS,
    IRRELEVANT,
    MODEL_TYPES,
    MULTIMODAL,
    PRESETS,
    Family,
)
from recursive_jax.weights.hf_rope import ORIGINAL_LENGTH, number, ropes_from_hf, ropes_to_hf

SIZES = (
    "vocab_size embed_dim mlp_dim num_layers num_heads num_kv_heads max_length head_dim"
).split()
LARGEST = 2**31 - 1  # of a size or window: sizes are int32 on the device
# Keys of which null is a value: no window, no cap, or a size that follows from the others.
NULLABLE = (
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "num_key_value_heads",
)


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` of a parsed Hugging Face `config.json`.

    Raises:
      ValueError: the model type, a key or a value is not implemented; the message names it.
    """
    model_type = hf.get("model_type")
    if model_type == looped.MODEL_TYPE:
        return _looped_from_hf(hf)
    family = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported; "
            f"expected one of {sorted([*MODEL_TYPES, looped.MODEL_TYPE])}"
        )
    if "text_config" in hf:
        hf = _text_config(hf)
    _audit(family, hf)
    given = {key: value for key, value in hf.items() if value is not None or key in NULLABLE}
    values = dict(family.defaults) | given
    if values.get("head_dim", 0) is None and "head_dim" in family.defaults:
        raise ValueError(
            f"config.json: head_dim is null; a {family.name} model needs a number, which does not "
            "follow from its other sizes"
        )
    fields = {"family": family.name, **family.fields}
    for key, names in (COMMON_KEYS | dict(family.keys)).items():
        if key not in values and key not in HEADS:
            raise ValueError(f"config.json: {key!r} is missing; a {family.name} model needs it")
        value = values.get(key)
        if names[0] not in SIZES:
            _check(key, value, names[0])
        fields |= dict.fromkeys(names, value)
    fields["num_kv_heads"] = fields.get("num_kv_heads") or fields["num_heads"]
    for name in SIZES:
        if name == "head_dim" and not fields.get(name):
            fields[name] = fields["embed_dim"] // fields["num_heads"]
        if type(fields[name]) is not int or not 0 < fields[name] <= LARGEST:
            raise ValueError(
                f"config.json: {name} must be a positive integer, got {fields[name]!r}"
            )
    fields["activation"] = _activation(family, values)
    if family.query_scalar:
        scalar = number("query_pre_attn_scalar", values["query_pre_attn_scalar"])
        if scalar != fields["head_dim"]:
            fields["query_scale"] = scalar**-0.5
    if family.scaled_embedding:
        fields["embed_scale"] = fields["embed_dim"] ** 0.5
    is_local = _local_layers(family, values)
    if any(is_local):
        fields["windows"] = tuple(values["sliding_window"] if loc else 0 for loc in is_local)
    ropes, fields["rotary_fraction"] = ropes_from_hf(family, values)
    fields["ropes"] = ropes
    if family.rope_by_layer_type:
        fields["rope_of_depth"] = tuple(int(loc) for loc in is_local)
    in_use = {
        "sliding_window": values.get("sliding_window"),
        family.theta_keys[0]: ropes[0].theta,
        family.fraction_key: fields["rotary_fraction"],
    }
    for copy, key in family.copies.items():
        if copy in given and given[copy] != in_use[key]:
            raise ValueError(
                f"config.json: {copy}={given[copy]!r} and {key}={in_use[key]!r} disagree; keep the "
                "one the model was trained with"
            )
    return DecoderConfig(**fields)


def config_to_hf(cfg: DecoderConfig) -> dict[str, Any]:
    """A `config.json` for a vanilla `cfg` that transformers accepts; inverse of `config_from_hf`.

    Rope keys are written in the old and in the new form. Token ids are null: the caller adds those
    of the tokenizer.

    Raises:
      ValueError: `cfg` has loops, or settings that transformers has no key for in this family.
    """
    if cfg.prefix_length:
        raise ValueError(
            f"the model has prefixes (prefix_length={cfg.prefix_length}), which no other format "
            "has; it can only be saved as a checkpoint"
        )
    if cfg.num_loops != 1 or cfg.lora_ranks:
        raise ValueError(
            f"config.json describes vanilla models only; this one has num_loops={cfg.num_loops} "
            f"and lora_ranks={dict(cfg.lora_ranks)}. Untie it first (export does)"
        )
    family = FAMILIES[cfg.family]
    hf = {"model_type": family.model_type, "architectures": [family.architecture]}
    for key, names in (COMMON_KEYS | dict(family.keys)).items():
        hf[key] = getattr(cfg, names[0])
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    hf[family.act_key] = names[cfg.activation]
    if family.query_scalar:
        scale = cfg.query_scale
        hf["query_pre_attn_scalar"] = cfg.head_dim if scale is None else round(scale**-2)
    if family.local != "none":
        hf |= _local_to_hf(family, cfg)
    hf |= ropes_to_hf(family, cfg)
    hf |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    # A field that these keys cannot express differs when the config is read back.
    back = config_from_hf(hf)
    lost = [
        f.name for f in dataclasses.fields(cfg) if getattr(back, f.name) != getattr(cfg, f.name)
    ]
    if lost:
        raise ValueError(
            f"a transformers {family.model_type} model cannot express "
            + ", ".join(f"{n}={getattr(cfg, n)!r}" for n in lost)
        )
    return hf


def looped_to_hf(cfg: DecoderConfig) -> dict[str, Any]:
    """A `config.json` of the stored-once layout (see `looped`); `config_from_hf` reads it, too.

    Raises:
      ValueError: the layout cannot express the model.
    """
    return config_to_hf(looped.block(cfg)) | {
        "model_type": looped.MODEL_TYPE,
        "architectures": [looped.ARCHITECTURE],
        "num_loops": cfg.num_loops,
        "skip_loop_final_norm": True,
    }


def _looped_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The recursive model of a `config.json` of the stored-once layout."""
    loops, skip = hf.get("num_loops", 1), hf.get("skip_loop_final_norm", False)
    if type(loops) is not int or not 0 < loops <= LARGEST:
        raise ValueError(f"config.json: num_loops must be a positive integer, got {loops!r}")
    if loops > 1 and not _flag("skip_loop_final_norm", skip):
        raise ValueError(
            "config.json: skip_loop_final_norm is false: the final norm runs between the loops, "
            "which is not implemented; expected true"
        )
    own = ("num_loops", "skip_loop_final_norm")
    rest = {key: value for key, value in hf.items() if key not in own}
    return config_from_hf(rest | {"model_type": "llama"}).replace(num_loops=loops)


def preset(name: str) -> DecoderConfig:
    """The config of a published model, for shapes and costs; see `PRESETS` for the names."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; expected one of {sorted(PRESETS)}")
    return config_from_hf(PRESETS[name])


def _check(key: str, value: Any, field: str) -> None:
    """ValueError unless the value of a key is one for this field of `DecoderConfig`."""
    if isinstance(getattr(DecoderConfig, field), bool):  # the field's default
        _flag(key, value)
    elif value is not None or key not in NULLABLE:
        number(key, value, zero=field == "norm_eps")


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def _text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of a multimodal config; its own keys are audited here."""
    if not isinstance(hf["text_config"], Mapping):
        raise ValueError(f"config.json: text_config must be an object, got {hf['text_config']!r}")
    text = {k: v for k, v in hf["text_config"].items() if v is not None or k in NULLABLE}
    # transformers ties by the outer key
    tied = [part.get("tie_word_embeddings") for part in (hf, text)]
    text["tie_word_embeddings"] = next((t for t in tied if t is not None), True)
    outer = {k: v for k, v in hf.items() if k not in MULTIMODAL | {"tie_word_embeddings"}}
    outer = {k: v for k, v in outer.items() if v is not None}
    clash = {k: v for k, v in outer.items() if k in text and k not in IRRELEVANT and text[k] != v}
    if clash:
        raise ValueError(f"config.json: {clash} contradicts the same keys of text_config")
    return outer | text


def _audit(family: Family, hf: Mapping[str, Any]) -> None:
    """ValueError for every key that is neither handled nor listed as without effect."""
    if hf.get("quantization_config"):
        raise ValueError(
            "config.json: the weights are quantised (quantization_config: "
            f"{hf['quantization_config']}); dequantise them first, for example with dequantize() "
            "and save_pretrained() of transformers"
        )
    handled = set(COMMON_KEYS) | set(family.keys) | set(family.copies)
    handled |= {"hidden_act", "hidden_activation", "head_dim", "num_key_value_heads"}
    handled |= {"rope_parameters", "rope_scaling", "partial_rotary_factor", ORIGINAL_LENGTH}
    handled |= {*family.theta_keys, family.fraction_key, "layer_types"}
    fixed = FIXED | dict(family.fixed)
    if family.query_scalar:
        handled.add("query_pre_attn_scalar")
    if family.local == "tail":
        handled |= {"use_sliding_window", "max_window_layers"}
    else:  # transformers reads neither of them in these families
        handled |= {"max_window_layers"} if family.local == "none" else set()
        fixed["use_sliding_window"] = (False, family.local != "none")
    if family.local != "none" or hf.get("use_sliding_window") is False:
        handled.add("sliding_window")
    if family.local == "pattern":
        handled |= {"sliding_window_pattern", "_sliding_window_pattern"}
    refused = {}
    for key, value in hf.items():
        if value is None or key in IRRELEVANT:
            continue
        if (key not in fixed and key not in handled) or (key in fixed and value not in fixed[key]):
            refused[key] = value
    if refused:
        raise ValueError(
            f"config.json of a {family.name} model has settings that are not implemented: "
            + ", ".join(f"{k}={v!r}" for k, v in sorted(refused.items()))
            + ". If one does not change what the model computes, remove it from config.json"
        )


def _activation(family: Family, values: Mapping[str, Any]) -> str:
    name = values.get(family.act_key)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {family.act_key}={name!r} is not implemented; "
            f"expected one of {sorted(ACTIVATIONS)}"
        )
    # The first Gemma configs have 'gelu' for the tanh form, and transformers reads them so.
    names = ACTIVATIONS | ({"gelu": "gelu_tanh"} if family.name == "gemma" else {})
    activation = names[name]
    for key in ("hidden_act", "hidden_activation"):
        other = values.get(key)
        if other is not None and names.get(str(other)) != activation:
            raise ValueError(
                f"config.json: {key}={other!r} contradicts {family.act_key}={name!r}; "
                "keep the one the model was trained with"
            )
    return activation


def _local_layers(family: Family, values: Mapping[str, Any]) -> list[bool]:
    """By depth: whether the layer attends within `sliding_window` only."""
    depth, window = values["num_hidden_layers"], values.get("sliding_window")
    if window is not None and (type(window) is not int or not 0 < window <= LARGEST):
        raise ValueError(f"config.json: sliding_window={window!r}; expected a positive integer")
    if family.local == "none":
        window = None
    if family.local == "tail":
        window = window if _flag("use_sliding_window", values["use_sliding_window"]) else None
    types = values.get("layer_types")
    if types is not None:
        known = {"sliding_attention": True, "full_attention": False}
        fits = isinstance(types, list) and len(types) == depth
        if not fits or not all(isinstance(t, str) and t in known for t in types):
            raise ValueError(
                f"config.json: layer_types={types} ; expected {depth} entries, "
                f"each one of {sorted(known)}"
            )
        local = [known[t] for t in types]
        if any(local) and window is None:
            raise ValueError(
                "config.json: layer_types has sliding_attention but no sliding_window is in use"
            )
        if family.local == "all" and set(local) != {window is not None}:
            raise ValueError(
                f"config.json: layer_types={types} of a {family.name} model does not agree with "
                f"sliding_window={window}; the family has no alternating attention"
            )
        return local
    if family.local == "none":
        return [False] * depth
    if family.local == "pattern":
        if window is None:
            raise ValueError(f"config.json: sliding_window is null; {family.name} needs a number")
        n = values.get("_sliding_window_pattern") or values["sliding_window_pattern"]
        if type(n) is not int or n < 1:
            raise ValueError(
                f"config.json: sliding_window_pattern={n!r}; expected a positive integer"
            )
        return [bool((i + 1) % n) for i in range(depth)]
    first = 0 if family.local == "all" else values["max_window_layers"]
    if type(first) is not int:
        raise ValueError(f"config.json: max_window_layers={first!r}; expected an integer")
    return [window is not None and i >= first for i in range(depth)]


def _local_to_hf(family: Family, cfg: DecoderConfig) -> dict[str, Any]:
    windows = cfg.windows or (0,) * cfg.depth
    types = ["sliding_attention" if w else "full_attention" for w in windows]
    out = {"sliding_window": max(windows) or None}
    if family.local == "tail":
        out |= {"use_sliding_window": any(windows), "max_window_layers": cfg.depth}
    return out if family.local == "all" else out | {"layer_types": types}
