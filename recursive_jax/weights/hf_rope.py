"""Rope settings of a `config.json`, in their old and new keys, to `Rope` and back.

transformers 5 keeps them in `rope_parameters`. transformers 4 kept them in `rope_scaling` and in
keys of their own, such as `rope_theta`. A file may state a setting several times, with one value.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from recursive_jax.models.config import DecoderConfig, Rope
from recursive_jax.weights.families import Family

ORIGINAL_LENGTH = "original_max_position_embeddings"
LAYER_TYPES = ("full_attention", "sliding_attention")  # order of `Rope`s and of `theta_keys`


class RopeType(NamedTuple):
    """A `rope_type` of transformers."""

    scaling: str  # of `Rope`
    needed: Mapping[str, str] = {}  # key -> field of `Rope`
    optional: Mapping[str, str] = {}
    others: tuple[str, ...] = ()  # optional keys from which a field is computed


ROPE_TYPES = {
    "default": RopeType("none"),
    "linear": RopeType("linear", {"factor": "factor"}),
    "llama3": RopeType(
        "llama3",
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            ORIGINAL_LENGTH: "original_length",
        },
    ),
    "yarn": RopeType(
        "yarn",
        {"factor": "factor", ORIGINAL_LENGTH: "original_length"},
        {name: name for name in ("attention_factor", "beta_fast", "beta_slow", "truncate")},
        ("mscale", "mscale_all_dim"),
    ),
}
# Settings beside a type that does not read them: any value, or one value only.
UNREAD = (ORIGINAL_LENGTH, "finetuned")
NEUTRAL = {"factor": 1, "attention_factor": 1}


def ropes_from_hf(family: Family, values: Mapping[str, Any]) -> tuple[tuple[Rope, ...], float]:
    """Rope kinds, (full,) or (full, sliding), and the share of head_dim that is rotated.

    Args:
      family: of the model.
      values: `config.json`, with `max_position_embeddings`.

    Raises:
      ValueError: settings contradict each other, are no numbers, or are not implemented.
    """
    new = _object(values, "rope_parameters")
    kinds = LAYER_TYPES if family.rope_by_layer_type else (None,)
    if family.rope_by_layer_type and set(new) - set(kinds):
        raise ValueError(
            f"config.json: rope_parameters has keys {sorted(set(new) - set(kinds))}; a "
            f"{family.name} model has one entry per layer type, {list(kinds)}"
        )
    ropes, fractions = [], set()
    for i, kind in enumerate(kinds):
        settings, keys = _merged(_stated(family, values, i, kind))
        settings.setdefault("rope_theta", family.default_thetas[i])
        fraction = settings.pop("partial_rotary_factor", family.default_fraction)
        fractions.add(number(keys.get("partial_rotary_factor"), fraction))
        ropes.append(_rope(settings, keys, values["max_position_embeddings"]))
    if len(fractions) > 1 or (fractions != {1.0} and not family.fraction_key):
        raise ValueError(
            f"config.json: partial_rotary_factor {sorted(fractions)} of a {family.name} model "
            "is not implemented; expected 1.0"
        )
    return tuple(ropes), fractions.pop()


def ropes_to_hf(family: Family, cfg: DecoderConfig) -> dict[str, Any]:
    """Rope keys of `config.json` for transformers 5 (rope_parameters) and 4 (all others)."""
    type_names = {rope_type.scaling: name for name, rope_type in ROPE_TYPES.items()}
    entries = []
    for rope in cfg.ropes:
        name = type_names[rope.scaling]
        fields = ROPE_TYPES[name].needed | ROPE_TYPES[name].optional
        entries.append(
            {"rope_theta": rope.theta, "rope_type": name}
            | {theirs: getattr(rope, ours) for theirs, ours in fields.items()}
        )
    out = {key: rope.theta for key, rope in zip(family.theta_keys, cfg.ropes, strict=False)}
    scaling = {k: v for k, v in entries[0].items() if k != "rope_theta"}
    out["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if family.fraction_key:
        out[family.fraction_key] = cfg.rotary_fraction
        entries[0]["partial_rotary_factor"] = cfg.rotary_fraction
    if family.rope_by_layer_type:
        return out | {"rope_parameters": dict(zip(LAYER_TYPES, entries, strict=False))}
    return out | {"rope_parameters": entries[0]}


def number(key: str | None, value: Any, zero: bool = False) -> float:
    """`value` of a key as a float; ValueError unless finite and above 0 (or 0, if `zero`)."""
    fits = type(value) in (int, float) and abs(value) <= sys.float_info.max  # not NaN either
    if not fits or value < 0 or (value == 0 and not zero):
        kind = "a number of at least 0" if zero else "a number above 0"
        raise ValueError(f"config.json: {key} must be {kind}, got {value!r}")
    return float(value)


def _object(values: Mapping[str, Any], key: str, inside: str = "") -> Mapping[str, Any]:
    """The object `values[key]`, empty where it is absent or null."""
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json: {inside}{key} must be an object or null, got {found!r}")
    return found


def _stated(
    family: Family, values: Mapping[str, Any], i: int, kind: str | None
) -> Iterator[tuple[str, str, Any]]:
    """(setting, its key in `config.json`, value) of rope kind `i`, wherever they are stated."""
    yield "rope_theta", family.theta_keys[i], values.get(family.theta_keys[i])
    fraction_key = family.fraction_key or "partial_rotary_factor"
    yield "partial_rotary_factor", fraction_key, values.get(fraction_key)
    objects = [("rope_parameters.", _object(values, "rope_parameters"))]
    if kind is not None:
        entry = _object(objects[0][1], kind, "rope_parameters.")
        objects = [(f"rope_parameters.{kind}.", entry)]
    if i == 0:  # these apply to the full-attention layers only
        yield ORIGINAL_LENGTH, ORIGINAL_LENGTH, values.get(ORIGINAL_LENGTH)
        objects = [("rope_scaling.", _object(values, "rope_scaling")), *objects]
    for prefix, settings in objects:
        for name, value in settings.items():
            if name == "type":  # the old name of rope_type, which has priority
                if settings.get("rope_type") is not None:
                    continue
                name = "rope_type"
            yield name, prefix + name, value


def _merged(stated: Iterator[tuple[str, str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings by name, and the key each comes from; null counts as absent."""
    settings: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for name, key, value in stated:
        if value is None:
            continue
        if name in settings and settings[name] != value:
            raise ValueError(
                f"config.json: {keys[name]}={settings[name]!r} and {key}={value!r} disagree; "
                "keep the one the model was trained with"
            )
        settings[name], keys[name] = value, key
    return settings, keys


