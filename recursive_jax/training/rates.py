"""Factors of the learning rate by parameter, named by regular expressions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import jax


class Rates:
    """What `optimizer.rates` says.

    It is a list 'PATTERN=FACTOR PATTERN=FACTOR …', separated by spaces. A pattern is a regular
    expression of a whole path, such as `block/.*/lora_[ab]`. The first pattern that matches a
    parameter has its factor. A factor of 0 freezes: no update, no decay, no moments, no part in the
    norm that is clipped.

    Args:
      text: the list; '': every factor is 1.

    Raises:
      ValueError: names the entry that cannot be read.
    """

    def __init__(self, text: str):
        self._rules = [_rule(entry) for entry in text.split()]

    def check(self, paths: Iterable[str]) -> None:
        """Raise ValueError for a parameter without a factor, or a pattern that decides nothing.

        Args:
          paths: of all parameters.
        """
        if not self._rules:
            return
        paths, idle = list(paths), {pattern.pattern for pattern, _ in self._rules}
        for path in paths:
            pattern, _ = self._find(path)
            if pattern is None:
                raise ValueError(
                    f"optimizer.rates has no pattern for the parameter {path}; end it with .*=1, "
                    "or with .*=0 to freeze what is left"
                )
            idle.discard(pattern.pattern)
        for pattern, _ in self._rules:
            if pattern.pattern in idle:
                raise ValueError(
                    f"optimizer.rates: the pattern {pattern.pattern} decides for no parameter: "
                    f"none matches, or an earlier pattern does; there are {', '.join(paths)}"
                )
        if not any(self._find(path)[1] for path in paths):
            raise ValueError("optimizer.rates freezes every parameter: nothing to train")

    def scale(self, updates: Any, params: Any = None) -> Any:
        """Updates times their factors."""
        return jax.tree_util.tree_map_with_path(
            lambda path, update: update * self._find(_name(path))[1], updates
        )

    def labels(self, params: Any) -> Any:
        """'moving' or 'frozen' for every parameter."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "moving" if self._find(_name(path))[1] else "frozen", params
        )

    def _find(self, path: str) -> tuple[re.Pattern | None, float]:
        """The pattern that decides, and its factor; (None, 1) where none does."""
        found = (rule for rule in self._rules if rule[0].fullmatch(path))
        return next(found, (None, 1.0))


def _rule(entry: str) -> tuple[re.Pattern, float]:
    pattern, _, number = entry.rpartition("=")
    try:
        factor = float(number)
        if not pattern or not 0 <= factor < math.inf:
            raise ValueError("a factor is a number of at least 0")
        return re.compile(pattern), factor
    except (re.error, ValueError) as error:
        raise ValueError(
            f"optimizer.rates: {entry!r} cannot be read ({error}); write it as 'PATTERN=FACTOR …', "
            "such as 'embedding=0 .*lora_.*=2 .*=1'"
        ) from error


def _name(path: Any) -> str:
    """Of a parameter, as `parameters.leaves` has it."""
    return "/".join(entry.key for entry in path)
