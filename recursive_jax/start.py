"""The model that a training run starts from: a run, a checkpoint, a source, or random weights."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from recursive_jax import paths
from recursive_jax.console.output import note
from recursive_jax.model import Model, load
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import init_params
from recursive_jax.text import load_tokenizer
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import ASSETS
from recursive_jax.weights.stored import ArrayWeights
from recursive_jax.weights.tie_config import TieConfig, tied_config


@dataclasses.dataclass
class Start:
    """A model before its first step.

    Attributes:
      cfg, tokenizer: of the model.
      origin: in words, for the start-up table.
      make: makes the model; a conversion happens here.
      resumes: the run in the workdir goes on.
    """

    cfg: DecoderConfig
    tokenizer: Any
    origin: str
    make: Callable[[], Model]
    resumes: bool = False


def choose(
    config: Any, source: Model | None, workdir: str | os.PathLike, strict: bool = False
) -> Start:
    """The model to start from, by the first that exists: workdir, init_from, source, scratch.

    Nothing is converted yet, but an impossible recipe is refused.

    Args:
      config: a ConfigDict as `configs/common.py` makes it.
      source: the opened `config.source`.
      workdir: of the run.
      strict: as in `load`.

    Raises:
      ValueError: nothing to start from, an impossible recipe, or a run of another model.
    """
    recipe = make_recipe(config, source)
    if checkpoint.latest_step(workdir) is not None:
        check_recipe(workdir, recipe)
        model = load(workdir, strict=strict)
        return Start(model.cfg, model.tokenizer, f"resumed from {workdir}", lambda: model, True)
    checkpoint.check_ours(workdir)  # nothing else there is read: it is made anew
    if config.init_from:
        checkpoint.load_config(config.init_from)  # raises where there is no checkpoint
        model = load(config.init_from, strict=strict)
        start = Start(model.cfg, model.tokenizer, f"checkpoint {config.init_from}", lambda: model)
    elif source is not None and config.model.reduced_baseline:
        start = reduced_baseline(source, config.model.num_loops, config.seed)
    elif source is not None:
        start = converted(source, tie_config(config))
    elif config.scratch:
        start = from_scratch(config.scratch.to_dict(), config.tokenizer, config.seed)
    else:
        raise ValueError(
            "nothing to train: set --config.source=MODEL (Hugging Face directory, .gguf, hub id "
            "or 'tiny'), --config.init_from=CHECKPOINT, or config.scratch"
        )
    make = start.make

    def with_recipe() -> Model:
        model = make()
        return dataclasses.replace(model, facts=model.facts | {"recipe": recipe})

    return dataclasses.replace(start, make=with_recipe)


def tie_config(config: Any) -> TieConfig:
    """The conversion that a config's `model` section describes."""
    values = config.model.to_dict()
    values.pop("reduced_baseline")
    return TieConfig.from_json(values | {"seed": config.seed})


def converted(source: Model, how: TieConfig) -> Start:
    """A pretrained model, tied; one loop without LoRA leaves it as it is."""
    if how.num_loops == 1 and not how.has_lora and not how.prefix_length:
        return Start(source.cfg, source.tokenizer, f"{source.name}, as it is", lambda: source)
    if how.lora_budget is not None:  # the ranks, and with them the config, follow from the fit
        model = source.convert(how)
        return Start(model.cfg, model.tokenizer, model.name, lambda: model)
    cfg = tied_config(source.cfg, how)
    return Start(cfg, source.tokenizer, f"{source.name}, tied", lambda: source.convert(how))


