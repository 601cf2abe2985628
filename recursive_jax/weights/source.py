"""Models to start from, opened lazily: Hugging Face directory, GGUF file, hub id, or our export."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import leaves
from recursive_jax.weights import gguf, hf, hf_files, names, own_format

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "assets"


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened model, of which only the headers have been read.

    Attributes:
      path: file or directory on this machine.
      cfg: its config. Of one loop, but for looped models of other tools and exports of ours.
      params: flat lazy mapping 'block/attention/q/w' -> array `[layer, ...]`, read on access.
      load_tokenizer: () -> transformers tokenizer.
      generation_config: stop ids and sampling defaults the model came with, may be empty.
      facts, certificate: that an export of ours came with.
    """

    path: pathlib.Path
    cfg: DecoderConfig
    params: names.LazyParams
    load_tokenizer: Callable[[], Any]
    generation_config: dict[str, Any]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    certificate: dict[str, Any] | None = None

    def load_params(self) -> dict[str, Any]:
        """All params, nested, in their stored dtype (layers cast them to the compute dtype)."""
        return names.nested({path: self.params[path] for path in self.params})

    def outer_params(self) -> dict[str, Any]:
        """Embedding, head and final norm, nested, as stored."""
        outer = [leaf.path for leaf in leaves(self.cfg).values() if not leaf.in_block]
        return names.nested({path: self.params[path] for path in outer})

    def layers(self, depths: Sequence[int]) -> tuple[DecoderConfig, dict[str, Any]]:
        """Config and block (`{'block': ...}`, as stored) of a model made of these depths only.

        No other layer is read. The block and `outer_params` together are the model's params.
        """
        block = [leaf.path for leaf in leaves(self.cfg).values() if leaf.in_block]
        layers = names.nested({path: self.params.layers(path, depths) for path in block})
        return self.cfg.at_depths(depths), layers


def open_source(spec: str) -> Source:
    """The model of `spec`: a directory, a GGUF file, a hub id, or 'tiny' (part of this package).

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: its format is not supported, or its files contradict each other.
    """
    if spec == "tiny":
        spec = str(ASSETS / "tiny")
    path = pathlib.Path(spec).expanduser()
    if path.suffix == ".gguf" and not path.exists():
        raise FileNotFoundError(f"no such file: {path}; expected a GGUF model")
    if path.is_file() and (path.suffix == ".gguf" or hf_files.is_gguf(path)):
        params, cfg = gguf.open_params(path)
        return Source(path, cfg, params, lambda: gguf.load_tokenizer(path), {})
    path = hf.resolve(spec)
    if own_format.is_ours(path):
        return _open_export(path)
    cfg = hf.load_config(path)
    params = hf.open_params(path, cfg)
    generation = path / "generation_config.json"
    generation_config = _read_object(generation) if generation.is_file() else {}

    def load_tokenizer():
        from recursive_jax.text import load_tokenizer

        try:
            return load_tokenizer(path)
        except ValueError as error:
            cause = error.__cause__
            if not type(cause).__name__.startswith("StrictDataclass"):
                raise
            # AutoTokenizer reads config.json, and transformers checks the type of every key in it.
            reason = " ".join(str(cause).split())
            raise ValueError(
                f"{path / 'config.json'} is refused by transformers: {reason}. Correct that key"
            ) from error

    return Source(path, cfg, params, load_tokenizer, generation_config)


def _open_export(path: pathlib.Path) -> Source:
    """An export of ours, as `own_format` writes it."""
    from recursive_jax.text import load_tokenizer

    cfg, record = own_format.load_config(path)
    params = own_format.open_params(path, cfg, record["form"])
    facts = {name: record[name] for name in ("source", "tying") if name in record}
    file = path / own_format.CERTIFICATE
    certificate = _read_object(file) if file.is_file() else None
    return Source(
        path,
        cfg,
        params,
        lambda: load_tokenizer(path / own_format.TOKENIZER),
        record.get("generation_config") or {},
        facts,
        certificate,
    )


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: expected an object; download it again")
    return found
