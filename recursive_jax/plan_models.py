"""The models of a config, from descriptions alone: no weights and no tokenizer are read."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import re
from typing import Any

from recursive_jax import start
from recursive_jax.model import Model
from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights import checkpoint, hf, hf_config, own_format
from recursive_jax.weights.source import open_source

# Hub id -> name of the preset that equals its config.json. These need no network and no licence.
PUBLISHED = {
    "google/gemma-2b": "gemma_2b",
    "google/gemma-2-2b": "gemma2_2b",
    "google/gemma-3-270m": "gemma3_270m",
    "google/gemma-3-1b-pt": "gemma3_1b",
    "meta-llama/Llama-3.2-1B": "llama3_2_1b",
    "TinyLlama/TinyLlama-1.1B-step-50K-105b": "tinyllama_1_1b",
    "TinyLlama/TinyLlama_v1.1": "tinyllama_1_1b",
    "HuggingFaceTB/SmolLM2-135M": "smollm2_135m",
    "HuggingFaceTB/SmolLM2-360M": "smollm2_360m",
    "EleutherAI/pythia-410m": "pythia_410m",
    "EleutherAI/pythia-1b": "pythia_1b",
    "Qwen/Qwen2-0.5B": "qwen2_0_5b",
    "Qwen/Qwen3-0.6B": "qwen3_0_6b",
    "mistralai/Mistral-7B-v0.1": "mistral_7b",
}


class NoWeights:
    """Stands for the weights of a model of which only the config is known."""

    def content(self) -> None:
        """None: no fingerprint."""


@dataclasses.dataclass(frozen=True)
class PlannedModels:
    """What a run trains, and distils from.

    Attributes:
      student: config of the model that is trained.
      source: config of the pretrained model; None without.
      origin: of the student, in words.
    """

    student: DecoderConfig
    source: DecoderConfig | None
    origin: str


def planned_models(config: Any) -> PlannedModels:
    """The models of a config, a ConfigDict as `configs/common.py` makes it.

    A `lora_budget` becomes one rank for all projections, of the same number of parameters.

    Raises:
      ValueError, OSError: an impossible recipe, or a source whose config cannot be read.
    """
    if config.objective.kd and not config.source and not config.data.teacher:
        raise ValueError("objective.kd > 0 needs the model to distil from: set --config.source")
    source = None
    if config.source:
        source = Model(source_config(config.source), None, NoWeights(), config.source)
    if config.init_from:
        cfg = checkpoint.load_config(config.init_from)[0]
        return PlannedModels(cfg, source and source.cfg, f"checkpoint {config.init_from}")
    config = copy.deepcopy(config)
    budget = config.model.lora_budget
    if source is not None and budget is not None:
        sizes = list(source.cfg.projections.values())
        share = sum(n * m for n, m in sizes) / sum(n + m for n, m in sizes)
        config.model.lora_budget = None
        config.model.lora_rank = max(round(budget * share), 1)
    begin = start.choose(config, source, "/nonexistent")
    return PlannedModels(begin.cfg, source and source.cfg, begin.origin)


def source_config(spec: str) -> DecoderConfig:
    """The config of a source. Of a hub id at most its config.json is downloaded.

    Raises:
      ValueError, OSError: not there, not understood, or the hub cannot be reached.
    """
    path = pathlib.Path(spec).expanduser()
    if spec in PUBLISHED and not path.exists():
        return hf_config.preset(PUBLISHED[spec])
    if checkpoint.is_checkpoint(spec):
        return checkpoint.load_config(spec)[0]
    if path.is_dir() and not own_format.is_ours(path):
        return hf.load_config(path)
    if path.exists() or spec == "tiny" or not re.fullmatch(r"[\w][\w.-]*/[\w.-]+", spec):
        return open_source(spec).cfg  # headers only
    try:
        from huggingface_hub import hf_hub_download

        return hf.load_config(pathlib.Path(hf_hub_download(spec, "config.json")).parent)
    except ImportError as error:
        raise FileNotFoundError(
            f"{spec} does not exist here. If it is a hub id: pip install 'recursive_jax[hub]'"
        ) from error
    except Exception as error:  # the hub client raises many kinds
        reason = next(iter(str(error).strip().splitlines()), "")
        raise FileNotFoundError(
            f"the config of {spec} could not be downloaded ({type(error).__name__}: {reason}); "
            "give a directory with its config.json: --config.source=DIR"
        ) from error
