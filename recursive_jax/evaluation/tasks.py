"""The paper's seven tasks for lm-eval: from a hub by name, or from local files.

A local task is a file NAME.jsonl with one JSON object a line, in one of three forms:

    {"query": TEXT, "choices": [TEXT, ...], "gold": INDEX}
    {"context_options": [TEXT, ...], "continuation": TEXT, "gold": INDEX}
    {"context": TEXT, "continuation": TEXT}

The first scores choices behind a query, the second one continuation behind several contexts
(WinoGrande), the third asks whether the continuation is what the model would write (LAMBADA). A
space joins both parts. A query that begins with "Question:" is followed by a line "Answer:", as in
lm-eval's tasks.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import pathlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

SEVEN = (
    "lambada_openai", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
)  # fmt: skip
ALIASES = {"openbook_qa": "openbookqa"}  # names of files, and lm-eval's
FORMS = (
    {"query": str, "choices": list, "gold": int},
    {"context_options": list, "continuation": str, "gold": int},
    {"context": str, "continuation": str},
)


def load_tasks(names: str | Sequence[str], directory: str | pathlib.Path | None) -> dict[str, Any]:
    """lm-eval's tasks by name.

    Args:
      names: of tasks, in a list or separated by commas; 'all' are the paper's seven, or all files
        of `directory`.
      directory: of local files NAME.jsonl; None: lm-eval's own tasks, whose data is on a hub.

    Raises:
      FileNotFoundError, ValueError: a task that is not there, or a broken line; by name.
    """
    names = names.split(",") if isinstance(names, str) else list(names)
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError("no tasks; expected names separated by commas, or 'all'")
    if directory is None:
        return _from_hub(list(SEVEN) if names == ["all"] else names)
    return {name: _local_task(name, path) for name, path in _find(names, directory).items()}


def headline(metrics: Sequence[str]) -> str:
    """The metric that the paper reports: `acc_norm` where choices are scored, else `acc`."""
    for name in ("acc_norm", "acc", "exact_match", "word_perplexity"):
        for label in metrics:  # 'METRIC', or 'METRIC,FILTER'
            if label.partition(",")[0] == name:
                return label
    return next(iter(metrics))


def _find(names: Sequence[str], directory: str | pathlib.Path) -> dict[str, pathlib.Path]:
    directory = pathlib.Path(directory).expanduser()
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}; expected one with files NAME.jsonl")
    there = {ALIASES.get(path.stem, path.stem): path for path in sorted(directory.glob("*.jsonl"))}
    if names == ["all"]:
        if not there:
            raise FileNotFoundError(f"{directory} has no tasks; expected files NAME.jsonl")
        ordered = [name for name in SEVEN if name in there]
        return {name: there[name] for name in [*ordered, *(n for n in there if n not in ordered)]}
    names = [ALIASES.get(name, name) for name in names]
    missing = [name for name in names if name not in there]
    if missing:
        raise FileNotFoundError(
            f"{directory} has no task {', '.join(missing)}; it has {', '.join(there) or 'none'}"
        )
    return {name: there[name] for name in names}


def read_items(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The items of a local task.

    Raises:
      ValueError: names file and line of what is no item, or the file if it has none.
    """
    path, items, form = pathlib.Path(path), [], None
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON object ({error}); mend it") from error
        found, fault = _form_of(item)
        if fault is None and form not in (None, found):
            fault = f"fields {_shown(found)}, while the lines before have {_shown(form)}"
        if fault is not None:
            raise ValueError(f"{path}, line {number}: {fault}")
        form = found
        items.append({name: item[name] for name in found})
    if not items:
        raise ValueError(f"{path} has no items; expected one JSON object a line")
    return items


