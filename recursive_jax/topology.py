"""TPU slices by name: their chips as descriptions, and as the compiler has them."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from typing import Any

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}  # name -> device_kind
# cloud.google.com/tpu/docs: slices of v5e and v6e. Those of v5p have sides of 1, 2 or 4 · n.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
MOST_V5P = 6144


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip that is not here: what meshes and tables read of a JAX device."""

    id: int
    device_kind: str
    coords: tuple[int, ...]
    platform: str = "tpu"
    process_index: int = 0
    core_on_chip: int = 0


def chips(name: str) -> list[Chip]:
    """The chips of a slice such as v5e:4x4. Needs no TPU and no TPU wheel.

    Raises:
      ValueError: there is no such slice.
    """
    kind, _, shape = name.partition(":")
    if kind not in KINDS:
        raise ValueError(f"topology {name!r}; expected {', '.join(KINDS)}, then a shape: v5e:4x4")
    sides = [int(n) for n in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    if kind == "v5p":
        known = len(sides) == 3 and all(n in (1, 2) or (n > 0 and n % 4 == 0) for n in sides)
        if not known or sides != _ordered(sides) or not 4 <= math.prod(sides) <= MOST_V5P:
            raise ValueError(
                f"topology {name!r}: v5p has slices of three sides, such as v5p:2x2x1, v5p:2x2x2 "
                "and v5p:4x4x8"
            )
    elif shape not in FLAT:
        raise ValueError(f"topology {name!r}: {kind} has the slices {', '.join(FLAT)}")
    places = itertools.product(*(range(n) for n in reversed(sides)))
    coords = [(*reversed(place), 0, 0)[:3] for place in places]
    return [Chip(n, KINDS[kind], place) for n, place in enumerate(coords)]


def _ordered(sides: list[int]) -> list[int]:
    return [2, 2, 1] if sorted(sides) == [1, 2, 2] else sorted(sides)


def for_compiler(name: str) -> list[Any]:
    """The devices of a slice, for an ahead-of-time compile on a machine without a TPU.

    Raises:
      ValueError: libtpu is not installed, or it has no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for a TPU needs libtpu: pip install 'recursive_jax[tpu]'. --nocompile plans "
            "by arithmetic alone"
        )
    # Libtpu otherwise looks for a TPU machine's metadata, and refuses a second process.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # of the plugin: several kinds
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"topology {name!r} is unknown to libtpu: {lines[0]}") from error
