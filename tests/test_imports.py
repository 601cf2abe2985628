"""Who may import whom, read from the source: jobs -> packages -> models -> jax and flax."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "recursive_jax"
BASE = ("models", "text")
# Packages do not import each other, except for those that a package builds on.
PACKAGES = {
    "models": (),
    "text": (),
    "cpu": BASE,
    "weights": BASE,
    "training": BASE,
    "decoding": BASE,
    "evaluation": (*BASE, "weights", "decoding"),  # exit measures
    "analysis": (*BASE, "decoding"),
    "serving": (*BASE, "decoding"),
}
# Whole files, their errors and locks, agreement of processes: everything may import these.
FOUNDATION = tuple(f"{PACKAGE}.{name}" for name in ("files", "file_lock", "paths", "hosts"))
SHARED = ("files", "sharding", "metrics")  # single files that import nothing else of this package
CHOOSES = "recursive_jax/decode_model.py"  # alone imports both implementations
FLAGS = ("absl.app", "absl.flags", "ml_collections")
HTTP = ("http", "socketserver", "aiohttp", "fastapi", "flask", "starlette", "uvicorn", "requests")
# Imported only where tasks are asked for; the first of them imports lm-eval at its top.
HARNESS = ("evaluation/harness", "evaluation/tasks", "evaluating")
ONLY_IN = {  # library -> files that may import it at all
    "lm_eval": tuple(f"recursive_jax/{name}.py" for name in HARNESS),
    "torch": (),
    "tensorflow": (),
    "chex": (),
}
# Slow to import or optional: only inside the function that needs them.
INSIDE_FUNCTIONS = (
    "array_record",
    "gguf",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "orbax",
    "tensorboardX",
    "tensorflow_datasets",
    "transformers",
    "wandb",
    "zstandard",
)

FILES = sorted(
    p.relative_to(ROOT).as_posix() for d in (PACKAGE, "configs") for p in (ROOT / d).rglob("*.py")
)


def imports(source: str, file: str) -> list[tuple[str, bool]]:
    """(dotted name, whether at module level) of everything a file imports.

    `from a.b import c` counts as `a.b.c`, since c may be a module.
    """
    package = file.removesuffix(".py").split("/")[:-1]
    found = []

    def visit(node, top):
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = base + ([child.module] if child.module else [])
                found.extend((".".join([*base, alias.name]), top) for alias in child.names)
            visit(child, top and not inside)

    visit(ast.parse(source), True)
    return found


def is_in(name: str, *modules: str) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)


def complaints(source: str, file: str) -> list[str]:
    """What is wrong with the imports of `file`, a path below the project's root."""
    parts = file.split("/")
    package = parts[1] if parts[0] == PACKAGE and parts[1] in PACKAGES else None
    shared = len(parts) == 2 and parts[1].removesuffix(".py") in SHARED
    out = []
    for name, top in imports(source, file):
        ours = is_in(name, PACKAGE) and name not in (PACKAGE, f"{PACKAGE}.__version__")
        ours = ours and not is_in(name, *FOUNDATION)
        allowed = tuple(f"{PACKAGE}.{p}" for p in (package, *PACKAGES.get(package, ())))
        if package and ours and not is_in(name, *allowed):
            out.append(f"{file}: package {package} imports {name}; expected only {allowed}")
        if shared and ours:
            out.append(f"{file}: a file that all share imports {name}")
        if file != CHOOSES and package != "cpu" and is_in(name, f"{PACKAGE}.cpu"):
            if not package:  # a package is told above
                out.append(f"{file}: imports {name}; only {CHOOSES} chooses an implementation")
        if parts[0] == "configs" and ours:
            out.append(f"{file}: a config imports {name}; expected values only")
        if (package or shared) and is_in(name, *FLAGS):
            out.append(f"{file}: {name} stops at the jobs and configs")
        if is_in(name, *HTTP) and package != "serving":
            out.append(f"{file}: {name} belongs in the package serving")
        for library, files in ONLY_IN.items():
            if is_in(name, library) and file not in files:
                out.append(f"{file}: {library} belongs in {files or 'tests'}")
        late = file == f"{PACKAGE}/{HARNESS[0]}.py" and is_in(name, "lm_eval")
        if top and is_in(name, *INSIDE_FUNCTIONS) and not late:
            out.append(f"{file}: import {name} inside the function that needs it")
        if file.endswith("decoding/scheduler.py"):
            if name.split(".")[0] not in sys.stdlib_module_names:
                out.append(f"{file}: the scheduler imports {name}; expected standard library only")
    return out