def _rope(settings: Mapping[str, Any], keys: Mapping[str, str], max_length: int) -> Rope:
    given = dict(settings)
    name, theta = given.pop("rope_type", "default"), given.pop("rope_theta")
    rope_type = ROPE_TYPES.get(name) if isinstance(name, str) else None
    if rope_type is None:
        raise ValueError(
            f"config.json: rope scaling {name!r} is not implemented, got {settings}; "
            f"expected one of {sorted(ROPE_TYPES)}"
        )
    if ORIGINAL_LENGTH in rope_type.needed:
        given.setdefault(ORIGINAL_LENGTH, max_length)
    known = {*rope_type.needed, *rope_type.optional, *rope_type.others}
    for key in set(given) - known:
        if key in UNREAD or given[key] == NEUTRAL.get(key):
            del given[key]
    unknown, missing = set(given) - known, set(rope_type.needed) - set(given)
    if unknown or missing:
        raise ValueError(
            f"config.json: rope settings {dict(settings)} of type {name!r} have unknown keys "
            f"{sorted(unknown)} and miss {sorted(missing)}"
        )
    for key, value in given.items():
        if key != "truncate":
            number(keys.get(key), value)
        elif not isinstance(value, bool):
            raise ValueError(f"config.json: {keys[key]} must be true or false, got {value!r}")
    fields = rope_type.needed | rope_type.optional
    fields = {ours: given[theirs] for theirs, ours in fields.items() if theirs in given}
    if name == "yarn":
        fields.setdefault("attention_factor", _yarn_attention_factor(given))
    return Rope(number(keys.get("rope_theta"), theta), rope_type.scaling, **fields)


def _yarn_attention_factor(settings: Mapping[str, Any]) -> float:
    """The factor of cos and sin where the settings do not give it, as transformers computes it."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(max(settings["factor"], 1)) + 1

    if "mscale" in settings and "mscale_all_dim" in settings:
        return scale(settings["mscale"]) / scale(settings["mscale_all_dim"])
    return scale(1)
