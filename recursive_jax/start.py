"""The model that a training run starts from: a run, a checkpoint, a source, or random weights."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import init_params
from recursive_jax.weights import checkpoint, tying
from recursive_jax.weights.source import ASSETS, Source


@dataclasses.dataclass
class Start:
    """A model before its first step.

    Attributes:
      params: nested float32 host arrays; None when a checkpoint has them.
      cfg: their config.
      tokenizer: of transformers.
      facts: JSON for the checkpoint's config.json (source, tying, ...).
      origin: of the model, in words for the start-up table.
      checkpoint: directory of the params if it is another than the run's. They are read from there
        straight onto their devices.
      step: of that checkpoint; None for the newest.
      certificate: of a conversion, without measurements on text.
    """

    params: Any
    cfg: DecoderConfig
    tokenizer: Any
    facts: dict[str, Any]
    origin: str
    checkpoint: str | os.PathLike | None = None
    step: int | None = None
    certificate: dict[str, Any] | None = None


def from_workdir(workdir: str | os.PathLike, recipe: Mapping[str, Any]) -> Start | None:
    """The run in `workdir`, None when no step has been saved there.

    Raises:
      ValueError: the run there has another recipe.
    """
    workdir = pathlib.Path(workdir)
    if checkpoint.latest_step(workdir) is None:
        checkpoint.check_ours(workdir)  # nothing else there is read: it is made anew
        return None
    cfg, facts = checkpoint.load_config(workdir)
    there = facts.get("recipe") or {}
    changed = [name for name in recipe if there.get(name) != recipe[name]]
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another model: {', '.join(changed)} differ from this "
            "config. Give another --workdir, or the config it was started with"
        )
    return Start(None, cfg, _tokenizer(workdir / "tokenizer"), facts, f"resumed from {workdir}")


def from_checkpoint(directory: str | os.PathLike, step: int | None = None) -> Start:
    """The model of a checkpoint that `convert` or another run has written. `step` None: newest."""
    cfg, facts = checkpoint.load_config(directory)
    checkpoint.load_progress(directory, step)  # raises where there is no readable step
    facts = {k: v for k, v in facts.items() if k not in ("format", "versions", "recipe")}
    tokenizer = _tokenizer(pathlib.Path(directory) / "tokenizer")
    origin = f"checkpoint {directory}" + ("" if step is None else f", step {step}")
    return Start(None, cfg, tokenizer, facts, origin, directory, step)


def from_source(source: Source, recipe: Mapping[str, Any], tie: Callable) -> Start:
    """A pretrained model, tied by `recipe` (arguments of `tying.tie`); one loop leaves it as it is.

    `tie(source, recipe)` returns params, config and certificate
    (`certificate.tie_with_certificate`).
    """
    facts = {"source": str(source.path), "generation_config": source.generation_config}
    tokenizer = source.load_tokenizer()
    if recipe["num_loops"] == 1 and not recipe["lora_ranks"]:
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), source.load_params())
        return Start(params, source.cfg, tokenizer, facts, f"{source.path}, as it is")
    params, cfg, certificate = tie(source, recipe)
    facts["tying"] = dict(recipe)
    origin = f"{source.path}, tied"
    return Start(params, cfg, tokenizer, facts, origin, certificate=certificate)


def reduced_baseline(source: Source, num_loops: int, seed: int) -> Start:
    """The paper's reduced-size baseline (§3.2): depth / num_loops layers, random, run once."""
    tying.tied_config(source.cfg, num_loops)  # raises for an impossible count
    cfg = source.cfg.at_depths(range(source.cfg.depth // num_loops))
    facts = {"source": str(source.path), "generation_config": source.generation_config}
    return Start(_random(cfg, seed), cfg, source.load_tokenizer(), facts, "random, reduced size")


def from_scratch(decoder: Mapping[str, Any], tokenizer: str, seed: int) -> Start:
    """A model of random weights.

    `decoder`: fields of DecoderConfig. `tokenizer`: a directory, or 'tiny'.
    """
    cfg = DecoderConfig.from_json(decoder)
    directory = ASSETS / "tiny" if tokenizer == "tiny" else tokenizer
    return Start(_random(cfg, seed), cfg, _tokenizer(directory), {}, "random weights")


def _random(cfg: DecoderConfig, seed: int):
    return checkpoint.as_numpy(jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(seed)))


def _tokenizer(directory):
    from recursive_jax.text import load_tokenizer

    return load_tokenizer(directory)
