"""Hugging Face `config.json` to `DecoderConfig` and back. Each family is a row of `families`.

`config_from_hf` refuses every key that it does not implement, by name. Skipping a key that changes
the mathematics would give a model that runs and is wrong. `config_to_hf` is its inverse. `preset`
returns full-size configs by name, for shapes, costs and parameter counts.

To add a family: add a row to `families`, a name table in `weights.hf`, a case in
`tests/test_hf_consistency.py`, and run `tests/golden/generate.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from recursive_jax.models.config import DecoderConfig, Rope
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
    ROPE_TYPES,
    Family,
)

SIZES = (
    "vocab_size embed_dim mlp_dim num_layers num_heads num_kv_heads max_length head_dim"
).split()


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` of a parsed Hugging Face `config.json`.

    Raises:
      ValueError: the model type, a key or a value is not implemented; the message names it.
    """
    family = MODEL_TYPES.get(hf.get("model_type"))
    if family is None:
        raise ValueError(
            f"config.json: model_type {hf.get('model_type')!r} is not supported; "
            f"expected one of {sorted(MODEL_TYPES)}"
        )
    if "text_config" in hf:
        hf = _text_config(hf)
    _audit(family, hf)
    values = dict(family.defaults) | dict(hf)
    fields = {"family": family.name, **family.fields}
    for key, names in (COMMON_KEYS | dict(family.keys)).items():
        if key not in values and key not in HEADS:
            raise ValueError(f"config.json: {key!r} is missing; a {family.name} model needs it")
        fields |= dict.fromkeys(names, values.get(key))
    fields["num_kv_heads"] = fields.get("num_kv_heads") or fields["num_heads"]
    for name in SIZES:
        if name == "head_dim" and not fields.get(name):
            fields[name] = fields["embed_dim"] // fields["num_heads"]
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(
                f"config.json: {name} must be a positive integer, got {fields[name]!r}"
            )
    fields["activation"] = _activation(family, values)
    if family.query_scalar and values["query_pre_attn_scalar"] != fields["head_dim"]:
        fields["query_scale"] = values["query_pre_attn_scalar"] ** -0.5
    if family.scaled_embedding:
        fields["embed_scale"] = fields["embed_dim"] ** 0.5
    is_local = _local_layers(family, values)
    if any(is_local):
        fields["windows"] = tuple(values["sliding_window"] if loc else 0 for loc in is_local)
    ropes, fields["rotary_fraction"] = _ropes(family, values)
    fields["ropes"] = ropes
    if family.rope_by_layer_type:
        fields["rope_of_depth"] = tuple(int(loc) for loc in is_local)
    return DecoderConfig(**fields)


def config_to_hf(cfg: DecoderConfig) -> dict[str, Any]:
    """A `config.json` for a vanilla `cfg` that transformers accepts; inverse of `config_from_hf`.

    Rope keys are written in the old and in the new form. Token ids are null: the caller adds those
    of the tokenizer.

    Raises:
      ValueError: `cfg` has loops, or settings that transformers has no key for in this family.
    """
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
    hf |= _rope_to_hf(family, cfg)
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


def preset(name: str) -> DecoderConfig:
    """The config of a published model, for shapes and costs; see `PRESETS` for the names."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; expected one of {sorted(PRESETS)}")
    return config_from_hf(PRESETS[name])


def _text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of a multimodal config; its own keys are audited here."""
    text = dict(hf["text_config"])
    # transformers ties by the outer key
    text["tie_word_embeddings"] = hf.get(
        "tie_word_embeddings", text.get("tie_word_embeddings", True)
    )
    outer = {k: v for k, v in hf.items() if k not in MULTIMODAL | {"tie_word_embeddings"}}
    clash = {k: v for k, v in outer.items() if k in text and k not in IRRELEVANT and text[k] != v}
    if clash:
        raise ValueError(f"config.json: {clash} contradicts the same keys of text_config")
    return outer | text


def _audit(family: Family, hf: Mapping[str, Any]) -> None:
    """ValueError for every key that is neither handled nor listed as irrelevant."""
    handled = set(COMMON_KEYS) | set(family.keys) | {"hidden_act", "hidden_activation"}
    handled |= {"rope_parameters", "rope_scaling", "partial_rotary_factor", *family.theta_keys}
    handled |= {family.fraction_key, "head_dim", "num_key_value_heads"}
    if family.query_scalar:
        handled.add("query_pre_attn_scalar")
    if family.local != "none":
        handled |= {"sliding_window", "layer_types"}
    if family.local == "pattern":
        handled |= {"sliding_window_pattern", "_sliding_window_pattern"}
    if family.local == "tail":
        handled |= {"use_sliding_window", "max_window_layers"}
    fixed = FIXED | dict(family.fixed)
    refused = {}
    for key, value in hf.items():
        if key in fixed and value not in fixed[key]:
            refused[key] = value
        elif key not in handled and key not in IRRELEVANT and key not in fixed:
            refused[key] = value
    if refused:
        raise ValueError(
            f"config.json of a {family.name} model has settings that are not implemented: "
            + ", ".join(f"{k}={v!r}" for k, v in sorted(refused.items()))
            + ". If one does not change what the model computes, remove it from config.json"
        )


