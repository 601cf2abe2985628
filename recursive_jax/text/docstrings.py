"""What the installed Python packages say about themselves; nothing is imported to read it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import pathlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator


def modules() -> list[tuple[str, pathlib.Path]]:
    """Importable modules as (dotted name, file), in an order that is fixed but mixes packages.

    The order is by the hash of the name, so a capped read is a sample of everything installed.
    """
    paths = sysconfig.get_paths()
    packages = {pathlib.Path(paths[key]).resolve() for key in ("purelib", "platlib")}
    stdlib = pathlib.Path(paths["stdlib"]).resolve()
    found = {}
    for root in [stdlib, *sorted(packages)]:
        for file in root.rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            installed = root == stdlib and {"site-packages", "dist-packages"} & set(parts)
            # Tests rarely say anything; a part that is no identifier cannot be imported.
            tests = any(part in ("test", "tests", "idlelib") for part in parts)
            tests |= parts[-1].startswith("test_") or parts[-1].endswith("_test")
            if installed or tests or not all(part.isidentifier() for part in parts):
                continue
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found.setdefault(".".join(parts), file)

    def order(name: str) -> bytes:
        return hashlib.blake2b(name.encode(), digest_size=8).digest()

    return [(name, found[name]) for name in sorted(found, key=order) if name]


def read(files: Iterable[tuple[str, pathlib.Path]]) -> Iterator[tuple[str, str]]:
    """The docstrings of modules, as `modules` lists them: (dotted name, text) of every module.

    A docstring may be vendored or copied into many modules. Only its first copy counts, which also
    keeps copies from standing on both sides of a held-out split.
    """
    seen: set[bytes] = set()
    for name, file in files:
        if name == "pydoc_data.topics":  # help() texts of the language: data, not docstrings
            for topic, text in sorted(_literal_dict(file).items()):
                yield f"{name}[{topic}]", text.strip()
            continue
        try:
            source = file.read_bytes()
            if b'"""' not in source and b"'''" not in source:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's code
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # templates and files for other Python versions
        entries = []
        for title, text in _entries(tree, name):
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                entries.append(f"{title}\n\n{text}")
        if entries:
            yield name, "\n\n\n".join(entries).encode("utf-8", "replace").decode()


def _entries(node: ast.AST, title: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module or class and of the classes and functions in it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [a.arg for a in arguments if a.arg not in ("self", "cls")]
        title = f"{title}({', '.join(names)})"
    docstring = ast.get_docstring(node, clean=False)
    if docstring and (text := inspect.cleandoc(docstring).strip()):
        yield title, text
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inside = f"{title}.{child.name}" if isinstance(node, ast.ClassDef) else child.name
                yield from _entries(child, inside)


def _literal_dict(file: pathlib.Path) -> dict[str, str]:
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}