def _form_of(item: Any) -> tuple[dict[str, type] | None, str | None]:
    """The form of an item and None, or what is wrong with it."""
    if not isinstance(item, dict):
        return None, "no JSON object; expected one, with fields " + _all_forms()
    form = next((form for form in FORMS if set(form) <= set(item)), None)
    if form is None:
        return None, f"fields {sorted(item)}; expected " + _all_forms()
    for name, kind in form.items():
        if type(item[name]) is not kind:
            return form, f"{name} is {json.dumps(item[name])[:80]}; expected {_KINDS[kind]}"
    options = next((item[name] for name, kind in form.items() if kind is list), None)
    if options is not None:
        if len(options) < 2 or not all(isinstance(x, str) and x.strip() for x in options):
            return form, f"{json.dumps(options)[:80]}; expected a list of at least two texts"
        if not 0 <= item["gold"] < len(options):
            return form, f"gold is {item['gold']}; expected an index below {len(options)}"
    empty = [name for name, kind in form.items() if kind is str and not item[name].strip()]
    return form, f"{empty[0]} is empty; expected a text" if empty else None


_KINDS = {str: "a text", list: "a list of texts", int: "a number, counted from 0"}


def _all_forms() -> str:
    return ", or ".join(_shown(form) for form in FORMS)


def _shown(form: dict[str, type]) -> str:
    return "{" + ", ".join(form) + "}"


def _query(item: dict[str, Any]) -> str:
    text = item["query"].rstrip()
    return f"{text}\nAnswer:" if text.startswith("Question:") else text


def _local_task(name: str, path: pathlib.Path) -> Any:
    """The task of a local file, as lm-eval's ConfigurableTask."""
    items = read_items(path)
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    if "choices" in items[0]:
        kind, metrics = "multiple_choice", [accuracy, accuracy | {"metric": "acc_norm"}]
        fields = {
            "doc_to_text": _query,
            "doc_to_choice": _field("choices"),
            "doc_to_target": _field("gold"),
        }
    elif "context_options" in items[0]:
        kind, metrics = "multiple_choice", [accuracy]
        fields = {  # lm-eval's form of several contexts: the text is the index of the right one
            "doc_to_text": _field("gold"),
            "doc_to_choice": _options,
            "doc_to_target": _continuation,
        }
    else:
        lower = {"aggregation": "perplexity", "higher_is_better": False}
        kind, metrics = "loglikelihood", [{"metric": "perplexity", **lower}, accuracy]
        fields = {"doc_to_text": _context, "doc_to_target": _spaced_continuation}
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
        "test_split": "test",
        "output_type": kind,
        "metric_list": metrics,
        **fields,
    }
    with quiet():
        return ConfigurableTask(config=config)


def _field(name: str):
    def get(item):
        return item[name]

    return get


def _options(item):
    return [text.rstrip() for text in item["context_options"]]


def _continuation(item):
    return item["continuation"].strip()


def _context(item):
    return item["context"].rstrip()


def _spaced_continuation(item):
    return " " + item["continuation"].strip()


def _from_hub(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's own tasks; their data is downloaded."""
    from lm_eval.tasks import TaskManager

    _check_hub(names)
    manager = TaskManager()
    names = [ALIASES.get(name, name) for name in names]
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks)
            raise ValueError(
                f"lm-eval has no task {name!r}; close to it: {', '.join(close) or 'none'}. A file "
                "of your own needs --task_dir=DIR"
            )
    try:
        with quiet():
            return dict(manager.load(names)["tasks"])
    except Exception as error:  # of datasets, huggingface_hub and what they download with
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(
            f"the data of {', '.join(names)} cannot be loaded from a hub: {reason}. Give local "
            "files with --task_dir=DIR (docs/evaluate.md has their format)"
        ) from error


def _check_hub(names: Sequence[str]) -> None:
    """Raise ValueError if the hub does not answer: its client would try again for minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or "https" in urllib.request.getproxies():
        return
    place = urllib.parse.urlsplit(constants.ENDPOINT)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname, port), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"the data of {', '.join(names)} is on a hub, and {place.hostname} cannot be reached "
            f"({error}). Give local files with --task_dir=DIR (docs/evaluate.md has their format), "
            "or set HF_HUB_OFFLINE=1 to use data that was downloaded before"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without lm-eval's warnings, which are about its own defaults, and without its bars.

    lm-eval shows a bar for every task and loop while it builds requests, in an instant.
    """
    from lm_eval.api import task

    logger, bar = logging.getLogger("lm_eval"), task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
