"""Values of settings."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

WORDS = {int: "an integer", float: "a number", str: "text"}


def check_kinds(config: Any, section: str = "") -> None:
    """Raise ValueError for a value that is not of the kind of its field's default."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        allowed = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            expected = WORDS.get(kind, f"a {kind.__name__}")
            raise ValueError(f"{section}{field.name}={value!r}; expected {expected}")
