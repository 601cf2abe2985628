"""`python -m recursive_jax`: the jobs, each with its first line of help."""

from __future__ import annotations

import ast
import pathlib

from recursive_jax.console import output, tables

JOBS = ("convert", "tokenize", "teach", "plan", "train", "evaluate", "generate", "serve", "export")


def main() -> None:
    here = pathlib.Path(__file__).parent
    rows = []
    for job in JOBS:
        text = ast.get_docstring(ast.parse((here / f"{job}.py").read_text(encoding="utf-8")))
        rows.append((f"python -m recursive_jax.{job}", text.splitlines()[0]))
    output.say(tables.table(rows))
    output.say("\nEach lists its flags with --help. From Python: import recursive_jax as rj")


if __name__ == "__main__":
    main()
