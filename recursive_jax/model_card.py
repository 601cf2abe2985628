"""README.md of an export: what the model is, how it was made, how to load it, what was measured."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recursive_jax import paths
from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights.stored import CheckpointWeights

if TYPE_CHECKING:
    from recursive_jax.exporting import Export

METHOD = "[Relaxed Recursive Transformers](https://arxiv.org/abs/2410.20672)"
EVALUATION = "evaluation.json"
# Of transformers, of the stored-once layout, of our own form, and of llama.cpp.
LOAD = {
    ("hf", "unrolled"): """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path})
tokenizer = AutoTokenizer.from_pretrained({path})""",
    ("hf", "looped"): """\
import recursive_jax as rj

model = rj.load({path})""",
    ("recursive", None): """\
import recursive_jax as rj

model = rj.load({path})""",
    ("orbax", None): """\
import jax, os
from orbax.checkpoint import v1 as ocp
path, mesh = os.path.abspath({params}), jax.sharding.Mesh(jax.devices(), ("x",))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())  # a copy on each device
shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
params = ocp.load(path, jax.tree.map(shape, ocp.metadata(path).metadata))""",
    ("gguf", "unrolled"): "llama-cli -m {file}",
    ("gguf", "looped"): "llama-cli -m {file}",
}


def how_to_load(export: Export, path: str) -> str:
    """Lines that open the export at `path`."""
    text = LOAD[export.format, export.layout]
    return text.format(path=repr(path), params=repr(f"{path}/params"), file=shlex.quote(path))


def card(export: Export) -> str:
    """The text of README.md, with the front matter that the Hugging Face hub reads."""
    model, source = export.model, _source(export.model)
    licence = licence_of(source) if source else None
    hub_id = _hub_id(source)
    name = export.out.name
    front = {"license": licence, "base_model": hub_id}
    if (export.format, export.layout) == ("hf", "unrolled"):
        front |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    lines = ["---", *(f"{k}: {v}" for k, v in front.items() if v)]
    lines += ["tags:", "- recursive-transformer", "- recursive_jax", "---", f"# {name}", ""]
    lines += [_what_it_is(export), "", "## How it was made", "", *_table(_history(export, hub_id))]
    lines += ["", "## How to load it", ""]
    if (export.format, export.layout) == ("hf", "looped"):
        lines += ["SGLang and mlx-lm have this architecture (`nanbeige`). From Python:", ""]
    lines += ["```python", how_to_load(export, "."), "```"]
    if export.format == "recursive":
        lines += ["", "`docs/format.md` of recursive_jax describes the files for other programs."]
    lines += _measured(model)
    lines += ["", "## Licence", ""]
    if licence:
        lines.append(f"The source has the licence `{licence}`. It holds for this model, too.")
    else:
        lines.append("Unknown: the source's files name none. Look it up before you share this.")
    return "\n".join(lines) + "\n"


def licence_of(source: pathlib.Path) -> str | None:
    """The licence that a source's files name, such as 'apache-2.0'; None if they name none."""
    if source.is_file():
        return _licence_of_gguf(source)
    readme = source / "README.md"
    if readme.is_file():
        front = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.DOTALL)
        found = front and re.search(r"(?m)^license:[ \t]*['\"]?([\w.+-]+)", front[1])
        if found:
            return found[1]
    for name in ("config.json", "tokenizer_config.json"):
        try:
            value = json.loads((source / name).read_text(encoding="utf-8")).get("license")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(value, str) and value:
            return value
    return None


def _licence_of_gguf(file: pathlib.Path) -> str | None:
    try:
        from gguf import GGUFReader

        field = GGUFReader(file).get_field("general.license")
    except (ImportError, OSError, ValueError):
        return None
    return None if field is None else str(field.contents())


def _source(model: Any) -> pathlib.Path | None:
    """Where the pretrained source is, or was."""
    source = model.facts.get("source") or (model.certificate or {}).get("source")
    return pathlib.Path(source).expanduser() if isinstance(source, str) and source else None


def _hub_id(source: pathlib.Path | None) -> str | None:
    """The hub id of a source in the Hugging Face cache: .../models--OWNER--NAME/snapshots/X."""
    found = source and re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots", source.as_posix())
    return f"{found[1]}/{found[2]}" if found else None


