"""What all processes of a training run must have in common, by name, and how it is compared."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import jax

from recursive_jax import hosts, text
from recursive_jax.model import Model
from recursive_jax.training.contract import RunContract

# Files may have another path on each host: their content is compared instead.
PATHS = ("source", "init_from", "tokenizer", "data.train", "data.valid", "data.cache_dir")
PATHS += ("data.teacher",)
PACKAGES = (
    *("recursive_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"),
    *("numpy", "tokenizers", "transformers"),
)


def agree_on_start(config: Mapping[str, Any], source: Model | None) -> None:
    """Return if all processes start the same run; before anything is written or compiled.

    Args:
      config: of the run, as nested mappings.
      source: the opened source.

    Raises:
      ValueError: on every process; names what differs, the processes and the values.
      hosts.MissingHosts, hosts.OtherHostFailed: as `hosts.decide`.
    """
    if jax.process_count() == 1:
        return
    settings = hosts.flatten(config, "config.")
    for path in PATHS:
        settings.pop(f"config.{path}", None)
    facts = {
        **settings,
        "source (content)": source and source.weights.content(),
        "tokenizer of the source": source and text.fingerprint(source.tokenizer),
        "devices of this host": [jax.local_device_count(), jax.local_devices()[0].device_kind],
        **{f"version of {name}": _version(name) for name in PACKAGES},
    }
    hosts.agree({name: _plain(value) for name, value in facts.items()}, "the start")


def agree_on_text(contract: RunContract, tokenizer: Any, rows: int) -> None:
    """Return if all processes have the same text, tokenizer and contract; errors as above.

    Args:
      contract: of the run, with hashes of its text.
      tokenizer: of the model.
      rows: of an epoch.
    """
    if jax.process_count() == 1:
        return
    facts = {
        **contract.to_json(),
        "tokenizer": text.fingerprint(tokenizer),
        "rows of text": rows,
    }
    hosts.agree(hosts.flatten({k: _plain(v) for k, v in facts.items()}), "the text")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """The value, if it is JSON; else its text."""
    simple = isinstance(value, str | int | float | bool | None)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value if simple else str(value)
