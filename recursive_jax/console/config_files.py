"""Config files: by path, or by the name of one that comes with this package."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def directory() -> Path:
    """The directory of the configs that come with the package: beside it in a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
    """Names of the configs that come with the package."""
    found = (path.stem for path in directory().glob("*.py"))
    return sorted(name for name in found if name[0] != "_" and name != "common")


def resolve(arguments: Sequence[str]) -> list[str]:
    """A command line where NAME of `--config=NAME[:arg]` or `--config NAME[:arg]` is a path."""
    out = list(arguments)
    for n, argument in enumerate(arguments):
        flag, value = "", argument
        if re.match(r"--?config=", argument):
            flag, _, value = argument.partition("=")
            flag += "="
        elif not n or arguments[n - 1] not in ("--config", "-config"):
            continue
        name, colon, rest = value.partition(":")
        file = directory() / f"{name}.py"
        if re.fullmatch(r"\w+", name) and not Path(name).is_file() and file.is_file():
            out[n] = f"{flag}{file}{colon}{rest}"
    return out


def make_importable(file: str) -> None:
    """Let a config file say `from configs import common`.

    Raises:
      FileNotFoundError: no such file; the message lists the names of configs.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"no config file {file}; expected a file, or one of {', '.join(names())}"
        )
    sys.path += [str(Path(file).resolve().parents[1]), str(directory().parent)]