def ranks(cfg: DecoderConfig) -> str:
    """The LoRA ranks of a model, in words."""
    found = {rank for _, rank in cfg.lora_ranks}
    return str(*found) if len(found) == 1 else f"{min(found)} to {max(found)}"


def _what_it_is(export: Export) -> str:
    cfg = export.model.cfg
    if cfg.num_loops == 1:
        return f"A {cfg.family} model of {cfg.num_layers} layers."
    loras = f", and LoRAs of rank {ranks(cfg)} for each loop" if cfg.lora_ranks else ""
    text = (
        f"A recursive transformer ({METHOD}): a {cfg.family} block of {cfg.num_layers} layers that "
        f"runs {cfg.num_loops} times{loras}."
    )
    if export.layout == "unrolled":
        return (
            f"{text} Here the loops are unrolled and the LoRAs merged. It is an ordinary "
            f"{cfg.family} model of {cfg.depth} layers with the same logits, up to rounding."
        )
    return f"{text} The block is stored once."


def _history(export: Export, hub_id: str | None) -> Iterator[tuple[str, str]]:
    from recursive_jax import __version__

    model, source = export.model, _source(export.model)
    if source is not None:
        yield "source", hub_id or source.name
    tying = model.facts.get("tying") or {}
    if tying:
        given = {k: v for k, v in tying.items() if v is not None and k != "calibrate"}
        yield "conversion", ", ".join(f"{k}={v}" for k, v in given.items())
    weights = model.weights
    if isinstance(weights, CheckpointWeights):
        averaged = " (averaged weights)" if weights.part() == "ema" else ""
        yield "training", f"{weights.step} steps{averaged}" if weights.step else "none"
    yield "stored as", f"{export.dtype}, by recursive_jax {__version__}"


def _measured(model: Any) -> list[str]:
    """Numbers of the certificate, and of an evaluation beside the checkpoint."""
    lines, certificate = [], model.certificate or {}
    names = ("source_perplexity", "perplexity", "kl", "top1_agreement")
    rows = [(name, _number(certificate[name])) for name in names if name in certificate]
    if rows:
        text = pathlib.PurePath(str(certificate.get("text", ""))).name
        rows.append(("text", f"{text}, {certificate.get('text_tokens', 0):,} tokens"))
        lines += ["", "## Measured at its conversion, before any training", "", *_table(rows)]
    report = _evaluation(model)
    beside = report.get("source") or {}
    agrees = (beside.get("check") or {}).get("agrees", True)
    source = dict(_results(beside)) if agrees else {}
    rows = [(name, value, source.get(name, "")) for name, value in _results(report)]
    if rows:
        lines += ["", "## Evaluated", "", *_table(rows, ("", "this model", "source"))]
    if rows and not agrees:
        lines += ["", "The source is left out: it differs from what the certificate stores of it."]
    return lines


def _evaluation(model: Any) -> Mapping[str, Any]:
    """The report of `evaluate` beside a checkpoint; empty without one of these very weights."""
    if not isinstance(model.weights, CheckpointWeights):
        return {}
    file = paths.path_of(model.weights.directory) / EVALUATION
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        same = report["model"]["content"] == model.weights.content()
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return report if same else {}


def _results(report: Any) -> Iterator[tuple[str, str]]:
    """What was measured, and the value, of a report's `perplexity` and `tasks`."""
    report = report if isinstance(report, Mapping) else {}
    perplexity, tasks = report.get("perplexity") or {}, report.get("tasks") or {}
    windows, rolling = perplexity.get("windows") or {}, perplexity.get("rolling") or {}
    if "perplexity" in windows:
        length = f"windows of {windows.get('context_length')} tokens"
        yield f"perplexity per token, {length}", _number(windows["perplexity"])
    if "word_perplexity" in rolling:
        yield "perplexity per word, lm-eval's rolling", _number(rolling["word_perplexity"])
    for name, task in tasks.items():
        if "value" in task:
            error = task.get("stderr")
            spread = "" if error is None else f" ± {_number(error)}"
            yield (
                f"{name}, {task.get('metric')}, {task.get('items')} items",
                (f"{_number(task['value'])}{spread}"),
            )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] = ("", "")) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]