def prints(source: str) -> list[int]:
    """Lines that call `print`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    ]


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith(PACKAGE)])
def test_only_the_console_prints(file):
    if not file.startswith(f"{PACKAGE}/console/"):
        assert not prints((ROOT / file).read_text())


@pytest.mark.parametrize("file", FILES)
def test_imports_keep_the_packages_apart(file):
    assert not complaints((ROOT / file).read_text(), file)


def test_files_were_found():
    for name in ("recursive_jax/models/decoder.py", "recursive_jax/train.py", "configs/common.py"):
        assert name in FILES


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("recursive_jax/training/setup.py", "from recursive_jax.weights import tying"),
        ("recursive_jax/models/layers.py", "from recursive_jax.cpu.matmul import matmul"),
        ("recursive_jax/decoding/engine.py", "from recursive_jax.cpu import build"),
        ("recursive_jax/decoding/engine.py", "from recursive_jax.console import tables"),
        ("recursive_jax/generate.py", "from recursive_jax.cpu.decoder import CpuModel"),
        ("recursive_jax/cpu/decoder.py", "from recursive_jax.decoding import engine"),
        ("recursive_jax/weights/hf.py", "import chex"),
        ("recursive_jax/training/setup.py", "from recursive_jax import sharding"),
        ("recursive_jax/training/setup.py", "from ..weights.tying import tie"),
        ("recursive_jax/training/setup.py", "import recursive_jax.decoding.engine"),
        ("recursive_jax/models/layers.py", "def f():\n    from recursive_jax.training import data"),
        ("recursive_jax/models/layers.py", "from absl import flags"),
        ("recursive_jax/weights/hf.py", "from ml_collections import ConfigDict"),
        ("recursive_jax/weights/hf.py", "import transformers"),
        ("recursive_jax/weights/hf.py", "def f():\n    import torch"),
        ("recursive_jax/train.py", "def f():\n    import lm_eval"),
        ("recursive_jax/evaluation/tasks.py", "import lm_eval"),
        ("recursive_jax/train.py", "import http.server"),
        ("recursive_jax/serve.py", "import uvicorn"),
        ("recursive_jax/serving/app.py", "from recursive_jax.model import Model"),
        ("recursive_jax/sharding.py", "from recursive_jax.models import config"),
        ("recursive_jax/decoding/scheduler.py", "import numpy as np"),
        ("configs/x.py", "from recursive_jax.models.config import DecoderConfig"),
    ],
)
def test_a_forbidden_import_is_noticed(file, source):
    assert len(complaints(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("recursive_jax/training/setup.py", "from recursive_jax.training.losses import Objective"),
        ("recursive_jax/training/setup.py", "from recursive_jax.models.decoder import Decoder"),
        ("recursive_jax/weights/hf.py", "def f():\n    import transformers"),
        ("recursive_jax/cpu/decoder.py", "from recursive_jax.models.interface import Rows"),
        ("recursive_jax/decode_model.py", "from recursive_jax.cpu.decoder import CpuModel"),
        ("recursive_jax/analysis/timing.py", "from recursive_jax.decoding.engine import Engine"),
        ("recursive_jax/serving/server.py", "import uvicorn"),
        ("recursive_jax/evaluation/harness.py", "from lm_eval.api.model import TemplateLM"),
        ("recursive_jax/decoding/scheduler.py", "import collections\nimport dataclasses"),
    ],
)
def test_allowed_imports_pass(file, source):
    assert not complaints(source, file)
