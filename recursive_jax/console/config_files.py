"""Config files: by path, or by the name of one that comes with this package."""

from __future__ import annotations

import re
import sys
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


def resolve(argument: str) -> str:
    """A command line argument, where `--config=NAME[:arg]` becomes `--config=PATH[:arg]`."""
    given = re.fullmatch(r"(--?config=)(\w+)(:.*)?", argument, re.DOTALL)
    if given is None or Path(given[2]).is_file():
        return argument
    file = directory() / f"{given[2]}.py"
    return f"{given[1]}{file}{given[3] or ''}" if file.is_file() else argument


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