def _activation(family: Family, values: Mapping[str, Any]) -> str:
    name = values.get(family.act_key)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {family.act_key}={name!r} is not implemented; "
            f"expected one of {sorted(ACTIVATIONS)}"
        )
    # The first Gemma configs have 'gelu' for the tanh form, and transformers reads them so.
    names = ACTIVATIONS | ({"gelu": "gelu_tanh"} if family.name == "gemma" else {})
    activation = names[name]
    for key in ("hidden_act", "hidden_activation"):
        other = values.get(key)
        if other is not None and names.get(other) != activation:
            raise ValueError(
                f"config.json: {key}={other!r} contradicts {family.act_key}={name!r}; "
                "keep the one the model was trained with"
            )
    return activation


def _local_layers(family: Family, values: Mapping[str, Any]) -> list[bool]:
    """By depth: whether the layer attends within `sliding_window` only."""
    depth, window = values["num_hidden_layers"], values.get("sliding_window")
    if family.local == "none":
        return [False] * depth
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"config.json: sliding_window={window!r}; expected a positive integer")
    if family.local == "tail" and not values["use_sliding_window"]:
        window = None
    types = values.get("layer_types")
    if types is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if len(types) != depth or not set(types) <= set(known):
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
    return [window is not None and i >= first for i in range(depth)]


def _local_to_hf(family: Family, cfg: DecoderConfig) -> dict[str, Any]:
    windows = cfg.windows or (0,) * cfg.depth
    types = ["sliding_attention" if w else "full_attention" for w in windows]
    out = {"sliding_window": max(windows) or None}
    if family.local == "tail":
        out |= {"use_sliding_window": any(windows), "max_window_layers": cfg.depth}
    return out if family.local == "all" else out | {"layer_types": types}


def _ropes(family: Family, values: Mapping[str, Any]) -> tuple[tuple[Rope, ...], float]:
    """Rope kinds, (full,) or (full, sliding), and the share of head_dim that is rotated."""
    new = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    kinds = ("full_attention", "sliding_attention") if family.rope_by_layer_type else (None,)
    if family.rope_by_layer_type and set(new) - set(kinds):
        raise ValueError(
            f"config.json: rope_parameters has keys {sorted(set(new) - set(kinds))}; a "
            f"{family.name} model has one entry per layer type, {list(kinds)}"
        )
    ropes, fractions = [], set()
    for i, kind in enumerate(kinds):
        # Scaling in its old form applies to the full-attention layers only.
        merged = dict(scaling) if i == 0 else {}
        if "type" in merged:
            merged.setdefault("rope_type", merged.pop("type"))
        for old, key in ((family.theta_keys[i], "rope_theta"),) + tuple(
            (old, "partial_rotary_factor")
            for old in (family.fraction_key, "partial_rotary_factor")
            if old
        ):
            if values.get(old) is not None:
                merged.setdefault(key, values[old])
        current = dict(new if kind is None else new.get(kind) or {})
        clash = {k: (merged[k], v) for k, v in current.items() if merged.get(k, v) != v}
        if clash:
            raise ValueError(
                f"config.json: old and new rope settings disagree, as (old, new): {clash}"
            )
        params = {
            "rope_theta": family.default_thetas[i],
            "partial_rotary_factor": family.default_fraction,
            **merged,
            **current,
        }
        fractions.add(float(params.pop("partial_rotary_factor")))
        ropes.append(_rope(params, values["max_position_embeddings"]))
    if len(fractions) > 1 or (fractions != {1.0} and not family.fraction_key):
        raise ValueError(
            f"config.json: partial_rotary_factor {sorted(fractions)} of a {family.name} model "
            "is not implemented; expected 1.0"
        )
    return tuple(ropes), fractions.pop()


def _rope(params: Mapping[str, Any], max_length: int) -> Rope:
    given = dict(params)
    rope_type, theta = given.pop("rope_type", None) or "default", given.pop("rope_theta")
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"config.json: rope scaling {rope_type!r} is not implemented, got {params}; "
            f"expected one of {sorted(ROPE_TYPES)}"
        )
    scaling, names = ROPE_TYPES[rope_type]
    if rope_type == "llama3":
        given.setdefault("original_max_position_embeddings", max_length)
    if set(given) != set(names):
        raise ValueError(
            f"config.json: rope settings {params} of type {rope_type!r} have unknown keys "
            f"{sorted(set(given) - set(names))} and miss {sorted(set(names) - set(given))}"
        )
    fields = {ours: given[theirs] for theirs, ours in names.items()}
    return Rope(theta=float(theta), scaling=scaling, **fields)


def _rope_to_hf(family: Family, cfg: DecoderConfig) -> dict[str, Any]:
    """Rope keys of `config.json` for transformers 5 (rope_parameters) and 4 (all others)."""
    scaling_names = {ours: theirs for theirs, (ours, _) in ROPE_TYPES.items()}
    entries = []
    for rope in cfg.ropes:
        rope_type = scaling_names[rope.scaling]
        names = ROPE_TYPES[rope_type][1]
        entries.append(
            {"rope_theta": rope.theta, "rope_type": rope_type}
            | {theirs: getattr(rope, ours) for theirs, ours in names.items()}
        )
    out = {key: rope.theta for key, rope in zip(family.theta_keys, cfg.ropes, strict=False)}
    scaling = {k: v for k, v in entries[0].items() if k != "rope_theta"}
    out["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if family.fraction_key:
        out[family.fraction_key] = cfg.rotary_fraction
        entries[0]["partial_rotary_factor"] = cfg.rotary_fraction
    if family.rope_by_layer_type:
        kinds = ("full_attention", "sliding_attention")
        return out | {"rope_parameters": dict(zip(kinds, entries, strict=False))}
    return out | {"rope_parameters": entries[0]}