def reduced_baseline(source: Model, num_loops: int, seed: int) -> Start:
    """The paper's reduced-size baseline (§3.2): depth / num_loops layers, random, run once."""
    tied_config(source.cfg, TieConfig(num_loops))  # raises for an impossible count
    cfg = source.cfg.at_depths(range(source.cfg.depth // num_loops))
    return _random(cfg, source.tokenizer, seed, source.facts, "random, reduced size")


def from_scratch(decoder: Mapping[str, Any], tokenizer: str, seed: int) -> Start:
    """A model of random weights.

    `decoder`: fields of DecoderConfig. `tokenizer`: a directory, or 'tiny'.
    """
    cfg = DecoderConfig.from_json(decoder)
    directory = ASSETS / "tiny" if tokenizer == "tiny" else tokenizer
    return _random(cfg, load_tokenizer(directory), seed, {}, "random weights")


def _random(cfg: DecoderConfig, tokenizer: Any, seed: int, facts: Any, origin: str) -> Start:
    def make() -> Model:
        params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(seed))
        weights = ArrayWeights(checkpoint.as_numpy(params), origin)
        return Model(cfg, tokenizer, weights, origin, dict(facts))

    return Start(cfg, tokenizer, origin, make)


# What a resumed run must have started from


def make_recipe(config: Any, source: Model | None) -> dict[str, Any]:
    """Where the model of a config comes from, as JSON; stored with the run."""
    init_from = config.init_from
    recipe = {
        "source": config.source,
        "source_content": source.weights.content() if source is not None else None,
        "init_from": init_from,
        "init_from_content": _content_of(init_from) if init_from else None,
        # A checkpoint determines its model: these sections do not apply to it.
        "scratch": None if init_from else config.scratch.to_dict(),
        "model": None,
    }
    if not init_from:
        recipe["model"] = _model_section(tie_config(config), config.model.reduced_baseline)
    return json.loads(json.dumps(recipe))  # as it is read from config.json: lists, no tuples


def check_recipe(workdir: str | os.PathLike, recipe: Mapping[str, Any]) -> None:
    """Raise ValueError, with both values, if the run in `workdir` has another recipe.

    Keys that an older version did not record have today's defaults. A source or `init_from` is
    compared by content, so that it may have been moved; another one at the same path is another
    model.
    """
    facts = checkpoint.load_config(workdir)[1]
    there = dict(facts.get("recipe") or {})
    if there.get("model") is not None:
        how, baseline = TieConfig.from_json(there["model"]), there["model"].get("reduced_baseline")
        section = _model_section(how, bool(baseline))
        if "metric" not in there["model"] and recipe["model"] is not None:
            section |= _before_calibration(section, recipe["model"])
        there["model"] = section
    names = [name for name in recipe if not name.endswith("_content")]
    for name in ("source", "init_from"):
        if _same_model(there, recipe, name):
            there[name] = recipe[name]
        elif there.get(name) == recipe[name]:
            names.append(f"{name}_content")  # checksums: the files were replaced
    changed = [name for name in names if there.get(name) != recipe[name]]
    if changed:
        differences = "; ".join(
            f"{name} was {_brief(there.get(name), recipe[name])}, "
            f"now {_brief(recipe[name], there.get(name))}"
            for name in changed
        )
        raise ValueError(
            f"{workdir} holds a run of another model: {differences}. "
            "Give another --workdir, or the config it was started with"
        )


def _model_section(how: TieConfig, reduced_baseline: bool) -> dict[str, Any]:
    section = how.to_json() | {"reduced_baseline": reduced_baseline}
    del section["seed"]  # of the whole run: `RunContract` compares it
    return section


def _before_calibration(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a record lacks that is older than the joint start. Its default start was 'svd'."""
    values = {name: now[name] for name in ("metric", "calibrate", "calibration_tokens")}
    if then["lora_init"] is None and now["lora_init"] is not None:
        values["lora_init"] = "svd"
    return values


def _content_of(directory: str) -> int | None:
    """A checksum of the weights in a checkpoint; None if they cannot be read any more."""
    try:
        return checkpoint.params_checksum(directory, say=note)[1]
    except (OSError, ValueError):  # a run that goes on does not need it
        return None


def _same_model(there: Mapping[str, Any], here: Mapping[str, Any], name: str) -> bool:
    """Whether `name` is one model in two recipes: its content or, where unknown, its path."""
    contents = there.get(f"{name}_content"), here.get(f"{name}_content")
    if None not in contents:
        return contents[0] == contents[1]
    places = [there.get(name) or "", here.get(name) or ""]
    return all(places) and len({str(paths.resolved(place)) for place in places}) == 1


def _brief(value: Any, other: Any) -> Any:
    """The value; of two mappings only the entries that differ."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return {k: v for k, v in value.items() if other.get(k) != v}
    return repr(value)
